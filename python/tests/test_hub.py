"""Downloads, from a hub on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import numpy as np
import pytest

import deltafox
from conftest import TINY

ID, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix in (".json", ".txt", ".safetensors")}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        if self.path.startswith(f"/api/models/{ID}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            return self.send(json.dumps({"sha": COMMIT, "siblings": siblings}).encode())
        name = self.path.removeprefix(f"/{ID}/resolve/{COMMIT}/")
        if name not in FILES:
            return self.send_error(404)
        self.send(FILES[name])

    def send(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_id_is_downloaded_once(hub):
    ids = np.arange(1, 9).reshape(1, 8)
    logits = deltafox.AutoModelForCausalLM.from_pretrained(ID)(ids).logits
    hub.shutdown()  # what comes now is in the cache
    again = deltafox.AutoModelForCausalLM.from_pretrained(ID, local_files_only=True)
    assert np.array_equal(again(ids).logits, logits)
    assert deltafox.AutoTokenizer.from_pretrained(ID).vocab_size == again.info.vocab_size


def test_progress_is_shown_where_tqdm_is(hub):
    bars = []

    class Bar:
        def __init__(self, desc, unit, unit_scale):
            assert (unit, unit_scale) == ("B", True)
            self.desc, self.n, self.total, self.closed = desc, 0, None, False
            bars.append(self)

        def update(self, n):
            self.n += n

        def close(self):
            self.closed = True

    auto = mock.Mock(tqdm=Bar)
    with mock.patch.dict("sys.modules", {"tqdm": mock.Mock(auto=auto), "tqdm.auto": auto}):
        deltafox.pull(ID)
    assert {bar.desc: bar.n for bar in bars} == {name: len(data) for name, data in FILES.items()}
    assert all(bar.total == bar.n and bar.closed for bar in bars)


def test_no_bars_are_fine(hub):
    with mock.patch.dict("sys.modules", {"tqdm": None, "tqdm.auto": None}):
        directory = deltafox.pull(ID)
    assert deltafox.pull(ID, progress=False) == directory


def test_what_is_not_there_is_named(hub):
    with pytest.raises(deltafox.Error, match="someone/else"):
        deltafox.pull("someone/else")
