"""What a fine-tuning method is to the rest of tuneline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tuneline.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


class Attach(Protocol):
    """Wraps a base model so that only the method's parameters train.

    Raises:
        MethodError: the options don't fit the model.
    """

    def __call__(self, model: PreTrainedModel, config: Settings) -> PeftModel: ...


class Save(Protocol):
    """Writes the trained adapter so that it loads on the original base with plain peft."""

    def __call__(self, model: PeftModel, folder: str) -> None: ...


class CreateOptimizer(Protocol):
    """An optimizer with parameter groups of its own.

    Args:
        model: with the method attached.
        config: of the method.
        optimizer_class: what the training settings chose.
        options: of that class; `lr` among them.

    Returns:
        The optimizer, or None for one group with one learning rate.
    """

    def __call__(
        self,
        model: PeftModel,
        config: Settings,
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


@dataclass(frozen=True)
class Method:
    """One row of METHODS: names, capabilities and functions of one fine-tuning method."""

    name: str
    title: str
    config_class: type[Settings]
    attach: Attach
    open_merge: OpenMerge | None
    """None: the change has no equal form in the base's weights, so it can't be merged."""
    save: Save
    create_optimizer: CreateOptimizer

    @property
    def mergeable(self) -> bool:
        """Whether the tuned model can be written as weights of the base's architecture."""
        return self.open_merge is not None
