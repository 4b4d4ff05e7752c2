"""Training in several processes computes what one computes, and fails and stops as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneline import artifacts
from tuneline.data_prep.prepare import prepare
from tuneline.errors import UsageError
from tuneline.finetune import launch
from tuneline.recipe import DataSection


@pytest.fixture(scope="module")
def dataset(
    tiny_model: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Artifact:
    path = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(
        str(tiny_model),
        DataSection(train=(str(chats_file),), validation_fraction=0.2, test_fraction=0.6),
        path,
    )


def losses(history: list[dict], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def command_of(model: Path, dataset: artifacts.Artifact, output: Path, *settings: str) -> list[str]:
    return [
        sys.executable, "-m", "tuneline_pipelines.cli", "finetune", "--base-model", str(model),
        "--data", str(dataset.path), "--method", "lora", "--output", str(output),
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip


def environment_of(processes: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TUNELINE_PROCESSES": str(processes),
    }


def in_processes(
    processes: int, model: Path, dataset: artifacts.Artifact, output: Path, *settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_of(model, dataset, output, *settings),
        capture_output=True, text=True, env=environment_of(processes), check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_several_processes_fail_with_one_sentence_and_stop_with_a_checkpoint(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    failed = in_processes(2, tiny_model, dataset, output, "target_modules=[q_projj]")
    assert failed.returncode == 1
    assert "q_projj" in failed.stderr.splitlines()[-1] and not output.exists()
    process = subprocess.Popen(
        command_of(tiny_model, dataset, output, "epochs=500", "checkpoint_minutes=60"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_of(2),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "grad norm" in line:
            process.terminate()
            break
    rest, errors = process.communicate()
    assert process.returncode == 143, rest + errors
    assert "checkpoint" in errors.splitlines()[-1] and not output.exists()
    markers = list(tmp_path.rglob("step-*/checkpoint.json"))
    assert len(markers) == 1, list(tmp_path.rglob("*"))


@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(
    count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_PROCESSES", count)
    with pytest.raises(UsageError, match=f"not '{count}'"):
        launch.processes()


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(
    tiny_model: Path, dataset: artifacts.Artifact, tmp_path: Path
) -> None:
    # fewer than a whole number of batches for two: one of the processes has to sit out
    results = {}
    for processes, accumulation in ((1, 2), (2, 1)):
        output = tmp_path / str(processes)
        done = in_processes(
            processes, tiny_model, dataset, output, "batch_tokens=128", "epochs=2",
            "learning_rate=0.01", f"gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        text = (output / "history.jsonl").read_text()
        results[processes] = [json.loads(line) for line in text.splitlines()]
        assert done.stdout.count("== finetune_lora") == 1, "rank 0 only"
    for key in ("loss", "eval_loss", "grad_norm"):
        one, two = losses(results[1], key), losses(results[2], key)
        assert len(one) >= 2
        # sums over ranks in another order; Adam lets rounding grow along the steps
        assert two == pytest.approx(one, rel=1e-4)
