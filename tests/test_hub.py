"""Data sets on the Hugging Face hub, read over real HTTP from a small server that answers as the hub does."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.test_data import write_parquet

ROOT = Path(__file__).parents[1]
CLIENT = """
from nextscale.config.data import DataConfig
from nextscale.data import datasets
datasets._IN_MEMORY = 0
train, held_out, source = datasets.open_dataset("someone/photos", 8, DataConfig(), 0)
batch = train.fetch(range(10), None)
print(len(train), len(held_out), source.class_names, sorted(batch["label"].tolist()), batch["unreadable"])
"""


@pytest.fixture
def hub(tmp_path):
    """A server with the data set someone/photos; its address and the ranges of files that were asked for."""
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", range(10))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(4))
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            if "/api/datasets/someone/photos/tree/" in path:
                files = {str(p.relative_to(tmp_path)): p.stat().st_size for p in tmp_path.rglob("*.parquet")}
                entries = [{"type": "file", "oid": "0" * 40, "size": n, "path": p} for p, n in files.items()]
                return self.answer(200, json.dumps(entries).encode())
            if path.startswith("/api/datasets/someone/photos"):
                return self.answer(200, json.dumps({"id": "someone/photos", "sha": "a" * 40}).encode())
            if match := re.match(r"/datasets/someone/photos/resolve/[^/]+/(.*)", path):
                content = (tmp_path / match[1]).read_bytes()
                first, last = re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
                asked.append(match[1])
                return self.answer(206, content[int(first) : int(last) + 1])
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status, body, headers=()):
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **dict(headers),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def ask(address: str, code: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_a_data_set_is_read_without_a_copy(hub, tmp_path):
    address, asked = hub
    done = ask(address, CLIENT)
    assert done.stdout.strip() == "10 4 ('cat', 'dog') [0, 0, 0, 0, 0, 1, 1, 1, 1, 1] []", done.stderr[-2000:]
    assert {Path(name).name for name in asked} == {"train-00000-of-00001.parquet", "test-00000-of-00001.parquet"}


def test_an_absent_data_set_is_named(hub):
    done = ask(hub[0], CLIENT.replace("someone/photos", "nobody/nothing"))
    assert "there is no folder nobody/nothing, and the hub gave no data set of that name" in done.stderr
