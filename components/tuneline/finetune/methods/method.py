"""What a fine-tuning method is to the rest of tuneline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tuneline.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quantization:
    """How a base is loaded in 4 bits: NF4, blocks of 64 weights with one scale each."""

    double: bool = True
    """Quantize the scales too: 0.37 bits less per weight."""


class MethodSettings(Settings):
    """Hyperparameters of a method; every one has a `name`, whose only value says which."""

    @property
    def quantization(self) -> Quantization | None:
        """How the base is loaded for this method; None: in 16 or 32 bits."""
        return None

    @property
    def merge_hindrance(self) -> str:
        """Why what is trained with these settings may not merge; empty when it does."""
        if self.quantization is not None:
            return "is trained on a base in 4 bits, which is not the base that it would merge into"
        return ""


class FourBitSettings(MethodSettings):
    """Of a method that can stand on a base in 4 bits."""

    load_in_4bit: bool = False
    """Keep the frozen base in NF4: a quarter of the memory of 16 bits, slower, slightly worse."""

    @property
    def quantization(self) -> Quantization | None:
        """NF4 when asked for."""
        return Quantization() if self.load_in_4bit else None


class Attach(Protocol):
    """Prepares a base model so that only the method's parameters train.

    Raises:
        MethodError: the options don't fit the model.
    """

    def __call__(
        self, model: PreTrainedModel, config: MethodSettings
    ) -> PeftModel | PreTrainedModel: ...


class Save(Protocol):
    """Writes what was trained, so that it loads on the original base."""

    def __call__(self, model: PeftModel | PreTrainedModel, folder: str) -> None: ...


class Load(Protocol):
    """Puts a saved adapter on a base, ready to compute."""

    def __call__(self, model: PreTrainedModel, folder: str) -> PeftModel: ...


class CreateOptimizer(Protocol):
    """An optimizer of the method's own.

    Args:
        model: with the method attached.
        config: of the method.
        optimizer_class: what the training settings chose.
        options: of that class; `lr` among them.

    Returns:
        The optimizer, or None for the training settings' own with one learning rate.
    """

    def __call__(
        self,
        model: PeftModel | PreTrainedModel,
        config: MethodSettings,
        optimizer_class: type[Optimizer],
        options: dict[str, Any],
    ) -> Optimizer | None: ...


class MergeTensor(Protocol):
    """Adds an adapter's change to one base tensor.

    Args:
        name: of the base tensor, as in the base's safetensors.
        tensor: the base tensor, in its own dtype.

    Returns:
        The merged tensor in the base's dtype, or the same object if the adapter leaves it alone.
    """

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor: ...


class OpenMerge(Protocol):
    """Reads an adapter folder once and gives the function that merges tensor by tensor.

    Returns:
        The merge function, and the base tensors' names that the adapter must find.

    Raises:
        MergeError: the adapter is of a form that can't be merged.
    """

    def __call__(self, adapter_dir: str) -> tuple[MergeTensor, frozenset[str]]: ...


def save_adapter(model: PeftModel | PreTrainedModel, folder: str) -> None:
    """Write a PEFT adapter: adapter_config.json and adapter_model.safetensors."""
    model.save_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """Put a PEFT adapter on its base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def one_learning_rate(
    model: PeftModel | PreTrainedModel,
    config: MethodSettings,
    optimizer_class: type[Optimizer],
    options: dict[str, Any],
) -> None:
    """The training settings' own optimizer."""
    del model, config, optimizer_class, options


@dataclass(frozen=True)
class Method:
    """One row of METHODS: names, capabilities and functions of one fine-tuning method.

    The capabilities are promises to users; the contract tests hold each of them against every
    architecture.
    """

    name: str
    title: str
    config_class: type[MethodSettings]
    learning_rate: float
    """Peak learning rate when the recipe names none; the method's file gives its source."""
    attach: Attach
    save: Save = save_adapter
    load: Load = load_adapter
    """Not for `stored_as` model."""
    create_optimizer: CreateOptimizer = one_learning_rate
    open_merge: OpenMerge | None = None
    """None: the change has no equal form in the base's weights, so it can't be merged."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass when the recipe leaves it open."""
    stored_as: Literal["adapter", "model"] = "adapter"
    """`adapter`: a PEFT adapter beside the base. `model`: all weights, the base is not needed."""
    identity_at_start: bool = True
    """Before the first step the model computes what the base computes."""
    works_on_4bit: bool = True
    """The base may be loaded in NF4."""
    side_by_side: bool = True
    """Several can be loaded on one base and switched."""
    loader: Literal["transformers", "peft", "peft with tuneline"] = "peft"
    """What a process must have installed to load the unmerged result."""

    @property
    def mergeable(self) -> bool:
        """Whether the tuned model can be written as weights of the base's architecture."""
        return self.open_merge is not None
