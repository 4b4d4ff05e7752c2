"""`transformers.Trainer` with batches by token budget, the loss of `loss.py`, and checkpoints that
a killed run goes on from, bit for bit on CPU."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tuneline.errors import Terminated, TrainingError
from tuneline.finetune import memory
from tuneline.finetune.checkpoint import (
    Checkpoint,
    Checkpoints,
    Schedule,
    load_trainable,
    save_state,
    save_trainable,
    trainable,
)
from tuneline.finetune.loss import held_out_nll, supervised_nll
from tuneline.finetune.sharding import is_sharded, load_optimizer, settle, shard, whole
from tuneline.progress import minutes, report, tick
from tuneline.termination import Termination
from tuneline.tracking import Step

T = TypeVar("T")
GRACE_SECONDS: Final = 30
"""From SIGTERM to SIGKILL, Kubernetes' default. A checkpoint has to be on the disk by then: the
micro-batch at hand is finished, the accumulated ones of an unfinished step are dropped."""

_SILENCE_SECONDS = 30


@dataclass
class Figures:
    """What has been counted since the loss was last logged, and since the start."""

    nll: float = 0.0
    """Summed over `supervised` tokens, in nats."""
    supervised: int = 0
    tokens_seen: int = 0
    """Without padding."""
    slots_seen: int = 0
    """With padding."""


@dataclass(frozen=True)
class _Moment:
    """What a checkpoint holds beside weights and optimizer, as of the end of a step."""

    random_state: dict[str, Any]
    figures: Figures


class SupervisedTrainer(Trainer):
    """The loop of transformers over loaders that already make batches.

    Args:
        train_loader: batches with `input_ids`, `labels`, `rows` and `attention_mask` or
            `position_ids`.
        validation_loader: batches for the validation loss, or None.
        create_optimizer: makes the method's own optimizer from a class and its options, or None.
        checkpoints: where to keep them, or None to keep none.
        schedule: when one is due, beside those of each new lowest validation loss.
        termination: whether SIGTERM has arrived.
        load_best: end with the weights of the lowest validation loss.
        early_stopping_patience: evaluations without a lower one until training stops, or None.
        shard_in: what dtype to compute in with the model divided over all processes; None: each
            process has all of it.
        others: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        train_loader: DataLoader[dict[str, Tensor]],
        validation_loader: DataLoader[dict[str, Tensor]] | None,
        create_optimizer: Callable[[type[Optimizer], dict[str, Any]], Optimizer | None],
        checkpoints: Checkpoints | None = None,
        schedule: Schedule | None = None,
        termination: Termination | None = None,
        load_best: bool = False,
        early_stopping_patience: int | None = None,
        shard_in: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        dataset = validation_loader.dataset if validation_loader else None
        super().__init__(train_dataset=train_loader.dataset, eval_dataset=dataset, **others)
        self.remove_callback(PrinterCallback)  # ProgressCallback prints what it would
        if shard_in is not None:
            shard(self.model, shard_in)
            # accelerate then leaves placement and gradients to the model
            self.is_distributed_loading_by_transformers = True
        self._train_loader = train_loader
        self._validation_loader = validation_loader
        self._create_optimizer = create_optimizer
        self._checkpoints = checkpoints
        self._schedule = schedule
        self._termination = termination or Termination()
        self._load_best = load_best
        self._patience = early_stopping_patience
        self.figures = Figures()
        self._moment: _Moment | None = None
        self._pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._grad_norm: float | Tensor | None = None
        self._evaluation_due = False
        self._next_counts: list[tuple[int, int, int]] = []
        self._resumed_at: int | None = None
        self._measured = memory.Measured()
        self._longest_row = 0
        self._evaluates = False
        self._micro_batch_started = 0.0
        self._micro_batch_seconds = 0.0
        self._grace_was_checked = False
        self.add_callback(_Steps(self))
        # the loop counts supervised tokens over the accumulated batch and hands the number in
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def run(self) -> None:
        """Train from the newest checkpoint, or from the start, to the end.

        Raises:
            TrainingError: the loss or a gradient is not finite, memory or disk is full.
            Terminated: SIGTERM arrived; a checkpoint was written.
        """
        found = self._newest()
        if found is not None:
            report(f"going on from {found.path}")
            self._resumed_at = found.step
            self.figures = Figures(**found.notes["figures"])
            if not self.args.should_save:  # the sums are of all ranks
                self.figures = replace(self.figures, nll=0.0, supervised=0)
            self.args.eval_on_start = found.notes["evaluation_due"]
        started, tokens = time.monotonic(), self.figures.tokens_seen
        if found is not None and found.notes["stopped_early"]:
            self._load_from_checkpoint(str(found.path))
            self.state = TrainerState.load_from_json(str(found.path / "trainer_state.json"))
        else:
            with self._memory_errors():
                self._measured = memory.Measured(start=memory.peak_bytes())
                self.train(resume_from_checkpoint=str(found.path) if found else None)
        seconds, tokens = time.monotonic() - started, self.figures.tokens_seen - tokens
        tokens = int(self._summed(torch.tensor(tokens, device=self.args.device)))
        report(
            f"trained {tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:.0f} tokens/s), "
            f"{self.state.global_step} steps"
        )
        if self._validation_loader is not None and not self._evaluated_now():
            with self._memory_errors():
                self.evaluate()
        if self.any_rank(self._termination.requested):
            self._stop()
        if self._load_best:
            self._take_best()

    def _newest(self) -> Checkpoint | None:
        """Rank 0's newest, for all."""
        return self._of_rank_0(lambda checkpoints: checkpoints.newest())

    def _of_rank_0(self, look: Callable[[Checkpoints], Checkpoint | None]) -> Checkpoint | None:
        found = look(self._checkpoints) if self._checkpoints and self.args.should_save else None
        found = self._from_rank_0(found)
        if self.args.world_size > 1 and found is not None and self._checkpoints is not None:
            found = self._on_this_machine(found, self._checkpoints)
        return found

    def _from_rank_0(self, value: T) -> T:
        if self.args.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def _on_this_machine(self, found: Checkpoint, checkpoints: Checkpoints) -> Checkpoint:
        brings = self.args.local_process_index == 0
        if brings and self.args.process_index > 0:
            found = checkpoints.same(found, brings=True)
        torch.distributed.barrier()
        return found if brings else checkpoints.same(found, brings=False)

    def _run_epoch(self, *given: Any, **options: Any) -> None:
        """Nothing where training is over: transformers looks at that after a step only.

        A resumed run can be past the last step inside of an epoch, or the evaluation that it begins
        with can end it.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*given, **options)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """A schedule by validation loss steps also at the evaluation that a resumed run begins
        with: it was due in the run before."""
        del skip_scheduler
        return super()._evaluate(trial, ignore_keys_for_eval)

    def _stop(self) -> None:
        if self._checkpoints is None:
            raise Terminated
        if self._resumed_at == self.state.global_step:
            # nothing was trained since, and this process need not have the random state of then
            raise Terminated(
                f"the checkpoint of step {self._resumed_at} is as it was: run it again to go on"
            )
        self._moment = self._now()
        self._save_checkpoint(self.model, None)
        self._raise_terminated()

    def _raise_terminated(self) -> None:
        what = f"a checkpoint of step {self.state.global_step} was written"
        if self._checkpoints is not None and self._checkpoints.unsent:
            raise Terminated(
                f"{what}, but it is in {self._checkpoints.folder} only ("
                f"{self._checkpoints.unsent}): run it again on this disk to go on"
            )
        raise Terminated(f"{what}: run it again to go on")

    # ---- batches, loss, gradients

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The loader that was given; its sampler knows ranks and epochs by itself."""
        return self._train_loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As in transformers; tokens are counted while they are still on the CPU."""
        batches, supervised = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._next_counts = [
            (
                int(batch["attention_mask"].sum())
                if "attention_mask" in batch
                else batch["input_ids"].numel(),
                batch["input_ids"].numel(),
                int((batch["labels"][:, 1:] != -100).sum()),
            )
            for batch in batches
        ]
        self._longest_row = max(
            (
                int(batch["position_ids"].max()) + 1
                if "position_ids" in batch
                else batch["input_ids"].shape[1]
                for batch in batches
            ),
            default=0,
        )
        return batches, supervised

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean loss over the supervised tokens of the whole accumulated batch."""
        del return_outputs
        started = time.monotonic()
        nll, tokens = supervised_nll(model, inputs)
        self._pending.append((nll.detach(), inputs))
        divisor = tokens if num_items_in_batch is None else num_items_in_batch
        self._micro_batch_started = started
        # gradients are averaged over ranks, the divisor already counts all of them
        return nll / divisor * self.accelerator.num_processes

    def _clip_grad_norm(self, model: nn.Module) -> float | Tensor | None:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._grad_norm

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The method's optimizer, or the one of transformers."""
        if self.optimizer is None:
            chosen, options = self.get_optimizer_cls_and_kwargs(self.args)
            options["weight_decay"] = self.args.weight_decay
            self.optimizer = self._create_optimizer(chosen, options)
        return self.optimizer or super().create_optimizer(model)

    def before_optimizer_step(self) -> None:
        """Nothing that is not finite reaches the weights.

        Raises:
            TrainingError: names the step and the rows.
        """
        # one look at the device per step
        losses = torch.stack([nll for nll, _ in self._pending]).double().tolist()
        norm = None if self._grad_norm is None else float(self._grad_norm)
        bad = not all(map(math.isfinite, losses)) or not (norm is None or math.isfinite(norm))
        if self.any_rank(bad):
            self._refuse(losses, norm)
        self.figures.nll += math.fsum(losses)
        self._measured.note(max(slots for _, slots, _ in self._next_counts))
        for tokens, slots, supervised in self._next_counts:
            self.figures.tokens_seen += tokens
            self.figures.slots_seen += slots
            self.figures.supervised += supervised
        self._pending.clear()

    def _refuse(self, losses: list[float], norm: float | None) -> NoReturn:
        """Of all processes with the same words: the rows may be another's."""
        batches = [batch for _, batch in self._pending]
        faults = [
            (loss, row)
            for loss, batch in zip(losses, batches, strict=True)
            if not math.isfinite(loss)
            for row in self._rows_at_fault(batch)
        ]
        faults = self._of_all_ranks(faults)
        if faults:
            what, rows = f"the loss is {faults[0][0]}", [row for _, row in faults]
        else:
            what = f"the losses are finite, but the gradient's norm is {norm}"
            rows = self._of_all_ranks([row for batch in batches for row in _rows_of(batch)])
        raise TrainingError(
            f"{what} at step {self.state.global_step + 1}, in rows {rows} (counted from 0) of the "
            "train split: look at these rows; if they are as they should be, lower "
            "training.learning_rate or training.max_grad_norm"
        )

    def _of_all_ranks(self, values: list[T]) -> list[T]:
        if self.args.world_size == 1:
            return values
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, values)
        return [value for of_rank in gathered for value in of_rank]

    def _rows_at_fault(self, batch: dict[str, Tensor]) -> list[int]:
        rows = _rows_of(batch)
        assert self.model is not None
        if is_sharded(self.model) or "attention_mask" not in batch:
            return rows  # other ranks would have to compute too, or rows lie end to end
        one_by_one = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(rows))]
        with torch.no_grad():
            losses = [float(supervised_nll(self.model, one)[0]) for one in one_by_one]
        at_fault = [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]
        return at_fault or rows

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            assert self.model is not None
            step = self.state.global_step
            raise TrainingError(
                memory.sentence(
                    f"in the evaluation after step {step}"
                    if self._evaluates
                    else f"at step {step + 1}",
                    self.model,
                    tokens=max((slots for _, slots, _ in self._next_counts), default=0),
                    longest_row=self._longest_row,
                    element_bytes=2 if self.args.bf16 else 4,
                    checkpointing=bool(self.args.activation_checkpointing),
                    measured=self._measured,
                    limit=memory.limit_bytes(),
                )
            ) from error

    # ---- logging, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The loss of transformers' interval, but weighted by tokens and exact when resumed.

        How long this process took is no part of the history: a resumed run has the same.
        """
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            sums = torch.tensor(
                [self.figures.nll, float(self.figures.supervised)],
                dtype=torch.float64,
                device=self.args.device,
            )
            nll, supervised = self._summed(sums).tolist()
            logs["loss"] = nll / supervised
            self.figures = replace(self.figures, nll=0.0, supervised=0)
        super().log(logs, start_time)

    def _summed(self, values: Tensor) -> Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation loss per supervised token."""
        assert self._validation_loader is not None
        model = self.model
        assert model is not None
        try:
            with self.accelerator.autocast():
                nll, tokens = held_out_nll(model, self._until_terminated(self._validation_loader))
        finally:
            settle(model)
        sums = torch.tensor([nll, float(tokens)], dtype=torch.float64, device=self.args.device)
        total, count = self._summed(sums).tolist()
        if not math.isfinite(total):
            raise TrainingError(
                f"validation loss is {total} at step {self.state.global_step}: the model's "
                "weights or its precision are broken; lower training.learning_rate"
            )
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._evaluation_due = False
        if self._best_step() == self.state.global_step:
            self.control.should_save = True
        if self._out_of_patience():
            self.control.should_training_stop = True
        return metrics

    def _until_terminated(self, batches: Iterable[Any]) -> Iterator[Any]:
        self._evaluates = True
        for batch in batches:
            if self.any_rank(self._termination.requested):
                self._evaluation_due = True  # the resumed run begins with it
                self._stop()
            yield batch
        self._evaluates = False

    def _evaluations(self) -> list[tuple[float, int]]:
        return [
            (entry["eval_loss"], int(entry["step"]))
            for entry in self.state.log_history
            if "eval_loss" in entry
        ]

    def _best_step(self) -> int | None:
        evaluations = self._evaluations()
        return min(evaluations)[1] if evaluations else None

    def _out_of_patience(self) -> bool:
        losses = [loss for loss, _ in self._evaluations()]
        if self._patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self._patience

    def _evaluated_now(self) -> bool:
        evaluations = self._evaluations()
        return bool(evaluations) and evaluations[-1][1] == self.state.global_step

    # ---- checkpoints

    def _now(self) -> _Moment:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if torch.cuda.is_available():
            many = self.args.world_size > 1
            state["cuda"] = (
                torch.cuda.random.get_rng_state_all() if many else torch.cuda.get_rng_state()
            )
        return _Moment(state, replace(self.figures))

    def begin_step(self) -> None:
        """Remember the end of the last step: a checkpoint inside of this one holds that."""
        self._pending.clear()
        if self._checkpoints is not None:
            self._moment = self._now()

    def end_micro_batch(self) -> None:
        """Stop here if SIGTERM has arrived, with the state of the last whole step."""
        self._micro_batch_seconds = max(
            self._micro_batch_seconds, time.monotonic() - self._micro_batch_started
        )
        if self.any_rank(self._termination.requested):
            if self._checkpoints is None:
                raise Terminated
            self._save_checkpoint(self.model, None)
            self._raise_terminated()

    def end_step(self, control: TrainerControl) -> None:
        """Decide whether this step's state is written."""
        self._micro_batch_seconds = max(
            self._micro_batch_seconds, time.monotonic() - self._micro_batch_started
        )
        stopping = self.any_rank(self._termination.requested)
        if self._checkpoints is None:
            if stopping:
                raise Terminated
            return
        self._moment = None
        if stopping:
            # an evaluation can outlast the grace period: the resumed run begins with it
            self._evaluation_due = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
        elif self.any_rank(self._schedule is not None and self._schedule.due):
            control.should_save = True

    def after_save(self) -> None:
        """Stop if that was why."""
        if self.any_rank(self._termination.requested):
            self._raise_terminated()

    def any_rank(self, value: bool) -> bool:
        """Whether it is so in one of the processes; all of them have to ask."""
        if self.args.world_size == 1:
            return value
        flag = torch.tensor(float(value), device=self.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _save_checkpoint(self, model: nn.Module | None, trial: Any) -> None:
        """Write one; within a step, the state before that step's gradients."""
        del model, trial
        if self._checkpoints is None:
            return
        started = time.monotonic()
        moment = self._moment or self._now()
        states = [moment.random_state]
        figures = moment.figures
        if self.args.world_size > 1:
            gathered: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(gathered, (moment.random_state, figures))
            states = [state for state, _ in gathered]
            figures = Figures(
                nll=math.fsum(f.nll for _, f in gathered),
                supervised=sum(f.supervised for _, f in gathered),
                tokens_seen=figures.tokens_seen,
                slots_seen=figures.slots_seen,
            )
        assert self.model is not None and self.optimizer is not None
        settle(self.model)
        weights, optimizer_state = trainable(self.model), self.optimizer.state_dict()
        if is_sharded(self.model):  # all processes gather, the first one writes
            weights = whole(weights, keep=self.args.should_save)
            optimizer_state = whole(optimizer_state, keep=self.args.should_save)
        if self.args.should_save:
            notes = {
                "figures": asdict(figures),
                "evaluation_due": self._evaluation_due,
                "stopped_early": self._out_of_patience(),
            }
            self._checkpoints.write(
                self.state.global_step,
                notes,
                lambda folder: self._fill(folder, weights, optimizer_state, states),
                self._best_step(),
            )
        # the others wait for the first one: what stops next must not end it while it writes
        seconds, self._checkpoints.unsent = self._from_rank_0(
            (time.monotonic() - started, self._checkpoints.unsent)
        )
        if self._schedule is not None:
            self._schedule.wrote(seconds)
        self._check_grace(seconds)

    def _fill(
        self,
        folder: Path,
        weights: dict[str, Tensor],
        optimizer_state: dict[str, Any],
        random_states: list[dict[str, Any]],
    ) -> None:
        assert self.lr_scheduler is not None
        save_trainable(weights, folder)
        save_state(folder, "optimizer.pt", optimizer_state)
        save_state(folder, "scheduler.pt", self.lr_scheduler.state_dict())  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's has none
        for rank, state in enumerate(random_states):
            name = "rng_state.pth" if len(random_states) == 1 else f"rng_state_{rank}.pth"
            save_state(folder, name, state)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _check_grace(self, seconds: float) -> None:
        needed = self._micro_batch_seconds + seconds
        if needed > GRACE_SECONDS and not self._grace_was_checked:
            report(
                f"warning: a micro-batch and a checkpoint take {needed:.0f} s, more than the "
                f"{GRACE_SECONDS} s between SIGTERM and SIGKILL: a reclaimed node may lose up to "
                "training.checkpoint_minutes; lower training.batch_tokens"
            )
            self._grace_was_checked = True

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        target = model if model is not None else self.model
        assert target is not None
        load_trainable(target, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.model is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        folder = Path(checkpoint)
        # from the file piece by piece: all of it is too much for one process's device
        state = torch.load(
            folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True
        )
        load_optimizer(self.optimizer, state)
        state = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(state)  # pyright: ignore[reportAttributeAccessIssue]  # DeepSpeed's has none

    def _take_best(self) -> None:
        ranked = [step for _, step in sorted(self._evaluations())]
        assert self._checkpoints is not None and self.model is not None
        last = self.state.global_step
        if not ranked or ranked[0] == last:
            return
        # of those that were worse than the last weights none is of use
        better = ranked[: ranked.index(last)] if last in ranked else ranked
        found = self._of_rank_0(
            lambda checkpoints: next(filter(None, map(checkpoints.find, better)), None)
        )
        if found is None or found.step != ranked[0]:
            report(
                f"warning: the checkpoint of step {ranked[0]}, which had the lowest validation "
                f"loss, is lost from {self._checkpoints.folder}"
            )
        if found is None:
            report(f"warning: the last weights are taken, of step {last}")
            return
        load_trainable(self.model, found.path)
        what = "the lowest" if found.step == ranked[0] else "the lowest of those that are left"
        report(f"took the weights of step {found.step}, which had {what} validation loss")


def _rows_of(batch: dict[str, Tensor]) -> list[int]:
    return [row if row >= 0 else ~row for row in batch["rows"].tolist()]


class _Steps(TrainerCallback):
    """Hands the loop's events to the trainer."""

    def __init__(self, trainer: SupervisedTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del control
        loader = self._trainer.get_train_dataloader()
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
        # by the steps done: what transformers wraps around a resumed loader doesn't pass it on
        loader.batch_sampler.set_epoch(state.global_step // steps)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state, control
        self._trainer.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state, control
        self._trainer.end_micro_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state, control
        self._trainer.before_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state
        self._trainer.end_step(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state, control
        self._trainer.after_save()


class ProgressCallback(TrainerCallback):
    """Progress to the console, metrics to tracking; of rank 0 only."""

    def __init__(self, step: Step, trainer: SupervisedTrainer) -> None:
        self._step = step
        self._trainer = trainer
        self._started = time.monotonic()
        self._last_tick = 0.0
        self._first_step = 0
        self._first_tokens = 0
        self._last_tokens = 0
        self._step_ended = 0.0
        self._aside_seconds = 0.0
        """Since the last line, for evaluation and checkpoints."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        del args, control
        self._started = self._last_tick = self._step_ended = time.monotonic()
        self._first_step = state.global_step
        self._first_tokens = self._last_tokens = self._trainer.figures.tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A sign of life between two logged figures of a slow run."""
        del args
        self._step_ended = time.monotonic()
        if self._step_ended - self._last_tick > _SILENCE_SECONDS and not control.should_log:
            self._tick(state, "")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluation is over: its time is not training's."""
        del args, state, control
        self._set_aside()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """As after an evaluation."""
        del args, state, control
        self._set_aside()

    def _set_aside(self) -> None:
        now = time.monotonic()
        self._aside_seconds += now - self._step_ended
        self._step_ended = now

    def _tick(self, state: TrainerState, figures: str) -> None:
        if not state.is_world_process_zero:
            return
        now, seen = time.monotonic(), self._trainer.figures.tokens_seen
        seconds = max(now - self._last_tick - self._aside_seconds, 1e-9)
        rate = (seen - self._last_tokens) * self._trainer.args.world_size / seconds
        self._last_tick, self._last_tokens, self._aside_seconds = now, seen, 0.0
        elapsed = self._last_tick - self._started
        done = max(state.global_step - self._first_step, 1)
        left = elapsed / done * (state.max_steps - state.global_step)
        tick(
            f"step {state.global_step}/{state.max_steps}  {figures}"
            f"{rate:.0f} tokens/s  padding {self._padding():.0%}  "
            f"{memory.peak_bytes() / 1e9:.1f} GB  ETA {minutes(left)}"
        )

    def _tokens_per_second(self, elapsed: float) -> float:
        seen = self._trainer.figures.tokens_seen - self._first_tokens
        return seen * self._trainer.args.world_size / elapsed

    def _padding(self) -> float:
        figures = self._trainer.figures
        return 1 - figures.tokens_seen / max(figures.slots_seen, 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One progress line, and the figures to tracking."""
        del args, control
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        elapsed = time.monotonic() - self._started
        if "eval_loss" in logs:
            report(
                f"step {state.global_step}/{state.max_steps}: "
                f"validation loss {logs['eval_loss']:.4f}"
            )
            self._step.log_metrics({"validation_loss": logs["eval_loss"]}, state.global_step)
        elif "loss" in logs:
            norm = logs.get("grad_norm", 0.0)
            self._tick(
                state,
                f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}  grad norm {norm:.2f}  ",
            )
            self._step.log_metrics(
                {
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": norm,
                    "elapsed_seconds": elapsed,
                    "tokens_per_second": self._tokens_per_second(elapsed),
                    "padding_fraction": self._padding(),
                    "peak_memory_bytes": float(memory.peak_bytes()),
                },
                state.global_step,
            )
