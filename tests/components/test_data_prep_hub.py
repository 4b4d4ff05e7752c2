"""A data set of a hub: the branch is pinned to its commit, the rows are streamed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(30)]
CONTENT = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
FILE = "data/train.jsonl"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as reading one data set takes."""

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        entry = {"type": "file", "oid": "b" * 40, "size": len(CONTENT), "path": FILE}
        folder = {"type": "directory", "oid": "c" * 40, "size": 0, "path": "data"}
        if path.startswith("/api/datasets/org/name/tree/"):
            return self.answer(json.dumps([folder, entry]).encode())
        if path.startswith("/api/datasets/org/name"):
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": FILE}]}
            return self.answer(json.dumps(info).encode())
        if path == f"/datasets/org/name/resolve/{COMMIT}/{FILE}":
            etag = hashlib.sha1(CONTENT).hexdigest()
            return self.answer(CONTENT, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
        return self.answer(b"{}", 404, **{"X-Error-Code": "EntryNotFound"})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


READ = """
import json
from tuneline.data_prep.sources import read_blocks
from tuneline.recipe import Source
import pyarrow as pa
digests = {}
(block,) = read_blocks(Source(path="hf://org/name@main"), digests)
rows = pa.ipc.open_stream(block.payload).read_all().to_pylist()
print(json.dumps([rows, block.where(4), digests]))
"""


def test_a_hub_s_branch_is_pinned_and_its_rows_are_streamed(endpoint: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": endpoint,  # read when the client is imported
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows, where, digests = json.loads(done.stdout.splitlines()[-1])
    assert rows == ROWS
    assert where == f"hf://org/name@{COMMIT} row 5"
    ((name, digest),) = digests.items()
    assert name == f"hf://org/name@{COMMIT} default/train" and digest.startswith("sha256:")
