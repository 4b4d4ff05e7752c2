"""`transformers.Trainer` with batches by token budget and the loss of `loss.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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

from tuneline.errors import RegistryError, TrainingError
from tuneline.finetune.loss import held_out_loss, supervised_nll
from tuneline.progress import minutes, peak_memory_bytes, report, tick
from tuneline.tracking import Step

_SILENCE_SECONDS = 30


class SupervisedTrainer(Trainer):
    """The loop of transformers over loaders that already make batches.

    Args:
        train_loader: batches with `input_ids`, `attention_mask`, `labels`.
        validation_loader: batches for the validation loss, or None.
        create_optimizer: makes the method's own optimizer from a class and its options, or None.
        others: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        train_loader: DataLoader[dict[str, Tensor]],
        validation_loader: DataLoader[dict[str, Tensor]] | None,
        create_optimizer: Callable[[type[Optimizer], dict[str, Any]], Optimizer | None],
        **others: Any,
    ) -> None:
        dataset = validation_loader.dataset if validation_loader else None
        super().__init__(train_dataset=train_loader.dataset, eval_dataset=dataset, **others)
        self.remove_callback(PrinterCallback)  # ProgressCallback prints what it would
        self._train_loader = train_loader
        self._validation_loader = validation_loader
        self._create_optimizer = create_optimizer
        self.tokens_seen = 0
        # the loop counts supervised tokens over the accumulated batch and hands the number in
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The loader that was given, prepared for the device and the ranks."""
        return self.accelerator.prepare(self._train_loader)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The method's optimizer, or the one of transformers."""
        if self.optimizer is None:
            chosen, options = self.get_optimizer_cls_and_kwargs(self.args)
            options["weight_decay"] = self.args.weight_decay
            self.optimizer = self._create_optimizer(chosen, options)
        return self.optimizer or super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean loss over the supervised tokens of the whole accumulated batch.

        Raises:
            TrainingError: the loss is not finite.
        """
        del return_outputs
        nll, tokens = supervised_nll(model, inputs)
        if not math.isfinite(float(nll.detach())):
            raise TrainingError(
                f"the loss is {float(nll.detach())} at step {self.state.global_step + 1}: lower "
                "training.learning_rate or training.max_grad_norm"
            )
        self.tokens_seen += int(inputs["attention_mask"].sum())
        divisor = tokens if num_items_in_batch is None else num_items_in_batch
        # gradients are averaged over ranks, the divisor already counts all of them
        return nll / divisor * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation loss per supervised token."""
        assert self._validation_loader is not None
        model = self.model
        assert model is not None
        metrics = {"eval_loss": held_out_loss(model, self._validation_loader)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class ProgressCallback(TrainerCallback):
    """Progress to the console, metrics to tracking."""

    def __init__(self, step: Step, trainer: SupervisedTrainer) -> None:
        self._step = step
        self._trainer = trainer
        self._started = time.monotonic()
        self._last_tick = 0.0
        self._tracking_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        del args, state, control
        self._started = self._last_tick = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A sign of life between two logged figures of a slow run."""
        del args, control
        if time.monotonic() - self._last_tick > _SILENCE_SECONDS:
            self._tick(state, "")

    def _tick(self, state: TrainerState, loss: str) -> None:
        self._last_tick = time.monotonic()
        elapsed = self._last_tick - self._started
        left = elapsed / max(state.global_step, 1) * (state.max_steps - state.global_step)
        tick(
            f"step {state.global_step}/{state.max_steps}  {loss}"
            f"{self._trainer.tokens_seen / elapsed:.0f} tokens/s  ETA {minutes(left)}"
        )

    def _track(self, metrics: dict[str, float], step: int) -> None:
        # hours of training are worth more than a curve, and each try of a server that is away
        # costs MLflow's retries, some minutes
        if self._tracking_failed:
            return
        try:
            self._step.log_metrics(metrics, step)
        except RegistryError as error:
            report(f"warning: metrics are not tracked from step {step} on: {error}")
            self._tracking_failed = True

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
        logs = logs or {}
        elapsed = time.monotonic() - self._started
        if "eval_loss" in logs:
            report(
                f"step {state.global_step}/{state.max_steps}: "
                f"validation loss {logs['eval_loss']:.4f}"
            )
            self._track({"validation_loss": logs["eval_loss"]}, state.global_step)
        elif "loss" in logs:
            self._tick(state, f"loss {logs['loss']:.4f}  ")
            self._track(
                {
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": logs.get("grad_norm", 0.0),
                    "elapsed_seconds": elapsed,
                    "tokens_per_second": self._trainer.tokens_seen / elapsed,
                    "peak_memory_bytes": _peak_memory_bytes(),
                },
                state.global_step,
            )


def _peak_memory_bytes() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(peak_memory_bytes())
