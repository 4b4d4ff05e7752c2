"""MLflow's errors become one sentence that tells no password."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import RegistryError
from tuneline.tracking import TrackedStep, mlflow_errors, open_client, safe_uri, tracked


def test_a_password_in_the_uri_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    uri = "http://user:s3cret@127.0.0.1:9/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert safe_uri() == "http://127.0.0.1:9/mlflow"
    with pytest.raises(RegistryError) as caught, mlflow_errors("asking"):
        raise MlflowException(f"GET {uri}/api with s3cret failed")
    assert "s3cret" not in str(caught.value) and "asking" in str(caught.value)


def test_a_server_that_is_away_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cret@127.0.0.1:9")
    with pytest.raises(
        RegistryError, match=r"MLflow at http://127\.0\.0\.1:9: connecting"
    ) as caught:
        open_client()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("keeps", ["in a store", "on its disk"])
def test_a_pod_with_an_empty_disk_logs_no_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: str
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "s3://bucket/checkpoints")
    folder = "checkpoints-s3" if keeps == "in a store" else "checkpoints"
    for pod, steps in {"first": (1, 2, 3, 4), "second": (3, 4, 5)}.items():  # 3 and 4 once more
        monkeypatch.setenv("TUNELINE_CACHE", str(tmp_path / pod))
        if keeps == "on its disk":
            monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / pod / folder))
        with (
            suppress(KeyboardInterrupt),
            tracked("pipeline-run", "finetune_lora", experiment="here") as step,
        ):
            for number in steps:
                step.log_metrics({"loss": 1 / number}, number)
            if pod == "first":
                raise KeyboardInterrupt
        assert (tmp_path / pod / folder / "metrics").is_dir()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("here")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if r.data.tags["kfp.task"] == "finetune_lora"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5]


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return uri


def history(client: Any, task: str, key: str) -> list[int]:
    """The steps at which a metric was measured."""
    experiment = client.get_experiment_by_name("here")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if r.data.tags["kfp.task"] == task]
    return [point.step for point in client.get_metric_history(run.info.run_id, key)]


def test_a_pod_beside_one_that_is_not_quite_gone_logs_no_step_again(uri: str) -> None:
    import mlflow

    client = mlflow.MlflowClient(uri)
    with tracked("pipeline-run", "finetune_lora", experiment="here") as first:
        for number in (1, 2, 3):
            first.log_metrics({"loss": 1 / number}, number)
        deadline = time.monotonic() + 60
        while history(client, "finetune_lora", "loss") != [1, 2, 3]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with tracked("pipeline-run", "finetune_lora", experiment="here") as second:
            for number in (2, 3, 4):
                second.log_metrics({"loss": 1 / number}, number)
    assert history(client, "finetune_lora", "loss") == [1, 2, 3, 4]


def test_a_metric_that_mlflow_refuses_holds_up_no_other(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    with tracked("pipeline-run", "finetune_lora", experiment="here") as step:
        assert isinstance(step, TrackedStep)
        # as an earlier version has left it in a file: what a step logs gets a name that is taken
        step._spool.put({"loss": 1.0, "score?": 2.0}, 1)
        step._spool.put({"loss": 0.5, "score?": 3.0}, 2)
    assert history(mlflow.MlflowClient(uri), "finetune_lora", "loss") == [1, 2]
    output = capsys.readouterr().out
    assert output.count("warning: score? is not in MLflow, which refuses it for good") == 1
    assert "is away" not in output


def test_a_run_that_was_deleted_ends_no_step_and_holds_up_no_later_one(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    client = mlflow.MlflowClient(uri)
    with tracked("pipeline-run", "finetune_lora", experiment="here") as step:
        assert isinstance(step, TrackedStep)
        client.delete_run(step.run_id)
        step.log_metrics({"loss": 1.0}, 1)
    output = capsys.readouterr().out
    (aside,) = (tmp_path / "checkpoints" / "metrics").rglob("*.refused")
    assert str(aside) in output and "was deleted" in output and "is away" not in output
    with tracked("pipeline-run", "evaluate", experiment="here") as step:
        step.log_metrics({"score": 1.0})
    assert history(client, "evaluate", "score") == [0]
    assert "warning" not in capsys.readouterr().out
