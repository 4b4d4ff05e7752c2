"""All pipelines on a real Kubeflow Pipelines and MLflow, in the order in which a team meets them.

    python -m pytest tests/e2e -m cluster --kfp-host URL --mlflow-uri URI [--namespace NS]

The packages name the image of `TUNELINE_IMAGE`, which the cluster has to be able to pull. Whether
KFP's MLflow plugin is on makes no difference: `kfp.task` is the tag of a step in both.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster
Tuneline = Callable[..., str]


@pytest.fixture
def mlflow(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    return MlflowClient(environment["MLFLOW_TRACKING_URI"])


@pytest.fixture
def submit(
    tuneline: Tuneline, recipe_file: Path, request: pytest.FixtureRequest
) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        pool = request.config.getoption("--pool")
        return tuneline("submit", str(recipe_file), "--pool", pool, "--wait", *arguments)

    return run


def until(found: Callable[[], Any], seconds: float) -> Any:
    """What is there in the end, of what the cluster does by itself."""
    deadline = time.monotonic() + seconds
    while not (there := found()) and time.monotonic() < deadline:
        time.sleep(2)
    return there


def champion(mlflow: Any, name: str) -> int:
    return int(mlflow.get_registered_model(name).aliases["champion"])


def test_publishing_twice_uploads_once(tuneline: Tuneline) -> None:
    tuneline("publish")
    assert "uploaded" not in tuneline("publish")


def test_a_submitted_recipe_ends_as_champion(
    submit: Callable[..., str], mlflow: Any, name: str
) -> None:
    assert "promote" in submit()
    assert champion(mlflow, name) == 1
    version = mlflow.get_model_version(name, "1")
    assert version.tags["tuneline.gate"] == "passed"
    experiment = mlflow.get_experiment_by_name(name)

    def ended() -> dict[str, tuple[str, str]]:
        """Task -> its status and its parent's task, once all have ended: with KFP's plugin, the API
        server ends the pipeline's run a little after KFP's own."""
        runs = {run.info.run_id: run for run in mlflow.search_runs([experiment.experiment_id])}
        tags = {i: run.data.tags for i, run in runs.items() if "kfp.task" in run.data.tags}
        found = {
            tag["kfp.task"]: (
                runs[i].info.status,
                tags.get(tag.get("mlflow.parentRunId", ""), {}).get("kfp.task", ""),
            )
            for i, tag in tags.items()
        }
        return found if {status for status, _ in found.values()} == {"FINISHED"} else {}

    tasks = until(ended, 60)
    assert {"pipeline", "check_recipe", "resolve_pool", "prepare_data", "finetune_lora", "evaluate",
            "merge", "register", "promote"} <= tasks.keys()  # fmt: skip
    assert tasks.pop("pipeline") == ("FINISHED", "")
    assert set(tasks.values()) == {("FINISHED", "pipeline")}


def test_retraining_trains_once(submit: Callable[..., str], mlflow: Any, name: str) -> None:
    changed = ("--pipeline", "retrain", "--set", "training.seed=7")
    assert "finetune-chosen" in submit(*changed)
    assert champion(mlflow, name) == 2
    assert "finetune-chosen" not in submit(*changed)
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2


def test_a_version_is_promoted_by_a_run(
    tuneline: Tuneline, recipe_file: Path, mlflow: Any, name: str
) -> None:
    promote = ("--pipeline", "promote", "--model-version", "2")
    assert "promote-version" in tuneline("submit", str(recipe_file), *promote, "--wait")
    assert champion(mlflow, name) == 2


def test_a_rollback_returns_to_the_champion_before(
    tuneline: Tuneline, mlflow: Any, name: str
) -> None:
    tuneline("rollback", name)
    assert champion(mlflow, name) == 1


def test_methods_are_compared(submit: Callable[..., str], mlflow: Any, name: str) -> None:
    submit("--pipeline", "compare", "--methods", "lora,ia3")
    experiment = mlflow.get_experiment_by_name(name)
    boards = mlflow.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'leaderboard'")
    assert {"score_lora", "score_ia3"} <= boards[0].data.metrics.keys()


def test_schedules_become_what_the_file_says(
    tuneline: Tuneline, recipe_file: Path, name: str
) -> None:
    file = recipe_file.with_name("schedules.yaml")
    schedule = {"name": name, "cron": "0 0 3 1 1 *", "recipe": recipe_file.name, "enabled": False}
    file.write_text(yaml.safe_dump({"group": name, "schedules": [schedule]}))
    tuneline("schedule", "apply", str(file))
    assert name in tuneline("schedule", "list")
    assert "unchanged" in tuneline("schedule", "diff", str(file))
    file.write_text(yaml.safe_dump({"group": name, "schedules": []}))
    tuneline("schedule", "apply", str(file))
    assert name not in tuneline("schedule", "list")


def test_a_schedule_fires_with_the_recipes_parameters(
    tuneline: Tuneline, recipe_file: Path, mlflow: Any, name: str, environment: dict[str, str]
) -> None:
    from tuneline_pipelines.connection import Connection

    file = recipe_file.with_name("fires.yaml")
    schedule = {
        "name": name, "cron": "0 * * * * *", "recipe": recipe_file.name,
        "overrides": {"training": {"seed": 7}},  # what was retrained above: there is nothing to do
    }  # fmt: skip
    file.write_text(yaml.safe_dump({"group": name, "schedules": [schedule]}))
    tuneline("schedule", "apply", str(file))
    connection = Connection(environment["KFP_HOST"], environment.get("KFP_NAMESPACE"))
    try:
        (made,) = [
            one for one in json.loads(tuneline("schedule", "list", "--json")) if one["name"] == name
        ]

        def fired() -> Any:
            runs = connection.pages(
                "listing runs",
                connection.runs.run_service_list_runs,
                "runs",
                sort_by="created_at desc",
                **connection.scope,
            )
            mine = [r for r in runs if r.recurring_run_id == made["recurring_run_id"]]
            return next((r for r in mine if r.state in ("SUCCEEDED", "FAILED")), None)

        run = until(fired, 600)
    finally:
        file.write_text(yaml.safe_dump({"group": name, "schedules": []}))
        tuneline("schedule", "apply", str(file))
    assert run is not None and run.state == "SUCCEEDED"
    assert run.runtime_config.parameters["model_name"] == name
    experiment = mlflow.get_experiment_by_name(name)
    assert mlflow.search_runs([experiment.experiment_id], f"tags.`kfp.run_id` = '{run.run_id}'")
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2
