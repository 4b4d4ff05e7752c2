"""Weights, gradients and optimizer state divided over the processes: FSDP2 of torch.

Each decoder block is gathered when it computes and given up after it; what lies outside of the
blocks (embeddings, the last norm, the output layer) is gathered for the whole step, so that tied
weights stay one tensor and the loss finds the output layer's weight whole. Gradients are summed in
fp32.

torch's own `fully_shard` is called, and not accelerate's FSDP plugin: that one does nothing on
CPUs, and it casts what the model returns, here the loss, to bf16.

What is written is whole: the first process has it, and every process has to take part in gathering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tuneline.finetune.methods.structure import decoder_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def shard(model: Any, dtype: torch.dtype) -> None:
    """Divide a causal LM over the processes of torch's default group, which has to be there.

    Args:
        model: with parameters of one dtype; it stays the same object.
        dtype: of the computation.

    Raises:
        MethodError: the model has no decoder blocks to divide by.
    """
    policy = MixedPrecisionPolicy()
    if dtype is not torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in _blocks(model):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def _blocks(model: Any) -> list[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        blocks = [model.get_submodule(block.name) for block in decoder_blocks(model)]
    return blocks[::-1]  # one inside of another first


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided it."""
    return isinstance(model, FSDPModule)


def settle(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left gathered.

    Else parameters would be read, or new values written, in the gathered copy.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Any, *, keep: bool) -> Any:
    """A state dictionary with every divided tensor whole and on the CPU, for all processes to call.

    Args:
        value: tensors in dictionaries and lists.
        keep: whether this process wants them; else None is in their place.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor().detach()
        return gathered.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep=keep) for item in value]
    return value


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole in every process, divided as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return value
    # each process cuts its part from what it has: nothing is sent
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put back what `whole` made of an optimizer's state dictionary."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        of_parameter = state["state"].get(index, {})
        for key, value in of_parameter.items():
            if isinstance(value, torch.Tensor):  # step counts are not of the parameter's shape
                own = like(parameter, value) if value.shape == parameter.shape else value
                of_parameter[key] = own.clone()  # it may be a view of a file
    optimizer.load_state_dict(state)
