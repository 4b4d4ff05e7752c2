"""Memory that does not suffice names what was too much, and a figure that would fit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.errors import TrainingError
from tuneline.finetune import memory
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods.lora import LoraSettings, attach

TOKENS = 512


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def kept_bytes(model: nn.Module, rows: int, length: int) -> int:
    """What a forward pass keeps for the backward pass, beside the parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 200, (rows, length))
    labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = supervised_nll(model, batch)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_is_near_what_the_backward_pass_keeps(
    llama: LlamaForCausalLM, method: str
) -> None:
    model = llama if method == "full" else attach(llama, LoraSettings())
    per_token = kept_bytes(model.train(), 4, TOKENS // 4) / TOKENS
    estimate = memory.token_bytes(llama.config, 4, checkpointing=False)
    # an adapter on a frozen layer needs no input of that layer, and has inputs of its own
    assert 0.75 < per_token / estimate < 1.25


def test_what_is_held_throughout_counts_gradients_and_moments_of_what_trains() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    assert memory.static_bytes(model) == 100 * 4 + 100 * (4 + 4 + 8)


def sentence(model: nn.Module, limit: int, **changes) -> str:
    options = {
        "tokens": 4096,
        "longest_row": 256,
        "element_bytes": 4,
        "checkpointing": False,
        "measured": memory.Measured(),
    }
    return memory.sentence("at step 1", model, limit=limit, **(options | changes))


def test_the_figure_is_what_fits_beside_weights_and_optimizer(llama: LlamaForCausalLM) -> None:
    each = memory.token_bytes(llama.config, 4, checkpointing=False)
    limit = memory.static_bytes(llama) + 1000 * each
    assert "lower training.batch_tokens to about 1000 and raise" in sentence(llama, limit)
    # as measured before: 2000 tokens took twice the estimate
    trained = sum(12 * p.numel() for p in llama.parameters() if p.requires_grad)
    measured = memory.Measured(tokens=2000, start=7, peak=7 + trained + 4000 * each)
    assert "batch_tokens to about 500 and" in sentence(llama, limit, measured=measured)
    assert "gradient_checkpointing" in sentence(llama, limit)
    assert "gradient_checkpointing" not in sentence(llama, limit, checkpointing=True)


def test_a_row_that_does_not_fit_alone_is_what_to_shorten(llama: LlamaForCausalLM) -> None:
    limit = memory.static_bytes(llama) + 1000 * memory.token_bytes(
        llama.config, 4, checkpointing=False
    )
    text = sentence(llama, limit, tokens=4096, longest_row=4096)
    assert "a row of 4096 tokens alone is too much: lower data.max_seq_len to about 1000" in text
    assert "batch_tokens" not in text


def test_weights_that_do_not_fit_are_not_helped_by_smaller_batches(
    llama: LlamaForCausalLM,
) -> None:
    text = sentence(llama, memory.static_bytes(llama) // 2)
    assert "no micro-batch fits: take a method that trains less" in text


def test_a_base_model_that_does_not_fit_says_how_large_it_is(tiny_model: Path) -> None:
    with (
        pytest.raises(TrainingError, match=r"while the base model is loaded: its weights take "),
        memory.loading(tiny_model),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory.loading(tiny_model):
        torch.ones(2, 3) @ torch.ones(2, 3)
