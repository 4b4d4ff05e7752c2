"""A training run that is killed again and again ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneline import artifacts
from tuneline.data_prep.prepare import prepare
from tuneline.recipe import DataSection

TRAINING = {
    "epochs": 3,
    "learning_rate": 0.01,
    "batch_tokens": 128,
    "gradient_accumulation_steps": 2,
    "evaluations": 6,
    "checkpoint_minutes": 0,
    "load_best": True,
}
METHOD = {"name": "lora", "dropout": 0.1, "target_modules": ["all-linear"]}


class Server:
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kills"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def request_(
    tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    dataset = tmp_path_factory.mktemp("prepared") / "data"
    prepare(str(tiny_model), DataSection(train=(str(chats_file),)), dataset)
    return {
        "base_model": str(tiny_model),
        "dataset": str(dataset),
        "method": METHOD,
        "training": TRAINING,
    }


@pytest.fixture(scope="module")
def whole(server: Server, request_: dict[str, Any]) -> artifacts.Artifact:
    """Of a run that nothing stopped."""
    server.start("whole", **request_)
    assert server.wait() == 0, server.log("whole").read_text()
    return artifacts.load(server.root / "whole", "adapter")


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_equals_the_uninterrupted_one(
    server: Server, request_: dict[str, Any], whole: artifacts.Artifact
) -> None:
    chance = random.Random(20)
    kills = [signal.SIGKILL, signal.SIGTERM] * 5
    chance.shuffle(kills)
    landed = []
    for number in kills:
        steps = _steps(server.log("killed"))
        pid = server.start("killed", **request_)
        # by steps and not by the clock, whose pace depends on what else the machine does; the
        # moment within a step is random, and most of the time a checkpoint is written in it
        wanted = steps + chance.randrange(3)
        _wait_until(lambda: _steps(server.log("killed")) >= wanted, server.log("killed"))  # noqa: B023
        time.sleep(chance.random() * 0.1)
        os.kill(pid, number)
        code = server.wait()
        text = server.log("killed").read_text()
        assert code in (-signal.SIGKILL, 143), text
        assert (code == 143) == (number == signal.SIGTERM)
        assert not (server.root / "killed").exists()
        landed.append(text.count("going on from"))
    server.start("killed", **request_)
    text = server.log("killed").read_text()
    assert server.wait() == 0, text
    killed = artifacts.load(server.root / "killed", "adapter")
    assert landed[-1] >= 5, "the kills came before there was anything to go on from"
    # every loss, rate and norm of every logged step, the validation losses, and the weights
    assert (killed.path / "history.jsonl").read_text() == (whole.path / "history.jsonl").read_text()
    assert killed.digest == whole.digest
    assert not any((server.root / "checkpoints").iterdir()), "removed after success"


def _steps(log: Path) -> int:
    return log.read_text().count("  loss ") if log.exists() else 0


def _wait_until(is_so: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.01)


def _wait_for(log: Path, text: str) -> None:
    _wait_until(lambda: log.exists() and text in log.read_text(), log)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_previous_checkpoint(
    server: Server, request_: dict[str, Any], whole: artifacts.Artifact
) -> None:
    pid = server.start("full", **request_)
    _wait_for(server.log("full"), "step 20/")
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 143, server.log("full").read_text()
    (folder,) = (server.root / "checkpoints").iterdir()
    before = sorted(path.name for path in folder.iterdir())
    server.start("full", file_size_limit=20_000, **request_)
    assert server.wait() == 1
    (sentence,) = [
        line for line in server.log("full").read_text().splitlines() if line.startswith("error: ")
    ][1:]
    assert "File too large" in sentence and "the last complete one is step-" in sentence
    assert sorted(path.name for path in folder.iterdir()) == before
    server.start("full", **request_)
    assert server.wait() == 0, server.log("full").read_text()
    assert artifacts.load(server.root / "full", "adapter").digest == whole.digest


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_named(
    server: Server, request_: dict[str, Any], whole: artifacts.Artifact
) -> None:
    pid = server.start("damaged", **request_)
    _wait_for(server.log("damaged"), "step 12/")
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 143
    assert "a checkpoint of step" in server.log("damaged").read_text()
    (folder,) = (server.root / "checkpoints").iterdir()
    older, newest = sorted(folder.glob("step-*"))[-2:]
    weights = newest / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-7] + b"damaged")
    server.start("damaged", **request_)
    assert server.wait() == 0, server.log("damaged").read_text()
    text = server.log("damaged").read_text()
    assert f"warning: checkpoint {newest} is skipped: optimizer.pt differs from its" in text
    assert f"going on from {older}" in text
    assert artifacts.load(server.root / "damaged", "adapter").digest == whole.digest
