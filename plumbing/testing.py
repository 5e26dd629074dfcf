"""What the three test files share: the command line, in its own process or in this one."""
import contextlib, io, os, re, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from plumbing import fetch
from plumbing.config import UserError, one_line_errors

ROOT = Path(__file__).parents[1]


def start(script):
    """'ae.py', or a module such as 'lab.evidence' -> the beginning of its command line."""
    return [sys.executable, *([str(ROOT / script)] if script.endswith(".py") else ["-m", script])]


def run(script, *args, cwd, **more):
    """A script or module as a user starts it, in its own process."""
    return subprocess.run([*start(script), *map(str, args)], cwd=cwd, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **more)


def call(module, *args, cwd):
    """The same command in this process, without the seconds that an import of torch takes."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            with one_line_errors():
                module.main([*map(str, args)])
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):                    # as the interpreter does
                print(code, file=sys.stderr)
                code = 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def one_line(result, *words, code=1):
    """A user's error: the exit status, one clear line at the end, no traceback."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


def refuses(*words, call, **more):
    """call(**more) raises a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        call(**more)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value


def picture(path, size=(50, 40), mode="RGB", **more):
    """Write an image file of noise."""
    rng = np.random.default_rng(sum(path.name.encode()))
    array = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(path, **more)


def left(folder):
    """The names in a folder, but not the lock files."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def threads(function, *args, **more):
    """Call it three times at once, as ranks do; -> the three results."""
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(function, *args, **more) for _ in range(3)]
        return [job.result() for job in jobs]


class Handler(BaseHTTPRequestHandler):
    """A file server with faults.  server.files: path -> bytes; server.log: (path, headers) of each
    request; server.plan: path -> what to do instead, in order: a status, a redirect's headers,
    "cut" (close after half), "plain" (no ranges, no Content-Length), None (serve normally)."""

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path)
        server.log.append((self.path, dict(self.headers)))
        act = (server.plan.get(self.path) or [404 if body is None else None]).pop(0)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and act != "plain" else 0
        status, headers = 206 if start else 200, {}
        if isinstance(act, (int, dict)):
            status, headers, body = (act, {}, b"") if isinstance(act, int) else (302, act, b"")
        elif start:
            place = f"{start}-{len(body) - 1}" if start < len(body) else "*"
            status = 416 if place == "*" else 206
            headers["Content-Range"] = f"bytes {place}/{len(body)}"
        self.send_response(status)
        if act != "plain":
            headers["Content-Length"] = max(len(body) - start, 0)
        for header in headers.items():
            self.send_header(*map(str, header))
        self.end_headers()
        self.wfile.write(body[start:(start + len(body)) // 2 if act == "cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts file servers on 127.0.0.1: serve(name=bytes, ...) -> server with .url, .plan, .log;
    the one started last is the hub."""
    servers = []

    def start_server(**files):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.files, server.plan, server.log = {f"/{k}": v for k, v in files.items()}, {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        return servers.append(server) or server
    monkeypatch.setattr(fetch, "WAIT", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NOVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield start_server
    for server in servers:
        server.shutdown(), server.server_close()
