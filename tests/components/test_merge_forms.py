"""What leaves: merged from several adapters, in 4 bits, or packaged; and what travels along."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneline import artifacts, base_model, recipe
from tuneline.artifacts import Artifact
from tuneline.data_prep.prepare import prepare
from tuneline.errors import ArtifactError, MergeError, RecipeError
from tuneline.evaluate.evaluate import evaluate
from tuneline.finetune.load import keep_4_bit_weights, load_base, load_tuned
from tuneline.finetune.train import attach, finetune
from tuneline.merge.merge import merge
from tuneline.merge.package import load_packaged
from tuneline.recipe import (
    DataSection,
    EvaluationSection,
    ExportSection,
    GateSection,
    TrainingSection,
    method_of,
)
from tuneline.tracking import Untracked

pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
TOKENS = torch.arange(5, 45).reshape(2, 20)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits.clone()


def moved(base: Path, folder: Path, seed: int = 1, **method: Any) -> Artifact:
    """An adapter whose trained parameters were moved at random."""
    settings = recipe.method_settings({"name": "lora", **method})
    model, _, _ = attach(base_model.resolve(str(base)), method_of(settings), settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    method_of(settings).save(model, str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    artifacts.seal(
        folder,
        kind="adapter",
        config={"method": settings.model_dump(mode="json"), "training": {}},
        base_model=base_model.resolve(str(base)).identity(),
        inputs={"prepared_dataset": "sha256:of-no-data"},
    )
    return artifacts.load(folder, "adapter")


def run(base: Path, adapter: Artifact, output: Path, *also: Artifact, **values: Any) -> Artifact:
    return merge(
        str(base),
        adapter.path,
        recipe.check(ExportSection, values, source="export"),
        output,
        Untracked(),
        also=[other.path for other in also],
    )


PACKAGED = [
    {"name": "prompt_tuning", "num_virtual_tokens": 4},
    {"name": "prompt_tuning", "num_virtual_tokens": 4, "load_in_4bit": True},
    {"name": "bottleneck", "bottleneck_dim": 8},
    {"name": "bitfit", "missing_biases": "add"},
    {"name": "lora", "export": "packaged"},
    {"name": "qlora", "export": "packaged"},
]


@pytest.mark.parametrize("case", PACKAGED, ids=lambda case: "-".join(map(str, case.values())))
def test_what_is_not_merged_is_packaged_and_its_card_loads_it(
    case: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    method = {key: value for key, value in case.items() if key != "export"}
    adapter = moved(tiny_model, tmp_path / "adapter", **method)
    model = run(tiny_model, adapter, tmp_path / "served", form=case.get("export", "auto"))
    assert model.manifest.kind == "packaged_model"
    assert artifacts.load(model.path, "packaged_model").manifest.base_model == (
        base_model.resolve(str(tiny_model)).identity()
    )
    loader = model.read_json("loader.json")
    assert {"torch", "transformers", "peft"} <= loader["packages"].keys()
    assert ("bitsandbytes" in loader["packages"]) == (loader["quantization"] is not None)
    assert loader["not_merged"].startswith("not merged: ")
    expected = logits(load_tuned(base_model.resolve(str(tiny_model)), adapter))
    torch.testing.assert_close(
        logits(load_packaged(model.path, base_model=str(tiny_model))[0]), expected
    )
    # the card's own lines, in a fresh process, with the base beside the package
    (tmp_path / tiny_model.name).symlink_to(tiny_model)
    card = (model.path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 6
    if loader["quantization"] is not None:
        # which packs weights anew on some CPUs, and then takes widths that 32 divides only, and
        # undoes those of 48 wrongly on some
        code = (
            "import bitsandbytes.nn.modules as layers\nlayers.has_avx512bf16 = lambda: False\n"
            "from tuneline.finetune import four_bits\nfour_bits.functional()\n" + code
        )
    code += (
        "import torch\n"
        f"print(model.eval()(torch.tensor({TOKENS.tolist()})).logits.detach().float().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(expected.sum()), rel=1e-3)


def test_a_package_is_not_loaded_on_another_base(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    adapter = moved(tiny_model, tmp_path / "adapter")
    model = run(tiny_model, adapter, tmp_path / "out", form="packaged")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ArtifactError, match="give the base it was trained on"):
        load_packaged(model.path, base_model=str(other))


def test_merging_what_can_not_be_is_refused_when_it_was_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    biases = moved(tiny_model, tmp_path / "bitfit", name="bitfit", missing_biases="add")
    with pytest.raises(RecipeError, match="method bitfit, which may add biases"):
        run(tiny_model, biases, tmp_path / "out", form="merged")
    assert (
        "no tensor model.layers."
        in run(tiny_model, biases, tmp_path / "packed").read_json("loader.json")["not_merged"]
    )
    prompt = moved(tiny_model, tmp_path / "prompt", name="prompt_tuning")
    with pytest.raises(RecipeError, match="merged is not possible with method prompt_tuning"):
        run(tiny_model, prompt, tmp_path / "out", form="merged")
    assert not (tmp_path / "out").exists()


def test_the_weighted_sum_of_adapters_is_that_of_their_changes(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = moved(tiny_model, tmp_path / "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = moved(tiny_model, tmp_path / "second", seed=2, rank=4, target_modules=["q_proj"])
    model = run(tiny_model, first, tmp_path / "out", second, weights=[0.7, -0.4])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(first.path), "first")
    tuned.load_adapter(str(second.path), "second")
    deltas = {
        name: [module.get_delta_weight(key) if key in module.lora_A else 0 for key in keys]
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight")
        for keys in [("first", "second")]
    }
    before, after = (load_file(p / "model.safetensors") for p in (tiny_model, model.path))
    assert len(deltas) == 4
    for name, (one, other) in deltas.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        torch.testing.assert_close(after[key], before[key] + 0.7 * one - 0.4 * other)
    assert model.manifest.inputs == {"adapter": first.digest, "adapter_2": second.digest}


@pytest.mark.parametrize("combine", ["ties", "dare_linear", "dare_ties"])
def test_ties_and_dare_are_pefts_on_the_changes(
    combine: str, tiny_model: Path, tmp_path: Path
) -> None:
    from peft.utils import merge_utils

    first = moved(tiny_model, tmp_path / "first", seed=1)
    second = moved(tiny_model, tmp_path / "second", seed=2)
    values = {"combine": combine, "weights": [1.0, 0.5], "density": 0.4}
    model = run(tiny_model, first, tmp_path / "out", second, **values)
    again = run(tiny_model, first, tmp_path / "again", second, **values)
    name = "model.layers.0.self_attn.q_proj"
    changes = []
    for adapter in (first, second):
        low = load_file(adapter.path / "adapter_model.safetensors")
        a, b = (low[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        changes.append(2.0 * b @ a)
    before, after = (load_file(p / "model.safetensors") for p in (tiny_model, model.path))
    change = after[f"{name}.weight"] - before[f"{name}.weight"]
    if combine == "ties":
        expected = merge_utils.ties(changes, torch.tensor([1.0, 0.5]), 0.4)
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    else:
        # what survives is rescaled by 1 / density; which survives is drawn
        kept = (change.abs() > 1e-7).float().mean()
        assert 0.5 < kept < 0.75  # 1 - 0.6^2 = 0.64
    assert torch.equal(after[f"{name}.weight"],
                       load_file(again.path / "model.safetensors")[f"{name}.weight"])  # fmt: skip


def test_several_on_a_base_in_4_bits_are_merged_into_what_they_were_trained_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = moved(tiny_model, tmp_path / "first", name="qlora", seed=1)
    second = moved(tiny_model, tmp_path / "second", name="qlora", seed=2)
    model = run(tiny_model, first, tmp_path / "out", second)
    assert model.read_json("proof.json")["worst_tensor_error"] < 1e-6
    tuned = load_tuned(base_model.resolve(str(tiny_model)), first)
    tuned.load_adapter(str(second.path), "second")
    tuned.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(load_base(model.path)), logits(tuned), **CLOSE)
    plain = moved(tiny_model, tmp_path / "plain")
    with pytest.raises(MergeError, match="trained on the base in another precision"):
        run(tiny_model, first, tmp_path / "no", plain)


def test_changes_that_are_no_sums_are_not_combined(tiny_model: Path, tmp_path: Path) -> None:
    first = moved(tiny_model, tmp_path / "first", use_dora=True)
    second = moved(tiny_model, tmp_path / "second", seed=2)
    with pytest.raises(MergeError, match="can't be combined by factors"):
        run(tiny_model, first, tmp_path / "out", second)
    with pytest.raises(MergeError, match=r"weights has 1 factors for 2 adapters"):
        run(tiny_model, second, tmp_path / "out", second, weights=[1.0])


def test_a_4_bit_export_loads_in_transformers(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if name.endswith("_proj.weight"):
            weights[name] *= 0.1  # rounding then shakes the random model as a trained one
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = moved(base, tmp_path / "adapter", target_modules=["all-linear"])
    model = run(base, adapter, tmp_path / "out", quantization="nf4")
    proof = model.read_json("proof.json")
    assert proof["dtype"] == "nf4" and 0.01 < proof["worst_tensor_error"] < 0.15
    loaded = AutoModelForCausalLM.from_pretrained(model.path)
    keep_4_bit_weights(loaded)
    packed = [p for p in loaded.parameters() if getattr(p, "quant_state", None) is not None]
    assert len(packed) == 14
    assert (model.path / "model.safetensors").stat().st_size < 0.8 * (
        base / "model.safetensors"
    ).stat().st_size
    expected = logits(load_tuned(base_model.resolve(str(base)), adapter))
    plain = logits(load_base(base))
    assert (logits(loaded) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()


def test_the_proof_covers_the_test_split_and_the_card_says_what_was_made(
    tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    import shutil

    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "LICENSE").write_text("Apache License 2.0")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (base / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    data = DataSection(train=(str(chats_file),), validation_fraction=0.1, test_fraction=0.2)
    dataset = prepare(str(base), data, tmp_path / "data")
    adapter = finetune(
        str(base),
        dataset.path,
        recipe.method_settings({"name": "lora", "target_modules": ["all-linear"]}),
        TrainingSection(epochs=1, batch_tokens=512, learning_rate=1e-2),
        tmp_path / "adapter",
        Untracked(),
    )
    evaluation = evaluate(
        str(base), adapter.path, dataset.path, EvaluationSection(max_rows=8),
        GateSection(min_rows=10), tmp_path / "report", Untracked(),
    )  # fmt: skip
    model = merge(
        str(base),
        adapter.path,
        ExportSection(),
        tmp_path / "out",
        Untracked(),
        dataset_dir=dataset.path,
        report_dir=evaluation.path,
    )
    proof = model.read_json("proof.json")
    assert proof["test_rows"] > 3
    assert proof["merged_loss"] == pytest.approx(proof["tuned_loss"], rel=1e-4)
    assert (model.path / "LICENSE").read_text() == "Apache License 2.0"
    assert (model.path / "BASE_README.md").read_text().endswith("# Tiny\n")
    assert (model.path / "generation_config.json").read_text() == '{"max_length": 77}'
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    card = (model.path / "README.md").read_text()
    for text in (
        "license: apache-2.0",
        dataset.digest,
        adapter.digest,
        base_model.resolve(str(base)).digest,
        "| exact_match, tuned |",
        "| merge proof | largest logit difference",
    ):
        assert text in card
    other = moved(base, tmp_path / "other")
    with pytest.raises(ArtifactError, match="was trained on another data set"):
        merge(
            str(base), other.path, ExportSection(), tmp_path / "no", Untracked(),
            dataset_dir=dataset.path,
        )  # fmt: skip
