"""The merged weights are what the adapter computes, or the step fails."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tuneline import artifacts, base_model, recipe
from tuneline.artifacts import Artifact
from tuneline.finetune.load import load_base, load_tuned
from tuneline.finetune.train import attach
from tuneline.merge.merge import merge
from tuneline.recipe import ExportSection, method_of
from tuneline.tracking import Untracked

# peft on BitFit's added biases, which tuneline packages; and on a Conv1D that became 4 bits
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
NATIVE = ("llama", "qwen2", "qwen3", "glm", "glm4", "gpt2")
OWN_CODE = ("chatglm_shaped", "baichuan_shaped")
MERGEABLE = ("full", "lora", "qlora", "ia3", "bitfit")
TOKENS = torch.arange(5, 45).reshape(2, 20)
# fp32 sums in another order, through two blocks
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

Make = Callable[..., tuple[str, Artifact]]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits.clone()


def export(**values: Any) -> ExportSection:
    return recipe.check(ExportSection, values, source="export")


def run(reference: str, adapter: Artifact, output: Path, **values: Any) -> Artifact:
    return merge(reference, adapter.path, export(**values), output, Untracked())


def seal(folder: Path, reference: str, method: dict[str, Any]) -> Artifact:
    """Make an adapter artifact of what PEFT wrote."""
    settings = recipe.method_settings(method)
    (folder / "README.md").unlink(missing_ok=True)
    artifacts.seal(
        folder,
        kind="adapter",
        config={"method": settings.model_dump(mode="json"), "training": {}},
        base_model=base_model.resolve(reference).identity(),
        inputs={"prepared_dataset": "sha256:of-no-data"},
    )
    return artifacts.load(folder, "adapter")


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2: Conv1D, LayerNorm with biases, tied embeddings, no prefix in the files' names."""
    folder = tmp_path_factory.mktemp("gpt2")
    for file in tiny_model.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=48, n_head=4, vocab_size=300, n_positions=128, initializer_range=0.25,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def make(
    model_reference: Callable[[str], str], gpt2: str, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """A method on a family's tiny model, whose trained parameters were moved at random."""

    @cache
    def made(family: str, name: str, strength: float = 0.1, **options: Any) -> tuple[str, Artifact]:
        reference = gpt2 if family == "gpt2" else model_reference(family)
        base = base_model.resolve(reference)
        settings = recipe.method_settings({"name": name, **options})
        method = method_of(settings)
        torch.manual_seed(1)
        model, _, _ = attach(base, method, settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(strength * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("adapters") / f"{family}-{name}"
        method.save(model, str(folder))
        if method.stored_as == "model":
            base_model.copy_small_files(base.path, folder)
        return reference, seal(folder, reference, settings.model_dump(mode="json"))

    def with_hashable(family: str, name: str, **options: Any) -> tuple[str, Artifact]:
        return made(family, name, **options)

    return with_hashable


def fitting(family: str, name: str) -> bool:
    """BitFit can't train Conv1D's biases."""
    return not (family == "gpt2" and name == "bitfit")


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in NATIVE + OWN_CODE for n in MERGEABLE if fitting(f, n)],
)
def test_merged_logits_equal_the_adapters(
    family: str, name: str, make: Make, tmp_path: Path
) -> None:
    reference, adapter = make(family, name)
    base = base_model.resolve(reference)
    expected = logits(load_tuned(base, adapter))
    model = run(reference, adapter, tmp_path / "out")
    if model.manifest.kind == "packaged_model":  # biases that the base has no place for
        assert name == "bitfit" and family != "qwen2" and family != "glm"
        return
    merged = load_base(model.path, trust_code=base.trusts_code)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    plain = load_base(base.path, trust_code=base.trusts_code)
    assert (logits(plain) - expected).abs().max() > 1e-2
    proof = model.read_json("proof.json")
    assert proof["top1_agreement"] == 1.0 and proof["max_logit_diff"] < 1e-3
    assert name == "full" or proof["tensors"] > 10
    assert model.manifest.config["merge_proof"] == proof
    assert artifacts.load(model.path, "merged_model") == model
