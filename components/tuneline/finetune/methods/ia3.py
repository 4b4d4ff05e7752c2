"""IA3: learned vectors that rescale keys, values and the activations of the FFN.

k becomes l_k * k, v becomes l_v * v, and the FFN's output layer reads l_ff * activation, all
elementwise with l = 1 at step 0. Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is
Better and Cheaper than In-Context Learning", section 3.3; the learning rate is that of the paper's
T-Few recipe. Where one projection computes query, key and value together,
the query is rescaled too.

Scaling rows (k, v) or columns (FFN) of a weight is linear: it merges without a trace.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from tuneline.finetune.methods.adapter_file import other_change, read_adapter
from tuneline.finetune.methods.method import (
    FourBitSettings,
    Method,
    MethodSettings,
    TensorChange,
)
from tuneline.finetune.methods.structure import decoder_blocks, short_targets

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Ia3Settings(FourBitSettings):
    """IA3's size is given by the model; it has no hyperparameters of its own."""

    name: Literal["ia3"] = "ia3"


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Freeze the base and add the vectors.

    Raises:
        MethodError: the model's attention or FFN can't be told.
    """
    from peft import IA3Config, PeftModel, get_peft_model
    from transformers.pytorch_utils import Conv1D

    del config
    blocks = decoder_blocks(model)
    ffn = [block.ffn_output for block in blocks]
    names = [name for block in blocks for name in block.key_value] + ffn
    short_ffn = short_targets(model, ffn)
    tuned = get_peft_model(
        model,
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=list(dict.fromkeys([*short_targets(model, names), *short_ffn])),
            feedforward_modules=short_ffn,
            fan_in_fan_out=isinstance(model.get_submodule(ffn[0]), Conv1D),
        ),
    )
    assert isinstance(tuned, PeftModel)
    return tuned


def open_merge(adapter_dir: str) -> dict[str, TensorChange]:
    """The changes of an adapter folder: rows or columns times their vector, in fp32.

    Raises:
        MergeError: the adapter has parts that this does not know.
    """
    config, tensors = read_adapter(adapter_dir)
    ffn = set(config["feedforward_modules"])
    transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps weights as (in, out)
    changes: dict[str, TensorChange] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.ia3_l(?:\.weight)?", key)
        if match is None:
            name, change = other_change(adapter_dir, config, key, tensor)
            changes[name] = change
            continue
        module, scales = match[1], tensor.float().flatten()
        inputs = module in ffn or module.rsplit(".", 1)[-1] in ffn
        changes[f"{module}.weight"] = _scaled(scales, columns=inputs != transposed)
        if not inputs:
            changes[f"{module}.bias"] = replace(_scaled(scales, vector=True), optional=True)
    return changes


def _scaled(scales: torch.Tensor, *, columns: bool = False, vector: bool = False) -> TensorChange:
    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        if columns:
            return rows.mul_(scales)
        some = scales[first : first + len(rows)]
        return rows.mul_(some if vector else some.unsqueeze(1))

    size = scales.numel()
    return TensorChange(
        shape=(size,) if vector else (-1, size) if columns else (size, -1), apply=apply
    )


METHOD = Method(
    name="ia3",
    title="IA3: learned scales of keys, values and FFN activations",
    config_class=Ia3Settings,
    learning_rate=3e-3,
    attach=attach,
    open_merge=open_merge,
)
