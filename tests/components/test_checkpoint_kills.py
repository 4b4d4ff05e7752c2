"""A training run that is killed again and again ends as if nothing had happened."""

import os
import random
import re
import signal
import socket
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


@pytest.fixture(scope="module")
def server(
    training_server: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    server = training_server(tmp_path_factory.mktemp("kills"))
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
def whole(server: Any, request_: dict[str, Any]) -> artifacts.Artifact:
    """Of a run that nothing stopped."""
    server.start("whole", **request_)
    assert server.wait() == 0, server.log("whole").read_text()
    return artifacts.load(server.root / "whole", "adapter")


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_equals_the_uninterrupted_one(
    server: Any, request_: dict[str, Any], whole: artifacts.Artifact
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
    server: Any, request_: dict[str, Any], whole: artifacts.Artifact
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
    server: Any, request_: dict[str, Any], whole: artifacts.Artifact
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


BUCKET = "checkpoints"


class Machine:
    """A disk of its own, and the way to the store."""

    def __init__(self, root: Path, prefix: str, environment: dict[str, str]) -> None:
        self.environment = environment | {
            "TUNELINE_CHECKPOINTS": f"s3://{BUCKET}/{prefix}",
            "TUNELINE_CACHE": str(root),
        }

    def checkpoints(self) -> list[str]:
        folder = Path(self.environment["TUNELINE_CACHE"]) / "checkpoints-s3"
        return sorted(path.name for path in folder.glob("*/step-*"))


def names_in(client: Any, prefix: str) -> list[str]:
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", ())
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in found]


def steps_in(client: Any, prefix: str) -> list[int]:
    """Of the complete checkpoints."""
    found = [re.search(r"step-(\d+)-\w+/checkpoint.json$", n) for n in names_in(client, prefix)]
    return [int(match[1]) for match in found if match]


@pytest.fixture
def client(store_client: Callable[[str], Any]) -> Any:
    return store_client(BUCKET)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_store_on_an_empty_disk(
    server: Any,
    request_: dict[str, Any],
    whole: artifacts.Artifact,
    client: Any,
    seaweed: Any,
    tmp_path: Path,
) -> None:
    machines = [Machine(tmp_path / name, "kills", seaweed.environment) for name in "abc"]
    steps = [0]
    for machine, number in zip(machines, [signal.SIGKILL, signal.SIGTERM], strict=False):
        pid = server.start("moved", environment=machine.environment, **request_)
        _wait_until(lambda: steps_in(client, "kills")[-1:] > steps[-1:], server.log("moved"))  # noqa: B023
        os.kill(pid, number)
        code = server.wait()
        assert code == (143 if number == signal.SIGTERM else -number), server.log("moved")
        steps = steps_in(client, "kills")
        assert len(steps) <= 3, "save_total_limit and the best"
    text = server.log("moved").read_text()
    assert f"a checkpoint of step {steps[-1]} was written: run it again" in text.splitlines()[-1]
    server.start("moved", environment=machines[2].environment, **request_)
    assert server.wait() == 0, server.log("moved").read_text()
    text = server.log("moved").read_text()
    assert text.count("fetching checkpoint s3://checkpoints/kills/") >= 2
    assert text.count("going on from") == 2
    moved = artifacts.load(server.root / "moved", "adapter")
    assert (moved.path / "history.jsonl").read_text() == (whole.path / "history.jsonl").read_text()
    assert moved.digest == whole.digest
    assert names_in(client, "kills") == [] and machines[2].checkpoints() == []


@pytest.mark.slow
def test_a_store_that_goes_away_costs_a_warning_and_no_training(
    server: Any,
    request_: dict[str, Any],
    whole: artifacts.Artifact,
    client: Any,
    door: Any,
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path / "disk", "away", door.environment)
    pid = server.start("away", environment=machine.environment, **request_)
    _wait_for(server.log("away"), "step 6/")
    door.close()
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 143, server.log("away").read_text()
    last = server.log("away").read_text().splitlines()[-1]
    assert "a checkpoint of step" in last and f"it is in {tmp_path}/disk/checkpoints-s3/" in last
    assert "Could not connect" in last and "run it again on this disk" in last
    newest = machine.checkpoints()[-1]

    server.start("away", environment=machine.environment, **request_)
    assert server.wait() == 1
    last = server.log("away").read_text().splitlines()[-1]
    assert last.startswith("error: checkpoints can't be kept in TUNELINE_CHECKPOINTS=s3://")
    assert machine.checkpoints()[-1] == newest, "nothing was done anew"

    door.open()
    server.start("away", environment=machine.environment, **request_)
    _wait_for(server.log("away"), "going on from")
    assert any(newest in name for name in names_in(client, "away")), "sent before it goes on"
    _wait_for(server.log("away"), "step 12/")
    door.close()
    assert server.wait() == 0, server.log("away").read_text()
    text = server.log("away").read_text()
    assert "is on this disk only and is sent with the next one: s3://" in text
    assert f"warning: the checkpoints in s3://{BUCKET}/away/" in text.splitlines()[-1]
    assert artifacts.load(server.root / "away", "adapter").digest == whole.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"TUNELINE_CHECKPOINTS": "s3://no-such-bucket/here"}, "NoSuchBucket"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "InvalidAccessKeyId"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "Invalid endpoint"),
        ({"TUNELINE_CHECKPOINTS": "gs://bucket/here"}, "name a folder or s3://bucket/prefix"),
    ],
)
def test_a_store_that_can_not_be_used_is_one_sentence_before_training(
    server: Any,
    request_: dict[str, Any],
    client: Any,
    seaweed: Any,
    tmp_path: Path,
    change: dict[str, str],
    said: str,
) -> None:
    environment = Machine(tmp_path, "wrong", seaweed.environment).environment | change
    log = server.log(tmp_path.name)
    server.start(tmp_path.name, environment=environment, **request_)
    assert server.wait() == 1, log.read_text()
    (sentence,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert said in sentence and ("TUNELINE_CHECKPOINTS" in sentence or "AWS_" in sentence)
    assert "trainable" not in log.read_text(), "before the model was loaded"
    assert not (server.root / tmp_path.name).exists()


@pytest.mark.slow
def test_every_machine_of_a_run_goes_on_from_the_same_checkpoint(
    server: Any,
    training_server: Callable[[Path], Any],
    request_: dict[str, Any],
    client: Any,
    seaweed: Any,
    tmp_path: Path,
) -> None:
    other = training_server(tmp_path)

    def run(output: str, disks: str, *, stop_at: str = "") -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        pids = []
        for rank, process in enumerate((server, other)):
            machine = Machine(tmp_path / f"{disks}{rank}", "ranks", seaweed.environment)
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = machine.environment | ranks
            pids.append(process.start(output, environment=environment, **request_))
        if stop_at:
            _wait_for(server.log(output), stop_at)
            os.kill(pids[0], signal.SIGTERM)  # of one machine: the other stops with it
        return [server.wait(), other.wait()]

    try:
        assert run("two", "whole") == [0, 0], server.log("two").read_text()
        stopped = run("stopped", "first", stop_at="step 6/")
        assert stopped == [143, 143], server.log("stopped").read_text()
        assert any("rng_state_1.pth" in name for name in names_in(client, "ranks"))
        assert run("stopped", "second") == [0, 0], other.log("stopped").read_text()
    finally:
        other.close()
    assert "going on from" in server.log("stopped").read_text()
    brought = tmp_path / "second1" / "checkpoints-s3"
    assert brought.is_dir() and not list(brought.glob("*/*")), "on a disk of its own, then removed"
    results = [artifacts.load(server.root / name, "adapter") for name in ("two", "stopped")]
    assert results[0].digest == results[1].digest
    assert names_in(client, "ranks") == []
