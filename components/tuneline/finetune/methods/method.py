"""What a fine-tuning method is to the rest of tuneline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tuneline.errors import ArtifactError
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
        """Why what a mergeable method trains with these settings may not merge; else empty."""
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
    """Puts a saved adapter on a base, ready to compute.

    Args:
        model: the base; or what `load` gave for it, beside whose adapters this one is put.
        folder: of the adapter.
        name: that `set_adapter` knows it by; one that comes beside others is not active yet.

    Raises:
        ArtifactError: the adapter lacks tensors that the model needs of it, or has others.
    """

    def __call__(
        self, model: PreTrainedModel | PeftModel, folder: str, name: str = "default"
    ) -> PeftModel: ...


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


class ChangeRows(Protocol):
    """Merges some rows of one tensor.

    Args:
        rows: fp32 rows of the base tensor, first axis; may be changed in place. Where the change
            replaces the tensor, only their shape counts.
        first: index of the first of them in the tensor.

    Returns:
        The merged rows, fp32.
    """

    def __call__(self, rows: torch.Tensor, first: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorChange:
    """What an adapter does to one tensor of the base."""

    shape: tuple[int, ...]
    """Of the merged tensor: the base's own, unless it `replaces`. -1: whatever the base has."""
    apply: ChangeRows
    by_rows: bool = True
    """Rows can be merged apart from each other; else all of them are given at once."""
    replaces: bool = False
    """The merged tensor is the adapter's own, of whatever size: resized embeddings, whole modules
    that were trained beside the adapter."""
    tied_follows: bool = False
    """An output layer that is tied to this embedding changes with it."""
    optional: bool = False
    """Nothing is lost when the base has no such tensor."""
    delta: Callable[[], torch.Tensor] | None = None
    """The whole change in fp32 where it is a sum, so that several can be combined."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a base tensor of this shape can be changed."""
        return self.replaces or (
            len(shape) == len(self.shape)
            and all(own in (-1, size) for own, size in zip(self.shape, shape, strict=True))
        )


class OpenMerge(Protocol):
    """Reads an adapter folder once.

    Returns:
        The change of every tensor that the adapter touches, by the tensor's name in the model.

    Raises:
        MergeError: the adapter is of a form that can't be merged.
    """

    def __call__(self, adapter_dir: str) -> dict[str, TensorChange]: ...


def save_adapter(model: PeftModel | PreTrainedModel, folder: str) -> None:
    """Write a PEFT adapter: adapter_config.json and adapter_model.safetensors."""
    model.save_pretrained(folder)


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: str, name: str = "default"
) -> PeftModel:
    """Put a PEFT adapter on its base, whose embeddings grow by the tokens that it added, or beside
    the adapters that are there.

    Raises:
        ArtifactError: the adapter lacks tensors that the model needs of it, or has others, or of
            another shape.
    """
    from peft import PeftModel
    from torch.nn import Embedding

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = _embedding_rows(base, folder)
    if rows is not None and rows != base.get_input_embeddings().get_parameter("weight").shape[0]:
        if isinstance(model, PeftModel):
            raise ArtifactError(
                f"the adapter in {folder} added tokens, {rows} in all, and others are on this base "
                "already: load it alone"
            )
        base.resize_token_embeddings(rows, mean_resizing=False)
    if isinstance(model, PeftModel):
        with _peft_errors(folder):
            model.load_adapter(folder, adapter_name=name)
        _check_complete(model, folder, name)
        return model
    without_weights = any(p.numel() > 1 and not any(p.stride()) for p in model.parameters())
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    with _peft_errors(folder):
        # without weights the adapter's tensors are assigned: the base's can't be written to
        tuned = PeftModel.from_pretrained(
            model, folder, adapter_name=name, low_cpu_mem_usage=without_weights
        )
    embedding = model.get_input_embeddings()
    if without_weights and tied and rows is not None and isinstance(embedding, Embedding):
        # assigning has parted them; a whole module of the adapter's own stays apart
        model.get_output_embeddings().weight = embedding.weight  # pyright: ignore[reportOptionalMemberAccess]  # tied
    _check_complete(tuned, folder, name)
    return tuned


def _embedding_rows(base: Any, folder: str) -> int | None:
    """Rows of the input embeddings that the adapter brings, if it brings any."""
    from safetensors import safe_open

    embedding = base.get_input_embeddings()
    name = next((key for key, module in base.named_modules() if module is embedding), "")
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as tensors:
        key = f"base_model.model.{name}.weight"
        return tensors.get_slice(key).get_shape()[0] if key in tensors.keys() else None  # noqa: SIM118  not a dict


@contextmanager
def _peft_errors(folder: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error later
        try:
            yield
        except KeyError as error:  # of prompt tuning, which has a single tensor
            raise _other_tensors(folder, "lacks", {str(error.args[0])}) from error
        except RuntimeError as error:
            shapes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            if not shapes:
                raise
            raise ArtifactError(
                f"the adapter in {folder} is of another model: {shapes[0]}"
            ) from error


def _check_complete(tuned: PeftModel, folder: str, name: str) -> None:
    """peft leaves what the file lacks at its random start and drops what it does not know."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    needed = set(get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False))
    own = {f"base_model.model.{key}" for key in tuned.get_base_model().state_dict()}
    for fault, keys in (("lacks", needed - found), ("has unknown", found - needed - own)):
        if keys:
            raise _other_tensors(folder, fault, keys)


def _other_tensors(folder: str, fault: str, keys: set[str]) -> ArtifactError:
    return ArtifactError(
        f"the adapter in {folder} {fault} tensors ({min(keys)} and {len(keys) - 1} more): it is "
        "damaged or of another model; run its training again"
    )


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
    """None: there is no change to merge; what is `stored_as` model is merged already, the change
    of any other method has no equal form in the base's weights."""

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
    form: tuple[str, ...] | None = None
    """Hyperparameters that the run form shows; the others are set by `overrides`. None: all."""

    @property
    def mergeable(self) -> bool:
        """Whether the tuned model can be written as weights of the base's architecture."""
        return self.open_merge is not None or self.stored_as == "model"
