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

from tuneline.data_prep.prepare import prepare
from tuneline.errors import RegistryError
from tuneline.finetune.trainer import GRACE_SECONDS
from tuneline.recipe import DataSection
from tuneline.spool import Entry, Refused, Spool
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


@pytest.mark.parametrize("sent", ["", "x", "7", "-3", "99999"])
def test_damage_holds_up_nothing_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sent: str
) -> None:
    path = tmp_path / "run.jsonl"
    good = [
        json.dumps({"metrics": {"loss": float(step)}, "step": step, "time_ms": 5, "status": ""})
        for step in (1, 2)
    ]
    garbage = ["\0\0\0\0", '{"metrics": 3}', "[]", '{"metrics": {"loss": "x"}, "step": 1}', ""]
    path.write_text("\n".join([good[0], *garbage, good[1], "\0\0"]) + "\n")
    path.with_suffix(".sent").write_text(sent)  # what a power cut leaves of it
    receiver = Receiver()
    spool = Spool(path, receiver)
    spool.put({"loss": 3.0}, 3)
    assert spool.close(30)
    # one that says 7 is in the middle of the first line, which was not sent then
    expected = [1, 2, 3] if sent != "7" else [2, 3]
    assert receiver.got == [("loss", step, float(step)) for step in expected]
    assert f"{path}: damaged lines are left out: [2, 3, 4, 5, 6, 8]" in capsys.readouterr().out
    again = Spool(path, receiver)
    assert again.close(30) and len(receiver.got) == len(expected), "sent, whatever lies behind it"


def test_what_is_refused_for_good_is_set_aside_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(entries: Sequence[Entry]) -> None:
        raise Refused("the run was deleted")

    path = tmp_path / "run.jsonl"
    spool = Spool(path, refuse)
    spool.put({"loss": 1.0}, 1)
    spool._thread.join(30)
    spool.put({"loss": 2.0}, 2)  # the step goes on
    assert not spool.close(30)
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl.refused"]
    output = capsys.readouterr().out
    assert f"{path}.refused" in output and "the run was deleted" in output
    assert len((tmp_path / "run.jsonl.refused").read_text().splitlines()) == 2


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


# ---- training without a server


_TRAIN = """
import sys
from tuneline import steps
steps.guard(
    steps.finetune, base_model=sys.argv[1], dataset=sys.argv[2], method={"name": "lora"},
    training={"epochs": float(sys.argv[4]), "batch_tokens": 128, "learning_rate": 0.01},
    output=sys.argv[3], run_id="pipeline-run", experiment="late",
)
"""


@pytest.fixture
def dataset(tiny_model: Path, chats_file: Path, tmp_path: Path) -> Path:
    data = DataSection(train=(str(chats_file),), validation_fraction=0.2, test_fraction=0.6)
    return prepare(str(tiny_model), data, tmp_path / "data").path


def _train(model: Path, dataset: Path, folder: Path, uri: str, epochs: int) -> subprocess.Popen:
    """Until it has trained a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TRAIN, str(model), str(dataset), str(folder / "out"), str(epochs)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "TUNELINE_CHECKPOINTS": str(folder / "checkpoints"),
        },
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "grad norm" in line:
            return process
    pytest.fail(process.communicate()[1])


@pytest.mark.slow
def test_training_goes_on_without_a_server_that_comes_up_later(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    import mlflow

    server = MlflowServer(tmp_path)
    process = _train(tiny_model, dataset, tmp_path, server.uri, epochs=3)
    server.start()
    try:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, output + errors
        client = mlflow.MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("late")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (run,) = [r for r in runs if r.data.tags["kfp.task"] == "finetune_lora"]
        logged = [entry for entry in _history(tmp_path / "out") if "loss" in entry]
        points = client.get_metric_history(run.info.run_id, "loss")
        assert [(p.step, p.value) for p in points] == [(e["step"], e["loss"]) for e in logged]
        assert run.data.params["tuneline.batch_tokens"] == "128"
        assert run.info.status == "FINISHED"
    finally:
        server.stop()
    assert not list((tmp_path / "checkpoints" / "metrics").rglob("*.jsonl"))


def _history(adapter: Path) -> list[dict]:
    return [json.loads(line) for line in (adapter / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_sigterm_ends_training_within_the_grace_while_mlflow_does_not_answer(
    tiny_model: Path, dataset: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:  # takes, and never answers
        uri = f"http://127.0.0.1:{hole.getsockname()[1]}"
        process = _train(tiny_model, dataset, tmp_path, uri, epochs=2000)
        process.terminate()
        output, errors = process.communicate(timeout=GRACE_SECONDS)
    assert process.returncode == 143, output + errors
    last = errors.splitlines()[-1]
    assert "a checkpoint of step" in last and "run it again to go on" in last
    lines = output.splitlines()
    said = [n for n, line in enumerate(lines) if "was written: run it again" in line]
    away = [n for n, line in enumerate(lines) if "the metrics of this step wait in" in line]
    assert said and away and said[0] < away[0], "first what was saved"
