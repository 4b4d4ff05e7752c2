"""The whole line on a tiny model, every step a process of its own, against a real MLflow store."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow


def tuneline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def recipe_file(
    tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe = {
        "model": {"base_model": str(tiny_model)},
        "data": {"train": str(chats_file), "test_fraction": 0.25},
        "method": {"name": "lora", "target_modules": ["all-linear"], "rank": 16, "alpha": 32},
        "training": {"epochs": 8, "learning_rate": 0.01, "batch_tokens": 512},
        "gate": {"min_rows": 40, "min_gain": 0.2},
        "registry": {"model_name": "colours", "experiment": "colours"},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def workdir(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    done = tuneline("run", str(recipe_file), "--workdir", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path / "stdout.txt").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def test_the_summary_tells_what_came_out(summary: dict) -> None:
    assert summary["base_exact_match"] <= 0.1 < 0.5 < summary["tuned_exact_match"]
    assert summary["test_rows"] >= 40
    assert summary["registered_version"] == 1 and summary["alias"] == "champion"
    assert list(summary["steps"]) == [
        "check_recipe", "resolve_pool", "prepare_data", "finetune_lora", "evaluate", "merge",
        "register", "promote",
    ]  # fmt: skip
    assert 0 < sum(summary["steps"].values()) < summary["wall_seconds"]
    assert summary["peak_memory_bytes"] > 100_000_000
    assert summary["merge_max_logit_diff"] < 1e-2 and summary["merge_top1_agreement"] >= 0.99


def test_the_log_of_a_pod_stays_readable(workdir: Path, summary: dict) -> None:
    text = (workdir / "stdout.txt").read_text()
    assert "\r" not in text and "\x1b" not in text and "[tuneline" not in text
    assert "ETA" in text and "validation loss" in text
    assert summary["report_html"] in text and "alias champion" in text
    assert "-m mlflow ui --backend-store-uri sqlite:///" in text
    assert len(text.splitlines()) < 120


def fresh(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a process that has not imported tuneline; returns its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(1, 40).unsqueeze(0)
def show(model):
    logits = model.eval()(tokens).logits
    print(f"{float(logits.abs().sum()):.2f} {logits.argmax(-1).tolist()}")
"""


def test_plain_peft_and_plain_transformers_load_the_same_model(
    summary: dict, tiny_model: Path
) -> None:
    adapted = fresh(
        LOGITS + "from peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "show(PeftModel.from_pretrained(base, sys.argv[2]))",
        str(tiny_model),
        summary["adapter_dir"],
    )
    load = LOGITS + "show(AutoModelForCausalLM.from_pretrained(sys.argv[1]))"
    merged = fresh(load, summary["merged_dir"])
    base = fresh(load, str(tiny_model))
    assert merged.partition(" ")[2] == adapted.partition(" ")[2]
    assert float(merged.split()[0]) == pytest.approx(float(adapted.split()[0]), rel=1e-4)
    assert merged.partition(" ")[2] != base.partition(" ")[2]


def test_the_registry_serves_the_merged_model(summary: dict) -> None:
    served = fresh(
        LOGITS + "import mlflow\n"
        "pipe = mlflow.transformers.load_model('models:/colours@champion')\nshow(pipe.model)",
        MLFLOW_TRACKING_URI=summary["tracking_uri"],
    )
    merged = fresh(
        LOGITS + "show(AutoModelForCausalLM.from_pretrained(sys.argv[1]))", summary["merged_dir"]
    )
    assert served == merged


def test_the_pipeline_that_only_promotes_runs_the_same_step(summary: dict, tmp_path: Path) -> None:
    alias = fresh(
        "import sys\n"
        "from kfp import local\n"
        "from tuneline_pipelines import promote\n"
        "local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1])\n"
        "pipeline = promote.build(lambda task, pool=None: None)\n"
        "print(pipeline(model_name='colours', version=1).output)",
        str(tmp_path),
        MLFLOW_TRACKING_URI=summary["tracking_uri"],
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    assert alias == "champion"


def test_the_run_tree_has_a_parent_and_a_child_per_step(
    summary: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    client = mlflow.MlflowClient(summary["tracking_uri"])
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    runs = {
        run.data.tags["kfp.task"]: run for run in client.search_runs([experiment.experiment_id])
    }
    parent = runs.pop("pipeline")
    assert sorted(runs) == sorted(summary["steps"])
    assert parent.info.status == "FINISHED"
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.metrics["wall_seconds"] > 0
    tuning = runs["finetune_lora"]
    assert tuning.data.params["tuneline.rank"] == "16"
    losses = client.get_metric_history(tuning.info.run_id, "loss")
    assert len(losses) > 10 and losses[-1].value < losses[0].value
    assert [d.dataset.name for d in tuning.inputs.dataset_inputs] == ["train"]
    saved = [f.path for f in client.list_artifacts(tuning.info.run_id, "adapter")]
    assert "adapter/adapter_model.safetensors" in saved
    assert "report.html" in [f.path for f in client.list_artifacts(runs["evaluate"].info.run_id)]
    version = client.get_model_version("colours", "1")
    assert version.run_id == runs["register"].info.run_id
    assert version.tags["tuneline.gate"] == "passed"
    assert client.get_registered_model("colours").aliases == {"champion": 1, "challenger": 1}
    del monkeypatch


def test_every_artifact_names_what_it_was_made_from(summary: dict, tiny_model: Path) -> None:
    from tuneline import artifacts, base_model

    adapter = artifacts.load(Path(summary["adapter_dir"]), "adapter")
    merged = artifacts.load(Path(summary["merged_dir"]), "merged_model")
    report = artifacts.load(Path(summary["report_html"]).parent, "eval_report")
    assert merged.manifest.inputs == {"adapter": adapter.digest}
    assert report.manifest.inputs["adapter"] == adapter.digest
    assert report.manifest.inputs["prepared_dataset"] == adapter.manifest.inputs["prepared_dataset"]
    assert adapter.manifest.base_model["digest"] == base_model.resolve(str(tiny_model)).digest


def test_registering_again_makes_no_second_version(
    summary: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from tuneline.register.register import register
    from tuneline.tracking import Untracked

    monkeypatch.setenv("MLFLOW_TRACKING_URI", summary["tracking_uri"])
    client = mlflow.MlflowClient(summary["tracking_uri"])
    run_id = client.get_model_version("colours", "1").tags["tuneline.run_id"]
    report = Path(summary["report_html"]).parent
    version = register(Path(summary["merged_dir"]), report, "colours", run_id, Untracked())
    assert version == 1
    assert len(client.search_model_versions("name = 'colours'")) == 1


def test_a_refused_model_is_registered_but_not_promoted(recipe_file: Path, workdir: Path) -> None:
    before = json.loads((workdir / "summary.json").read_text())
    done = tuneline(
        "run", str(recipe_file), "--workdir", str(workdir.with_name("refused")),
        "--set", "training.learning_rate=1e-6", "--quiet",
        MLFLOW_TRACKING_URI=before["tracking_uri"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "version 2, not promoted" in done.stdout and "== " not in done.stdout
    refused = json.loads((workdir.with_name("refused") / "summary.json").read_text())
    assert refused["alias"] == "" and not refused["gate"]["passed"]

    import mlflow

    aliases = mlflow.MlflowClient(before["tracking_uri"]).get_registered_model("colours").aliases
    assert aliases == {"champion": 1, "challenger": 1}
    promoted = tuneline(
        "promote", "colours", "--version", "2", MLFLOW_TRACKING_URI=before["tracking_uri"]
    )
    assert promoted.returncode == 0 and "is not promoted" in promoted.stdout


def test_a_registered_model_whose_files_were_changed_is_not_promoted(
    summary: dict,
) -> None:
    import mlflow

    client = mlflow.MlflowClient(summary["tracking_uri"])
    uri = client.get_model_version_download_uri("colours", "1")
    config = Path(uri.removeprefix("file://")) / "model" / "generation_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    try:
        done = tuneline(
            "promote", "colours", "--version", "1", MLFLOW_TRACKING_URI=summary["tracking_uri"]
        )
    finally:
        config.write_text(text)
    assert done.returncode == 1
    assert "is damaged: generation_config.json" in done.stderr


def test_a_failing_step_ends_the_run_with_its_own_sentence(
    recipe_file: Path, tmp_path: Path
) -> None:
    done = tuneline(
        "run", str(recipe_file), "--workdir", str(tmp_path / "w"),
        "--set", "data.train=absent.jsonl",
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: data file absent.jsonl can't be read" in done.stderr
    assert "run.log" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "summary.json").exists()


def test_a_stopped_run_stops_its_step_and_leaves_no_adapter(
    recipe_file: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tuneline_pipelines.cli", "run", str(recipe_file),
            "--workdir", str(tmp_path / "w"), "--set", "training.epochs=100000",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as output:
        next(line for line in output if "step 1/" in line)
        steps = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert steps and not any(step.is_running() for step in steps)
    assert not (tmp_path / "w" / "summary.json").exists()
    assert not list((tmp_path / "w").glob("kfp/*/finetune-lora/*/manifest.json"))
