"""`tuneline retrain` again and again: every step a process of its own, on a real MLflow store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe_file(
    tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("retrain")
    data = folder / "chats.jsonl"
    data.write_text(chats_file.read_text())
    path = folder / "tiny.yaml"
    recipe = {
        "model": {"base_model": str(tiny_model)},
        "data": {"train": str(data), "test_fraction": 0.25},
        "method": {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        "training": {"epochs": 8, "learning_rate": 0.01, "batch_tokens": 512, "evaluations": 1},
        "evaluation": {"metrics": ["exact_match"], "general_text": False},
        "gate": {"min_rows": 40, "min_gain": 0.2, "champion": "not_worse", "champion_margin": 0.5},
        "registry": {"model_name": "colours", "experiment": "colours"},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def retrain(recipe_file: Path, *more: str) -> tuple[dict, str]:
    """The outcome, and what a person read."""
    workdir = recipe_file.parent / "work"
    done = subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", "retrain", str(recipe_file), "--workdir",
         str(workdir), *more],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((workdir / "retrain.json").read_text()), done.stdout


def steps_of(text: str) -> list[str]:
    return [line.removeprefix("== ") for line in text.splitlines() if line.startswith("== ")]


def test_unchanged_work_is_done_once_and_changed_work_again(recipe_file: Path) -> None:
    first, text = retrain(recipe_file)
    assert steps_of(text) == [
        "check_retrain", "resolve_pool", "prepare_data", "finetune_lora", "evaluate", "merge",
        "register", "promote",
    ]  # fmt: skip
    assert (first["action"], first["version"]) == ("train", 1)
    assert first["aliases"] == ["challenger", "champion"] and first["gate"] == "passed"

    second, text = retrain(recipe_file)
    assert steps_of(text) == ["check_retrain"]
    assert (second["action"], second["version"]) == ("nothing", 1)
    assert second["key"] == first["key"]
    assert "colours version 1, gate passed, alias challenger, champion" in second["reason"]

    data = recipe_file.parent / "chats.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows[:20]:  # what a person would ask for beside the old ones
        row["messages"][0]["content"] = f"again: {row['messages'][0]['content']}"
    with data.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:20])
    waiting, text = retrain(recipe_file, "--set", "retrain.min_new_rows=50")
    assert steps_of(text) == ["check_retrain"]
    assert "no trigger is met: new rows 20 of 50" in waiting["reason"]

    third, text = retrain(recipe_file)
    assert third["action"] == "train" and third["version"] == 2
    assert third["reason"] == "the data changed (260 rows to train on, 240 before)"
    assert "champion" in text and third["key"] != first["key"]
    assert "champion" in third["aliases"], text

    import mlflow

    client = mlflow.MlflowClient(third["tracking_uri"])
    versions = client.search_model_versions("name = 'colours'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    ledger = client.search_model_versions("name = 'colours.retrain'")
    assert sorted(version.tags["tuneline.retrain_key"] for version in ledger) == sorted(
        [first["key"], third["key"]]
    )
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'pipeline'")
    assert {run.info.status for run in parents} == {"FINISHED"} and len(parents) == 4
