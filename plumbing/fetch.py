"""Files from the network: published weights and data sets, fetched once into a cache and checked.

A download grows in `.NAME.part` beside its target and takes its real name only when it is whole
and its sum is right: what is there can be trusted.  A cut connection goes on where it stopped, in
the next run too.  What cannot be mended ends in one line that says what to do.

Environment: NOVAE_CACHE, a folder instead of ~/.cache/novae; HF_ENDPOINT, a mirror instead of
https://huggingface.co; HF_TOKEN, for gated repositories there; HTTPS_PROXY and its like.
"""
import contextlib, errno, hashlib, os, re, shutil, tarfile, time, zlib
from pathlib import Path, PurePosixPath

import requests
from tqdm import tqdm

from plumbing import config
from plumbing.config import UserError

try:
    import fcntl
except ImportError:                          # Windows: two runs at once must take care themselves
    fcntl = None

HUB = "https://huggingface.co"
TRIES = 5                                    # in a row that bring nothing new
WAIT = 1.0                                   # seconds before the second try, doubled before each
TIMEOUT = 30                                 # seconds of silence


class Again(Exception):
    """A failure that another try may mend: what it is and, optionally, what to do if none does."""


def cache():
    """The folder where fetched files live."""
    return Path(os.environ.get("NOVAE_CACHE") or "~/.cache/novae").expanduser()


@contextlib.contextmanager
def alone(path, wait=True):
    """Holds off every other process that makes the same `path`: ranks, or a second run.  Look
    again inside whether it is there by now.  The system frees the lock of a process that dies.
    Gives whether the lock is held: without `wait`, False at once where another process has it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written to ({error.strerror})") from None
    mine = True
    with lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                mine = False
            except OSError:                                    # some network drives have no locks
                pass
        yield mine

# ---------------------------------------------------------------- one file


def fetch(url, path, sha256=None, md5=None, size=None, token=None):
    """Download `url` to `path` unless it is there, and check it either way; -> Path.

    sha256, md5: hex sums; size: bytes; token: sent to the host of `url` alone, not to where it
    redirects.  The hub tells the sum of its large files: it is checked when none is given.
    UserError, one line each: no network, 401/403, 404, a server that keeps failing, truncation
    (what came is kept, and gone on with next time); a wrong size or sum, an HTML page or Git-LFS
    pointer in place of the file, a full disk (what came is removed: it would be in the way).
    """
    path = Path(path)
    if url.startswith(HUB + "/"):
        url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url[len(HUB):]
    known = dict(size=size, sha256=sha256, md5=md5)
    if not path.is_file():
        with alone(path):
            if not path.is_file():
                print(f"fetching {url}\n      to {path}")
                _insist(url, path, known, token)
                return path
    problem = _problem(path, **known)
    if problem:                                # laid there by hand, perhaps: not ours to delete
        raise UserError(f"{path}: {problem}; delete it, and the same command fetches it anew")
    return path


def _insist(url, path, known, token):
    """Try until the part is whole and right, then rename it; wait twice as long after each try."""
    part = _part(path)
    tried, most = 0, _length(part)
    while True:
        begun = _length(part)
        try:
            said = _receive(url, path, known["size"], token)
            problem = _problem(part, **{k: v or said.get(k) for k, v in known.items()})
            if not problem:
                os.replace(part, path)
                return
            part.unlink()
            # the beginning may come from another version of the file: then once more, all of it
            raise (Again if begun else UserError)(f"{url}: {problem}; what came was removed")
        except Again as error:
            tried, most = 1 if _length(part) > most else tried + 1, max(most, _length(part))
            if tried >= TRIES:
                raise UserError("; ".join(error.args)) from None
            print(f"{error.args[0]}; trying again")
            time.sleep(WAIT * 2 ** (tried - 1))
        except requests.RequestException as error:         # an address that is none, and the like
            raise UserError(f"{url}: {type(error).__name__}: {error}") from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise UserError(f"{path}: could not be written ({error.strerror})") from None
            part.unlink(missing_ok=True)
            raise UserError(f"{path}: the disk is full; make room, or set NOVAE_CACHE to a folder "
                            "on another one (what had come was removed)") from None


def _receive(url, path, size, token):
    """One request: append what the part lacks; -> what the server says of size and sha256."""
    part = _part(path)
    have, total, answered, cut = _length(part), size, False, False
    if size is not None and have == size:                  # killed just before the renaming
        return {}
    # identity: the file's own bytes, so that lengths and ranges mean the same on both sides
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
            answered = True
            first, whole = _range(r)
            if r.status_code == 416 and whole == have > 0:
                return {}                                  # nothing was lacking
            if r.status_code == 416 or r.status_code == 206 and first != have:
                part.unlink(missing_ok=True)
                raise Again(f"{url}: cannot go on at byte {have}")
            _refusals(r, url, token)
            if r.status_code == 200:                       # knows no ranges: sends it all
                have, whole = 0, _number(r.headers.get("Content-Length"))
            total = size if whole is None else whole
            sums = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in [*r.history, r]]
            with (open(part, "ab" if have else "wb") as file,
                  tqdm(total=total, initial=have, unit="B", unit_scale=True, dynamic_ncols=True,
                       desc=path.name) as bar):
                for chunk in r.iter_content(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
    except (requests.ConnectionError, requests.Timeout,
            requests.exceptions.ChunkedEncodingError) as error:
        if not answered:
            reason = getattr(error.args[0] if error.args else error, "reason", error)
            raise Again(f"{url}: no connection ({type(reason).__name__})",
                        f"without a network, get it elsewhere and save it as {path}") from None
        cut = True
    if cut or total is not None and _length(part) < total:
        raise Again(f"{url}: truncated, {_length(part):,} of "
                    f"{f'{total:,}' if total else 'more'} bytes",
                    "the same command goes on from there")
    return dict(size=total, sha256=next((s for s in sums if re.fullmatch("[0-9a-f]{64}", s)), None))


def _refusals(r, url, token):
    """Every answer but 200 and 206, in the words of somebody who has to do something about it."""
    code = r.status_code
    if code in (401, 403):
        page = url.split("/resolve/")[0]
        if page == url:
            raise UserError(f"{url}: the server refuses it (HTTP {code})")
        raise UserError(f"{url}: HTTP {code}, " + (
            "the token in HF_TOKEN is refused; accept the terms with its account on "
            if token else "a gated repository: accept its terms on ") + page + (
            ", or renew it" if token else ", and set HF_TOKEN to a token of that account"))
    if code in (408, 429) or code >= 500:
        raise Again(f"{url}: the server fails (HTTP {code})", "try later")
    if code not in (200, 206):
        raise UserError(f"{url}: " + ("not there any more" if code in (404, 410) else
                                      "unexpected answer") + f" (HTTP {code})")


def _range(r):
    """Content-Range: bytes 5-9/10 -> (5, 10); None for what it does not say."""
    m = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", r.headers.get("Content-Range", ""))
    return (_number(m[1]), _number(m[2])) if m else (None, None)


def _number(text):
    return int(text) if text and text.isdigit() else None


def _part(path):
    return path.with_name(f".{path.name}.part")


def _length(path):
    return path.stat().st_size if path.exists() else 0


def _problem(path, size, sha256, md5):
    """What is wrong with a file, or None."""
    with open(path, "rb") as file:
        head = file.read(512)
        # a safetensors file may begin like a page, " <": its brace tells them apart
        if head[8:9] != b"{" and config.wrong_kind(head):
            return config.wrong_kind(head)
        if size is not None and _length(path) != size:
            return f"has {_length(path):,} bytes and not {size:,}"
        for kind, want in dict(sha256=sha256, md5=md5).items():
            file.seek(0)
            if want and hashlib.file_digest(file, kind).hexdigest() != want:
                return f"its {kind} is wrong, so it is damaged or not the file that it should be"

# ---------------------------------------------------------------- archives


def unpack(archive, folder, most_bytes=8 << 30):
    """Unpack a tar archive (.tgz ...) into `folder` unless that exists; -> Path.

    When all of it is in one top folder, that becomes `folder`.  It appears whole or not at all.
    UserError: damaged, larger than most_bytes once unpacked, a full disk, or with anything in it
    that a data set has no use for: links, devices, names that lead out of the folder.
    """
    archive, folder = Path(archive), Path(folder)
    part = _part(folder)
    if folder.is_dir():
        return folder
    with alone(folder):
        if folder.is_dir():
            return folder
        shutil.rmtree(part, ignore_errors=True)            # of a run that was killed
        try:
            part.mkdir()
            _extract(archive, part, most_bytes)
            inside = list(part.iterdir())
            lone = len(inside) == 1 and inside[0].is_dir()
            os.replace(inside[0] if lone else part, folder)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{archive}: a damaged archive ({reason}); delete it, and the same "
                            "command fetches it anew") from None
        except OSError as error:
            raise UserError(f"{folder}: could not be unpacked from {archive} "
                            f"({error.strerror or error})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _extract(archive, part, most_bytes):
    """Every member after a look at it; Python's own `data` filter looks once more."""
    room = most_bytes
    with tarfile.open(archive) as tar:
        for member in tqdm(tar, desc=f"unpacking {archive.name}", unit=" files"):
            name = PurePosixPath(member.name.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{archive}: {member.name!r} would land outside of the folder")
            if not (member.isreg() or member.isdir()):
                raise UserError(f"{archive}: {member.name!r} is a link or device; refused")
            room -= member.size + 512                      # an empty file is not free either
            if room < 0:
                raise UserError(f"{archive}: more than {most_bytes:,} bytes once unpacked; refused")
            tar.extract(member, part, filter="data")
