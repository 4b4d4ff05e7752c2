"""LoRA: a trained low-rank change beside frozen weights.

W x becomes W x + (alpha / rank) B A x, with A in R^(rank x in) drawn at random and B in
R^(out x rank) zero, so that the model is unchanged at step 0. Hu et al. 2021, "LoRA: Low-Rank
Adaptation of Large Language Models", section 4.1.

Query and value projections are the targets of the paper (section 4.2, and 7.1 for why);
`all-linear` also adapts the FFN, which QLoRA (Dettmers et al. 2023, section 4) found necessary
to match full fine-tuning. The learning rate is the paper's for GPT-3 (table 12).

Variants, which combine unless said otherwise:

- rsLoRA scales by alpha / sqrt(rank), so that a larger rank does not learn more slowly.
  Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", section 3.
- DoRA learns the norm of each output row apart from its direction:
  W' = m (W + s B A) / ||W + s B A||, m = ||W|| at step 0. Liu et al. 2024, "DoRA:
  Weight-Decomposed Low-Rank Adaptation", section 4.1.
- PiSSA starts from the base's principal components instead of zero: A0 and B0 hold the largest
  singular values, W - s B0 A0 is frozen. Meng et al. 2024, "PiSSA", section 3. It is saved as a
  plain LoRA of rank 2 r on the original base: s (B A - B0 A0) = s [B, -B0] [A; A0]. Not with
  DoRA, whose norm would be that of another base, nor with rsLoRA, whose scale depends on the rank.
- LoRA+ gives B a larger learning rate than A. Hayou et al. 2024, "LoRA+", section 4; the paper
  finds a ratio near 16 right.
"""

from __future__ import annotations

import re
import tempfile
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tuneline.errors import MergeError, MethodError, did_you_mean
from tuneline.finetune.methods.adapter_file import added, other_change, read_adapter
from tuneline.finetune.methods.method import Method, MethodSettings, TensorChange
from tuneline.finetune.methods.structure import (
    decoder_blocks,
    last_names,
    linear_layers,
    output_layer,
    short_targets,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
QUERY_VALUE = "query-value"


class LowRankSettings(MethodSettings):
    """What LoRA has with and without a quantized base."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Rank of the change; trainable parameters grow with it linearly."""
    alpha: float = Field(default=16.0, gt=0)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of zeroing an input element of the low-rank branch while training."""
    target_modules: tuple[str, ...] = Field(default=(QUERY_VALUE,), min_length=1)
    """Names of the linear modules to adapt; or ["query-value"], however the model calls them; or
    ["all-linear"] for each one but the output layer."""
    layers: tuple[int, ...] = ()
    """[first, end) of the blocks to adapt, all when empty. Blocks below the first keep no
    autograd graph: adapting the upper half saves about a quarter of a step's time."""

    @field_validator("layers")
    @classmethod
    def _range(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (0, 2):
            raise ValueError("must be [first, end) or empty")
        return value


class LoraSettings(LowRankSettings):
    """Hyperparameters of LoRA."""

    name: Literal["lora"] = "lora"
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Learn norm and direction apart; slower, and one vector more per target."""
    init_weights: Literal["zero", "pissa"] = "zero"
    """`zero`: B starts at zero. `pissa`: from the base's principal components, by a randomized
    SVD of 16 iterations."""
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of B over that of A; 1 is plain LoRA."""

    @model_validator(mode="after")
    def _compatible(self) -> LoraSettings:
        for name in ("use_rslora", "use_dora"):
            if self.init_weights == "pissa" and getattr(self, name):
                raise ValueError(f"init_weights pissa can't be combined with {name}")
        return self


def _targets(model: PreTrainedModel, chosen: tuple[str, ...], method: str) -> list[str]:
    linear = linear_layers(model)
    if chosen == (QUERY_VALUE,):
        wanted = [name for block in decoder_blocks(model) for name in block.query_value]
        return short_targets(model, wanted)
    names = last_names(linear)
    if chosen == (ALL_LINEAR,):
        output = output_layer(model)
        same = [n for n, m in model.named_modules() if m is output]
        # an output layer that shares its last name with others is left out by full names
        return linear if set(last_names(same)) & set(names) else names
    unknown = [name for name in chosen if name not in names and name not in linear]
    if unknown:
        raise MethodError(
            f"{method}: target_modules {unknown} match no linear module of "
            f"{type(model).__name__}; linear modules are {', '.join(names)}, or use "
            f"[{QUERY_VALUE}] or [{ALL_LINEAR}]."
            f"{did_you_mean(unknown[0], [*names, QUERY_VALUE, ALL_LINEAR])}"
        )
    return list(chosen)


def _is_transposed(model: PreTrainedModel, targets: list[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if name in targets or name.rsplit(".", 1)[-1] in targets
    )


def _check_layers(layers: tuple[int, ...], model: PreTrainedModel, method: str) -> list[int]:
    first, end = layers
    count = len(decoder_blocks(model))
    if not 0 <= first < end <= count:
        raise MethodError(
            f"{method}: layers [{first}, {end}] is no range of the model's {count} blocks: "
            f"give [first, end) with 0 <= first < end <= {count}"
        )
    return list(range(first, end))


def attach_low_rank(
    model: PreTrainedModel, config: LowRankSettings, method: str, **variant: Any
) -> PeftModel:
    """Freeze the base and add LoRA branches.

    Args:
        model: the base.
        config: rank, scale, targets.
        method: as errors name it.
        variant: further options of peft's LoraConfig.

    Raises:
        MethodError: a target names no linear module, or `layers` is out of range.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = _targets(model, config.target_modules, method)
    layers = None
    if config.layers:
        layers = _check_layers(config.layers, model, method)
        if any("." in name for name in targets):
            blocks = tuple(f"{decoder_blocks(model)[index].name}." for index in layers)
            targets, layers = [name for name in targets if name.startswith(blocks)], None
    tuned = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # floats work
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=_is_transposed(model, targets),
            layers_to_transform=layers,
            layers_pattern=_layers_pattern(model) if layers else None,
            **variant,
        ),
    )
    assert isinstance(tuned, PeftModel)
    return tuned


def _layers_pattern(model: PreTrainedModel) -> str:
    return decoder_blocks(model)[0].name.split(".")[-2]


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Freeze the base and add LoRA branches of the chosen variant.

    Raises:
        MethodError: a target names no linear module, or `layers` is out of range.
    """
    assert isinstance(config, LoraSettings)
    pissa = config.init_weights == "pissa"
    tuned = attach_low_rank(
        model,
        config,
        "lora",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="pissa_niter_16" if pissa else True,
    )
    if pissa:
        _keep_initial(tuned)
    return tuned


_INITIAL = "tuneline_pissa_initial"


def _keep_initial(tuned: PeftModel) -> None:
    # B0 and A0, which the base has lost: a few MB, needed again when saving
    tensors = {
        name: parameter.detach().clone()
        for name, parameter in tuned.named_parameters()
        if parameter.requires_grad
    }
    setattr(tuned, _INITIAL, tensors)


def save(model: PeftModel | PreTrainedModel, folder: str) -> None:
    """Write the adapter; a PiSSA one as a LoRA of twice the rank on the original base."""
    from peft import PeftModel

    assert isinstance(model, PeftModel)
    initial: dict[str, torch.Tensor] | None = getattr(model, _INITIAL, None)
    if initial is None:
        model.save_pretrained(folder, safe_serialization=True)
        return
    with tempfile.TemporaryDirectory() as before:
        config = model.peft_config["default"]
        trained = {name: p.detach().clone() for name, p in _trainable(model).items()}
        # else peft would decompose the base again on loading
        config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue]
        _assign(model, initial)
        model.save_pretrained(before, safe_serialization=True)
        _assign(model, trained)
        model.save_pretrained(
            folder, safe_serialization=True, path_initial_model_for_weight_conversion=before
        )


def _trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _assign(model: PeftModel, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in _trainable(model).items():
        parameter.data.copy_(values[name])


def create_optimizer(
    model: PeftModel | PreTrainedModel,
    config: MethodSettings,
    optimizer_class: type[Optimizer],
    options: dict[str, Any],
) -> Optimizer | None:
    """LoRA+: a learning rate of its own for B."""
    assert isinstance(config, LoraSettings)
    if config.lora_plus_ratio == 1:
        return None
    from peft.optimizers import create_loraplus_optimizer

    options = dict(options)
    return create_loraplus_optimizer(
        model,  # pyright: ignore[reportArgumentType]  # a PeftModel, as attach gave it
        optimizer_class,
        lr=options.pop("lr"),
        loraplus_lr_ratio=config.lora_plus_ratio,
        loraplus_weight_decay=options.pop("weight_decay", 0.0),
        **options,
    )


def open_merge(adapter_dir: str) -> dict[str, TensorChange]:
    """The changes of an adapter folder, computed in fp32: W + s B A, or DoRA's.

    Ranks and scales may differ between modules; embeddings, biases, trained tokens and whole
    modules beside the low-rank changes are merged too.

    Raises:
        MergeError: the adapter has parts that this does not know.
    """
    from peft.utils.other import get_pattern_key

    config, tensors = read_adapter(adapter_dir)
    transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps weights as (in, out)
    changes: dict[str, TensorChange] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(weight|bias))?", key
        )
        if match is None:
            name, change = other_change(adapter_dir, config, key, tensor)
            changes[name] = change
        else:
            part = "bias" if match[3] == "bias" else match[2]
            modules.setdefault(match[1], {})[part] = tensor.float()
    needed = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    for module, parts in modules.items():
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), config["lora_alpha"])
        embedding = "embedding_A" in parts
        low = {key.removeprefix("embedding_"): value for key, value in parts.items()}
        if low.keys() - {"bias"} != needed:
            raise MergeError(
                f"{adapter_dir}: {module} has {sorted(low)}, {sorted(needed)} are needed"
            )
        rank = len(low["A"])
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        # the rows of an embedding are its inputs, as those of Conv1D are
        changes[f"{module}.weight"] = _low_rank_change(
            low["A"], scale * low["B"], low.get("magnitude_vector"), transposed or embedding
        )
        if "bias" in low:
            changes[f"{module}.bias"] = added(scale * low["bias"])
    return changes


def _low_rank_change(
    a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None, transposed: bool
) -> TensorChange:
    left, right = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)

    def apply(rows: torch.Tensor, first: int) -> torch.Tensor:
        rows.addmm_(left[first : first + len(rows)], right)
        if magnitude is None:
            return rows
        if transposed:
            return rows * (magnitude / rows.norm(dim=0))
        return rows * (magnitude[first : first + len(rows)] / rows.norm(dim=1)).unsqueeze(1)

    return TensorChange(
        shape=(left.shape[0], right.shape[1]),
        apply=apply,
        by_rows=magnitude is None or not transposed,
        delta=(lambda: left @ right) if magnitude is None else None,
    )


METHOD = Method(
    name="lora",
    title="LoRA: low-rank change of linear layers",
    config_class=LoraSettings,
    learning_rate=2e-4,
    attach=attach,
    open_merge=open_merge,
    save=save,
    create_optimizer=create_optimizer,
    form=("rank", "alpha", "dropout", "target_modules"),
)
