"""Bottleneck adapters on tiny random models of several families."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tuneline.errors import MergeError, MethodError, RecipeError
from tuneline.finetune.load import load_base
from tuneline.finetune.methods.bottleneck import METHOD, BottleneckSettings
from tuneline.finetune.methods.bottleneck_tuner import BottleneckConfig, BottleneckLayer
from tuneline.recipe import method_settings

HIDDEN, LAYERS, WIDTH = 32, 2, 4
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "glm": lambda: GlmConfig(**_SIZES),
    "glm4": lambda: Glm4Config(**_SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, initializer_range=0.2
    ),
    "opt": lambda: OPTConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        word_embed_proj_dim=HIDDEN,
        init_std=0.2,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    # its feed-forward network returns (hidden states, routing)
    "gpt_oss": lambda: GptOssConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
}
every_family = pytest.mark.parametrize("family", CONFIGS)
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def base(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager")
    return model.to(dtype).eval()


def attached(model: PreTrainedModel, **settings: Any) -> PeftModel:
    settings = {"bottleneck_dim": WIDTH, **settings}
    tuned = METHOD.attach(model, BottleneckSettings(**settings))
    assert isinstance(tuned, PeftModel)
    return tuned.eval()


def randomize(model: nn.Module, name: str = "default", seed: int = 2) -> None:
    """Give an adapter other values than those at the start, which change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for parameter in adapter_parameters(layer, name):
            values = torch.randn(parameter.shape, generator=generator) / 2
            parameter.data.copy_(values)


def adapter_parameters(layer: BottleneckLayer, name: str) -> list[nn.Parameter]:
    return [*layer.bottleneck_down[name].parameters(), *layer.bottleneck_up[name].parameters()]


def layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def no_warning_of_deleting() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield


@every_family
def test_the_model_is_unchanged_at_the_start_and_only_adapters_train(family: str) -> None:
    model = base(family)
    before = logits(model)
    tuned = attached(model)
    assert torch.equal(logits(tuned), before)

    loss = tuned(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name for name, p in tuned.named_parameters() if p.grad is not None} == set(trained)
    assert all(re.search(r"\.bottleneck_(down|up)\.default\.", name) for name in trained)
    counted = sum(p.numel() for p in trained.values())
    assert counted == LAYERS * (2 * WIDTH * HIDDEN + HIDDEN + WIDTH)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        # through W_up = 0 nothing reaches W_down before the first step
        assert bool(parameter.grad.any()) == ("_up." in name), name


@every_family
def test_the_output_of_every_feed_forward_network_is_adapted(family: str) -> None:
    tuned = attached(base(family))
    randomize(tuned)
    found = layers(tuned)
    assert len(found) == LAYERS
    seen: list[tuple[Any, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output))
        for layer in found
        for module in (layer.base_layer, layer)
    ]
    logits(tuned)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * LAYERS
    for layer, plain, adapted in zip(found, seen[::2], seen[1::2], strict=True):
        if isinstance(plain, tuple):
            assert len(adapted) == len(plain)
            assert all(a is p for a, p in zip(adapted[1:], plain[1:], strict=True))
            plain, adapted = plain[0], adapted[0]
        down_weight, down_bias, up_weight, up_bias = adapter_parameters(layer, "default")
        inner = functional.relu(plain @ down_weight.T + down_bias)
        expected = plain + inner @ up_weight.T + up_bias
        # fp32, sums over 32 and 4 terms in another order
        torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)


def test_experts_still_report_their_routing() -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        tuned = attached(base(family))
        output = tuned(input_ids=IDS, labels=IDS, output_router_logits=True)
        assert len(output.router_logits) == LAYERS
        assert output.aux_loss.isfinite()


_LOAD = """
import json, sys
import torch
import tuneline.finetune.methods.bottleneck_tuner
from peft import PeftModel
from transformers import AutoModelForCausalLM

root = sys.argv[1]
ids, expected = torch.load(root + "/expected.pt", weights_only=True)
for family, logits in expected.items():
    base = AutoModelForCausalLM.from_pretrained(
        f"{root}/{family}", attn_implementation="eager"
    ).eval()
    for lean in (False, True):
        tuned = PeftModel.from_pretrained(base, f"{root}/{family}-adapter", low_cpu_mem_usage=lean)
        with torch.no_grad():
            same = torch.equal(tuned(input_ids=ids, use_cache=False).logits, logits)
        frozen = not any(parameter.requires_grad for parameter in tuned.parameters())
        print(json.dumps([family, lean, same, frozen]))
        base = tuned.unload()
"""


def test_plain_peft_loads_every_family_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for family in CONFIGS:
        model = base(family)
        model.save_pretrained(tmp_path / family)
        tuned = attached(model, non_linearity="gelu", dropout=0.1)
        randomize(tuned)
        METHOD.save(tuned, str(tmp_path / f"{family}-adapter"))
        files = {path.name for path in (tmp_path / f"{family}-adapter").iterdir()}
        assert files - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
        expected[family] = logits(tuned)
    torch.save((IDS, expected), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", _LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results == [[f, lean, True, True] for f in CONFIGS for lean in (False, True)]


def test_the_saved_configuration_says_all_that_loading_needs(tmp_path: Path) -> None:
    tuned = attached(base("gpt2"), bottleneck_dim=0, reduction_factor=10, non_linearity="tanh")
    tuned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = ("peft_type", "target_modules", "bottleneck_dim", "non_linearity", "hidden_size")
    assert [config[key] for key in kept] == ["TUNELINE_BOTTLENECK", ["mlp"], 3, "tanh", HIDDEN]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_adapters_side_by_side_each_give_their_own_output(
    family: str, tmp_path: Path, no_warning_of_deleting: None
) -> None:
    model = base(family)
    plain = logits(model)
    tuned = attached(model)
    randomize(tuned)
    first = logits(tuned)
    tuned.add_adapter("wide", BottleneckConfig(bottleneck_dim=7, non_linearity="silu"))
    assert torch.equal(logits(tuned), first)  # added, not active
    randomize(tuned, "wide", seed=3)
    tuned.set_adapter("wide")
    second = logits(tuned)
    training = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert training
    assert all(".wide." in name for name in training)
    tuned.save_pretrained(str(tmp_path))
    tuned.load_adapter(str(tmp_path / "wide"), "again")
    tuned.set_adapter("again")
    third = logits(tuned)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    assert torch.equal(third, second)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, plain)

    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    assert torch.equal(logits(tuned), first)

    tuned.delete_adapter("default")
    assert all("default" not in name for name, _ in tuned.named_parameters())
    tuned.set_adapter("wide")
    assert torch.equal(logits(tuned), second)
    unloaded = tuned.unload()
    assert not layers(unloaded)
    assert torch.equal(logits(unloaded), plain)


def test_several_active_adapters_follow_each_other() -> None:
    tuned = attached(base())
    tuned.add_adapter("second", BottleneckConfig(bottleneck_dim=3))
    for name in ("default", "second"):
        randomize(tuned, name)
    tuned.base_model.set_adapter(["default", "second"])
    layer = layers(tuned)[0]
    states = torch.randn(1, 3, HIDDEN)
    expected = layer.base_layer(states)
    for name in ("default", "second"):
        expected = layer.adapt(name, expected)
    assert torch.equal(layer(states), expected)


def test_an_adapter_on_a_model_with_adapters_of_its_own_finds_the_same_places() -> None:
    for family in CONFIGS:
        tuned = attached(base(family))
        places = tuned.peft_config["default"].target_modules
        tuned.add_adapter("second", BottleneckConfig())
        assert tuned.peft_config["second"].target_modules == places
        assert all(set(layer.bottleneck_down) == {"default", "second"} for layer in layers(tuned))
        assert len(layers(tuned)) == LAYERS


def test_merging_is_refused_with_the_reason_and_changes_nothing() -> None:
    tuned = attached(base())
    randomize(tuned)
    before = logits(tuned)
    model: Any = tuned
    for merge in (model.merge_and_unload, model.merge_adapter, layers(tuned)[0].merge):
        with pytest.raises(MergeError, match=r"not linear in h.*keep the adapter beside its base"):
            merge()
    assert torch.equal(logits(tuned), before)
    assert not METHOD.mergeable


def test_it_trains_and_reloads_on_a_base_in_4_bits(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    settings = BottleneckSettings(bottleneck_dim=WIDTH, load_in_4bit=True)
    quantization = settings.quantization
    assert quantization is not None
    model = load_base(tmp_path / "base", quantization=quantization)
    plain = logits(model)
    tuned = METHOD.attach(model, settings)
    assert torch.equal(logits(tuned), plain)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    METHOD.save(tuned, str(tmp_path / "adapter"))
    again = METHOD.load(
        load_base(tmp_path / "base", quantization=quantization), str(tmp_path / "adapter")
    )
    assert torch.equal(logits(again.eval()), logits(tuned.eval()))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_oss"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        tuned = attached(base(family)).train()
        for module in tuned.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        randomize(tuned)
        if checkpointing:
            options = {"use_reentrant": use_reentrant}
            tuned.activation_checkpointing_enable(options)  # pyright: ignore[reportCallIssue]
            tuned.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
        tuned(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == LAYERS * 4
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_no_graph_is_kept_below_the_first_adapter() -> None:
    tuned = attached(base())
    first = layers(tuned)[0]
    needs: list[bool] = []
    for module in (first.base_layer, first):
        module.register_forward_hook(lambda _, __, output: needs.append(output.requires_grad))
    tuned(input_ids=IDS)
    assert needs == [False, True]


def test_the_output_keeps_the_type_of_a_16_bit_base() -> None:
    model = base(dtype=torch.bfloat16)
    before = logits(model)
    tuned = attached(model)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(tuned), before)
    assert before.dtype == torch.bfloat16
    layer = layers(tuned)[0]
    randomize(tuned)
    states = torch.randn(2, 3, HIDDEN, dtype=torch.bfloat16)
    assert layer(states).dtype == torch.bfloat16

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(states).dtype == torch.bfloat16
        loss = tuned(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_dropout_acts_while_training_only() -> None:
    config = BottleneckConfig(bottleneck_dim=64, hidden_size=HIDDEN, dropout=0.5)
    layer = BottleneckLayer(nn.Identity(), "default", config)
    randomize(layer)
    states = torch.randn(1, 4, HIDDEN)
    assert not torch.equal(layer(states), layer(states))
    layer.eval()
    assert torch.equal(layer(states), layer(states))


def test_an_adapter_that_is_added_to_a_computing_model_drops_nothing() -> None:
    tuned = attached(base())
    tuned.add_adapter("second", BottleneckConfig(dropout=0.5))
    randomize(tuned, "second")
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), logits(tuned))


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    config = BottleneckConfig(bottleneck_dim=WIDTH, modules_to_save=["lm_head"])
    tuned: Any = get_peft_model(base(), config)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert sum("lm_head.modules_to_save.default" in name for name in trained) == 1
    randomize(tuned)
    with torch.no_grad():
        tuned.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    tuned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(), str(tmp_path))
    assert torch.equal(logits(again), logits(tuned.eval()))
    trainable = PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == set(trained)


def test_the_same_seed_gives_the_same_start() -> None:
    def start() -> torch.Tensor:
        model = base()
        torch.manual_seed(5)
        return adapter_parameters(layers(attached(model))[1], "default")[0]

    assert torch.equal(start(), start())


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    attached(base()).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**_SIZES, "hidden_size": 64}))
    with pytest.raises(MethodError, match="for hidden size 32, LlamaForCausalLM has 64"):
        METHOD.load(other, str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"non_linearity": "rleu"}, r"'rleu' is unknown; it is one of relu.*Did you mean 'relu'"),
        ({"bottleneck_dim": 0}, "bottleneck_dim 0 must be a whole number above 0"),
        ({"dropout": 1.0}, r"dropout 1.0 must be in \[0, 1\)"),
    ],
)
def test_a_tuner_configuration_with_faults_is_refused(values: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        BottleneckConfig(**values)


def test_a_target_off_the_residual_stream_is_refused() -> None:
    with pytest.raises(MethodError, match=r"up_proj has 64 outputs, the model's hidden size is 32"):
        get_peft_model(base(), BottleneckConfig(target_modules=["up_proj"]))


def test_a_module_whose_output_is_no_tensor_is_refused() -> None:
    class Named(nn.Module):
        def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"states": states}

    layer = BottleneckLayer(Named(), "default", BottleneckConfig(hidden_size=HIDDEN))
    with pytest.raises(MethodError, match="the output of Named is a dict: a tensor"):
        layer(torch.zeros(1, HIDDEN))


def test_other_tuners_are_left_alone() -> None:
    tuned = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    assert not layers(tuned)


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ({}, 64),
        ({"bottleneck_dim": 24}, 24),
        ({"reduction_factor": 16}, 36),
        ({"reduction_factor": 5}, 115),
        ({"reduction_factor": 1000.5}, 1),
        ({"bottleneck_dim": 0, "reduction_factor": 16}, 36),
    ],
)
def test_the_width_is_given_directly_or_by_a_factor(values: dict[str, Any], width: int) -> None:
    settings = method_settings({"name": "bottleneck", **values})
    assert isinstance(settings, BottleneckSettings)
    assert settings.width(576) == width
    assert method_settings(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"bottleneck_dim": 64, "reduction_factor": 16},
            "bottleneck_dim 64 and reduction_factor 16 both set the width: set one of them to 0",
        ),
        ({"bottleneck_dim": 0}, "bottleneck_dim or reduction_factor must be above 0"),
        ({"reduction_factor": 0.5}, r"must be 0 \(not used\) or at least 1"),
        ({"reduction_factor": -2}, "greater than or equal to 0"),
        ({"non_linearity": "swish"}, "'relu', 'gelu', 'silu' or 'tanh'"),
        ({"dropout": 1}, "less than 1"),
        ({"bottleneck": 8}, "bottleneck"),
    ],
)
def test_settings_with_faults_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_settings({"name": "bottleneck", **values})


def test_importing_the_methods_imports_no_torch() -> None:
    code = (
        "import sys, tuneline.finetune.methods; "
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
