"""Training in several processes computes what one computes, and fails and stops as one."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from tuneline import artifacts
from tuneline.base_model import resolve
from tuneline.errors import Terminated, TrainingError, UsageError
from tuneline.finetune import launch
from tuneline.finetune.arguments import training_arguments
from tuneline.finetune.batching import collate
from tuneline.finetune.checkpoint import Checkpoints, Schedule
from tuneline.finetune.load import load_base
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods.lora import METHOD
from tuneline.finetune.sharding import shard, whole
from tuneline.finetune.trainer import SupervisedTrainer
from tuneline.recipe import TrainingSection
from tuneline.termination import Termination


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
    last = errors.splitlines()[-1]
    assert "stopped by SIGTERM; a checkpoint of step" in last and not output.exists()
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


WRITTEN = "error: finetune was stopped by SIGTERM; a checkpoint of step 4 was written"
FULL = "error: checkpoint step-00000005 can't be written (No space left on device): free space"


@pytest.mark.parametrize(
    ("said", "code", "kind", "sentence"),
    [
        (f"{WRITTEN}: run it again to go on", 1, Terminated, "a checkpoint of step 4 was written"),
        (f"{WRITTEN}, but it is in /disk only", 1, Terminated, "but it is in /disk only"),
        (f"{WRITTEN}\n{FULL}", 1, TrainingError, "can't be written (No space left on device)"),
        ("exitcode  : -9", 1, TrainingError, "one of 2 training processes was killed"),
        (
            "error: finetune was stopped by SIGTERM; nothing was written, run it again",
            1, Terminated, "nothing was written",
        ),
        ("SignalException: Process 7 got signal: 15", 1, Terminated, "no process said that it "),
        ("", 0, Terminated, "its result is written"),
    ],
    ids=["written", "on one disk", "disk full", "killed", "loading", "starting", "ended"],
)  # fmt: skip
def test_a_stopped_run_claims_what_its_processes_said(
    said: str, code: int, kind: type[BaseException], sentence: str
) -> None:
    stopped = launch._as_stopped(f"Loading weights\n{said}\n", 2, code)
    assert isinstance(stopped, kind) and sentence in str(stopped)


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


# ---- what two processes agree on


class Agreement:
    """Runs a function in two forked processes that are torchrun's to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, work: Callable[[int], Any]) -> list[Any]:
        """What it returned or raised in each of them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                self._child(rank, work)
            pids.append(pid)
        left = dict(enumerate(pids))
        deadline = time.monotonic() + 60
        while left and time.monotonic() < deadline:
            left = {rank: pid for rank, pid in left.items() if os.waitpid(pid, os.WNOHANG)[0] == 0}
            time.sleep(0.01)
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not left, f"ranks {list(left)} wait for another"
        return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    def _child(self, rank: int, work: Callable[[int], Any]) -> None:
        try:
            try:
                result = work(rank)
            except (TrainingError, Terminated) as error:
                result = error
            torch.save(result, self.folder / f"{rank}.pt")
        except BaseException:  # noqa: BLE001  a forked child must never return into the tests
            traceback.print_exc()
        finally:
            os._exit(0)


@pytest.fixture
def in_two_processes(tmp_path: Path) -> Agreement:
    return Agreement(tmp_path)


class SlowCheckpoints(Checkpoints):
    """Is written while another process would have the time to end."""

    def write(self, *arguments: Any) -> None:
        ended = self.folder.parent / "ended"
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not ended.exists():
            time.sleep(0.01)
        assert not ended.exists(), "another process has ended"
        super().write(*arguments)


def trainer_of(
    folder: Path,
    rank: int,
    termination: Termination,
    *,
    steps: int,
    minutes: float,
    data: list,
    compiles: bool = False,
    shard_in: torch.dtype | None = None,
) -> SupervisedTrainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_embd=32, n_layer=1, n_head=2))
    model.lm_head = torch.nn.Linear(32, 211)  # not tied: a token's embedding is of its rows only
    training = TrainingSection(learning_rate=0.01, warmup_fraction=0)
    arguments = training_arguments(
        training,
        METHOD,
        steps=steps,
        validates=True,
        output_dir=folder / f"trainer{rank}",
        sharded=shard_in is not None,
    )
    if compiles:
        arguments.torch_compile, arguments.torch_compile_backend = True, "aot_eager"
    loaders = [
        DataLoader(
            rows,
            batch_sampler=Given([[row] for row in range(rank, len(rows), 2)]),
            collate_fn=lambda batch: collate(batch, 0),
        )
        for rows in (data, DATA)
    ]
    return SupervisedTrainer(
        model=model,
        args=arguments,
        train_loader=loaders[0],
        validation_loader=loaders[1],
        create_optimizer=lambda chosen, options: None,
        checkpoints=SlowCheckpoints(folder / "key", limit=9, own=rank == 0),
        schedule=Schedule(minutes),
        termination=termination,
        shard_in=shard_in,
    )


class Given(list):
    """Batches in a given order, in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        pass


DATA = [{"row": row, "input_ids": [5, 6, 7], "supervised": [0, 1, 1]} for row in range(4)]


def test_sigterm_of_one_process_after_the_last_step_stops_all_with_a_checkpoint(
    in_two_processes: Agreement,
) -> None:
    folder = in_two_processes.folder

    def work(rank: int) -> bool:
        termination = Termination()
        trainer = trainer_of(folder, rank, termination, steps=2, minutes=60, data=DATA)

        class Late(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                termination.requested = rank == 1 and state.global_step == state.max_steps

        trainer.add_callback(Late())
        try:
            trainer.run()
        finally:
            (folder / "ended").touch()
        return False

    results = in_two_processes(work)
    for stopped in results:
        assert isinstance(stopped, Terminated)
        assert str(stopped) == "a checkpoint of step 2 was written: run it again to go on"
    assert (folder / "key" / "step-00000002" / "checkpoint.json").is_file()


def test_the_first_process_s_time_for_a_checkpoint_decides_when_the_next_one_is_due(
    in_two_processes: Agreement,
) -> None:
    folder = in_two_processes.folder

    def work(rank: int) -> bool:
        trainer = trainer_of(folder, rank, Termination(), steps=12, minutes=0, data=DATA)
        trainer.run()
        return True

    assert in_two_processes(work) == [True, True]
    written = [path.name for path in (folder / "key").glob("step-*")]
    # of 2 s, a twentieth of the time at most; those at 6 and 12 hold the lowest validation loss
    assert sorted(written) == ["step-00000001", "step-00000006", "step-00000012"]


def test_rows_that_are_not_finite_are_named_by_every_process(in_two_processes: Agreement) -> None:
    data = [{**DATA[0], "row": number} for number in range(6)]
    data[2]["input_ids"] = [5, 210, 7]

    def work(rank: int) -> None:
        trainer = trainer_of(
            in_two_processes.folder, rank, Termination(), steps=3, minutes=60, data=data
        )
        with torch.no_grad():
            trainer.model.transformer.wte.weight[210] = math.nan
        trainer.run()

    one, other = in_two_processes(work)
    assert isinstance(one, TrainingError) and str(one) == str(other)
    assert "the loss is nan at step 2, in rows [2] (counted from 0)" in str(one)


@pytest.mark.slow
# torch's compiler hides its own, which comes too late where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shard_in", [None, torch.float32], ids=["whole", "divided"])
def test_compiled_training_has_the_same_losses(
    in_two_processes: Agreement, shard_in: torch.dtype | None
) -> None:
    def work(rank: int) -> list[list[dict]]:
        return [
            history_of(
                in_two_processes.folder / str(compiles), rank, compiles=compiles, shard_in=shard_in
            )
            for compiles in (False, True)
        ]

    for plain, compiled in in_two_processes(work):
        for key in ("loss", "grad_norm", "eval_loss"):
            expected = pytest.approx(losses(plain, key), rel=TOLERANCE_OF_PROCESSES)
            assert losses(compiled, key) == expected and losses(plain, key)


def history_of(folder: Path, rank: int, **how: Any) -> list[dict]:
    trainer = trainer_of(folder, rank, Termination(), steps=4, minutes=60, data=DATA, **how)
    trainer.model.eval()
    trainer.run()
    return trainer.state.log_history


FAMILIES = ("llama", "qwen2", "qwen3", "glm", "glm4", "chatglm_shaped", "baichuan_shaped")
BF16_TOLERANCE = 0.02
"""Of a loss: 8 bits of mantissa in every product."""


@pytest.mark.slow
def test_a_divided_model_of_every_family_has_the_gradients_of_a_whole_one(
    in_two_processes: Agreement, model_reference: Callable[[str], str]
) -> None:
    references = {family: model_reference(family) for family in FAMILIES}

    def work(rank: int) -> dict[str, list[float]]:
        torch.distributed.init_process_group("gloo")
        batch = collate(DATA[rank : rank + 1], 0)
        return {family: deviations(path, batch) for family, path in references.items()}

    for rank in in_two_processes(work):
        for family, (of_loss, of_gradient, of_bf16) in rank.items():
            assert of_loss < TOLERANCE_OF_PROCESSES, family
            assert of_gradient < TOLERANCE_OF_PROCESSES, family
            assert 0 < of_bf16 < BF16_TOLERANCE, family


def deviations(reference: str, batch: dict[str, torch.Tensor]) -> list[float]:
    """Of loss and gradients from those of the whole model, and of the loss in bf16."""
    base = resolve(reference)
    gradients, nlls = [], []
    for dtype in (None, torch.float32, torch.bfloat16):
        model = load_base(base.path, trust_code=base.trusts_code)
        if dtype is not None:
            shard(model, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            nll, _ = supervised_nll(model, batch)
        assert nll.dtype is torch.float32
        nll.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if dtype is None:
            for grad in grads.values():
                torch.distributed.all_reduce(grad)
                grad.div_(2)
        else:
            assert all(isinstance(grad, DTensor) for grad in grads.values())
            assert sum(g.to_local().numel() for g in grads.values()) < 0.6 * sum(
                g.numel() for g in grads.values()
            )
        grads = whole(grads, keep=True)
        gradients.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
        nlls.append(float(nll.detach()))
    plain, divided, _ = gradients
    return [
        abs(nlls[1] / nlls[0] - 1),
        float((divided - plain).norm() / plain.norm()),
        abs(nlls[2] / nlls[0] - 1),
    ]
