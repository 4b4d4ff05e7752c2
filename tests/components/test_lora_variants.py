"""Each variant of LoRA starts as the base, trains only itself, reloads and merges exactly."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tuneline.errors import MergeError, RecipeError
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods.lora import LoraSettings, attach, create_optimizer, open_merge, save
from tuneline.recipe import method_settings

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora and dora": {"use_rslora": True, "use_dora": True},
    "pissa": {"init_weights": "pissa"},
    "lora plus": {"lora_plus_ratio": 16.0},
}
TOKENS = torch.arange(5, 45).reshape(2, 20)
BATCH = {
    "input_ids": TOKENS,
    "attention_mask": torch.ones_like(TOKENS),
    "labels": TOKENS,
}
# fp32: PiSSA subtracts what it adds, DoRA divides by a norm and multiplies by it again
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def settings(request: pytest.FixtureRequest) -> LoraSettings:
    return LoraSettings(target_modules=("all-linear",), rank=4, alpha=8, **request.param)


@pytest.fixture
def tuned(settings: LoraSettings, tiny_model: Path) -> PeftModel:
    """The tiny model after some steps on two rows."""
    torch.manual_seed(0)
    model = attach(load(tiny_model), settings)
    optimizer = create_optimizer(model, settings, torch.optim.AdamW, {"lr": 1e-2})
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        nll, count = supervised_nll(model, BATCH)
        optimizer.zero_grad()
        (nll / count).backward()
        optimizer.step()
        losses.append(float((nll / count).detach()))
    assert losses[-1] < losses[0] - 0.5
    return model.eval()


def test_step_0_is_the_base_and_only_the_adapter_gets_gradients(
    settings: LoraSettings, tiny_model: Path
) -> None:
    base = load(tiny_model)
    before = base(TOKENS).logits.detach()
    model = attach(base, settings)
    torch.testing.assert_close(model(TOKENS).logits, before, **CLOSE)
    model(TOKENS).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_plain_peft_loads_it_on_the_original_base(
    tuned: PeftModel, tiny_model: Path, tmp_path: Path
) -> None:
    expected = tuned(TOKENS).logits.detach()
    save(tuned, str(tmp_path / "adapter"))
    torch.testing.assert_close(
        tuned(TOKENS).logits, expected, rtol=0, atol=0
    )  # saving changes nothing
    loaded = PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, expected, **CLOSE)
    with loaded.disable_adapter():
        torch.testing.assert_close(
            loaded(TOKENS).logits, load(tiny_model)(TOKENS).logits, rtol=0, atol=0
        )


def test_lora_plus_gives_b_its_own_learning_rate(tiny_model: Path) -> None:
    settings = LoraSettings(lora_plus_ratio=16)
    model = attach(load(tiny_model), settings)
    options = {"lr": 1e-3, "weight_decay": 0.01}
    optimizer = create_optimizer(model, settings, torch.optim.AdamW, options)
    assert optimizer is not None and options["lr"] == 1e-3
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1.6e-2}
    assert len(rates) == 8  # q and v of two blocks


@pytest.mark.parametrize("other", ["use_dora", "use_rslora"])
def test_pissa_refuses_what_it_cannot_be_saved_with(other: str) -> None:
    with pytest.raises(RecipeError, match=f"init_weights pissa can't be combined with {other}"):
        method_settings({"name": "lora", "init_weights": "pissa", other: True})


def test_a_dora_adapter_without_its_magnitudes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = attach(load(tiny_model), LoraSettings())
    save(model, str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(MergeError, match="magnitude_vector'] are needed"):
        open_merge(str(tmp_path))
