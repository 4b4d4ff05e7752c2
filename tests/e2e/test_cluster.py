"""All pipelines on a real Kubeflow Pipelines and MLflow, in the order in which a team meets them.

    python -m pytest tests/e2e -m cluster --kfp-host URL --mlflow-uri URI [--kfp-namespace NS]

The packages name the image of `TUNELINE_IMAGE`, which the cluster has to be able to pull.
"""

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
    runs = mlflow.search_runs([experiment.experiment_id])
    tasks = {run.data.tags.get("kfp.task"): run.info.status for run in runs}
    assert {"check_recipe", "resolve_pool", "prepare_data", "finetune_lora", "evaluate", "merge",
            "register", "promote"} <= tasks.keys()  # fmt: skip
    assert set(tasks.values()) == {"FINISHED"}


def test_retraining_trains_once(submit: Callable[..., str], mlflow: Any, name: str) -> None:
    changed = ("--pipeline", "retrain", "--set", "training.seed=7")
    assert "finetune-chosen" in submit(*changed)
    assert champion(mlflow, name) == 2
    assert "finetune-chosen" not in submit(*changed)
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2


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
