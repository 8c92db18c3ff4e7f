"""`torchtitan download` from a hub of our own: a local HTTP server that speaks its protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchtitan.commands import download
from torchtitan.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors": b"w" * 300_000,
    "tokenizer.json": b'{"t": 1}',
    "tokenizer_config.json": b"{}",
    "README.md": b"no part of it",
    "pytorch_model.bin": b"not wanted",
    "original/consolidated.safetensors": b"the same weights in another format",
}


class Hub(BaseHTTPRequestHandler):
    """Serves `good/model`; `private/model` to those with a token; `gated/model` to nobody."""

    requests: list[str]
    cut_off: bool
    """Break off in the middle of the weights."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        repo, _, rest = path.partition("/resolve/") if "/resolve/" in path else (path, "", "")
        repo = "/".join(repo.split("/")[:2])
        if repo == "gated/model":
            self._refuse(403, "GatedRepo")
        elif repo == "broken/model":
            self._refuse(500, "")
        elif repo == "private/model" and self.headers.get("Authorization") != "Bearer secret":
            self._refuse(401, "RepoNotFound")
        elif repo not in ("good/model", "private/model"):
            self._refuse(404, "RepoNotFound")
        elif "nowhere" in path:
            self._refuse(404, "RevisionNotFound")
        elif rest:
            self._send_file(rest.partition("/")[2], with_body)
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c)} for n, c in FILES.items()]
            for entry in entries:
                entry["oid"] = hashlib.sha1(FILES[entry["path"]]).hexdigest()
            self._send(200, json.dumps(entries).encode(), with_body)
        else:
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(info).encode(), with_body)

    def _send_file(self, name: str, with_body: bool) -> None:
        content = FILES[name]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, asked = 200, self.headers.get("Range", "")
        if with_body and asked.startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        if with_body and name == "model.safetensors" and self.server.cut_off:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if status == 200:
                self.wfile.write(content[:100_000])
            self.close_connection = True
            return
        self._send(status, content, with_body, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", True, {"X-Error-Code": code, "X-Error-Message": "no"})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.cut_off = [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub: ThreadingHTTPServer | int, folder: Path, *arguments: str, **env: str):
    port = hub if isinstance(hub, int) else hub.server_port
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = inherited | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "torchtitan", "download", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment | env, capture_output=True, text=True, timeout=120
    )


def refused(*arguments: object, code: int = 2, **env: str) -> str:
    done = run(*arguments, **env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_everything_but_what_is_not_needed(hub, tmp_path):
    done = run(hub, tmp_path, "good/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{Path('assets', 'model')}: 5 files, 300 kB\n"
    out = tmp_path / "assets" / "model"
    assert names(out) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert not (out / "original").exists()
    assert all((out / name).read_bytes() == FILES[name] for name in names(out))

    hub.requests.clear()
    assert run(hub, tmp_path, "good/model").returncode == 0
    assert not any(line.startswith("GET") and "model.safetensors" in line for line in hub.requests)


def test_a_download_that_was_cut_off_goes_on(hub, tmp_path):
    hub.cut_off = True
    message = refused(hub, tmp_path, "good/model", code=1)
    assert "the same command fetches the rest" in message
    out = tmp_path / "assets" / "model"
    assert "model.safetensors" not in names(out)
    kept = names(out)
    hub.cut_off = False
    hub.requests.clear()
    done = run(hub, tmp_path, "good/model")
    assert done.returncode == 0, done.stderr
    fetched = {line.split()[1].split("/")[-1] for line in hub.requests if "GET /good" in line}
    assert "model.safetensors" in fetched and not fetched & kept
    assert (out / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_parts_into_a_folder_that_has_another_file(hub, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("not counted")
    done = run(
        *(hub, tmp_path, "good/model", "--out", "here", "--include", "tokenizer"),
        *("--include", "config"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "here: 4 files, 14 B\n"
    assert names(tmp_path / "here") == {
        *(
            "notes.txt",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }


def test_a_private_model_needs_the_token(hub, tmp_path):
    message = refused(hub, tmp_path, "private/model")
    assert "private/model does not exist at http" in message and "set HF_TOKEN" in message
    message = refused(hub, tmp_path, "private/model", HF_TOKEN="wrong")
    assert "check the token in HF_TOKEN" in message
    done = run(hub, tmp_path, "private/model", "--include", "config", HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr


def test_what_the_hub_refuses(hub, tmp_path):
    assert "good/modle does not exist at http://127" in refused(hub, tmp_path, "good/modle")
    assert "accepted its terms" in refused(hub, tmp_path, "gated/model")
    message = refused(hub, tmp_path, "good/model", "--revision", "nowhere")
    assert "good/model has no revision 'nowhere'" in message
    assert "is not a model name" in refused(hub, tmp_path, "a/b/c")
    assert not (tmp_path / "assets").exists() or not names(tmp_path / "assets")


def test_offline(tmp_path):
    port = 9  # `discard`, where nobody listens
    message = refused(port, tmp_path, "good/model", code=1)
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "HF_HUB_OFFLINE" in refused(port, tmp_path, "good/model", HF_HUB_OFFLINE="1")


def test_a_hub_that_fails_is_an_outage(hub, tmp_path):
    message = refused(hub, tmp_path, "broken/model", code=1)
    assert "500 Internal Server Error" in message
    assert message.endswith("try again")


def test_out_that_is_a_file(hub, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "--out file is a file" in refused(hub, tmp_path, "good/model", "--out", "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'torchtitan\[hub\]'"):
        download.main(["good/model"])
