"""Figures reach the server once each, whatever happens to the server or to the process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tuneline.errors import RegistryError
from tuneline.spool import Entry, Spool
from tuneline.tracking import tracked


class Receiver:
    """A destination that can be away."""

    def __init__(self) -> None:
        self.away = False
        self.got: list[tuple[str, int, float]] = []
        self.calls = 0

    def __call__(self, entries: Sequence[Entry]) -> None:
        self.calls += 1
        if self.away:
            raise RegistryError("away")
        self.got += [(k, e.step, v) for e in entries for k, v in e.metrics.items()]


def test_what_is_put_arrives_in_order_in_few_requests(tmp_path: Path) -> None:
    receiver = Receiver()
    spool = Spool(tmp_path / "run.jsonl", receiver)
    for step in range(600):
        spool.put({"loss": step / 3, "rate": 0.1}, step)
    assert spool.close(30)
    assert [g for g in receiver.got if g[0] == "loss"] == [("loss", s, s / 3) for s in range(600)]
    assert len(receiver.got) == 1200 and 2 <= receiver.calls <= 4
    spool.remove()
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_sent_is_sent_by_the_next_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver = Receiver()
    receiver.away = True
    spool = Spool(tmp_path / "run.jsonl", receiver)
    spool.put({"loss": 1.0}, 1)
    assert not spool.close(0.5)
    assert "wait in" in capsys.readouterr().out
    spool._thread.join(0.1)
    receiver.away = False
    again = Spool(tmp_path / "run.jsonl", receiver)
    again.put({"loss": 1.0}, 1)  # a resumed run computes it again
    again.put({"loss": 2.0}, 2)
    assert again.close(30)
    assert sorted(set(receiver.got)) == [("loss", 1, 1.0), ("loss", 2, 2.0)]


def test_half_a_line_that_a_kill_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    entry = {"metrics": {"loss": 1.0}, "step": 1, "time_ms": 5, "status": ""}
    path.write_text(json.dumps(entry) + "\n" + json.dumps(entry)[:20])
    receiver = Receiver()
    spool = Spool(path, receiver)
    spool.put({"loss": 2.0}, 2)
    assert spool.close(30)
    assert receiver.got == [("loss", 1, 1.0), ("loss", 2, 2.0)]


def test_only_one_process_writes_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run.jsonl", Receiver())
    with pytest.raises(BlockingIOError):
        Spool(tmp_path / "run.jsonl", Receiver())
    spool.close(5)


# ---- a real server


class MlflowServer:
    """`mlflow server` on a sqlite file, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--workers", "1",
                    "--host", "127.0.0.1", "--port", str(self.port),
                    "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
                    "--artifacts-destination", str(self._folder / "artifacts"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        import requests

        deadline = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"{self.uri}/health", timeout=1).ok:
                    return
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("away_seconds", [3, 60])
def test_an_outage_of_the_server_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, away_seconds: int
) -> None:
    import mlflow

    server = MlflowServer(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    # else a first try against a server that is away takes minutes inside of the client
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    steps = 40
    slowest = 0.0
    try:
        with tracked("pipeline-run", "finetune_lora", experiment="outage") as step:
            for number in range(1, steps + 1):
                if number == steps // 4:
                    server.stop()
                    stopped = time.monotonic()
                if number == steps // 2:  # half of the steps fall into the outage
                    time.sleep(max(0.0, away_seconds - (time.monotonic() - stopped)))
                    server.start()
                started = time.monotonic()
                step.log_metrics({"loss": 1 / number, "tokens_per_second": 2.0}, number)
                slowest = max(slowest, time.monotonic() - started)
                time.sleep(0.05)
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("outage")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (run,) = [r for r in runs if r.data.tags["kfp.task"] == "finetune_lora"]
        for key in ("loss", "tokens_per_second"):
            history = client.get_metric_history(run.info.run_id, key)
            assert sorted(m.step for m in history) == list(range(1, steps + 1))
        assert run.info.status == "FINISHED"
    finally:
        server.stop()
    assert slowest < 1, "training waited for MLflow"
    output = capsys.readouterr().out
    assert "until MLflow is back" in output and "MLflow is back" in output
    assert not list((tmp_path / "checkpoints" / "metrics").rglob("*.jsonl"))


@pytest.mark.slow
def test_a_step_that_ends_while_the_server_is_away_leaves_its_metrics_to_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from tuneline import tracking

    server = MlflowServer(tmp_path)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_PATIENCE_SECONDS", 2.0)
    try:
        with tracked("pipeline-run", "finetune_lora", experiment="outage") as step:
            server.stop()
            step.log_metrics({"loss": 0.5}, 7)
        server.start()
        time.sleep(1)
        with tracked("pipeline-run", "evaluate", experiment="outage"):
            pass
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("outage")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (run,) = [r for r in runs if r.data.tags["kfp.task"] == "finetune_lora"]
        assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [7]
        assert run.info.status == "FINISHED"
    finally:
        server.stop()
