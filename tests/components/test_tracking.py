"""One run tree wherever a step runs; MLflow's errors become one sentence that tells no password."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import RegistryError
from tuneline.tracking import (
    TrackedStep,
    finish_run,
    mlflow_errors,
    mlflow_key,
    open_client,
    safe_uri,
    tracked,
)


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


@pytest.mark.parametrize(
    "name",
    [
        "exact_match",
        "pass@1",
        "pass#1",
        "a:b",
        "../up",
        "a//b",
        ".",
        "/",
        "é",
        "x" * 300,
        "x" * 301,
    ],
)
def test_mlflow_takes_the_key_of_any_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    key = mlflow_key(name)
    _validate_metric_name(key)
    assert len(key) <= 250


def test_two_names_never_share_a_key() -> None:
    names = ["pass@1", "pass#1", "pass_1", "a//b", "a__b", "x" * 300, "x" * 301]
    assert len({mlflow_key(name) for name in names}) == len(names)
    assert mlflow_key("tuned_exact_match") == "tuned_exact_match"


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
        step.log_metrics({"loss": 1.0, "score?": 2.0}, 1)
        step.log_metrics({"loss": 0.5, "score?": 3.0}, 2)
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


class Plugin:
    """KFP 2.17's MLflow plugin, by the calls that its source makes: a run for the pipeline's run,
    one for each condition and loop when its driver ends, and one for each task."""

    def __init__(self, client: Any, experiment: str) -> None:
        self._client = client
        self._experiment = client.create_experiment(experiment)
        tags = {"kfp.pipeline_run_id": "run", "kfp.pipeline_run_url": "http://kfp/run"}
        self.root = self._make("retrain 2026-11-27", tags)

    def _make(self, name: str, tags: dict[str, str]) -> str:
        return self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id

    def group(self, name: str, parent: str) -> str:
        run = self._make(name, {"mlflow.parentRunId": parent})
        self._client.set_terminated(run, "FINISHED")
        return run

    def task(self, name: str, parent: str) -> str:
        return self._make(name, {"mlflow.parentRunId": parent})

    def end(self, run: str, status: str) -> None:
        self._client.set_terminated(run, status)


def tree_of(client: Any, experiment: str) -> dict[str, tuple[str, str, str]]:
    """Task -> the name of its run, its parent's task, its status."""
    found = client.get_experiment_by_name(experiment)
    runs = {run.info.run_id: run for run in client.search_runs([found.experiment_id])}
    tasks = {i: run.data.tags["kfp.task"] for i, run in runs.items() if "kfp.task" in run.data.tags}
    assert {runs[i].data.tags["kfp.run_id"] for i in tasks} == {"run"}
    return {
        task: (
            # that of the pipeline's run is KFP's where KFP made it
            runs[i].info.run_name if task != "pipeline" else "",
            tasks.get(runs[i].data.tags.get("mlflow.parentRunId", ""), ""),
            runs[i].info.status,
        )
        for i, task in tasks.items()
    }


STEPS = ("check_retrain", "prepare_data", "finetune_lora")


def test_the_run_tree_is_the_same_with_and_without_kfps_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    client = mlflow.MlflowClient(uri)
    # locally, and on a cluster without the plugin, where the config map names the server
    for experiment, variable in (
        ("local", "MLFLOW_TRACKING_URI"),
        ("cluster", "TUNELINE_MLFLOW_TRACKING_URI"),
    ):
        with monkeypatch.context() as environment:
            environment.setenv(variable, uri)
            for task in STEPS:
                with tracked("run", task, experiment=experiment) as step:
                    step.log_params({"of": task})
            finish_run("run", experiment)
    plugin = Plugin(client, "plugin")
    outer = plugin.group("train", plugin.root)
    inner = plugin.group("for-loop-1", outer)
    parents = {"check_retrain": plugin.root, "prepare_data": outer, "finetune_lora": inner}
    for task, parent in parents.items():
        injected = plugin.task(task.replace("_", "-"), parent)
        with monkeypatch.context() as environment:
            environment.setenv("MLFLOW_RUN_ID", injected)
            environment.setenv("MLFLOW_TRACKING_URI", uri)
            environment.setenv("TUNELINE_MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
            with tracked("run", task, experiment="another") as step:
                step.log_params({"of": task})
            finish_run("run", "another")
        plugin.end(injected, "FINISHED")
    plugin.end(plugin.root, "FINISHED")
    trees = {name: tree_of(client, name) for name in ("local", "cluster", "plugin")}
    assert trees["local"] == trees["cluster"] == trees["plugin"]
    assert trees["plugin"] == {
        "pipeline": ("", "", "FINISHED"),
        **{task: (task, "pipeline", "FINISHED") for task in STEPS},
    }
    assert client.get_experiment_by_name("another") is None


@pytest.mark.parametrize("plugin_is_on", [True, False])
def test_a_step_that_is_tried_again_is_running_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_is_on: bool
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    client = mlflow.MlflowClient(uri)
    if plugin_is_on:
        plugin = Plugin(client, "here")
        injected = plugin.task("finetune-lora", plugin.root)
        monkeypatch.setenv("MLFLOW_RUN_ID", injected)
        plugin.end(injected, "FAILED")  # by the launcher, after the first try
    else:
        with suppress(KeyboardInterrupt), tracked("run", "finetune_lora", experiment="here"):
            raise KeyboardInterrupt
        assert tree_of(client, "here")["finetune_lora"][2] == "FAILED"
    with tracked("run", "finetune_lora", experiment="here"):
        during = tree_of(client, "here")
    assert during["finetune_lora"] == ("finetune_lora", "pipeline", "RUNNING")
    assert during["pipeline"][2] == "RUNNING"
