"""Loss, batches and LoRA compute what they say."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tuneline.errors import MethodError
from tuneline.finetune.batching import TokenBudgetSampler, collate
from tuneline.finetune.loss import held_out_nll, supervised_nll
from tuneline.finetune.methods.lora import LoraSettings, attach

ROWS = [
    {"row": 0, "input_ids": [3, 7, 9, 11, 13], "supervised": [0, 0, 1, 1, 1]},
    {"row": 1, "input_ids": [5, 6, 8], "supervised": [0, 1, 0]},
]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_loss_at_supervised_positions_equals_the_full_computation(model: torch.nn.Module) -> None:
    batch = collate(ROWS, pad_token_id=0)
    nll, count = supervised_nll(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    full = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        batch["labels"][:, 1:].reshape(-1),
        reduction="sum",
    )
    assert int(count) == 4
    # the same sums in another order, in fp32
    torch.testing.assert_close(nll, full, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_the_loss(model: torch.nn.Module) -> None:
    together, _ = supervised_nll(model, collate(ROWS, pad_token_id=0))
    alone = sum(supervised_nll(model, collate([row], pad_token_id=0))[0] for row in ROWS)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_model_is_as_before_after_the_loss(model: torch.nn.Module) -> None:
    supervised_nll(model, collate(ROWS, pad_token_id=0))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


def test_held_out_loss_sums_nats_and_tokens(model: torch.nn.Module) -> None:
    batches = [collate([row], pad_token_id=0) for row in ROWS]
    parts = [supervised_nll(model, batch) for batch in batches]
    nll, tokens = held_out_nll(model, batches)
    assert tokens == sum(int(n) for _, n in parts)
    assert nll == pytest.approx(sum(float(nll.detach()) for nll, _ in parts), rel=1e-6)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    budget=st.integers(60, 300),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_every_row_is_in_one_batch_and_every_batch_in_the_budget(
    lengths: list[int], budget: int, seed: int | None
) -> None:
    sampler = TokenBudgetSampler(lengths, budget, seed)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[row] for row in batch) <= budget for batch in batches)
    assert len(sampler) == len(batches)
    sampler.set_epoch(0)
    assert list(sampler) == batches


def test_each_epoch_has_its_own_order() -> None:
    sampler = TokenBudgetSampler([10] * 100, 50, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_lora_is_the_base_at_step_0_and_trains_only_itself(model: torch.nn.Module) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    before = model(tokens).logits
    tuned = attach(model, LoraSettings(target_modules=("all-linear",)))
    torch.testing.assert_close(tuned(tokens).logits, before, rtol=0, atol=0)
    tuned(tokens).logits.sum().backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in tuned.named_parameters() if "lora_" in name}


def test_layers_limits_the_blocks_that_are_adapted(model: torch.nn.Module) -> None:
    tuned = attach(model, LoraSettings(layers=(1, 2)))
    adapted = {name for name, _ in tuned.named_parameters() if "lora_A" in name}
    assert adapted and all(".layers.1." in name for name in adapted)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"target_modules": ("q_projj",)},
            r"'q_projj'.*linear modules are .*Did you mean 'q_proj'",
        ),
        ({"target_modules": ("lm_head",)}, "match no linear module of LlamaForCausalLM"),
        ({"layers": (1, 5)}, r"layers \[1, 5\] is no range of the model's 2 blocks"),
        ({"layers": (1, 1)}, "is no range"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    model: torch.nn.Module, options: dict[str, tuple[object, ...]], sentence: str
) -> None:
    with pytest.raises(MethodError, match=sentence):
        attach(model, LoraSettings(**options))
