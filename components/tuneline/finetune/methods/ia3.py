"""IA3: learned vectors that rescale keys, values and the activations of the FFN.

k becomes l_k * k, v becomes l_v * v, and the FFN's output layer reads l_ff * activation, all
elementwise with l = 1 at step 0. Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is
Better and Cheaper than In-Context Learning", section 3.3; the learning rate is that of the paper's
T-Few recipe. Where one projection computes query, key and value together,
the query is rescaled too.

Scaling rows (k, v) or columns (FFN) of a weight is linear: it merges without a trace.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tuneline.errors import MergeError
from tuneline.finetune.methods.method import FourBitSettings, MergeTensor, Method, MethodSettings
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


def open_merge(adapter_dir: str) -> tuple[MergeTensor, frozenset[str]]:
    """The merge function of an adapter folder: rows or columns times their vector, in fp32.

    Raises:
        MergeError: the adapter has parts beyond IA3's vectors.
    """
    from safetensors.torch import load_file

    folder = Path(adapter_dir)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("modules_to_save"):
        raise MergeError(
            f"{adapter_dir}: modules_to_save={config['modules_to_save']!r} can't be merged tensor "
            "by tensor"
        )
    ffn = set(config["feedforward_modules"])
    transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps weights as (in, out)
    vectors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.ia3_l(?:\.weight)?", key)
        if match is None:
            raise MergeError(f"{adapter_dir}: tensor {key} is not a vector of IA3")
        vectors[match[1]] = tensor.float().flatten()

    def scales_inputs(module: str) -> bool:
        return module in ffn or module.rsplit(".", 1)[-1] in ffn

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module, _, kind = name.rpartition(".")
        vector = vectors.get(module)
        if vector is None or (kind == "bias" and scales_inputs(module)):
            return tensor
        along = -1 if kind == "bias" or scales_inputs(module) != transposed else 0
        if tensor.shape[along] != vector.numel():
            raise MergeError(
                f"{name}: base shape {tuple(tensor.shape)} does not fit the adapter's "
                f"{vector.numel()} scales: the adapter belongs to another base"
            )
        shape = (-1, 1) if along == 0 else (-1,)
        return (tensor.float() * vector.view(shape)).to(tensor.dtype)

    return merge, frozenset(f"{module}.weight" for module in vectors)


METHOD = Method(
    name="ia3",
    title="IA3: learned scales of keys, values and FFN activations",
    config_class=Ia3Settings,
    learning_rate=3e-3,
    attach=attach,
    open_merge=open_merge,
)
