"""A run that was stopped ends as one that never was: the same history, the same weights."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from tuneline.data_prep.prepare import prepare
from tuneline.errors import Terminated, TrainingError
from tuneline.finetune.arguments import training_arguments
from tuneline.finetune.batching import collate
from tuneline.finetune.checkpoint import Checkpoints, Schedule, save_trainable, trainable
from tuneline.finetune.checkpoint_store import MARKER
from tuneline.finetune.methods.lora import METHOD, LoraSettings, attach
from tuneline.finetune.train import finetune
from tuneline.finetune.trainer import SupervisedTrainer
from tuneline.recipe import DataSection, TrainingSection, check
from tuneline.termination import Termination, raise_on_sigterm
from tuneline.tracking import Step, Untracked

ROWS = 8


class _InOrder:
    """Batches of one row."""

    def __init__(self, count: int) -> None:
        self._count = count

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return self._count

    def __iter__(self):
        return iter([[row] for row in range(self._count)])


def _loader(seed: int, on_read: Callable[[], None] = lambda: None) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(seed)
    data = [
        {
            "row": row,
            "input_ids": torch.randint(3, 200, (9,), generator=random).tolist(),
            "supervised": [0] * 3 + [1] * 6,
        }
        for row in range(ROWS)
    ]

    def collated(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        on_read()
        return collate(batch, 0)

    return DataLoader(
        data,  # pyright: ignore[reportArgumentType]
        batch_sampler=_InOrder(ROWS),
        collate_fn=collated,
        generator=torch.Generator(),
    )


@dataclass
class Runs:
    """Starts a process's part of the same run, as often as asked."""

    model: Path
    folder: Path

    def run(
        self,
        checkpoints: Checkpoints | None,
        *,
        steps: int,
        stop_in_step: int = 0,
        stop_in_validation_batch: int = 0,
        **settings: Any,
    ) -> SupervisedTrainer:
        """With SIGTERM in a micro-batch or a validation batch of this process, counted from 1."""
        torch.manual_seed(0)  # what a fresh process has, and no checkpoint
        patience = settings.pop("early_stopping_patience", None)
        termination = Termination()
        seen = {"train": 0, "validation": 0}

        def count(what: str, stop_at: int) -> None:
            seen[what] += 1
            termination.requested = termination.requested or seen[what] == stop_at

        training = TrainingSection(
            **{"learning_rate": 0.01, "warmup_fraction": 0, "evaluations": 2} | settings
        )
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        trainer = SupervisedTrainer(
            model=attach(base, LoraSettings(dropout=0.2)),
            args=training_arguments(
                training,
                METHOD,
                steps=steps,
                validates=True,
                output_dir=self.folder / "trainer",
            ),
            train_loader=_loader(0),
            validation_loader=_loader(1, lambda: count("validation", stop_in_validation_batch)),
            create_optimizer=lambda chosen, options: None,
            checkpoints=checkpoints,
            schedule=Schedule(60),
            termination=termination,
            load_best=training.load_best,
            early_stopping_patience=patience,
        )
        compute = trainer.compute_loss

        def counted(*arguments: Any, **options: Any) -> torch.Tensor:
            count("train", stop_in_step)
            return compute(*arguments, **options)

        trainer.compute_loss = counted
        trainer.run()
        return trainer


@pytest.fixture
def runs(tiny_model: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_model, tmp_path)


def assert_same(one: SupervisedTrainer, other: SupervisedTrainer) -> None:
    assert one.state.global_step == other.state.global_step
    assert one.state.log_history == other.state.log_history
    assert one.model is not None and other.model is not None
    for (name, mine), (_, yours) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, yours), name


def test_a_run_stopped_at_its_last_step_inside_of_an_epoch_trains_no_step_more(
    runs: Runs, tmp_path: Path
) -> None:
    half_an_epoch = ROWS // 2
    whole = runs.run(None, steps=half_an_epoch)
    with Checkpoints(tmp_path / "key", limit=1) as checkpoints:
        with pytest.raises(Terminated, match=f"a checkpoint of step {half_an_epoch} was written"):
            runs.run(checkpoints, steps=half_an_epoch, stop_in_step=half_an_epoch)
        resumed = runs.run(checkpoints, steps=half_an_epoch)
    assert whole.state.global_step == half_an_epoch
    assert_same(resumed, whole)


DIVERGING: dict[str, Any] = {
    "steps": 32,
    "learning_rate": 0.5,
    "schedule": "constant",
    "evaluations": 16,
    "early_stopping_patience": 2,
}


def test_a_run_that_ends_early_at_the_evaluation_it_resumes_with_trains_no_step_more(
    runs: Runs, tmp_path: Path
) -> None:
    whole = runs.run(None, **DIVERGING)
    last = whole.state.global_step
    assert last < DIVERGING["steps"]
    with Checkpoints(tmp_path / "key", limit=1) as checkpoints:
        with pytest.raises(Terminated, match=f"a checkpoint of step {last} was written"):
            runs.run(checkpoints, stop_in_step=last, **DIVERGING)
        resumed = runs.run(checkpoints, **DIVERGING)
    assert_same(resumed, whole)


def test_sigterm_in_the_evaluation_that_a_run_resumes_with_leaves_the_checkpoint_as_it_was(
    runs: Runs, tmp_path: Path
) -> None:
    whole = runs.run(None, steps=12)
    with Checkpoints(tmp_path / "key", limit=2) as checkpoints:
        with pytest.raises(Terminated, match="a checkpoint of step 6 was written"):
            runs.run(checkpoints, steps=12, stop_in_step=6)
        for _ in range(2):
            with pytest.raises(Terminated, match="the checkpoint of step 6 is as it was"):
                runs.run(checkpoints, steps=12, stop_in_validation_batch=3)
        resumed = runs.run(checkpoints, steps=12)
    assert_same(resumed, whole)


def test_a_schedule_by_validation_loss_steps_at_the_evaluation_that_a_run_resumes_with(
    runs: Runs, tmp_path: Path
) -> None:
    how = {**DIVERGING, "schedule": "reduce_lr_on_plateau", "early_stopping_patience": None}
    whole = runs.run(None, **how)
    rates = {int(e["step"]): e["learning_rate"] for e in whole.state.log_history if "loss" in e}
    assert rates[1] == how["learning_rate"]
    halved = min(step for step, rate in rates.items() if rate < rates[1])
    assert rates[halved] == rates[1] / 2
    with Checkpoints(tmp_path / "key", limit=1) as checkpoints:
        with pytest.raises(Terminated, match=f"a checkpoint of step {halved - 1} was written"):
            runs.run(checkpoints, stop_in_step=halved - 1, **how)
        resumed = runs.run(checkpoints, **how)
    assert_same(resumed, whole)


def test_sigterm_in_a_resumed_run_that_had_stopped_early_is_no_failure(
    runs: Runs, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path / "key", limit=2) as checkpoints:
        whole = runs.run(checkpoints, **DIVERGING)
        with pytest.raises(Terminated):  # as when SIGTERM comes between training and saving
            whole._stop()
        found = checkpoints.newest()
        assert found is not None and found.notes["stopped_early"]
        again = runs.run(checkpoints, **DIVERGING)
        assert_same(again, whole)
        again._termination.requested = True
        with pytest.raises(Terminated, match=f"step {found.step} is as it was: run it again"):
            again.run()


def test_the_best_checkpoint_is_kept_beside_the_newest_without_load_best(
    runs: Runs, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path / "key", limit=1) as checkpoints:
        trainer = runs.run(checkpoints, **DIVERGING)
        with pytest.raises(Terminated):
            trainer._stop()
        kept = sorted(path.name for path in checkpoints.folder.glob("step-*"))
    best, last = trainer._best_step(), trainer.state.global_step
    assert best is not None and best < last
    assert kept == [f"step-{best:08d}", f"step-{last:08d}"]


@pytest.mark.parametrize("another_survives", [True, False])
def test_a_lost_best_checkpoint_costs_a_warning_and_not_the_run(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    another_survives: bool,
) -> None:
    with Checkpoints(tmp_path / "key", limit=9) as checkpoints:
        trainer = runs.run(checkpoints, **DIVERGING)
        ranked = sorted((loss, step) for loss, step in trainer._evaluations())
        best, last = ranked[0][1], trainer.state.global_step
        trainer._save_checkpoint(None, None)
        for path in checkpoints.folder.glob("step-*"):
            (path / MARKER).unlink()
        survivor = next(step for _, step in ranked if step not in (best, last))
        capsys.readouterr()
        model = trainer.model
        assert model is not None
        weight = next(p for p in model.parameters() if p.requires_grad)
        if another_survives:
            with torch.no_grad():
                before = weight.clone()
                weight.fill_(0.125)
                weights = trainable(model)
                checkpoints.write(
                    survivor, {}, lambda folder: save_trainable(weights, folder), best
                )
                weight.copy_(before)
        trainer._take_best()
        output = capsys.readouterr().out
        assert f"warning: the checkpoint of step {best}, which had the lowest validation" in output
        if another_survives:
            assert torch.equal(weight, torch.full_like(weight, 0.125))
            assert f"took the weights of step {survivor}" in output
        else:
            assert f"the last weights are taken, of step {last}" in output


# ---- the whole step


class _Signals(Untracked):
    """Gets SIGTERM when the step tells its parameters, or its metrics for the third time."""

    def __init__(self, at: str) -> None:
        self._at = at
        self._told = 0

    def log_params(self, params: Mapping[str, Any]) -> None:
        if self._at == "params":
            os.kill(os.getpid(), signal.SIGTERM)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self._told += 1
        if self._at == "metrics" and self._told == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def sigterm_raises() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    raise_on_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def _finetune(model: Path, dataset: Path, output: Path, step: Step, **settings: Any) -> None:
    training = TrainingSection(
        **{"epochs": 2, "learning_rate": 0.01, "batch_tokens": 128} | settings
    )
    finetune(str(model), dataset, LoraSettings(), training, output, step)


@pytest.mark.usefixtures("sigterm_raises")
def test_sigterm_outside_of_the_loop_says_what_there_is_to_go_on_from(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    data = check(DataSection, {"train": str(chats_file)}, source="data")
    dataset = prepare(str(tiny_model), data, tmp_path / "data").path
    said = []
    for at in ("params", "metrics", "params"):
        with pytest.raises(Terminated) as caught:
            _finetune(tiny_model, dataset, tmp_path / "out", _Signals(at))
        said.append(str(caught.value))
    (checkpoint,) = (tmp_path / "out.checkpoints").glob("*/step-*")
    assert said[0] == "of its checkpoints there is none: run it again to go on"
    assert said[2] == (
        f"of its checkpoints the last complete one is {checkpoint.name}: run it again to go on"
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_best": True, "early_stopping_patience": 1}, "load_best"),
        ({"schedule": "reduce_lr_on_plateau"}, "schedule reduce_lr_on_plateau"),
    ],
)
def test_what_goes_by_validation_loss_is_refused_without_rows_before_the_model_loads(
    tiny_model: Path,
    chats_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    named: str,
) -> None:
    section = {"train": str(chats_file), "validation_fraction": 0}
    data = check(DataSection, section, source="data")
    dataset = prepare(str(tiny_model), data, tmp_path / "data").path
    with pytest.raises(TrainingError, match=f"training.{named} needs validation rows, and the"):
        _finetune(tiny_model, dataset, tmp_path / "out", Untracked(), **settings)
    assert "trainable" not in capsys.readouterr().out
