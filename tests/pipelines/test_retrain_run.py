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
    """Fruit of numbers 0 to 8 to learn from, of the others to test with."""
    folder = tmp_path_factory.mktemp("retrain")
    lines = chats_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:180]))
    (folder / "test.jsonl").write_text("".join(lines[180:]))
    path = folder / "tiny.yaml"
    recipe = {
        "model": {"base_model": str(tiny_model)},
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "method": {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        "training": {"epochs": 8, "learning_rate": 0.01, "batch_tokens": 512, "evaluations": 1},
        "evaluation": {"metrics": ["exact_match"], "general_text": False},
        "gate": {"min_rows": 40, "min_gain": 0.2, "champion": "not_worse", "champion_margin": 0.5},
        "registry": {"model_name": "colours", "experiment": "colours"},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def tuneline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", *arguments],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip


def retrain(recipe_file: Path, *more: str) -> tuple[dict, str]:
    """The outcome, and what a person read."""
    workdir = recipe_file.parent / "work"
    done = tuneline("retrain", str(recipe_file), "--workdir", str(workdir), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((workdir / "retrain.json").read_text()), done.stdout


def steps_of(text: str) -> list[str]:
    return [line.removeprefix("== ") for line in text.splitlines() if line.startswith("== ")]


def test_new_work_is_done_once_worse_work_is_refused_and_a_rollback_stays(
    recipe_file: Path,
) -> None:
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

    data = recipe_file.parent / "train.jsonl"
    good = data.read_text()
    rows = [json.loads(line) for line in good.splitlines()]
    more = "".join(
        json.dumps({"messages": [{**question, "content": f"again: {question['content']}"}, answer]})
        + "\n"
        for question, answer in (row["messages"] for row in rows[:20])
    )
    data.write_text(good + more)
    waiting, text = retrain(recipe_file, "--set", "retrain.min_new_rows=50")
    assert steps_of(text) == ["check_retrain"]
    assert "no trigger is met: new rows 20 of 50" in waiting["reason"]

    third, text = retrain(recipe_file)
    assert (third["action"], third["version"]) == ("train", 2)
    assert third["reason"] == "the data changed (200 rows to train on, 180 before)"
    assert "champion" in third["aliases"], text

    for row in rows:
        row["messages"][1]["content"] = "grey"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    worse, text = retrain(recipe_file)
    assert (worse["action"], worse["version"], worse["gate"]) == ("train", 3, "refused")
    assert worse["aliases"] == []

    import mlflow

    client = mlflow.MlflowClient(third["tracking_uri"])
    assert client.get_registered_model("colours").aliases["champion"] == 2
    rolled_back = tuneline("rollback", "colours", MLFLOW_TRACKING_URI=third["tracking_uri"])
    assert rolled_back.returncode == 0, rolled_back.stderr
    assert client.get_registered_model("colours").aliases["champion"] == 1
    # a schedule does not undo it: that work was done
    data.write_text(good + more)
    undone, text = retrain(recipe_file)
    assert steps_of(text) == ["check_retrain"] and undone["version"] == 2
    assert client.get_registered_model("colours").aliases["champion"] == 1

    versions = client.search_model_versions("name = 'colours'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3]
    ledger = client.search_model_versions("name = 'colours.retrain'")
    assert {version.tags["tuneline.retrain_key"] for version in ledger} == {
        first["key"], third["key"], worse["key"]
    }  # fmt: skip
    assert len(ledger) == 3
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.`kfp.task` = 'pipeline'")
    assert {run.info.status for run in parents} == {"FINISHED"} and len(parents) == 6
