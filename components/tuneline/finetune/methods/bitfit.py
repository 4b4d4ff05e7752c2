"""BitFit: only bias terms train.

y = W x + b becomes y = W x + b + d, with d = 0 at step 0 and W, b frozen. Ben Zaken et al. 2022,
"BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
section 3; the learning rate is the largest of the range that the paper searches.

The trained biases are those of the linear layers. Biases of LayerNorm, where a family has them,
stay as they are.

Many language models have no biases at all, where setting "bias terms only" trains nothing and says
so nowhere. There the method is refused, or, when `missing_biases` asks for it, every linear layer
of the blocks gets a zero bias: the model computes the same until the first step. Such an adapter
can't be merged, since the base's architecture has no place for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from tuneline.errors import MethodError
from tuneline.finetune.methods.adapter_file import added, other_change, read_adapter
from tuneline.finetune.methods.method import (
    FourBitSettings,
    Method,
    MethodSettings,
    TensorChange,
    load_adapter,
)
from tuneline.finetune.methods.structure import linear_layers, short_targets

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class BitfitSettings(FourBitSettings):
    """Hyperparameters of BitFit."""

    name: Literal["bitfit"] = "bitfit"
    missing_biases: Literal["refuse", "add"] = "refuse"
    """On a model without any bias: `refuse`, or `add` zero biases to every linear layer, which
    can't be merged."""

    @property
    def merge_hindrance(self) -> str:
        """Added biases have no place in the base's weights."""
        if self.missing_biases == "add":
            return "may add biases (missing_biases add), for which the base has no place"
        return ""


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Freeze the base and add a trained offset to its biases.

    Raises:
        MethodError: the model has no biases and `missing_biases` is `refuse`.
    """
    from peft import BeftConfig, PeftModel, get_peft_model
    from torch import nn

    assert isinstance(config, BitfitSettings)
    layers = linear_layers(model)
    if transposed := [n for n in layers if not isinstance(model.get_submodule(n), nn.Linear)]:
        raise MethodError(
            f"bitfit: {transposed[0]} of {type(model).__name__} is a Conv1D, whose bias it can't "
            "train; use lora, ia3 or full"
        )
    targets = [name for name in layers if model.get_submodule(name).bias is not None]
    if not targets and config.missing_biases == "refuse":
        raise MethodError(
            f"bitfit: {type(model).__name__} has no bias terms, so nothing would train: set "
            "method.missing_biases to add (zero biases, which can't be merged), or use lora or ia3"
        )
    with _merging_is_told_elsewhere():
        tuned = get_peft_model(
            model,
            BeftConfig(
                task_type="CAUSAL_LM", target_modules=short_targets(model, targets or layers)
            ),
        )
    assert isinstance(tuned, PeftModel)
    return tuned


def load(model: PreTrainedModel | PeftModel, folder: str, name: str = "default") -> PeftModel:
    """Put a saved adapter on its base."""
    with _merging_is_told_elsewhere():
        return load_adapter(model, folder, name)


@contextmanager
def _merging_is_told_elsewhere() -> Iterator[None]:
    # peft warns that an added bias can't be merged; open_merge says so when somebody merges
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias")
        yield


def open_merge(adapter_dir: str) -> dict[str, TensorChange]:
    """The changes of an adapter folder: b + d in fp32.

    Raises:
        MergeError: the adapter has parts that this does not know.
    """
    config, tensors = read_adapter(adapter_dir)
    changes: dict[str, TensorChange] = {}
    for key, tensor in tensors.items():
        module = key.removesuffix(".beft_bias")
        if module == key:
            name, change = other_change(adapter_dir, config, key, tensor)
            changes[name] = change
        else:
            changes[f"{module}.bias"] = added(tensor.float().flatten())
    return changes


METHOD = Method(
    name="bitfit",
    title="BitFit: bias terms only",
    config_class=BitfitSettings,
    learning_rate=1e-3,
    attach=attach,
    load=load,
    open_merge=open_merge,
)
