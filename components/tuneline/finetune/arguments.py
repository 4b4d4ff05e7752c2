"""The recipe's training settings as `transformers.TrainingArguments`, for the device at hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainingArguments

from tuneline.finetune.load import compute_dtype
from tuneline.finetune.methods import Method
from tuneline.recipe import TrainingSection

_LAST_FRACTION: Final = 0.1
"""Of the steps for the decay of `warmup_stable_decay`, and of the peak for the least learning rate
of `cosine_with_min_lr`."""


def training_arguments(
    training: TrainingSection, method: Method, *, steps: int, validates: bool, output_dir: Path
) -> TrainingArguments:
    """What transformers' loop is told.

    Args:
        training: with a learning rate, the recipe's or the method's own.
        method: whose needs the loop has to meet.
        steps: of the optimizer, in the whole run.
        validates: whether there is a validation loader.
        output_dir: an empty folder that transformers makes; nothing is left in it.
    """
    assert training.learning_rate is not None
    accelerated = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        learning_rate=training.learning_rate,
        **_schedule(training, steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=method.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=compute_dtype() is torch.bfloat16,
        eval_strategy="steps" if validates else "no",
        eval_steps=max(1, math.ceil(steps / training.evaluations)),
        logging_steps=min(math.ceil(steps / 40), 50),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # ours stops, and names the rows
        save_strategy="no",  # checkpoints go by our own clock and policy
        report_to="none",
        disable_tqdm=True,
        seed=training.seed,
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated,
        remove_unused_columns=False,
    )


def _schedule(training: TrainingSection, steps: int) -> dict[str, Any]:
    warmup_steps = int(training.warmup_fraction * steps)
    name: str = training.schedule
    options: dict[str, Any] = {}
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    elif name == "cosine_with_min_lr":
        options = {"min_lr_rate": _LAST_FRACTION}
    elif name == "warmup_stable_decay":
        options = {"num_decay_steps": math.ceil(_LAST_FRACTION * steps)}
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": options,
        "warmup_steps": warmup_steps,
    }
