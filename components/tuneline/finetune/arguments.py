"""The recipe's training settings as `transformers.TrainingArguments`, for the device at hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils.import_utils import is_flash_attn_2_available, is_liger_kernel_available

from tuneline.errors import TrainingError
from tuneline.finetune.batching import Layout
from tuneline.finetune.frozen import has_bf16_units, round_frozen
from tuneline.finetune.load import compute_dtype
from tuneline.finetune.methods import Method
from tuneline.finetune.methods.structure import output_layer
from tuneline.progress import report
from tuneline.recipe import TrainingSection, check_sharding

_LAST_FRACTION: Final = 0.1
"""Of the steps for the decay of `warmup_stable_decay`, and of the peak for the least learning rate
of `cosine_with_min_lr` and `cosine_warmup_with_min_lr`."""


def training_arguments(
    training: TrainingSection,
    method: Method,
    *,
    steps: int,
    validates: bool,
    output_dir: Path,
    sharded: bool = False,
) -> TrainingArguments:
    """What transformers' loop is told.

    Args:
        training: with a learning rate, the recipe's or the method's own.
        method: whose needs the loop has to meet.
        steps: of the optimizer, in the whole run.
        validates: whether there is a validation loader.
        output_dir: an empty folder that transformers makes; nothing is left in it.
        sharded: as `shards` says.
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
        activation_checkpointing=training.gradient_checkpointing or method.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=training_dtype(training) is torch.bfloat16,
        torch_compile=training.compile,
        use_liger_kernel=training.kernels == "auto" and has_liger(),
        # the loss is ours
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False},
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
        # of every micro-batch when divided: gradients that wait for the last one would be whole
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sharded}},
    )


def training_dtype(training: TrainingSection) -> torch.dtype:
    """What the loop computes in.

    Raises:
        TrainingError: bf16 was asked for, and this machine has no accelerator with it.
    """
    if training.precision == "fp32":
        return torch.float32
    dtype = compute_dtype()
    if training.precision == "bf16" and dtype is not torch.bfloat16:
        raise TrainingError(
            "training.precision bf16 needs an accelerator that computes in it, and there is none "
            "here (CPUs lose by it): use auto or fp32, or another gpu_pool"
        )
    return dtype


def shards(training: TrainingSection, method: Method, *, processes: int) -> bool:
    """Whether the model is divided over the processes.

    Raises:
        RecipeError: that was asked for with a method that trains little beside a frozen base.
    """
    check_sharding(method, training, source="training")
    return processes > 1 and method.stored_as == "model" and training.sharding != "none"


def has_liger() -> bool:
    """Whether Liger's Triton kernels are installed and have a device to run on."""
    return torch.cuda.is_available() and is_liger_kernel_available()


def has_flash_attention() -> bool:
    """Whether flash attention is installed and has a device to run on: Ampere or newer."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 8
        and is_flash_attn_2_available()
    )


def use_kernels(model: Any, training: TrainingSection) -> Layout:
    """Give the model what the hardware runs best; returns how batches are laid out.

    Flash attention where there is one, and bf16 products with frozen weights on a CPU with units
    for them.

    Packed rows need no mask with it. Elsewhere the block-diagonal mask makes every row pay for the
    whole pack's attention, and rows of like length win.

    Raises:
        TrainingError: packing was asked for and the model lets packed rows see each other.
    """
    flash = (
        training.kernels == "auto"
        and training_dtype(training) is torch.bfloat16
        and has_flash_attention()
        and getattr(model, "_supports_flash_attn", False)
    )
    if flash:
        model.set_attn_implementation("flash_attention_2")
    if training.precision == "auto" and not torch.cuda.is_available() and has_bf16_units():
        layers = round_frozen(model, output_layer(model))
        if layers:
            report(
                f"{layers} frozen layers in bf16, all else in fp32 (training.precision: fp32 "
                "leaves them in fp32)"
            )
    if training.batching == "grouped" or (training.batching == "auto" and not flash):
        return "grouped"
    if packed_rows_are_apart(model, training_dtype(training)):
        return "packed"
    if training.batching == "packed":
        raise TrainingError(
            f"batching packed: {type(model).__name__} with this method lets packed rows see each "
            "other: set training.batching: grouped"
        )
    return "grouped"


def packed_rows_are_apart(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a packed row's logits are those that it has when another row is in front of it.

    Seen by running two packs that differ in their first row only. Methods that put virtual tokens
    in front, recurrent layers, models that ignore position ids, and models whose kernels refuse
    packs are not.

    Args:
        model: a causal LM.
        dtype: that the loop computes in; weights that train are fp32 all the same, which the
            kernels of flash attention refuse.
    """
    device = next(model.parameters()).device
    packs = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 5, 6, 7, 8]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    was_training = model.training
    model.eval()
    try:
        autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
        with torch.no_grad(), autocast, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, that positions are ignored: seen below
            first, second = (
                model(input_ids=pack.unsqueeze(0), position_ids=positions, use_cache=False).logits
                for pack in packs
            )
    except RuntimeError as error:
        report(f"warning: batches are not packed, the model fails on a pack: {error}")
        return False
    finally:
        model.train(was_training)
    return torch.equal(first[:, -4:], second[:, -4:])


def _schedule(training: TrainingSection, steps: int) -> dict[str, Any]:
    warmup_steps = int(training.warmup_fraction * steps)
    name: str = training.schedule
    options: dict[str, Any] = {}
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        options = {"min_lr_rate": _LAST_FRACTION}
    elif name == "warmup_stable_decay":
        options = {"num_decay_steps": math.ceil(_LAST_FRACTION * steps)}
    elif name == "reduce_lr_on_plateau":
        options = {"factor": 0.5, "patience": 1}
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": options,
        "warmup_steps": warmup_steps,
        "metric_for_best_model": "eval_loss" if name == "reduce_lr_on_plateau" else None,
    }
