"""One contract for every method on every architecture; each claim of a METHODS row is held here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tuneline import base_model, recipe
from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.data_prep.prepare import prepare
from tuneline.errors import ArtifactError, MethodError, RecipeError
from tuneline.finetune import four_bits
from tuneline.finetune.load import (
    load_base,
    load_tuned,
    parameter_count,
    wrong_4_bit_widths,
)
from tuneline.finetune.loss import supervised_nll
from tuneline.finetune.methods import METHODS, Method
from tuneline.finetune.methods.method import MethodSettings, Quantization
from tuneline.finetune.methods.structure import decoder_blocks
from tuneline.finetune.train import attach, finetune
from tuneline.merge.merge import merge
from tuneline.merge.package import load_packaged
from tuneline.recipe import DataSection, ExportSection, TrainingSection
from tuneline.tracking import Untracked

ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "glm", "glm4", "chatglm_shaped", "baichuan_shaped",
)  # fmt: skip
TOKENS = torch.arange(5, 45).reshape(2, 20)
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
# at the tiny models' width the published rates, made for billions of parameters, barely move them
LEARNING_RATES = {"full": 3e-3, "prompt_tuning": 0.3, "ia3": 0.1, "bitfit": 0.1}
TRAINED_NAMES = {
    "lora": "lora_",
    "qlora": "lora_",
    "bottleneck": "bottleneck_",
    "prompt_tuning": "prompt_encoder",
    "ia3": "ia3_l",
    "bitfit": "beft_bias",
}
# fp32 sums in another order, through two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@dataclass(frozen=True)
class Tuned:
    """What the training step made of one method on one architecture."""

    method: Method
    settings: MethodSettings
    base: BaseModel
    adapter: Artifact

    def load_base(self) -> torch.nn.Module:
        """The base in the precision that the method stands on."""
        return load_base(
            self.base.path,
            trust_code=self.base.trusts_code,
            quantization=self.settings.quantization,
        ).eval()

    def load(self) -> torch.nn.Module:
        """The tuned model."""
        return load_tuned(self.base, self.adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        # virtual tokens in front have logits too
        return model.eval()(TOKENS).logits[:, -TOKENS.shape[1] :].clone()


def settings_of(method: Method, **options: object) -> MethodSettings:
    own = {"missing_biases": "add"} if method.name == "bitfit" else {}
    return recipe.method_settings({"name": method.name, **own, **options})


@pytest.fixture(scope="module")
def train(
    model_reference: Callable[[str], str],
    chats_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Method, str], Tuned]:
    """Runs the real training step, once per method and architecture."""

    @cache
    def dataset(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp("data") / architecture
        data = DataSection(train=(str(chats_file),), validation_fraction=0.2, test_fraction=0.1)
        return prepare(model_reference(architecture), data, folder).path

    @cache
    def trained(method: Method, architecture: str) -> Tuned:
        settings = settings_of(method)
        training = TrainingSection(
            epochs=1, batch_tokens=512, learning_rate=LEARNING_RATES.get(method.name, 1e-2)
        )
        reference = model_reference(architecture)
        folder = tmp_path_factory.mktemp("adapters") / f"{method.name}-{architecture}"
        adapter = finetune(
            reference, dataset(architecture), settings, training, folder, Untracked()
        )
        return Tuned(method, settings, base_model.resolve(reference), adapter)

    return trained


@pytest.fixture(params=[(m, a) for m in METHODS for a in ARCHITECTURES],
                ids=[f"{m.name}-{a}" for m in METHODS for a in ARCHITECTURES])  # fmt: skip
def tuned(request: pytest.FixtureRequest, train: Callable[[Method, str], Tuned]) -> Tuned:
    """Each method on each architecture, trained."""
    return train(*request.param)


def test_the_loss_falls(tuned: Tuned) -> None:
    history = tuned.adapter.read_jsonl("history.jsonl")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_step_0_is_the_base_and_the_counts_are_right(tuned: Tuned) -> None:
    before = logits(tuned.load_base())
    model, trainable, total = attach(tuned.base, tuned.method, tuned.settings)
    if tuned.method.identity_at_start:
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    else:
        assert (logits(model) - before).abs().max() > 1e-3
    plain = load_base(tuned.base.path, trust_code=tuned.base.trusts_code)
    assert total == sum(parameter.numel() for parameter in plain.parameters())
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected_trainable(tuned, plain)


def expected_trainable(tuned: Tuned, plain: torch.nn.Module) -> int:
    """The count by each method's own formula, from the base's shapes."""
    blocks = decoder_blocks(plain)  # type: ignore[arg-type]
    shape = {name: module.weight.shape for name, module in plain.named_modules()
             if isinstance(module, torch.nn.Linear)}  # fmt: skip
    width = plain.config.hidden_size  # type: ignore[union-attr]
    inside = [name for name in shape if name.startswith(tuple(f"{b.name}." for b in blocks))]
    match tuned.method.name:
        case "full":
            return sum(parameter.numel() for parameter in plain.parameters())
        case "lora":
            names = [name for block in blocks for name in block.query_value]
            return sum(8 * sum(shape[name]) for name in names)
        case "qlora":
            return sum(8 * sum(shape[name]) for name in inside)
        case "bottleneck":
            return len(blocks) * (2 * width * 64 + width + 64)
        case "prompt_tuning":
            return 20 * width
        case "ia3":
            keys_values = sum(shape[name][0] for block in blocks for name in block.key_value)
            return keys_values + sum(shape[block.ffn_output][1] for block in blocks)
        case "bitfit":
            own = [n for n in inside if plain.get_submodule(n).bias is not None]
            return sum(shape[name][0] for name in own or inside)
    raise AssertionError(tuned.method.name)


def test_only_the_methods_own_parameters_get_gradients(tuned: Tuned) -> None:
    model, _, _ = attach(tuned.base, tuned.method, tuned.settings)
    nll, _ = supervised_nll(model, BATCH)
    nll.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    if tuned.method.name == "full":
        assert with_gradient == {name for name, _ in model.named_parameters()}
    else:
        assert with_gradient == {
            name for name, _ in model.named_parameters() if TRAINED_NAMES[tuned.method.name] in name
        }


def test_gradient_checkpointing_gives_the_same_gradients(tuned: Tuned) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, _, _ = attach(tuned.base, tuned.method, tuned.settings)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        nll, _ = supervised_nll(model, BATCH)
        nll.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, **CLOSE)


def test_disabling_it_gives_the_base(tuned: Tuned) -> None:
    before = logits(tuned.load_base())
    model = tuned.load()
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    else:
        assert tuned.method.stored_as == "model"


def test_two_on_one_base_switch_and_each_gives_its_own_output(tuned: Tuned, tmp_path: Path) -> None:
    if not tuned.method.side_by_side:
        assert tuned.method.stored_as == "model"
        return
    model = tuned.load()
    assert isinstance(model, PeftModel)
    first = logits(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if TRAINED_NAMES[tuned.method.name] in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    second = logits(model)
    assert (first - second).abs().max() > 1e-3
    # peft looks the base up there when it saves
    model.peft_config["default"].base_model_name_or_path = str(tuned.base.path)
    tuned.method.save(model, str(tmp_path))
    both = tuned.load()
    assert isinstance(both, PeftModel)
    assert tuned.method.load(both, str(tmp_path), "second") is both
    for name, expected in (("second", second), ("default", first), ("second", second)):
        both.set_adapter(name)
        torch.testing.assert_close(logits(both), expected, rtol=0, atol=0)


def test_it_is_exported_merged_or_packaged_with_equal_logits(tuned: Tuned, tmp_path: Path) -> None:
    base = tuned.base
    reference = f"{base.path}{base_model.CODE_PIN}{base.code}" if base.code else str(base.path)
    exported = merge(reference, tuned.adapter.path, ExportSection(), tmp_path / "out", Untracked())
    if exported.manifest.kind == "merged_model":
        assert tuned.method.mergeable
        model = load_base(exported.path, trust_code=base.trusts_code)
    else:
        # bitfit: biases that the base has no place for
        assert not tuned.method.mergeable or tuned.settings.merge_hindrance
        model, _ = load_packaged(exported.path, base_model=reference)
    torch.testing.assert_close(logits(model), logits(tuned.load()), **CLOSE)


FRESH = """
import json, os, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

tokens = torch.arange(5, 45).reshape(2, 20)
for job in json.loads(sys.stdin.read()):
    if job["loader"] == "peft with tuneline":
        import tuneline.finetune.methods.bottleneck_tuner
    options = {"dtype": torch.float32, "trust_remote_code": True}
    if job["loader"] == "transformers":
        model = AutoModelForCausalLM.from_pretrained(job["adapter"], **options)
    else:
        from peft import PeftModel
        if job["double"] is not None:
            from transformers import BitsAndBytesConfig
            from tuneline.finetune import four_bits
            four_bits.functional()  # for layers of 48 inputs, where AVX-512 has them wrong
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=job["double"], bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(job["base"], **options)
        for module in base.modules():
            module.support_avx512bf16_for_cpu = False  # it would round the scales to bf16
        model = PeftModel.from_pretrained(base, job["adapter"])
    with torch.inference_mode():
        torch.save(model.eval()(tokens).logits[:, -20:].clone(), job["out"])
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(
    train: Callable[[Method, str], Tuned], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Logits of every tuned model, loaded in a fresh process by what its row says it needs."""
    out = tmp_path_factory.mktemp("fresh")
    jobs = []
    for method in METHODS:
        for architecture in ARCHITECTURES:
            one = train(method, architecture)
            quantization = one.settings.quantization
            jobs.append(
                {
                    "base": str(one.base.path),
                    "adapter": str(one.adapter.path),
                    "loader": method.loader,
                    "double": quantization.double if quantization else None,
                    "out": str(out / one.adapter.path.name),
                }
            )
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(sorted(jobs, key=lambda job: job["loader"] != "transformers")),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_fresh_process_loads_it_with_equal_logits(tuned: Tuned, loaded_elsewhere: Path) -> None:
    elsewhere = torch.load(loaded_elsewhere / tuned.adapter.path.name, weights_only=True)
    torch.testing.assert_close(elsewhere, logits(tuned.load()), rtol=0, atol=0)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("fault", ["lacks", "has unknown", "is of another model"])
@every_method
def test_an_adapter_with_other_tensors_is_refused(
    method: Method,
    fault: str,
    beside: bool,
    train: Callable[[Method, str], Tuned],
    tmp_path: Path,
) -> None:
    if method.stored_as == "model":
        return
    tuned = train(method, "qwen2")
    folder = tmp_path / "adapter"
    shutil.copytree(tuned.adapter.path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(tensors)
    if fault == "lacks":
        del tensors[first]
    elif fault == "has unknown":
        tensors[f"{first}.more"] = tensors[first].clone()
    else:
        tensors[first] = torch.cat([tensors[first], tensors[first]], dim=-1)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    model = tuned.load() if beside else tuned.load_base()
    with pytest.raises(ArtifactError, match=f"{fault}( tensors \\({first}|.*mismatch)"):
        method.load(model, str(folder), "second")  # type: ignore[arg-type]


@every_method
@every_architecture
def test_a_base_in_4_bits_carries_it(
    method: Method, architecture: str, model_reference: Callable[[str], str]
) -> None:
    fields = type(settings_of(method)).model_fields
    if not method.works_on_4bit:
        assert "load_in_4bit" not in fields
        return
    base = base_model.resolve(model_reference(architecture))
    settings = settings_of(method, **({"load_in_4bit": True} if "load_in_4bit" in fields else {}))
    if method.name == "lora":
        settings = settings_of(METHODS[2])  # LoRA on a base in 4 bits is the method qlora
    assert settings.quantization == Quantization(double=True)
    model, _, total = attach(base, recipe.method_of(settings), settings)
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert packed and all(p.dtype == torch.uint8 for p in packed)
    assert total == parameter_count(load_base(base.path, trust_code=base.trusts_code))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATES.get(method.name, 1e-2),
    )
    losses = []
    for _ in range(6):
        nll, count = supervised_nll(model, BATCH)
        optimizer.zero_grad()
        (nll / count).backward()
        optimizer.step()
        losses.append(float((nll / count).detach()))
    assert losses[-1] < losses[0]


@every_method
def test_tied_embeddings_stay_tied(method: Method, train: Callable[[Method, str], Tuned]) -> None:
    model = train(method, "llama").load()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert inner.config.tie_word_embeddings
    assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "lorra"}, "method 'lorra' is unknown; methods are full, lora.*mean 'lora'"),
        ({"name": "lora", "rnak": 4}, "rnak: unknown key; keys here are .*Did you mean 'rank'"),
        ({"name": "qlora", "rank": 0}, "rank: input should be greater than or equal to 1, got 0"),
        ({"name": "full", "rank": 4}, "rank: unknown key"),
        ({"name": "prompt_tuning", "num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"name": "bitfit", "missing_biases": "ignore"}, "'refuse' or 'add', got 'ignore'"),
        ({"name": "ia3", "load_in_4bit": "maybe"}, "load_in_4bit: input should be a valid bool"),
    ],
)  # fmt: skip
def test_wrong_hyperparameters_are_refused_with_what_is_allowed(
    values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        recipe.method_settings(values)


@pytest.mark.parametrize(
    ("method", "options", "architecture", "sentence"),
    [
        ("lora", {"target_modules": ["q_projj"]}, "qwen2", "Did you mean 'q_proj'"),
        ("qlora", {"target_modules": ["W_pak"]}, "baichuan_shaped", "Did you mean 'W_pack'"),
        ("qlora", {"layers": [0, 9]}, "glm", r"qlora: layers \[0, 9\] is no range.*2 blocks"),
        ("prompt_tuning", {"num_virtual_tokens": 256}, "qwen3", "context of 256 positions"),
        ("bitfit", {}, "llama", "no bias terms, so nothing would train"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    method: str,
    options: dict[str, object],
    architecture: str,
    sentence: str,
    model_reference: Callable[[str], str],
) -> None:
    base = base_model.resolve(model_reference(architecture))
    settings = recipe.method_settings({"name": method, **options})
    with pytest.raises(MethodError, match=sentence):
        attach(base, recipe.method_of(settings), settings)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "prompt_tuning"}, "no equal form"),
        ({"name": "bottleneck"}, "no equal form"),
        ({"name": "bitfit", "missing_biases": "add"}, "may add biases"),
    ],
)
def test_merged_weights_are_refused_at_the_start_where_a_run_may_not_end_in_them(
    method: dict[str, object], reason: str
) -> None:
    values = {
        "model": {"base_model": "demo"},
        "data": {"train": "demo:train"},
        "method": method,
        "registry": {"model_name": "orders"},
    }
    assert recipe.resolve(values).export.form == "auto"
    with pytest.raises(
        RecipeError, match=f"{reason}.*use auto or packaged, or.*\\(full, lora, qlora, ia3, bitfit"
    ):
        recipe.resolve(values | {"export": {"form": "merged"}})


def test_bitfit_trains_the_biases_that_a_model_has(model_reference: Callable[[str], str]) -> None:
    base = base_model.resolve(model_reference("qwen2"))
    settings = recipe.method_settings({"name": "bitfit"})
    model, _, _ = attach(base, recipe.method_of(settings), settings)
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj"}


def test_prompt_tuning_starts_from_a_text(
    model_reference: Callable[[str], str], tiny_model: Path
) -> None:
    from tuneline.data_prep.chat import load_tokenizer

    base = base_model.resolve(model_reference("llama"))
    text = "apple is red"
    settings = recipe.method_settings(
        {"name": "prompt_tuning", "num_virtual_tokens": 4, "init_text": text}
    )
    model, _, _ = attach(base, recipe.method_of(settings), settings)
    ids = load_tokenizer(str(tiny_model))(text)["input_ids"]
    wanted = model.get_input_embeddings()(torch.tensor((ids * 4)[:4]))
    started = next(p for n, p in model.named_parameters() if "prompt_encoder" in n)
    torch.testing.assert_close(started, wanted, rtol=0, atol=0)


def test_code_of_a_model_runs_only_when_it_is_pinned(
    model_reference: Callable[[str], str], tmp_path: Path
) -> None:
    from tuneline.errors import ModelError

    reference = model_reference("baichuan_shaped")
    folder, _, pin = reference.partition(base_model.CODE_PIN)
    assert base_model.resolve(reference).identity()["code"] == pin
    with pytest.raises(ModelError, match=f"is not run unless it is pinned.*#code={pin}"):
        base_model.resolve(folder)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    with (changed / "modeling_baichuan_shaped.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ModelError, match="not the pinned"):
        base_model.resolve(f"{changed}{base_model.CODE_PIN}{pin}")
    config = json.loads((changed / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "other/repo--configuration.Config"
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="from another repository"):
        base_model.resolve(f"{changed}{base_model.CODE_PIN}{pin}")
    config["auto_map"]["AutoConfig"] = "configuration_baichuan_shaped.BaichuanShapedConfig"
    (changed / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((changed / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["other/repo--tokenization.Tokenizer", None]}
    (changed / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="from another repository"):
        base_model.resolve(f"{changed}{base_model.CODE_PIN}{pin}")
    with pytest.raises(ModelError, match="has no code of its own"):
        base_model.resolve(f"{model_reference('qwen2')}{base_model.CODE_PIN}{pin}")


@pytest.mark.parametrize("double", [True, False])
def test_an_evaluation_leaves_4_bit_weights_as_they_are(tiny_model: Path, double: bool) -> None:
    """bitsandbytes would pack them for inference on some CPUs: no gradient passes them then."""
    model = load_base(tiny_model, quantization=Quantization(double))
    weight = next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    before = weight.data.clone(), weight.quant_state.absmax.clone()
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.inference_mode():
        model.eval()(tokens)
    assert torch.equal(weight.data, before[0])
    assert torch.equal(weight.quant_state.absmax, before[1])
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model.train()(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None and float(inputs.grad.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(16, 48), (3, 48), (7, 80), (9, 16), (5, 24), (11, 62), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bits_are_undone_with_their_own_scales(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    import bitsandbytes

    bits = four_bits.functional()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight *= torch.logspace(-2, 2, len(weight))[:, None]  # a neighbour's scale is far off
    packed, state = bits.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4")
    plain = bits.dequantize_4bit(packed, state)
    assert plain.shape == shape and plain.dtype == dtype
    scales = state.absmax.repeat_interleave(64)[: weight.numel()].reshape(shape)
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    exact = state.code[halves[: weight.numel()]].reshape(shape) * scales
    torch.testing.assert_close(plain.float(), exact, rtol=0.01, atol=0)
    inputs = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(4)).to(dtype)
    with torch.no_grad():
        product = bitsandbytes.matmul_4bit(inputs, packed, state)
    torch.testing.assert_close(product, inputs @ plain.t(), rtol=0.02, atol=0.02)


def test_a_width_that_bitsandbytes_gets_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel for CPUs with AVX-512 was, at 48 inputs; here every machine's is made to be."""
    from bitsandbytes import functional

    layers = torch.nn.ModuleDict()
    for width in (48, 64):
        weight = torch.nn.Parameter(torch.zeros(4, 1), requires_grad=False)
        _, weight.quant_state = functional.quantize_4bit(torch.randn(8, width))
        layers[str(width)] = torch.nn.Module()
        layers[str(width)].weight = weight
    right = functional.dequantize_4bit

    def wrong_at_48(packed: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
        plain = right(packed, state)
        return plain.flip(0) if state.shape[-1] == 48 else plain

    monkeypatch.setattr(functional, "dequantize_4bit", wrong_at_48)
    assert wrong_4_bit_widths(layers) == [48]
    assert wrong_4_bit_widths(torch.nn.Linear(48, 48)) == []
