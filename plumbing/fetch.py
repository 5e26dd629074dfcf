"""Published weights and data sets: downloaded once into a cache, checked, unpacked.

A download is written to `.NAME.part` next to its target and renamed when it is complete and its
checksum is right.  If the connection breaks, the download resumes where it stopped, even in
the next run.

Environment: NOVAE_CACHE, a folder instead of ~/.cache/novae; HF_ENDPOINT, a mirror of
https://huggingface.co; HF_TOKEN, for gated repositories there; HTTPS_PROXY and the like.
"""
import contextlib, errno, hashlib, math, os, re, shutil, stat, tarfile, time, zipfile
from functools import partial
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

from plumbing import config
from plumbing.config import UserError

try:
    import fcntl
except ImportError:                          # Windows: do not start two runs at once there
    fcntl = None

HUB = "https://huggingface.co"
TRIES = 5                                    # failures in a row without a new byte
WAIT = 1.0                                   # seconds before the second try, doubled after each
TIMEOUT = 30                                 # seconds without an answer
NETWORK = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Retry(Exception):
    """A failure that may be temporary: what happened and, optionally, what to do if it persists."""


def cache_dir():
    """The folder of downloaded files."""
    return Path(os.environ.get("NOVAE_CACHE") or "~/.cache/novae").expanduser()


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Lets one process at a time make `path`: check again inside whether it exists.

    Yields whether the lock is held: without `wait`, False at once if another process holds it.
    When a process dies, the system frees its lock.  UserError: the folder is not writable.
    """
    path, held = Path(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written to ({error.strerror})") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:                      # some network drives have no locks
            pass
        yield held


def cached_array(path, shape, dtype, fill, doing, advice, stale):
    """The .npy file at `path`, memory-mapped; made the first time, by fill(array), on all ranks.

    Of several runs one makes it and the others wait; rank 0 holds the lock for its whole run.
    doing: is printed; advice: what to do if the disk is too small; stale: a pattern of the names of
    earlier files, which are removed.  UserError: a small disk, or a file that does not fit.
    """
    with file_lock(path) if config.rank() == 0 else contextlib.nullcontext():
        if config.any_rank(config.rank() == 0 and not path.is_file()):
            for old in path.parent.glob(stale):
                old.unlink(missing_ok=True)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            free = shutil.disk_usage(path.parent).free
            config.wait_for_ranks()                        # nothing has been written yet
            if size > free:
                raise UserError(f"{path}: needs {size / 1e9:.0f} GB, but only {free / 1e9:.0f} GB "
                                f"are free; {advice}")
            print(f"{doing} into {path}, {size / 1e9:.2f} GB")
            config.atomic_array(path, shape, dtype, fill)
    try:
        array = np.load(path, mmap_mode="r")
        config.require(array.shape == shape, f"{array.shape}, not {shape}")
    except (ValueError, EOFError, IndexError) as error:
        raise UserError(f"{path}: does not fit the data, or is corrupt ({error}); delete it, and "
                        "the same command will recreate it") from None
    return array


# ---------------------------------------------------------------- one file


def fetch(url, path, sha256=None, md5=None, size=None, token=None):
    """Download `url` to `path` unless it exists, and check it either way; -> Path.

    sha256, md5: hex digests; size: bytes; token: sent to the host of `url` only, not to where it
    redirects.  The hub reports the sha256 of its large files, which is checked if none is given.
    UserError, one line each: no network, 401/403, 404, a server that keeps failing, truncation
    (the part file is kept and resumed); a wrong size or checksum, an HTML page or Git-LFS pointer
    instead of the file, a full disk (the part file is removed).
    """
    path, known = Path(path), dict(size=size, sha256=sha256, md5=md5)
    if url.startswith(HUB + "/"):
        url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url[len(HUB):]
    if not path.is_file():
        with file_lock(path):
            if not path.is_file():
                print(f"fetching {url}\n      to {path}")
                _download(url, path, known, token)
                return path
    if problem := _problem(path, **known):   # the user may have put it there: do not delete it
        raise UserError(f"{path}: {problem}; delete it, and the same command fetches it again")
    return path


def _download(url, path, known, token):
    """Try until the part file is complete and right, then rename it."""
    part, tried, most = _part(path), 0, 0
    while True:
        begun = _length(part)
        try:
            stated = _receive(url, path, known["size"], token)
            problem = _problem(part, **{k: v or stated.get(k) for k, v in known.items()})
            if not problem:
                return os.replace(part, path)
            part.unlink()
            # the part may be of another version of the file: then try once more from the start
            raise (Retry if begun else UserError)(f"{url}: {problem}; the download was removed")
        except Retry as error:
            tried, most = 1 if _length(part) > most else tried + 1, max(most, _length(part))
            if tried >= TRIES:
                raise UserError("; ".join(error.args)) from None
            print(f"{error.args[0]}; trying again")
            time.sleep(WAIT * 2 ** (tried - 1))
        except requests.RequestException as error:         # not a URL, a redirect loop, ...
            raise UserError(f"{url}: {type(error).__name__}: {error}") from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise UserError(f"{path}: could not be written ({error.strerror})") from None
            part.unlink(missing_ok=True)
            raise UserError(f"{path}: the disk is full; make room, or set NOVAE_CACHE to a folder "
                            "on another disk (the partial download was removed)") from None


def _receive(url, path, size, token):
    """One request that appends what the part file lacks -> size, sha256 as the server reports."""
    part, have, cut = _part(path), _length(_part(path)), False
    if have and have == size:                              # killed just before the renaming
        return {}
    reply = _request(url, path, have, token)
    code, span = reply.status_code, reply.headers.get("Content-Range", "")
    if code == 200:                                        # the whole file, whatever was asked
        have, span = 0, "/" + reply.headers.get("Content-Length", "")
    first, total = (n and int(n) for n in re.match(         # "bytes 5-9/10", "bytes */10", "/10"
        r"(?:bytes (\d+)-)?.*?(?:/(\d+))?$", span).groups())
    if code == 416 and total == have > 0:
        return {}                                          # killed there too, the size unknown
    if code == 416 or code == 206 and first != have:
        part.unlink(missing_ok=True)
        raise Retry(f"{url}: cannot resume at byte {have:,}")
    total = total or size
    with (reply, open(part, "ab" if have else "wb") as file,
          tqdm(desc=path.name, total=total, initial=have, unit="B", unit_scale=True) as bar):
        try:
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        except NETWORK:
            cut = True
    if cut or _length(part) < (total or 0):
        of = f" of {total:,}" if total else ""
        raise Retry(f"{url}: truncated, {_length(part):,}{of} bytes received",
                    "the same command resumes from there")
    etags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in [*reply.history, reply]]
    return dict(size=total, sha256=next(filter(re.compile("[0-9a-f]{64}").fullmatch, etags), None))


def _request(url, path, have, token):
    """Ask for the bytes from `have` on -> the server's answer: 200, 206 or 416, else an error."""
    # identity: the file's own bytes, so that lengths and ranges mean the same on both sides
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    try:
        reply = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except NETWORK as error:
        reason = getattr(error.args[0] if error.args else error, "reason", error)
        raise Retry(f"{url}: no connection ({type(reason).__name__})",
                    f"without a network, get it elsewhere and save it as {path}") from None
    code, (page, gated, _) = reply.status_code, url.partition("/resolve/")
    if code in (200, 206, 416):
        return reply
    if code in (408, 429) or code >= 500:
        raise Retry(f"{url}: server error (HTTP {code})", "try later")
    if code in (401, 403) and gated:
        what = "the token in HF_TOKEN was rejected" if token else "a gated repository"
        raise UserError(f"{url}: HTTP {code}, {what}: accept the terms on {page}, and set HF_TOKEN "
                        "to a valid token of that account")
    raise UserError(f"{url}: HTTP {code}, {reply.reason or 'unexpected'}")


def _part(path):
    return path.with_name(f".{path.name}.part")


def _length(path):
    return path.stat().st_size if path.exists() else 0


def _problem(path, size, sha256, md5):
    """What is wrong with a file, or None."""
    with open(path, "rb") as file:
        head = file.read(512)
        # a safetensors file may begin like a page, " <": its brace distinguishes it
        if head[8:9] != b"{" and config.wrong_kind(head):
            return config.wrong_kind(head)
        if size is not None and _length(path) != size:
            return f"has {_length(path):,} bytes, not {size:,}"
        for kind, digest in dict(sha256=sha256, md5=md5).items():
            file.seek(0)
            if digest and hashlib.file_digest(file, kind).hexdigest() != digest:
                return f"its {kind} is wrong, so it is damaged or not the right file"


# ---------------------------------------------------------------- archives


def unpack(archive, folder, most_bytes=8 << 30):
    """Unpack a zip or tar archive (.tgz and the like) into `folder` unless that exists; -> Path.

    If everything is in one top folder, that becomes `folder`.  It appears complete or not at all.
    UserError: damaged or empty, larger than most_bytes once unpacked, a full disk, or a member that
    no data set needs: a link, a device, a path that leads out of the folder.
    """
    archive, folder = Path(archive), Path(folder)
    part = _part(folder)
    if folder.is_dir():
        return folder
    with file_lock(folder):
        if folder.is_dir():
            return folder
        shutil.rmtree(part, ignore_errors=True)            # of a run that was killed
        try:
            part.mkdir()
            _extract(archive, part, most_bytes)
            inside = list(part.iterdir())
            lone = len(inside) == 1 and inside[0].is_dir()
            os.replace(inside[0] if lone else part, folder)
        except UserError:
            raise
        except Exception as error:                 # tarfile, zipfile, gzip, lzma: each has its own
            reason = str(error).partition("\n")[0]
            if getattr(error, "errno", None):
                raise UserError(f"{folder}: could not be unpacked from {archive} "
                                f"({error.strerror})") from None
            raise UserError(f"{archive}: a damaged archive ({reason}); delete it and fetch it "
                            "again") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _extract(archive, part, most_bytes):
    """Stricter than tarfile's `data` filter and zipfile, which rename paths that lead out of the
    folder; links may pass the former."""
    with open(archive, "rb") as file:
        members = _zip_members if file.read(4) == b"PK\3\4" else _tar_members
    room = most_bytes
    for name, size, plain, extract in tqdm(members(archive, part), f"unpacking {archive.name}",
                                           unit=" files"):
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "__MACOSX":                         # macOS adds it: no images, only metadata
            continue
        if not parts[0] or ".." in parts or not plain:
            raise UserError(f"{archive}: {name!r} is a link or device, or would land outside the "
                            "folder; refused")
        room -= size + 512                                 # even an empty file takes space
        if room < 0:
            raise UserError(f"{archive}: more than {most_bytes:,} bytes once unpacked; refused")
        extract()
    if room == most_bytes:
        raise tarfile.ReadError("it is empty")


def _tar_members(archive, part):
    """Yields each member's name, its size once unpacked, whether it is a plain file or a folder,
    and a function that unpacks it into `part`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            yield (member.name, member.size, member.isreg() or member.isdir(),
                   partial(tar.extract, member, part, filter="data"))


def _zip_members(archive, part):
    """The same for a zip file; zipfile never writes more than the stated size."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)           # 0: not stated
            yield (member.filename, member.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR),
                   partial(file.extract, member, part))
