"""A comparison on a tiny model, every step a process of its own, against a real MLflow store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tuneline_pipelines.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two legs, of which one can't train on this model."""
    path = tmp_path_factory.mktemp("compare")
    recipe = {
        "model": {"base_model": str(tiny_model)},
        "data": {"train": str(chats_file), "test_fraction": 0.25},
        "method": {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        "training": {"epochs": 4, "learning_rate": 0.01, "batch_tokens": 512},
        "gate": {"min_rows": 40},
        "registry": {"model_name": "colours", "experiment": "colours"},
    }
    (path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", "compare", str(path / "tiny.yaml"),
         "--methods", "bitfit,lora", "--workdir", str(path / "work")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "work" / "stdout.txt").write_text(done.stdout)
    return path / "work"


def test_a_failed_leg_does_not_sink_the_others(workdir: Path) -> None:
    board = json.loads((workdir / "leaderboard.json").read_text())
    assert [(leg["leg"], leg["status"]) for leg in board["legs"]] == [
        ("lora", "finished"), ("bitfit", "failed"),
    ]  # fmt: skip
    lora, bitfit = board["legs"]
    assert lora["rank"] == 1 and lora["score"] > board["base"]
    assert lora["settings"]["rank"] == 16 and lora["learning_rate"] == 0.01
    assert bitfit["learning_rate"] == 1e-3 and "no bias terms" in bitfit["reason"]
    shown = (workdir / "stdout.txt").read_text()
    assert "failed: bitfit: LlamaForCausalLM has no bias terms" in shown
    assert f"report: {workdir / 'leaderboard.html'}" in shown
    assert "bitfit failed." in (workdir / "leaderboard.html").read_text()


def test_mlflow_has_a_run_for_the_comparison_and_one_for_each_leg(workdir: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    (parent,) = (name for name in runs if name.startswith("compare-"))
    statuses = {name: run.info.status for name, run in runs.items() if name != parent}
    assert statuses == {
        "check_compare": "FINISHED", "resolve_pool": "FINISHED", "prepare_data": "FINISHED",
        "measure_base": "FINISHED",
        "leg_lora": "FINISHED", "leg_bitfit": "FAILED", "leaderboard": "FINISHED",
    }  # fmt: skip
    assert runs[parent].info.status == "FINISHED"
    for name in statuses:
        assert runs[name].data.tags["mlflow.parentRunId"] == runs[parent].info.run_id
    lora = runs["leg_lora"].data
    assert lora.params["tuneline.rank"] == "16"
    assert {"loss", "validation_loss", "score", "train_seconds"} <= set(lora.metrics)
    assert "no bias terms" in runs["leg_bitfit"].data.params["tuneline.failed"]
    files = [f.path for f in client.list_artifacts(runs["leaderboard"].info.run_id)]
    assert files == ["leaderboard.html", "leaderboard.json"]


def test_what_is_wrong_is_said_before_anything_runs(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(workdir.parent / "tiny.yaml")
    assert main(["compare", recipe, "--methods", "lorra", "--workdir", str(tmp_path / "w")]) == 2
    assert "method 'lorra' is unknown" in capsys.readouterr().err
    wrong = ["--set", "compare.ia3={rank: 3}"]
    assert main(["compare", recipe, *wrong, "--workdir", str(tmp_path / "w")]) == 2
    assert "compare.ia3: rank: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
