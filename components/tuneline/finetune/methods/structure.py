"""Attention projections and feed-forward networks, found from a model's structure.

Families name their parts as they like: q_proj or query_key_value or W_pack, down_proj or
dense_4h_to_h. What they share is the shape of a decoder: a list of equal blocks, each with a part
that is told about other positions (its forward takes a mask, positions or a cache) and a part that
maps every position alone. Names only decide what structure leaves open: which of three square
projections is the query, which part of an unusual block is which.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tuneline.errors import MethodError, ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION_ARGUMENTS: Final = ("mask", "past", "cache", "position", "rotary")
_ATTENTION_NAMES: Final = ("attn", "attention")
_FFN_NAMES: Final = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
_QUERY_KEY_VALUE: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)


@dataclass(frozen=True)
class Block:
    """One decoder block; all names are full module names in the model."""

    name: str
    attention: tuple[str, ...]
    """The linear layers of the attention, in the order of their definition."""
    query_value: tuple[str, ...]
    """Query and value projections, or the one projection that computes both."""
    key_value: tuple[str, ...]
    """Key and value projections, or the one projection that computes both."""
    ffn: str
    """The module whose output is the feed-forward network's."""
    ffn_linear: tuple[str, ...]
    """The linear layers of the feed-forward network; empty when experts keep them fused."""

    @property
    def ffn_output(self) -> str:
        """The last linear layer of the feed-forward network: it reads the activations.

        Raises:
            MethodError: the network has no linear layers of its own, as fused experts do.
        """
        if not self.ffn_linear:
            raise MethodError(
                f"{self.ffn} has no linear layers of its own (fused experts): this method can't "
                "change them; use lora with target_modules of the attention"
            )
        return self.ffn_linear[-1]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, GPT-2's transposed `Conv1D` included."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def output_layer(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits of hidden states.

    Models with code of their own often don't say which it is: then it is the linear layer with as
    many outputs as the vocabulary has tokens, of several the last.

    Raises:
        ModelError: the model has none.
    """
    layer = model.get_output_embeddings()
    if layer is not None:
        return layer
    vocabulary = model.config.vocab_size
    found = [m for m in model.modules() if is_linear(m) and _shape(m)[0] == vocabulary]
    if not found:
        raise ModelError(f"{type(model).__name__} has no output layer: a causal LM is needed")
    return found[-1]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the model's linear layers in its own order, the output layer aside."""
    output = output_layer(model)
    return [
        name for name, module in model.named_modules() if is_linear(module) and module is not output
    ]


def last_names(names: Iterable[str]) -> list[str]:
    """Last parts of full module names, each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def short_targets(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The shortest target list that PEFT matches to exactly these modules.

    Last name parts where they mean the same modules, else the full names.
    """
    short = last_names(names)
    matched = {
        name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short and name
    }
    return short if matched == set(names) else list(names)


def decoder_blocks(model: PreTrainedModel) -> list[Block]:
    """The model's blocks, first to last.

    Raises:
        MethodError: the model has no list of blocks, or a block no attention or feed-forward part.
    """
    from torch import nn

    count = next(
        (
            int(value)
            for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
            if (value := getattr(model.config, key, None)) is not None
        ),
        None,
    )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == (count if count is not None else len(module))
        and any(is_linear(part) for part in module.modules())
    ]
    if not lists:
        raise MethodError(
            f"{type(model).__name__} has no list of {count} decoder blocks with linear layers: "
            "name target_modules yourself (method lora), or use full or prompt_tuning"
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [_block(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def _block(name: str, block: nn.Module) -> Block:
    from torch import nn

    weighty = {
        f"{name}.{key}": part
        for key, part in block.named_children()
        if any(parameter.ndim > 1 for parameter in part.parameters())
    }
    parts = {key: part for key, part in weighty.items() if not is_linear(part)}
    seeing = [key for key, part in parts.items() if _sees_positions(part)]
    attention = _the_one(seeing, _ATTENTION_NAMES)
    others = [key for key in parts if key not in seeing]
    ffn = _the_one(others, _FFN_NAMES)
    if attention is None:
        raise MethodError(
            f"{name} has no part that is an attention (parts: {', '.join(weighty)}): name "
            "target_modules yourself (method lora), or use full or prompt_tuning"
        )
    projections = _linear_in(attention, parts[attention])
    if ffn is None:
        # some families keep the two layers of the feed-forward network in the block itself
        direct = tuple(key for key, part in weighty.items() if isinstance(part, nn.Linear))
        if not direct:
            raise MethodError(
                f"{name} has no part that is a feed-forward network (parts: {', '.join(weighty)}): "
                "name target_modules yourself (method lora), or use full or prompt_tuning"
            )
        ffn, ffn_linear = direct[-1], direct
    else:
        ffn_linear = _linear_in(ffn, parts[ffn])
    return Block(
        name=name,
        attention=projections,
        query_value=_projections(block, name, projections, (0, 2)),
        key_value=_projections(block, name, projections, (1, 2)),
        ffn=ffn,
        ffn_linear=ffn_linear,
    )


def _sees_positions(part: nn.Module) -> bool:
    parameters = inspect.signature(part.forward).parameters
    return any(word in name for name in parameters for word in _ATTENTION_ARGUMENTS)


def _the_one(candidates: list[str], words: tuple[str, ...]) -> str | None:
    if len(candidates) > 1:
        named = [c for c in candidates if any(w in c.rsplit(".", 1)[-1].lower() for w in words)]
        candidates = named or candidates
    return candidates[0] if len(candidates) == 1 else None


def _linear_in(name: str, part: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}.{key}" for key, module in part.named_modules() if is_linear(module))


def _projections(
    block: nn.Module, block_name: str, attention: tuple[str, ...], wanted: tuple[int, ...]
) -> tuple[str, ...]:
    by_last = {name.rsplit(".", 1)[-1]: name for name in attention}
    for names in _QUERY_KEY_VALUE:
        if all(names[index] in by_last for index in wanted):
            return tuple(by_last[names[index]] for index in wanted)
    # one projection for query, key and value, wider than the states that it reads, and the output
    if len(attention) == 2:
        for name in attention:
            rows, columns = _shape(block.get_submodule(name.removeprefix(f"{block_name}.")))
            if rows > columns:
                return (name,)
    # without a name that tells, everything in front of the output projection
    return attention[:-1] or attention


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; a 4-bit weight's own shape is packed."""
    from torch import nn

    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    weight = linear.get_parameter("weight")  # Conv1D keeps (inputs, outputs)
    return weight.shape[1], weight.shape[0]
