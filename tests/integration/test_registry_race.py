"""Promotions race, die and stall against a real MLflow server: one winner, no lost alias."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneline.register import history
from tuneline.register.promote import Request, promote
from tuneline.register.register import register
from tuneline.tracking import Untracked

pytestmark = pytest.mark.slow

RACERS = 50
KILLED = 20
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def client(tracking: Any) -> Iterator[Any]:
    import mlflow

    mlflow.set_tracking_uri(tracking.uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def versions(
    client: Any, make_candidate: Make, request: pytest.FixtureRequest
) -> Callable[[int], tuple[str, list[int]]]:
    """A model with that many versions, the first of them champion."""

    def make(count: int) -> tuple[str, list[int]]:
        name = request.node.name
        register(*make_candidate(name), name, "", Untracked())
        first = client.get_model_version(name, "1")
        for _ in range(count - 1):  # the same files under more numbers
            client.create_model_version(
                name, "models:/" + name + "/1", tags=first.tags, await_creation_for=0
            )
        assert promote(name, Request(1, "me")).alias == "champion"
        return name, list(range(1, count + 1))

    return make


class Track:
    """The process that runs races."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def start(self, **options: Any) -> list[int]:
        """Let racers go; returns their process ids."""
        self._folder = self._folder.with_name(f"{self._folder.name}x")
        self._folder.mkdir()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**options, "folder": str(self._folder)}) + "\n")
        self._process.stdin.flush()
        return self._line()["pids"]

    def results(self) -> list[dict[str, Any]]:
        """How each ended, when all have."""
        found = []
        while line := self._line():
            found.append(line)
        return found

    def race(self, **options: Any) -> list[dict[str, Any]]:
        """Both."""
        self.start(**options)
        return self.results()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def track(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Track]:
    environment = {
        **os.environ,
        **server.environment(),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("racers.py"))],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield Track(process, tmp_path_factory.mktemp("race"))
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


class Watch:
    """Reads the alias `champion` all the time; tells every value that it took."""

    def __init__(self, client: Any, name: str) -> None:
        self.values: list[str] = []
        self.readings = 0
        self._client, self._name = client, name
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stopped.is_set()  # what the last process did is read too
            aliases = self._client.get_registered_model(self._name).aliases
            value = str(aliases.get("champion", "none"))
            self.readings += 1
            if not self.values or self.values[-1] != value:
                self.values.append(value)
            self._stopped.wait(0.2)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def champion(client: Any, name: str) -> int:
    return int(client.get_registered_model(name).aliases["champion"])


def test_of_fifty_racing_promotions_one_wins_though_many_are_killed(
    client: Any, versions: Callable[[int], tuple[str, list[int]]], track: Track
) -> None:
    name, (first, *others) = versions(RACERS + 1)
    dice = random.Random(7)
    # a promotion makes some 20 requests; its entry is written by about the twelfth
    deaths = [dice.randint(1, 20) for _ in range(KILLED)] + [0] * (RACERS - KILLED)
    dice.shuffle(deaths)
    racers = [
        {"version": version, "expect_champion": first, "die_at": death}
        for version, death in zip(others, deaths, strict=True)
    ]
    with Watch(client, name) as watch:
        ended = track.race(model=name, lease_seconds=5.0, racers=racers)
    now = history.read(client, name)
    assert [move.builds_on for move in now.moves] == [0, 1], "two winners"
    winner = now.champion
    assert winner in others
    by_end = {end: [e for e in ended if e["end"] == end] for end in {e["end"] for e in ended}}
    assert set(by_end) <= {"champion", "conflict", "killed"}, by_end
    assert len(by_end["killed"]) == sum(1 for death in deaths if death) or winner
    assert [e["version"] for e in by_end.get("champion", [])] in ([winner], [])
    assert len(by_end["conflict"]) >= RACERS - KILLED - 1
    assert all(f"version {winner} (entry" in e["sentence"] for e in by_end["conflict"])
    assert watch.values in (["1"], ["1", str(winner)]) and watch.readings > 20
    # also where the winner was killed before it set the alias, the next one completes it
    assert promote(name, Request(int(winner), "me", lease_seconds=0.5)).alias == "champion"
    assert client.get_registered_model(name).aliases == {
        "champion": str(winner), "previous": str(first), "challenger": str(first),
    }  # fmt: skip
    print({end: len(found) for end, found in by_end.items()}, "watch", watch.readings)


def test_wherever_a_promotion_dies_a_retry_completes_it(
    client: Any, versions: Callable[[int], tuple[str, list[int]]], track: Track
) -> None:
    """Killed before its first request, before its second, and so on to the last."""
    name, _ = versions(16)
    before = champion(client, name)
    died_after_its_entry = 0
    with Watch(client, name) as watch:
        for die_at in range(1, 40):
            version = before + 1
            racer = {"version": version, "expect_champion": None, "die_at": die_at}
            (ended,) = track.race(model=name, lease_seconds=0.5, racers=[racer])
            if ended["end"] == "champion":  # it makes no more requests than that
                break
            assert ended["end"] == "killed", ended
            if history.read(client, name).champion == before:
                assert champion(client, name) == before
                continue
            died_after_its_entry += 1
            assert champion(client, name) in (before, version)
            assert promote(name, Request(version, "me", lease_seconds=0.5)).alias == "champion"
            aliases = client.get_registered_model(name).aliases
            assert (aliases["champion"], aliases["previous"]) == (str(version), str(before))
            before = version
    assert died_after_its_entry >= 5 and die_at > 12
    assert watch.values == [str(n) for n in range(1, version + 1)]
    moves = history.read(client, name).moves
    assert [move.version for move in moves] == list(range(1, version + 1))


def test_a_stalled_promotion_that_wakes_up_does_not_take_the_alias_back(
    client: Any, versions: Callable[[int], tuple[str, list[int]]], track: Track
) -> None:
    name, _ = versions(3)
    stalled = {"version": 2, "expect_champion": 1, "stop_at_alias": True}
    (pid,) = track.start(model=name, lease_seconds=1.0, racers=[stalled])
    deadline = time.monotonic() + 60
    while (Path("/proc") / str(pid) / "stat").read_text().split()[2] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert champion(client, name) == 1
    assert promote(name, Request(3, "me", lease_seconds=1.0)).alias == "champion"
    assert client.get_registered_model(name).aliases["previous"] == "2"
    os.kill(pid, signal.SIGCONT)
    (ended,) = track.results()
    assert ended["end"] == "champion"  # it was, by the history, before it was replaced
    assert champion(client, name) == 3
    assert [move.version for move in history.read(client, name).moves] == [1, 2, 3]
