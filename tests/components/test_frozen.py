"""Frozen weights in bf16: what is rounded, what is not, and that training goes on alike."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tuneline.finetune import arguments
from tuneline.finetune.frozen import FrozenLinear, has_bf16_units, round_frozen
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods.lora import LoraSettings, attach
from tuneline.recipe import TrainingSection

BF16_STEP = 2**-8
"""Between neighbours of bf16, of their size; rounding is off by half of it at most."""


def llama() -> Any:
    """Wide enough to be rounded, but for keys and values, which are 64 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def tuned(**settings: Any) -> Any:
    return attach(llama(), LoraSettings(target_modules=("all-linear",), rank=4, **settings))


def rounded(model: Any) -> dict[str, FrozenLinear]:
    round_frozen(model, model.get_output_embeddings())
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}


def test_a_product_is_that_of_rounded_operands_summed_in_fp32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 200)
    layer.requires_grad_(False)
    frozen = copy.deepcopy(layer)
    frozen.weight.data = frozen.weight.data.bfloat16()
    frozen.__class__ = FrozenLinear
    x = torch.randn(3, 5, 300, requires_grad=True)
    y = frozen(x)
    y.backward(torch.ones_like(y))
    weight = layer.weight.bfloat16().float()
    exact = functional.linear(x.detach().bfloat16().float(), weight, layer.bias)
    assert y.dtype is torch.float32 and x.grad is not None and x.grad.dtype is torch.float32
    # one rounding of the sum to bf16, and fp32's own
    torch.testing.assert_close(y, exact, rtol=BF16_STEP, atol=BF16_STEP * 0.1)
    gradient = weight.sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, gradient, rtol=BF16_STEP, atol=1e-5)


def test_a_change_too_small_for_bf16_is_not_rounded_away() -> None:
    model = tuned()
    rounded(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 4, 128)
    before = layer(x).detach()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(3e-6)
    low = layer.lora_A["default"](x).detach()
    added = layer.scaling["default"] * 3e-6 * low.sum(-1, keepdim=True)
    assert float(added.abs().max()) < float(before.abs().median()) * BF16_STEP / 10
    # fp32's rounding of the sum
    torch.testing.assert_close(
        layer(x).detach() - before, added.expand_as(before), rtol=0, atol=1e-6
    )


def test_only_frozen_wide_layers_that_are_called_are_rounded() -> None:
    layers = rounded(tuned())
    kinds = {name.split(".")[-2] for name in layers}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(layers) == 10
    model = tuned()
    kept = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    kept.weight.requires_grad_(True)
    narrow = model.base_model.model.model.layers[0].self_attn.k_proj.base_layer
    assert len(rounded(model)) == 9
    assert type(kept) is nn.Linear and type(narrow) is nn.Linear
    assert model.get_output_embeddings().weight.dtype is torch.float32
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


def test_layers_whose_weight_is_read_are_left() -> None:
    assert rounded(tuned(use_dora=True)) == {}


def test_a_layer_that_is_never_called_is_left() -> None:
    model = llama()
    model.requires_grad_(False)
    model.model.unused = nn.Linear(128, 128).requires_grad_(False)
    layers = rounded(model)
    assert len(layers) == 10 and not any("unused" in name for name in layers)


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gradients = []
    for again in (False, True):
        model = tuned()
        assert rounded(model)
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        supervised_nll(model.train(), batch)[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    kept, computed = gradients
    assert kept.keys() == computed.keys() and len(kept) > 10
    assert all(torch.equal(kept[name], computed[name]) for name in kept)


def test_training_follows_fp32() -> None:
    """The same rows and steps. At three times this rate fp32 itself is unstable here."""
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def losses(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
        seen = []
        for _ in range(8):
            nll, count = supervised_nll(model, batch)
            optimizer.zero_grad()
            (nll / count).backward()
            optimizer.step()
            seen.append(float(nll.detach() / count))
        return seen

    exact = losses(tuned())
    model = tuned()
    assert rounded(model)
    learned = exact[0] - exact[-1]
    assert learned > 0.5
    assert losses(model) == pytest.approx(exact, abs=2e-3 * learned)


@pytest.mark.parametrize(
    ("units", "precision", "expected"),
    [(True, "auto", 10), (True, "fp32", 0), (False, "auto", 0)],
)
def test_it_is_for_cpus_with_units_and_off_with_fp32(
    units: bool, precision: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("an accelerator computes in bf16 by autocast")
    monkeypatch.setattr(arguments, "has_bf16_units", lambda: units)
    model = tuned()
    training = TrainingSection.model_validate({"precision": precision})
    assert arguments.use_kernels(model, training) == "grouped"
    assert sum(isinstance(module, FrozenLinear) for module in model.modules()) == expected


def test_the_units_are_those_that_the_cpu_names() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("the CPU is not described here")
    flags = cpuinfo.read_text().split()
    assert has_bf16_units() == ("avx512_bf16" in flags or "amx_bf16" in flags)
