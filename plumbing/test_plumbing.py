"""Tests of the plumbing: flags, files, downloads, archives, photographs, weights, drawing."""
import gzip, hashlib, io, json, lzma, os, re, stat, struct, sys, tarfile, types, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

import ae, data, dino, dit, sample
from dino import DINOv3, ViTConfig, load_dino
from lab import edit
from plumbing import config, draw, fetch, lpips, muon, photos, weights
from plumbing.config import UserError
from plumbing.lpips import LPIPS, load_lpips
from plumbing.testing import ROOT, call, left, one_line, refuses, threads
from plumbing.weights import read_safetensors

# ---------------------------------------------------------------- config.py


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "Git-LFS"),
    (b"<!DOCTYPE html><html>", "HTML"), (b"\x80\x02garbage", "not a readable checkpoint")])
def test_files_that_are_not_checkpoints(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(config.UserError, match=words):
        config.load(tmp_path / "x.pt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    torch.save(dict(kind="ae", x=Evil()), tmp_path / "x.pt")
    with pytest.raises(config.UserError):
        config.load(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()
    for source in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if "test" not in source.name:
            for loading in re.findall(r"torch\.load\((.*)\)", source.read_text()):
                assert "weights_only=True" in loading, source
            assert "allow_pickle" not in source.read_text(), source


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    config.save(path, dict(a=1))
    before = path.read_bytes()

    def full(obj, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(config.UserError, match="No space left.*untouched"):
        config.save(path, dict(a=2))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.pt"]


def test_parse_flag_over_preset_over_default():
    flags = "--preset debug --steps 7 --keep 2,3 --no-decay"
    c = config.parse(dit.Config, dit.PRESETS, flags.split())
    assert (c.steps, c.batch, c.out, c.seed) == (7, 32, "out/debug", 0)
    assert c.explicit == ["decay", "keep", "steps"] and c.keep == (2, 3)
    assert config.flags(c) == "flags: --no-decay --keep 2,3 --steps 7"


@pytest.mark.parametrize("module, flags, word", [
    (ae, "--stepz 3", "stepz"), (ae, "--step 3", "--step"), (ae, "--mult 1,x", "--mult"),
    (dit, "--lr fast", "--lr"), (dit, "--lr nan", "--lr"), (dit, "--keep 5;20", "--keep"),
    (ae, "--latent gan", "--latent"), (ae, "--preset none", "--preset"), (ae, "--ch 12", "--ch"),
    (ae, "--steps 0", "--steps"), (dit, "--dim 100 --heads 3", "--heads"),
    (dit, "--shift 0", "--shift"), (sample, "--sweep 1,x", "--sweep"),
    (sample, "--dim 64", "--dim"), (sample, "--t_lo 0.9 --t_hi 0.1", "--t_lo"),
    (edit, "--edit a.png", "--to"), (edit, "--to star", "--edit"),
    (edit, "--edit a.png --to star", "--mask"),
    (edit, "--edit held-out --t_edit 1", "--t_edit")])
def test_bad_flags_exit_with_two_and_say_which(module, flags, word, tmp_path):
    one_line(call(module, *flags.split(), cwd=tmp_path), word, code=2)
    assert not os.listdir(tmp_path)


def test_a_loop_ends_where_it_should_and_saves_when_it_should(capsys):
    class Settings:
        steps, save_every, lr, warmup, decay = 10, 4, 1.0, 2, False
    optimizer, saved = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), []
    loop, rates = config.Loop("x", Settings, optimizer, "x.pt", saved.append, start=1), []
    for step in loop:
        rates.append((step, optimizer.param_groups[0]["lr"]))
        loop.log(torch.zeros(3))
    assert rates[0] == (1, 1.0) and [s for s, _ in rates] == list(range(1, 10)) and saved == [4, 8]
    with pytest.raises(config.UserError, match="not finite"):
        for step in loop:
            loop.log(torch.tensor([0.0, float("nan") if step == 2 else 0.0]))
    assert saved == [4, 8]                               # a bad state is never saved


def test_a_long_run_says_once_how_long_it_will_take(capsys, monkeypatch):
    class Settings:
        steps, save_every, lr, warmup, decay = 100, 1000, 1.0, 2, False
    optimizer, now = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), [0.0]
    monkeypatch.setattr(config.time, "time", lambda: now[0])

    def told(start, seconds, slower=0):
        for step in config.Loop("x", Settings, optimizer, "x.pt", None, start, slower=slower):
            now[0] += 90 if step in (start, slower) else seconds   # the first step compiles
        return capsys.readouterr().out
    assert told(0, 3) == "x: about 4 min for 79 more steps, 3 s each\n"
    assert told(30, 4) == "x: about 3 min for 49 more steps, 4 s each\n"
    assert told(0, 0.1) == told(85, 60) == ""                      # short, or soon over
    assert told(0, 6, slower=50) == (
        "x: about 3 min for 29 more steps, 6 s each; then 50 that take longer\n"
        "x: about 3 min for 29 more steps, 6 s each\n")
    assert told(60, 6, slower=50) == told(60, 6) == told(60, 6, slower=100) != ""


# ---------------------------------------------------------------- fetch.py

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


def test_a_broken_download_resumes_where_it_stopped(serve, tmp_path, monkeypatch):
    server, path, part = serve(f=BODY), tmp_path / "new/f", tmp_path / "new/.f.part"
    known = dict(size=len(BODY), sha256=SHA, md5=hashlib.md5(BODY).hexdigest())
    get = lambda **k: fetch.fetch(server.url + "/f", path, **(k or known)).read_bytes()
    ranges = lambda: [h.get("Range") for _, h in server.log]
    server.plan["/f"] = ["cut", 503, "cut", 429]
    monkeypatch.setattr(fetch, "TRIES", 3)                        # in a row without a new byte
    assert get() == get() == BODY and left(path.parent) == ["f"]
    assert ranges() == [None] + ["bytes=131072-"] * 2 + ["bytes=196608-"] * 2      # whole chunks
    for begun, act, asked in [
            (BODY[:9], None, ["bytes=9-"]), (BODY, None, []),     # of an earlier run; killed late
            (BODY[:9], "plain", ["bytes=9-"]),                    # a server without ranges
            (BODY + b"x", None, ["bytes=300001-", None]),         # longer than the file: all again
            (b"x" * 9, None, ["bytes=9-", None])]:                # of another version: wrong sum
        path.unlink(), part.write_bytes(begun)
        server.plan["/f"], server.log[:] = [act] if act else [], []
        assert get() == BODY and ranges() == asked and left(path.parent) == ["f"]
    path.unlink(), part.write_bytes(BODY)                         # size unknown: 416 is enough
    assert get(sha256=SHA) == BODY and ranges()[2:] == ["bytes=300000-"]
    path.unlink(), monkeypatch.setattr(fetch, "TRIES", 1)
    server.plan["/f"] = ["cut"]
    refuses("truncated, 131,072 of 300,000", "resumes from there", call=get)
    assert left(path.parent) == [".f.part"] and get() == BODY


def test_downloads_that_fail_say_why_in_one_line(serve, tmp_path, monkeypatch):
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    server, path = serve(f=BODY, lfs=lfs, html=b"\n<!DOCTYPE html>", empty=b""), tmp_path / "x/f"

    def get(name="f", hub=False, **more):
        at = fetch.HUB + "/a/b/resolve/main/" if hub else server.url + "/"
        fetch.fetch(at + name, path, **more)
    server.plan = {"/f": [403, 418] + [503] * fetch.TRIES, "/a/b/resolve/main/f": [401, 403]}
    for words, more in [
            ("HTTP 403, Forbidden", {}), ("HTTP 418", {}),
            ("server error .HTTP 503.; try later", {}),
            ("HTTP 404, Not Found", dict(name="other")),
            (f"gated.*{server.url}/a/b, and set HF_TOKEN", dict(hub=True)),
            ("the token in HF_TOKEN was rejected", dict(hub=True, token="secret")),
            ("Git-LFS pointer", dict(name="lfs", size=9)), ("HTML page", dict(name="html")),
            ("empty", dict(name="empty")), ("its sha256 is wrong.*removed", dict(sha256="0" * 64)),
            ("its md5 is wrong", dict(md5="0")), ("300,000 bytes, not 7", dict(size=7))]:
        with pytest.raises(UserError, match=words):
            get(**more)
        assert left(path.parent) == []
    assert len(server.log) == 2 + fetch.TRIES + 9

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")
    fetch._part(path).write_bytes(BODY[:99])
    with monkeypatch.context() as m:
        m.setattr(fetch, "open", lambda *_: Full(), raising=False)
        refuses("disk is full", "NOVAE_CACHE", call=get)
    server.shutdown(), server.server_close()
    refuses("no connection", f"without a network, get it elsewhere and save it as {path}", call=get)
    refuses("nonsense", call=lambda: fetch.fetch("nonsense:/x", path))
    assert left(path.parent) == []
    path.write_bytes(b"by hand")                                  # wrong, but it may be the user's
    refuses("md5 is wrong", "delete it", call=get, md5="0" * 32)
    assert path.read_bytes() == b"by hand"
    path.write_bytes((15392).to_bytes(8, "little") + b"{}")       # begins like a page, with " <"
    get()


def test_a_redirect_gets_no_token_and_the_hubs_own_sum_is_checked(serve, tmp_path):
    store, hub, at = serve(f=BODY), serve(), "/a/b/resolve/main/f"
    hub.plan[at] = [{"Location": store.url + "/f", "X-Linked-Etag": f'"{sha}"'}
                    for sha in (SHA, "0" * 64)]
    get = lambda name: fetch.fetch(fetch.HUB + at, tmp_path / name, token="secret\n").read_bytes()
    assert get("a") == BODY
    refuses("sha256 is wrong", call=get, name="b")
    tokens = [[h.get("Authorization") for _, h in server.log] for server in (hub, store)]
    assert tokens == [["Bearer secret"] * 2, [None] * 2]
    threads(fetch.fetch, store.url + "/f", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == BODY and len(store.log) == 3


def tgz(path, *members):
    """members: (name, bytes), or (name, a tarfile type, which is one byte)"""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = content if len(content) == 1 else tarfile.REGTYPE, "a"
            info.size = len(content) * (info.type == tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def test_an_archive_is_unpacked_completely_inside_its_folder_or_not_at_all(tmp_path):
    path, out, good = tmp_path / "x.tgz", tmp_path / "out", ("top/a", b"hello")
    whole = tgz(path, good, ("top/b/c", b"xx"))
    xz = lzma.compress(gzip.decompress(whole))
    for word, bad in [("damaged", whole[:-20]), ("damaged", b"no archive"), ("damaged", b""),
                      ("damaged", xz[:100] + b"noise" + xz[100:]),
                      ("empty", tgz(path))] + [
            (word, tgz(path, good, bad)) for word, bad in [
                ("outside", ("../evil", b"xx")), ("outside", ("/tmp/evil", b"xx")),
                ("outside", ("a/../../b", b"xx")), ("outside", ("..\\evil", b"xx")),
                ("outside", ("\\evil", b"xx")), ("link", ("l", tarfile.SYMTYPE)),
                ("link", ("l", tarfile.LNKTYPE)), ("device", ("d", tarfile.CHRTYPE)),
                ("device", ("d", tarfile.FIFOTYPE)), ("than 9,000", ("big", b"12" * 5000))]]:
        path.write_bytes(bad)
        refuses(str(path), word, call=fetch.unpack, archive=path, folder=out, most_bytes=9000)
        assert left(tmp_path) == ["x.tgz"]
    path.write_bytes(whole)
    (tmp_path / ".out.part").mkdir()                              # of a run that was killed
    assert fetch.unpack(path, out) == out and left(tmp_path) == ["out", "x.tgz"]
    assert (out / "a").read_bytes() == b"hello" and (out / "b/c").exists()
    tgz(path, ("a", b"xx"), ("b", b"xx"))                         # no top folder: all of it
    assert left(fetch.unpack(path, tmp_path / "out2")) == ["a", "b"]


def zipped(path, *members):
    """members: (name, bytes), or (name, the type of a file in stat's bits)"""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED * (".JPEG" not in name)
            if isinstance(content, int):
                info.external_attr, content = (content | 0o600) << 16, b"a"
            file.writestr(info, content)
    return path.read_bytes()


def test_a_zip_file_is_unpacked_with_the_same_care(tmp_path):
    path, out, good = tmp_path / "x.zip", tmp_path / "out", ("top/a", b"hello")
    whole = zipped(path, good, ("top/b/", b""), ("top/b/c", b"xx" * 50),
                   ("__MACOSX/top/._a", b"xx"))
    lies = zipped(path, good, ("big", b"0" * 50_000))
    lies = lies.replace(struct.pack("<I", 50_000), struct.pack("<I", 10))     # its stated size
    for word, bad in [("damaged", whole[:-20]), ("damaged", whole[:4]), ("damaged", lies),
                      ("damaged", zipped(path, ("a.JPEG", b"hello")).replace(b"hello", b"help!"))
                      ] + [
            (word, zipped(path, good, bad)) for word, bad in [
                ("outside", ("../evil", b"xx")), ("outside", ("/tmp/evil", b"xx")),
                ("outside", ("a/../../b", b"xx")), ("outside", ("..\\evil", b"xx")),
                ("link", ("l", stat.S_IFLNK)), ("device", ("d", stat.S_IFCHR)),
                ("device", ("d", stat.S_IFIFO)), ("than 9,000", ("big", b"0" * 9000))]]:
        path.write_bytes(bad)
        refuses(str(path), word, call=fetch.unpack, archive=path, folder=out, most_bytes=9000)
        assert left(tmp_path) == ["x.zip"]
    path.write_bytes(whole)
    assert fetch.unpack(path, out) == out and left(tmp_path) == ["out", "x.zip"]
    assert (out / "a").read_bytes() == b"hello" and (out / "b/c").read_bytes() == b"xx" * 50


def test_a_lock_that_does_not_wait(tmp_path):
    with fetch.file_lock(tmp_path / "a") as first:
        assert first
        with fetch.file_lock(tmp_path / "a", wait=False) as second:
            assert not second
    with fetch.file_lock(tmp_path / "a", wait=False) as third:
        assert third


# ---------------------------------------------------------------- photos.py


def jpeg(shade, kind="JPEG"):
    """The bytes of a plain gray image."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade,) * 3).save(file, kind)
    return file.getvalue()


def decoded(root, out, split="train", classes=""):
    """Find, list and decode to 16 px -> images, labels, class names, as `load_images` does."""
    root = photos.find_folder(str(root))
    paths, labels, names = photos.list_folder(root, split, classes)
    labels = photos.decode_folder(root, paths, labels, names, 16, out / "images.npy")
    return np.load(out / "images.npy"), labels, names


@pytest.mark.parametrize("name", ["imagenette", "imagewoof"])
def test_an_archive_end_to_end(name, serve, tmp_path, monkeypatch):
    url, sums = photos.ARCHIVES[name]
    stem, kind = url.rpartition("/")[2], [*sums][0]
    ids = [*photos.WORDS][:10:9] if name == "imagenette" else [*photos.WORDS][10:20:9]
    words = [photos.WORDS[i] for i in ids]
    members = [(f"{stem[:-4]}/{split}/{folder}/{i}.JPEG", jpeg(40 * i)) for split, n in
               (("train", 3), ("val", 2)) for folder in ids for i in range(n)]
    body = tgz(tmp_path / "x.tgz", *members, (f"{stem[:-4]}/noisy.csv", b"xx"))
    server = serve(**{stem: body})
    monkeypatch.setitem(photos.ARCHIVES, name, (f"{server.url}/{stem}", sums))
    refuses(f"its {kind} is wrong", call=photos.find_folder, name=name)       # the real one's
    monkeypatch.setitem(photos.ARCHIVES, name, (
        f"{server.url}/{stem}", {kind: hashlib.new(kind, body).hexdigest()}))
    (x, y, names), (xt, _, _) = (decoded(name, tmp_path, split) for split in ("train", "test"))
    assert x.shape == (6, 3, 16, 16) and y == [0] * 3 + [1] * 3 and len(xt) == 4
    assert names == words and abs(int(x[1].max()) - 40) < 3
    for classes in ids[1], words[1].upper(), f" {ids[1]},{words[1]}":
        paths, y, chosen = photos.list_folder(photos.find_folder(name), "train", classes)
        assert len(paths) == 3 and y == [0] * 3 and chosen == words[1:]
    assert len(server.log) == 2


def tiny_imagenet(path):
    """A small archive in the layout of Tiny ImageNet: ladybug, pizza, and `hand saw` by words.txt;
    three training images of each, two for validation, in any order."""
    ids, top = ("n02165456", "n07873807", "n03481172"), "tiny-imagenet-200/"
    train = [(f"{top}train/{k}/images/{k}_{i}.JPEG", jpeg(40 * i + 20 * ids.index(k)))
             for k in ids for i in range(3)]
    lines = [f"val_{i}.JPEG\t{ids[-i % 3]}\t0\t32\t44\t62\n" for i in range(6)]
    return zipped(
        path, *train, (f"{top}train/{ids[0]}/{ids[0]}_boxes.txt", b"n_0.JPEG\t0\t0\t62\t62"),
        (f"{top}val/val_annotations.txt", "".join(lines).encode()),
        *((f"{top}val/images/val_{i}.JPEG", jpeg(20 * (-i % 3))) for i in range(6)),
        *((f"{top}test/images/test_{i}.JPEG", jpeg(0)) for i in range(6)),
        (f"{top}words.txt", b"n01440764\ttench\nn02165456\tno\nn03481172\thand saw, handsaw\n"))


def test_tiny_imagenet_end_to_end(serve, tmp_path, monkeypatch):
    body, name = tiny_imagenet(tmp_path / "own.zip"), "tiny-imagenet"
    url, sums = photos.ARCHIVES[name]
    server = serve(**{url.rpartition("/")[2]: body})
    url = server.url + url[url.rindex("/"):]
    monkeypatch.setitem(photos.ARCHIVES, name, (url, sums))
    refuses("bytes, not 248,100,043", call=photos.find_folder, name=name)     # the real one's
    monkeypatch.setitem(photos.ARCHIVES, name, (
        url, dict(size=len(body), md5=hashlib.md5(body).hexdigest())))
    for source in name, tmp_path / "own.zip":                     # fetched, or without a network
        (x, y, names), (xt, yt, _) = (decoded(source, tmp_path, s) for s in ("train", "test"))
        assert names == ["ladybug", "hand saw", "pizza"] and y == [0] * 3 + [1] * 3 + [2] * 3
        assert abs(int(x[1].max()) - 40) < 3 and yt == [0, 0, 1, 1, 2, 2]
        assert np.abs(xt.mean((1, 2, 3)) - [0, 0, 40, 40, 20, 20]).max() < 3
    root = photos.find_folder(name)
    list_of = lambda classes: photos.list_folder(root, "test", classes)[1:]
    assert list_of("Hand Saw,n07873807") == ([0, 0, 1, 1], ["hand saw", "pizza"])
    monkeypatch.setitem(photos.CLASS_LISTS, "two", ("n07873807", "n02165456"))
    assert list_of("two")[1] == ["ladybug", "pizza"] and len(photos.CLASS_LISTS["easy-ten"]) == 10
    refuses("no class 'n01443537'", call=list_of, classes="easy-ten")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02165456\n")
    refuses("n03481172: no images in this class", call=list_of, classes="")
    assert len(server.log) == 2 and len(left(tmp_path / "cache")) == 3        # with own.zip's


def test_a_path_that_is_no_archive_or_another_one(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path / "cache"))
    for body in b"", jpeg(0), tiny_imagenet(path)[:-30]:
        path.write_bytes(body)
        refuses(str(path), "nor a zip or tar archive", call=photos.find_folder, name=str(path))
    folders = set()
    for i in range(2):                                            # of one name, tar this time
        tgz(path, ("top/a", b"%d " % i), ("top/b", b"xx"))
        os.utime(path, (i, i))
        folders |= {photos.find_folder(str(path)), photos.find_folder(str(path))}
    assert len(folders) == 2 and {(f / "a").read_bytes() for f in folders} == {b"0 ", b"1 "}


def test_some_of_a_folders_classes(tmp_path):
    for name in "a", "b", "Stra\u00dfe", "du\u0308nn":             # the last as macOS writes it
        (tmp_path / "root" / name).mkdir(parents=True)
        for file in "0.jpg", "1.jpg", "._0.jpg":
            (tmp_path / "root" / name / file).touch()
    chosen = lambda classes: photos.list_folder(tmp_path / "root", "train", classes)[2]
    (tmp_path / "list.txt").write_text("\ufeffb\r\n\n a \n", encoding="utf-8")
    assert chosen("") == chosen("all") == ["Stra\u00dfe", "a", "b", "du\u0308nn"]
    assert chosen("b,a") == chosen(str(tmp_path / "list.txt")) == ["a", "b"]
    assert chosen("d\u00fcnn , STRASSE") == ["Stra\u00dfe", "du\u0308nn"]
    assert len(photos.list_folder(tmp_path / "root", "train")[0]) == 4       # not the ._ files
    for classes, words in ("a,c", "no class 'c'.*a, b"), ("no.txt", "'no.txt'"), (",", "names no"):
        with pytest.raises(UserError, match=words):
            chosen(classes)


def test_bad_folders_end_in_one_line(tmp_path):
    root = tmp_path / "root"
    for make, words in [(lambda: None, "no such folder"), (root.mkdir, "no subfolders"),
                        ((root / "a").mkdir, "no images"),
                        ((root / "a/0.png").touch, "has only one image")]:
        make()
        refuses(str(root), words, call=photos.list_folder, root=root, split="train")
    (root / "A").mkdir()
    refuses("differ only in case: A, a", call=photos.list_folder, root=root, split="train")


def test_odd_images_become_what_a_person_expects(tmp_path):
    red = Image.new("RGB", (80, 60), (200, 0, 0))

    def stored(image, name="x.png", size=16, **more):
        image.save(tmp_path / name, **more)
        return photos.decode(tmp_path / name, size).mean((1, 2))
    assert np.allclose(stored(red.convert("P")), [200, 0, 0], atol=6)
    assert np.allclose(stored(red.convert("CMYK"), "x.jpg"), [200, 0, 0], atol=12)
    assert np.allclose(stored(red.convert("L")), 60, atol=2)
    clear = red.convert("RGBA")
    clear.putalpha(0)
    assert np.allclose(stored(clear), 255, atol=1)                # transparency over white
    assert np.allclose(stored(Image.fromarray(np.full((40, 40), 32896, np.uint16))), 128, atol=1)
    for array in np.full((9, 9), 0.5, np.float32), np.full((9, 9), 32896, np.int32):
        assert (stored(Image.fromarray(array), "x.tif") == 128).all()
    assert np.allclose(stored(red, "x.gif", save_all=True, append_images=[clear])[0], 200, atol=6)
    thin = Image.new("RGB", (1, 60_000), (200, 0, 0))             # not 4 gigapixels
    assert (stored(thin, size=256) == [200, 0, 0]).all() and stored(thin).shape == (3,)
    assert (stored(red, exif=b"Exif\0\0no exif") == [200, 0, 0]).all()        # damaged EXIF only
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))
    exif = turned.getexif()
    exif[0x0112] = 3                                              # upside down
    turned.save(tmp_path / "t.jpg", exif=exif)
    left_half = photos.decode(tmp_path / "t.jpg", 16)[:, :, :6]
    assert left_half.mean() > 250                                 # the black half is on the right


def adms_crop(image, size):
    """The function `center_crop_arr` of ADM's repository, from its description."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.array(image.resize(tuple(round(x * scale) for x in image.size), Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y:y + size, x:x + size].transpose(2, 0, 1)


@pytest.mark.parametrize("width, height", [(517, 389), (256, 260), (64, 64), (50, 33), (130, 999)])
def test_decoding_is_adms_crop_to_the_last_value(width, height, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
    for quality, mode in (95, "RGB"), (60, "L"), (80, "CMYK"):
        image.convert(mode).save(tmp_path / "x.jpg", quality=quality)
        with Image.open(tmp_path / "x.jpg") as stored:
            expected = adms_crop(stored.convert("RGB"), 64)
        assert (photos.decode(tmp_path / "x.jpg", 64) == expected).all()


@pytest.mark.filterwarnings("ignore")
def test_images_that_would_hurt(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(jpeg(0, "PNG"))
    bomb = bytearray(path.read_bytes())
    bomb[16:24] = bytes([0, 0, 48, 0] * 2)                        # IHDR: width, height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match="12288 x 12288 pixels are too many"):
        photos.decode(path, 8)
    for bad in jpeg(0, "EPS"), b"":                               # EPS would start another program
        path.write_bytes(bad)
        with pytest.raises(UnidentifiedImageError):
            photos.decode(path, 8)


def test_unreadable_images_are_named_and_more_than_one_percent_stop(tmp_path, capsys):
    a, b = tmp_path / "root/a", tmp_path / "root/b"
    a.mkdir(parents=True)
    odd = os.fsdecode(b"\xe9") if sys.platform == "linux" else "\u00e9"        # not UTF-8
    for i in range(200):                                          # and PNG, whatever the name says
        (a / f"{odd}{i:03}.jpg").write_bytes(jpeg(i, "PNG") if i else b"text")
    (a / "0.HEIC").touch()
    x, y, _ = decoded(a.parent, tmp_path)
    assert len(x) == len(y) == 179 and x[0].max() == 1 and x[-1].min() == 198
    out = capsys.readouterr().out
    assert photos.printable(odd) + "000.jpg: Unid" in out and "skipped 1 of 180" in out
    assert "1 files are left out (.heic)" in out
    (a / f"{odd}001.jpg").write_bytes(b"")
    refuses("more than 1 %", "000.jpg", call=decoded, root=a.parent, out=tmp_path)
    for i in range(20, 200):                                      # one bad image does not stop
        (a / f"{odd}{i:03}.jpg").unlink()
    (a / f"{odd}001.jpg").write_bytes(jpeg(1))
    assert len(decoded(a.parent, tmp_path)[0]) == 17
    (a / f"{odd}000.jpg").unlink(), (a / f"{odd}001.jpg").unlink(), b.mkdir()
    (b / "0.png").touch(), (b / "1.png").touch()                  # all that one class has is bad
    refuses("no image of b", call=decoded, root=a.parent, out=tmp_path)
    assert left(tmp_path) == ["images.npy", "root"]


# ---------------------------------------------------------------- parts of a sorted folder


class Gray(nn.Module):
    """An autoencoder whose latent is the gray level of an image."""
    latent_dim = 1
    config = types.SimpleNamespace(data="sorted", size=16, classes="", images=0)

    def __init__(self):
        super().__init__()
        self.mean, self.std = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)

    def tokens(self, x):
        return x.mean((1, 2, 3)).view(-1, 1, 1), 0

    def encode(self, x):
        return x

    decode = encode


def sorted_images(*_, **__):
    """As `load_images`: 7,500 images, the first third black, the second gray, the last white."""
    labels = torch.arange(3).repeat_interleave(2500)
    shades = np.array([0, 128, 255], np.uint8)[labels.numpy()][:, None, None, None]
    return np.broadcast_to(shades, (7500, 3, 16, 16)), labels, ["black", "gray", "white"]


def test_every_part_of_a_sorted_folder_has_every_class(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae, "load_images", sorted_images)
    for score in "psnr", "ssim":                         # the mean says what is scored
        monkeypatch.setattr(ae, score, lambda x, y: x.mean((1, 2, 3)))
    _, images, names = ae.feed(ae.Config(images=30), "cpu")
    assert np.bincount(images[:, 0, 0, 0])[[0, 128, 255]].tolist() == [10] * 3 and len(names) == 3
    model, c = Gray(), ae.Config(out=str(tmp_path))
    model.config.images = 31
    assert ae.load_pictures(model.config)[1].bincount().tolist() == [11, 10, 10]
    options = dict(autocast=lambda: torch.autocast("cpu", enabled=False), device="cpu")
    ae.measure_statistics(model, sorted_images()[0], **options, most=300)
    assert abs(model.mean.item() - 1 / 765) < 1e-5 and abs(model.std.item() - (2 / 3) ** 0.5) < 1e-3
    ae.evaluate(c, model, **options)
    shown = capsys.readouterr().out
    assert abs(float(re.search(r"psnr_db: (.*)", shown)[1])) < 0.01           # of -1, 0 and 1
    sheet = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    middles = sheet[32::64, 32::64, 0].flatten()         # of its 64 pairs
    assert np.bincount(middles)[[0, 128, 255]].tolist() == [44, 42, 42] and "wrote" in shown


def test_a_sweep_without_scores_says_so(tmp_path, capsys):
    blank = lambda labels, steps: (torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), 0, 0)
    sample.sweep(sample.Config(out=str(tmp_path), sweep=(1, 2)), blank, [0, 1], None)
    assert "no sweep.tsv" in capsys.readouterr().out and left(tmp_path) == ["sweep.png"]


@pytest.mark.parametrize("text", ["", "1"])
def test_scores_are_of_every_class_and_the_grid_of_ten_or_those_chosen(text, tmp_path, monkeypatch):
    asked, blank = [], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def draw(labels, steps=10, scale=1.0):
        asked.append(labels.unique().tolist())
        return blank.expand(len(labels), -1, -1, -1), 1.0, steps
    draw.keywords = dict(shift=1.0)
    scores = dict.fromkeys(sample.SCORES, 0.5)
    scorer = lambda images, labels: scores
    scorer.floors = lambda n: (scores, scores)
    monkeypatch.setattr(sample, "choose_scorer", lambda *_: scorer)
    c = sample.Config(out=str(tmp_path), sweep=(2,), n=24, classes=text, scale=1.0)
    names, grid = [f"class {k}" for k in range(12)], [1] if text else [*range(10)]
    made = types.SimpleNamespace(class_names=names)
    sample.show(c, draw, made, sample.choose(text, names), "cpu")
    assert asked == [grid, [*range(12)], grid, [*range(12)]]


def test_small_data_sets_are_warned_of_in_one_line(capsys):
    warned = lambda *a: photos.warn_of_few(*a) or capsys.readouterr().out
    labels = torch.tensor([0] * 19 + [1] * 20)
    assert warned(labels, ["cats", "dogs"], 39) == (
        "warning: 1 of 2 classes have fewer than 20 images: cats (19); the models will memorize "
        "them\n")
    assert "39 images are fewer than --batch 40; 1 of 2" in warned(labels, ["cats", "dogs"], 40)
    assert warned(labels[19:], ["cats", "dogs"], 20).count("cats (0)") == 1
    assert warned(labels.repeat(2), ["cats", "dogs"], 39) == ""


NAMES = """cls_token embeddings.cls_token cls_token
storage_tokens embeddings.register_tokens reg_token
mask_token embeddings.mask_token -
patch_embed.proj embeddings.patch_embeddings patch_embed.proj
attn.proj attention.o_proj attn.proj
ls1.gamma layer_scale1.lambda1 gamma_1
ls2.gamma layer_scale2.lambda1 gamma_2
mlp.fc1 mlp.up_proj mlp.fc1
mlp.fc2 mlp.down_proj mlp.fc2
mlp.w1 mlp.gate_proj mlp.fc1_g
mlp.w2 mlp.up_proj mlp.fc1_x
mlp.w3 mlp.down_proj mlp.fc2
norm norm norm"""                                             # Meta's (ours), transformers', timm's


def random_vit(swiglu):
    """Every parameter random, so that each of them matters; no bias for k."""
    model = DINOv3(ViTConfig(dim=128, depth=3, heads=2, hidden=192, swiglu=swiglu)).freeze()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    for block in model.blocks:
        block.attn.qkv.bias.chunk(3)[1].zero_()
    return model


def in_every_layout(model):
    """The same weights as four files: Meta's, transformers', timm's with q and v bias, timm's."""
    meta, hf, timm = model.state_dict(), {}, {}
    for name, t in list(meta.items()):
        name_hf, part = name.replace("blocks.", "layer."), t.chunk(3)
        if name.endswith("qkv.weight"):
            timm[name] = t
            for x, rows in zip("qkv", part):
                hf[name_hf.replace("attn.qkv", f"attention.{x}_proj")] = rows
        elif name.endswith("qkv.bias"):
            for x, rows in ("q", part[0]), ("v", part[2]):
                hf[name_hf.replace("attn.qkv", f"attention.{x}_proj")] = rows
                timm[name.replace("qkv.bias", f"{x}_bias")] = rows
            meta[name + "_mask"] = torch.tensor([1., 0., 1.]).repeat_interleave(128)
        else:
            row = next(row.split() for row in NAMES.splitlines() if row.split()[0] in name)
            hf[name_hf.replace(row[0], row[1])] = t[None] if name == "mask_token" else t
            timm[name.replace(row[0], row[2])] = t
    del timm["-"]
    meta |= {"rope_embed.periods": model.periods.bfloat16(), "local_cls_norm.bias": torch.ones(128)}
    plain = {k: v for k, v in timm.items() if not k.endswith(("q_bias", "v_bias"))}
    return {layout: {k: v.clone() for k, v in tensors.items()}
            for layout, tensors in dict(meta=meta, hf=hf, qkvb=timm, timm=plain).items()}


@pytest.mark.parametrize("swiglu", [False, True])
def test_every_layout_gives_the_same_encoder(swiglu, tmp_path):
    from safetensors.torch import save_file
    ours, x = random_vit(swiglu), torch.randn(2, 3, 32, 48)
    files = in_every_layout(ours)
    save_file(files["hf"], tmp_path / "hf.safetensors")
    save_file(files["qkvb"], tmp_path / "timm.safetensors")
    for name, content in {
            "memory.pth": {"state_dict": {f"model.{k}": v for k, v in files["hf"].items()}},
            "timm.bin": files["qkvb"], "meta.pth": files["meta"], "wrapped.pth":
            {"teacher": {f"module.backbone.{k}": v for k, v in files["meta"].items()}}}.items():
        torch.save(content, tmp_path / name)
    for path in list(tmp_path.iterdir()):
        model = load_dino(path)
        assert model.config == ours.config and not model.training, path
        assert all(torch.equal(a, b) for a, b in zip(model(x), ours(x))), path
    # timm's usual file has no bias: the same as a mask of zeros, which is what Meta released
    for key in files["meta"]:
        if key.endswith("bias_mask"):
            files["meta"][key] = torch.zeros(384, dtype=torch.bfloat16)
    torch.save(files["meta"], tmp_path / "zero.pth")
    save_file(files["timm"], tmp_path / "plain.safetensors")
    plain, zero = load_dino(tmp_path / "plain.safetensors"), load_dino(tmp_path / "zero.pth")
    assert not plain.config.qkv_bias
    assert torch.equal(plain(x)[0], zero(x)[0]) and not torch.equal(plain(x)[0], ours(x)[0])


def test_encoder_sources(tmp_path, monkeypatch):
    c = ViTConfig(dim=96, depth=1, heads=3, patch=8, registers=2, stem=16, mean=(0.5, 0.5, 0.4))
    model, x = DINOv3(c).half(), torch.randn(2, 3, 32, 16)
    saved = dict(kind="dino", version=config.VERSION, config=vars(c), model=model.state_dict())
    torch.save(saved, tmp_path / "tiny.pt")
    monkeypatch.setattr(weights, "TINY", tmp_path / "tiny.pt")
    tiny = load_dino("tiny")
    assert torch.equal(tiny(x)[0], model.float().eval()(x)[0]) and tiny.config == c
    meta = in_every_layout(random_vit(True))["meta"]
    for name, mean in ("a.pth", 0.485), ("a-sat493m.pth", 0.430), ("a-eadcf0ff.pth", 0.430):
        torch.save(meta, tmp_path / name)
        assert load_dino(tmp_path / name).config.mean[0] == mean
    periods = torch.arange(1.0, 9.0)                          # 8 of them: heads of width 32
    torch.save({**meta, "rope_embed.periods": periods}, tmp_path / "heads.pth")
    model = load_dino(tmp_path / "heads.pth")
    assert model.config.heads == 4 and torch.equal(model.periods, periods)
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")   # nobody answers there
    monkeypatch.setattr(fetch, "WAIT", 0)
    torch.save({**saved, "kind": "ae"}, tmp_path / "ae.pt")
    torch.save({**saved, "config": dict(width=3)}, tmp_path / "fields.pt")
    refuses("contains ae, not dino", "lab.pretrain", call=load_dino, source=tmp_path / "ae.pt")
    refuses("fields.pt: not a DINOv3", "width", call=load_dino, source=tmp_path / "fields.pt")
    refuses("vits61: no such file", "not a model name", call=load_dino, source="vits61")
    refuses("timm/vit_small_plus_patch16_dinov3", "'tiny'", call=load_dino, source="vits16plus")
    for name in "vits16plus.safetensors", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth":
        (tmp_path / name).touch()
    found = [weights.find_weights(name, dino.SIZES).name for name in ("vits16plus", "vits16")]
    assert found == ["vits16plus.safetensors", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"]


def test_a_file_that_does_not_fit_names_its_tensor(tmp_path):
    good, path = in_every_layout(random_vit(True)), tmp_path / "x.pth"

    def refused(layout, *words, drop=(), **change):
        torch.save({k: v for k, v in {**good[layout], **change}.items() if k not in drop}, path)
        refuses("x.pth: ", *words, call=load_dino, source=path)

    for layout in "meta", "hf", "qkvb":                       # each tensor, under the file's name
        for key in good[layout]:
            if not re.search(r"mask|periods|local_cls|\.[02]\.|reg|storage", key):
                refused(layout, key, "issing", drop=[key])
    refused("meta", '"blocks.2.norm1.bias"', '"junk"', "mismatch for norm.weight", "[7]",
            drop=["blocks.2.norm1.bias"], **{"junk": torch.ones(1), "norm.weight": torch.ones(7)})
    name, ones = "blocks.1.attn.qkv.bias", torch.ones(384)
    refused("meta", f"{name}_mask contains NaN", **{name + "_mask": ones * torch.nan})
    refused("meta", "a bias for k", **{name + "_mask": ones, name: ones})
    refused("meta", "whole numbers", **{name: ones.long()})
    refused("hf", "a bias for k", **{"layer.0.attention.k_proj.bias": torch.ones(128)})
    refused("hf", "layer.1.mlp.gate_proj.weight", **{"layer.1.mlp.gate_proj.weight": ones[:9]})
    refused("hf", "transformers", **{"layer.1.attention.k_proj.weight": torch.ones(9, 9)})
    for bad in [1., 0.], [1., torch.nan], [[1.]], [], 1.:
        refused("meta", "periods", **{"rope_embed.periods": torch.tensor(bad)})
    refused("meta", "width 12", **{"rope_embed.periods": torch.ones(3)})
    for junk in {}, [1], torch.ones(2), {"model": {"fc.weight": torch.ones(2)}}:
        torch.save(junk, path)
        refuses("no DINOv3 ViT", "reg_token", call=load_dino, source=path)


def write_safetensors(path, header, data=b"", pad=0):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()).ljust(pad)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor_entry(dtype, shape, *offsets):
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


def test_safetensors_reader_equals_the_package(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "x.safetensors"
    tensors = {str(d): (torch.rand(3, 5) * 99).to(d) for d in weights.DTYPES.values()}
    tensors |= dict(scalar=torch.tensor(2.5), empty=torch.empty(0, 4), odd=torch.ones(3).byte())
    save_file(tensors, path, metadata=dict(format="pt"))
    read = read_safetensors(path)
    assert read.keys() == tensors.keys() and len(weights.DTYPES) == 10
    for name, t in tensors.items():
        assert read[name].dtype == t.dtype and torch.equal(read[name], t), name
    # not aligned; and a header of 15392 bytes, which begins like an HTML page, " <"
    for pad in 115, 15392:
        header = dict(a=tensor_entry("U8", [1], 0, 1), b=tensor_entry("F32", [1], 1, 5))
        write_safetensors(path, header, b"\1\0\0\0\x40", pad)
        assert read_safetensors(path)["b"].item() == 2


def test_safetensors_reader_refuses(tmp_path):
    path, four = tmp_path / "x.safetensors", b"\0" * 4
    one = tensor_entry("F32", [1], 0, 4)
    for header, data, why in [
            (dict(a=one), four[:2], "truncated"), (dict(a=one), 2 * four, "bytes after"),
            (dict(a=one, b=one), 2 * four, "contradicts"),
            (dict(a=tensor_entry("F32", [1], -4, 0)), four, "contradicts"),
            (dict(a=tensor_entry("F32", [1], 0, 2**70)), four, "truncated"),
            (dict(a=tensor_entry("F32", [2], 0, 4)), four, "contradicts"),
            (dict(a=tensor_entry("F32", [-1, -1], 0, 4)), four, "malformed"),
            (dict(a=tensor_entry("F32", [-1], 0, -4)), four, "negative"),
            (dict(a=tensor_entry("F32", [0, 2**70], 0, 0)), b"", "malformed"),
            (dict(a=tensor_entry("F8_E4M3", [1], 0, 1)), b"\0", "dtype F8"),
            (dict(a=tensor_entry("F32", 3, 0, 4)), four, "malformed"),
            (dict(a=3), b"", "malformed"),
            (dict(a=dict(dtype="F32")), b"", "malformed"), (b"{" * 9, b"", "malformed"),
            (b'{"a":' * 9999, b"", "malformed"), (b"{\xff}", b"", "malformed"),
            (b"[]", b"", "not a safetensors file")]:
        write_safetensors(path, header, data)
        refuses("x.safetensors: ", why, call=read_safetensors, path=path)
    write_safetensors(path, dict(a=tensor_entry("F32", [64], 0, 256)), b"\0" * 256)
    whole = path.read_bytes()
    for content, why in [*((whole[:n], "truncated") for n in range(7, len(whole), 7)),
                         (b"", "empty"), (b"\xff" * 99, "truncated"),
                         (b"\xff" * 8 + b"{}", "truncated"), (b"<!DOCTYPE html><html>", "HTML"),
                         (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "LFS")]:
        path.write_bytes(content)
        refuses("x.safetensors: ", why, call=read_safetensors, path=path)


def test_encoder_weights_come_from_the_hub_once(serve, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save
    c, state = ViTConfig(dim=64, depth=1, heads=1, hidden=96, qkv_bias=False), {}
    for name, t in DINOv3(c).state_dict().items():
        if name != "mask_token":
            state[weights.theirs("timm", name)] = t
    body, at = save(state), "{}/resolve/main/model.safetensors"
    timm = at.format("timm/vit_small_patch16_dinov3.lvd1689m")
    meta = at.format("facebook/dinov3-vits16-pretrain-lvd1689m")
    server = serve(**{timm: body, meta: body, timm.replace("small", "base"): body})
    monkeypatch.setitem(dino.SIZES, "vits16", c)
    for name in "vits16", "hf:vits16":
        monkeypatch.setitem(weights.SUMS, name, (len(body), hashlib.sha256(body).hexdigest()))
    for _ in range(2):
        model = load_dino("vits16")
        assert model.config == c and model(torch.randn(1, 3, 32, 48))[0].shape == (1, 6, 64)
    assert len(server.log) == 1 and capsys.readouterr().out.count(weights.LICENSE) == 1
    server.plan["/" + meta] = [401]
    refuses("facebook/dinov3-vits16-", "HF_TOKEN", "'tiny'", call=load_dino, source="hf:vits16")
    monkeypatch.setenv("HF_TOKEN", "secret")
    load_dino("hf:vits16")
    assert server.log[-1][1]["Authorization"] == "Bearer secret"
    refuses("on request", call=load_dino, source="vitl16plus")
    refuses("not vitb16", call=load_dino, source="vitb16")


class TinyTimm(nn.Module):
    """As much of timm's VisionTransformer as TimmViT calls."""
    num_prefix_tokens, num_features, pretrained_cfg = 1, 8, dict(mean=(0.5,) * 3, std=(0.25,) * 3)

    def __init__(self, patch):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, patch, patch)
        self.patch_embed.patch_size = (patch, patch)

    def forward_features(self, x):
        return F.pad(self.patch_embed(x).flatten(2), (1, 0)).transpose(1, 2)

    def forward_intermediates(self, x, norm, output_fmt, intermediates_only):
        return [self.forward_features(x)[:, 1:]]


def test_encoders_of_timm(monkeypatch):
    asked = []

    def create_model(name, pretrained, num_classes, dynamic_img_size):
        asked.append((name, pretrained))
        if name == "resnet":
            raise TypeError("unexpected keyword argument dynamic_img_size")
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)\nmore")
        return TinyTimm(int(name)) if name != "conv" else nn.Conv2d(3, 8, 3)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    for patch, counted in (16, 16), (14, 16), (8, 8):             # DINOv2's 14 counts as 16
        model = load_dino(f"timm:{patch}")
        x = model.normalize(torch.ones(2, 3, 32, 64))
        patches, cls = model(x)
        assert model.patch == counted and model.dim == 8 and x.mean() == 2 and not cls.any()
        assert patches.shape == model.features(x)[0].shape == (2, 32 * 64 // counted ** 2, 8)
        parent = nn.ModuleList([model.freeze()]).train()
        assert not any(m.training for m in parent[0].modules())
        assert not any(p.requires_grad for p in model.parameters())
        again = dino.rebuild(vars(model.config))                  # as a checkpoint does
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x)[0], patches) and again.config == model.config
    assert asked[-2:] == [("8", True), ("8", False)]
    for name in "resnet", "conv":
        refuses("no patch tokens", call=load_dino, source=f"timm:{name}")
    refuses("timm:unknown: Unknown model", call=load_dino, source="timm:unknown")
    monkeypatch.setitem(sys.modules, "timm", None)
    refuses("pip install timm", call=load_dino, source="timm:16")


# ---------------------------------------------------------------- lpips.py

CONVS = dict(zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
                 (64, 64, 128, 128) + (256,) * 3 + (512,) * 6))


@pytest.fixture(scope="session")
def lpips_weights():
    """Random weights in the two published layouts."""
    g, vgg, c = torch.Generator().manual_seed(0), {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for n, out in CONVS.items():
        vgg[f"features.{n}.weight"] = torch.randn(out, c, 3, 3, generator=g) * (2 / (9 * c)) ** 0.5
        vgg[f"features.{n}.bias"], c = 0.1 * torch.randn(out, generator=g), out
    return dict(vgg=vgg, heads={f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g)
                                for i, c in enumerate((64, 128, 256, 512, 512))})


@pytest.fixture(scope="session")
def lpips_files(lpips_weights, tmp_path_factory):
    """The same as files; the real VGG file has the format before zip."""
    paths = {k: tmp_path_factory.mktemp("lpips") / f"{k}.pth" for k in lpips_weights}
    torch.save(lpips_weights["vgg"], paths["vgg"], _use_new_zipfile_serialization=False)
    torch.save(lpips_weights["heads"], paths["heads"])
    return paths


@pytest.fixture(scope="session")
def lpips_model(lpips_files):
    return load_lpips(**lpips_files)


def lpips_pair(seed, n=2):
    return torch.rand(2, n, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slow_lpips(x, y, vgg, heads):
    """One pair, place by place, in float64."""
    a, b = ((v[None].double() - torch.tensor([-.030, -.088, -.188]).double().view(1, 3, 1, 1))
            / torch.tensor([.458, .448, .450]).double().view(1, 3, 1, 1) for v in (x, y))
    total, ends = 0.0, (2, 7, 14, 21, 28)
    for n in CONVS:
        weight, bias = (vgg[f"features.{n}.{k}"].double() for k in ("weight", "bias"))
        a, b = (F.conv2d(v, weight, bias, padding=1).clamp(min=0) for v in (a, b))
        if n in ends:
            h, w = a.shape[2:]
            head = heads[f"lin{ends.index(n)}.model.1.weight"].flatten().double()
            for i in range(h * w):
                p, q = (v[0, :, i // w, i % w] for v in (a, b))
                p, q = (v / (v.pow(2).sum().sqrt() + 1e-10) for v in (p, q))
                total = total + head.dot((p - q) ** 2) / (h * w)
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
    return total


def test_lpips_against_the_formula_and_its_gradient(lpips_model, lpips_weights):
    x, y = lpips_pair(1)
    u, v = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.nn.ModuleList([lpips_model]).train()
    assert not any(m.training for m in lpips_model.modules())
    expected = torch.stack([slow_lpips(a, b, **lpips_weights) for a, b in zip(v, y)])
    fast = lpips_model(u, y.requires_grad_())
    assert expected.min() > 0.01 and torch.allclose(fast.double(), expected, rtol=1e-5)
    fast.sum().backward(), expected.sum().backward()
    assert (u.grad - v.grad).norm() < 1e-3 * v.grad.norm() and v.grad.norm() > 0
    assert y.grad is None and not any(p.requires_grad for p in lpips_model.parameters())
    assert torch.equal(lpips_model(x, x), torch.zeros(2))
    assert torch.allclose(lpips_model(y, x), fast, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = lpips_model(x, y)
    assert rough.dtype == torch.float32 and torch.allclose(rough, fast, rtol=.02)


def test_lpips_against_the_package(lpips_model, lpips_weights):
    package = pytest.importorskip("lpips")
    theirs = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    for name, p in theirs.named_parameters():                 # net.sliceK.N.weight, linK.model...
        key = "features." + name.split(".", 2)[2] if name.startswith("net.") else name
        p.data.copy_((lpips_weights["vgg"] | lpips_weights["heads"])[key])
    assert torch.allclose(lpips_model(*lpips_pair(2)), theirs(*lpips_pair(2)).flatten(), rtol=1e-4)


def test_lpips_of_dead_places_leaves_the_gradient_finite(lpips_weights):
    dead, (x, y) = LPIPS(), lpips_pair(4)
    dead.features.load_state_dict({k[9:]: v - 2 * ("bias" in k) for k, v
                                   in lpips_weights["vgg"].items() if k.startswith("features.")})
    assert any((m.abs().sum(1) == 0).any() for m in dead.maps(x))
    d = dead(x.requires_grad_(), y)
    d.sum().backward()
    assert d.isfinite().all() and x.grad.isfinite().all()


def test_lpips_of_impossible_shapes():
    for x, y in ((1, 3, 32, 32), (2, 3, 32, 32)), ((1, 1, 32, 32),) * 2, ((1, 3, 15, 32),) * 2:
        with pytest.raises(ValueError, match="one shape"):
            LPIPS()(torch.zeros(x), torch.zeros(y))


@pytest.mark.parametrize("which, to, words", [
    ("vgg", {"features.28.bias": None}, 'Missing key(s) in state_dict: "28.bias"'),
    ("vgg", {"features.0.weight": torch.zeros(64, 1, 3, 3)}, "size mismatch for 0.weight"),
    ("vgg", {"features.30.weight": torch.zeros(2)}, 'Unexpected key(s) in state_dict: "30.weight"'),
    ("heads", [1], "'list'"), ("vgg", b"<!DOCTYPE html>", "HTML"), ("heads", b"", "empty"),
    ("vgg", 9999, "truncated"), ("heads", None, "no such file")])
def test_wrong_lpips_files_are_refused_in_one_line(lpips_files, lpips_weights, tmp_path, which, to,
                                                   words):
    bad = tmp_path / f"{which}.pth"
    if isinstance(to, dict):
        to = {k: v for k, v in {**lpips_weights[which], **to}.items() if v is not None}
    if isinstance(to, (dict, list)):
        torch.save(to, bad)
    elif to is not None:
        bad.write_bytes(lpips_files[which].read_bytes()[:to] if isinstance(to, int) else to)
    refuses(str(bad), words, call=load_lpips, **{**lpips_files, which: bad})


def test_omitted_lpips_files_come_from_the_cache(lpips_files, lpips_model, tmp_path, monkeypatch):
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path))
    for k, name in dict(vgg="vgg16-397923af.pth", heads="lpips-v0.1-vgg.pth").items():
        (tmp_path / name).symlink_to(lpips_files[k])
        refuses(name, "sha256" if k == "vgg" else "bytes", call=load_lpips,
                **({} if k == "vgg" else dict(vgg=lpips_files["vgg"])))
        monkeypatch.setattr(lpips, k.upper(), dict(url="http://127.0.0.1:1/"))  # there: not asked
    assert torch.equal(load_lpips().heads[4], lpips_model.heads[4])


# ---------------------------------------------------------------- draw.py


def test_a_grid_puts_each_image_in_its_place(tmp_path):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    draw.save_grid(tmp_path / "new" / "grid.png", images, 3)
    sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (128, 192, 3)                          # 32 px are enlarged to 64
    small = sheet[::2, ::2].reshape(2, 32, 3, 32, 3).transpose(0, 2, 4, 1, 3).reshape(6, 3, 32, 32)
    assert (small[:5] == images.numpy()).all() and (small[5] == 255).all()
    assert (sheet[1::2, 1::2] == sheet[::2, ::2]).all()          # not smoothed
    assert draw.grid_image(images.numpy(), 5, zoom=1).size == (160, 32)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_an_animation_keeps_its_frames_and_times(tmp_path):
    frames = [draw.Canvas(20, 10, color).done() for color in ("red", "green", "blue")]
    draw.save_gif(tmp_path / "a.gif", frames, [600, 60, 1800])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (20, 10)
        assert [gif.seek(i) or gif.info["duration"] for i in range(3)] == [600, 60, 1800]


def test_a_plane_has_its_origin_in_the_middle_and_y_up():
    plane = draw.Plane(100, extent=2.0)
    plane.dots([(1.0, 1.0)], "#ff0000", 3)
    red = np.argwhere((np.asarray(plane.done()) == (255, 0, 0)).all(2))
    assert np.allclose(red.mean(0), (24.5, 74.5), atol=1)        # row, column
    blank = np.asarray(plane.done()).copy()
    plane.mean_arrows(np.zeros((39, 2)), np.ones((39, 2)), "#0000ff", 1.0)       # too few
    assert (np.asarray(plane.done()) == blank).all()
    plane.mean_arrows(np.full((40, 2), -0.9), np.ones((40, 2)), "#0000ff", 1.0)
    assert (np.asarray(plane.done()) != blank).any()


@pytest.mark.parametrize("logx, logy", [(True, True), (False, False)])
def test_a_chart_draws_every_point_and_skips_what_was_not_measured(logx, logy):
    values = [[1.0, 1.2], [], [4.0]]
    series = [("long name", "#ff0000", False, values)]
    panel = draw.chart("title", series, [1, 2, 4], "steps", 300, 200, logx, logy)
    red = (np.asarray(panel.done()) == (255, 0, 0)).all(2)
    assert panel.done().size == (300, 200) and red.sum() > 100
    left, right = np.argwhere(red)[:, 1].min(), np.argwhere(red)[:, 1].max()
    assert 50 < left < 65 and 265 < right < 285                  # the two ends
    wide = draw.chart("", [("", "#ff0000", True, [[1e-9], [1], [2]])], [1, 2, 4], "", 300, 200,
                      limits=(0.1, 10), floor=(0.5, "floor"))    # beyond the axis: at its edge
    rows = np.argwhere((np.asarray(wide.done()) == (255, 0, 0)).all(2))[:, 0]
    assert rows.max() <= 200 - 48 + 3


@pytest.mark.parametrize("low, high, log, expected", [
    (np.log(4), np.log(30), True, [5, 10, 20]),
    (np.log(0.02), np.log(400), True, [0.1, 1, 10, 100]),
    (0.1, 0.75, False, [0.2, 0.4, 0.6]), (-3, 2, False, [-3, -2, -1, 0, 1, 2])])
def test_ticks_are_round_numbers(low, high, log, expected):
    assert draw.y_ticks(low, high, log) == pytest.approx(expected)


# ---------------------------------------------------------------- muon.py


def test_orthogonalize_keeps_directions_and_evens_out_sizes():
    x = torch.randn(2, 48, 20, generator=config.generator(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    for steps, low in ((3, 0.15), (5, 0.6)):
        y = muon.orthogonalize(x, steps)
        inside = u.mT @ y @ v.mT                           # diagonal: the same singular vectors
        off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
        values = torch.linalg.svdvals(y)
        assert off.abs().max() < 0.05 and low < values.min() and values.max() < 1.3
    assert torch.allclose(muon.orthogonalize(x.mT, 5), muon.orthogonalize(x, 5).mT, atol=0.02)


def test_muon_trains_and_resumes_bit_identically():
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                              nn.Linear(8, 2))
        matrices = [p for p in model[:3].parameters() if p.ndim > 1]
        return model, muon.optimizer([*model.parameters()], matrices, 0.01, 0.02, (0.9, 0.99))

    def train(model, optimizer, steps):
        for step in steps:
            g = config.generator(1, step)
            x = torch.randn(16, 3, 5, 5, generator=g)
            loss = (model(x) - x.mean((2, 3))[:, :2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()
    a, b = net(), net()
    first = train(*a, range(1))
    assert train(*a, range(1, 60)) < 0.7 * first
    train(*b, range(20))
    model, optimizer = net()
    model.load_state_dict(b[0].state_dict()), optimizer.load_state_dict(b[1].state_dict())
    assert optimizer.param_groups[0]["lr_scale"] == 2 and len(optimizer.param_groups) == 2
    train(model, optimizer, range(20, 60))
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), model.parameters()))
    assert type(muon.optimizer([*model.parameters()], [], 0.01, 0, (0.9, 0.99))).__name__ == "AdamW"


def test_busy_neighbors_leave_fewer_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for name, text, free in (("idle", "0.1 0.1 0.1 1/99 7", 4), ("busy", "9 9 9 3/99 7", 2),
                             ("full", "9 9 9 20/99 7", 1), ("odd", "", 4)):
        (tmp_path / name).write_text(text)
        assert config.free_cores(tmp_path / name) == free
    assert config.free_cores(tmp_path / "not_linux") == 4
