"""Training in several processes computes what one computes, and fails and stops as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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


# ---- the same without starting interpreters anew


class Ranks:
    """Two warm servers that train together."""

    def __init__(self, root: Path, training_server: Callable[[Path], Any], request: dict) -> None:
        self.servers = [training_server(root), training_server(root / "second")]
        self.root = root
        self._request = request
        (root / "second").mkdir()

    def start(self, output: str, processes: int = 2, **training: Any) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        request = {**self._request, "training": {**self._request["training"], **training}}
        pids = []
        for rank, server in enumerate(self.servers[:processes]):
            environment = {"TUNELINE_CHECKPOINTS": str(self.root / "checkpoints")}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pids.append(server.start(output, environment=environment, **request))
        return pids

    def wait(self, processes: int = 2) -> list[int]:
        return [server.wait() for server in self.servers[:processes]]

    def log(self, output: str) -> str:
        files = [server.log(output) for server in self.servers]
        return "".join(file.read_text() for file in files if file.exists())

    def trained(self, output: str, processes: int = 2, **training: Any) -> artifacts.Artifact:
        self.start(output, processes, **training)
        assert self.wait(processes) == [0] * processes, self.log(output)
        return artifacts.load(self.root / output, "adapter")

    def wait_for(self, output: str, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.log(output):
            assert time.monotonic() < deadline, self.log(output)
            time.sleep(0.01)

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture(scope="module")
def full(
    tiny_model: Path,
    dataset: artifacts.Artifact,
    training_server: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ranks]:
    """Full fine-tuning."""
    request = {
        "base_model": str(tiny_model),
        "dataset": str(dataset.path),
        "method": {"name": "full"},
        "training": {"epochs": 2, "learning_rate": 0.003, "batch_tokens": 128, "evaluations": 3},
    }
    ranks = Ranks(tmp_path_factory.mktemp("full"), training_server, request)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone(full: Ranks) -> artifacts.Artifact:
    """Of one process that accumulates what two compute."""
    return full.trained("alone", 1, gradient_accumulation_steps=4)


TOLERANCE_OF_PROCESSES = 1e-4
"""Relative, of losses and of the way that the weights went: sums over processes are in another
order, and Adam lets rounding grow along the steps (1e-6 was seen)."""


def moved(artifact: artifacts.Artifact, base: Path) -> torch.Tensor:
    """How far each weight of what plain transformers loads went from the base's."""
    loaded = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(loaded) is type(start) and loaded.config.architectures == ["LlamaForCausalLM"]
    own = dict(start.named_parameters())
    return torch.cat([(p - own[name]).flatten() for name, p in loaded.named_parameters()]).detach()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"sharding": "none"}, {"gradient_checkpointing": True}])
def test_full_training_divided_over_processes_equals_one_that_has_all(
    full: Ranks, alone: artifacts.Artifact, tiny_model: Path, settings: dict[str, Any]
) -> None:
    name = "-".join(["two", *settings])
    together = full.trained(name, gradient_accumulation_steps=2, **settings)
    divided = settings.get("sharding") != "none"
    assert ("divided over 2 processes" in full.log(name)) == divided
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = (losses(a.read_jsonl("history.jsonl"), key) for a in (alone, together))
        assert two == pytest.approx(one, rel=TOLERANCE_OF_PROCESSES) and len(one) >= 3
    one, two = (moved(artifact, tiny_model) for artifact in (alone, together))
    assert float((one - two).norm() / one.norm()) < TOLERANCE_OF_PROCESSES


UNSTEADY = {"epochs": 4, "learning_rate": 0.1, "schedule": "constant", "evaluations": 12}
"""The lowest validation loss is not the last one."""


@pytest.mark.slow
def test_a_divided_run_that_is_killed_ends_as_if_nothing_had_happened(full: Ranks) -> None:
    settings = {**UNSTEADY, "load_best": True, "gradient_accumulation_steps": 2}
    whole = full.trained("whole", **settings)
    assert "took the weights of step" in full.log("whole")
    assert "divided over 2 processes" in full.log("whole")
    settings |= {"checkpoint_minutes": 0}
    for number, step in ((signal.SIGKILL, 4), (signal.SIGTERM, 9)):
        pids = full.start("killed", **settings)
        full.wait_for("killed", f"step {step}/")
        for pid in pids if number == signal.SIGKILL else pids[:1]:  # SIGTERM stops both
            os.kill(pid, number)
        expected = -number if number == signal.SIGKILL else 143
        assert full.wait() == [expected] * 2, full.log("killed")
    killed = full.trained("killed", **settings)
    assert full.log("killed").count("going on from") == 2
    for name in ("history.jsonl", "model.safetensors"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
