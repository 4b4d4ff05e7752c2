"""The merged weights are what the adapter computes, or the step fails."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tuneline import artifacts, base_model, recipe
from tuneline.artifacts import Artifact
from tuneline.base_model import stored_dtype, weight_files
from tuneline.errors import ArtifactError, MergeError, RecipeError
from tuneline.finetune.load import load_base, load_tuned
from tuneline.finetune.train import attach
from tuneline.merge import merge as merging
from tuneline.merge import stream
from tuneline.merge.merge import merge
from tuneline.recipe import ExportSection, method_of
from tuneline.tracking import Untracked

# peft on BitFit's added biases, which tuneline packages; and on a Conv1D that became 4 bits
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
MERGEABLE = ("full", "lora", "qlora", "ia3", "bitfit")
"""Trained ones on every architecture are held by test_methods; here are GPT-2's Conv1D."""
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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("gpt2", name) for name in MERGEABLE if name != "bitfit"),
        *(("qwen2", n) for n in MERGEABLE),
    ],
)
def test_merged_logits_equal_the_adapters(
    family: str, name: str, make: Make, tmp_path: Path
) -> None:
    reference, adapter = make(family, name)
    base = base_model.resolve(reference)
    expected = logits(load_tuned(base, adapter))
    model = run(reference, adapter, tmp_path / "out")
    merged = load_base(model.path, trust_code=base.trusts_code)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    plain = load_base(base.path, trust_code=base.trusts_code)
    assert (logits(plain) - expected).abs().max() > 1e-2
    proof = model.read_json("proof.json")
    assert proof["top1_agreement"] == 1.0 and proof["max_logit_diff"] < 1e-3
    assert name == "full" or proof["tensors"] > 10
    assert model.manifest.config["merge_proof"] == proof
    assert artifacts.load(model.path, "merged_model") == model


@pytest.fixture
def lora(make: Make) -> tuple[str, Artifact]:
    """LoRA on every linear layer of the tiny Llama."""
    return make("llama", "lora", target_modules=("all-linear",), rank=4)


def test_untouched_tensors_and_the_header_stay_byte_for_byte(
    lora: tuple[str, Artifact], tmp_path: Path
) -> None:
    reference, adapter = lora
    model = run(reference, adapter, tmp_path / "out")
    before = (Path(reference) / "model.safetensors").read_bytes()
    after = (model.path / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(before[:8], "little")
    assert after[:size] == before[:size] and len(after) == len(before)
    changed = {
        name
        for name, entry in json.loads(before[8:size]).items()
        if name != "__metadata__"
        and before[size:][slice(*entry["data_offsets"])]
        != after[size:][slice(*entry["data_offsets"])]
    }
    assert len(changed) == 14 and all(name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_weights": "pissa"},
        {"lora_plus_ratio": 16.0},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_variant_of_lora_merges(
    family: str, options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    reference, adapter = make(family, "lora", target_modules=("all-linear",), **options)
    base = base_model.resolve(reference)
    model = run(reference, adapter, tmp_path / "out")
    torch.testing.assert_close(
        logits(load_base(model.path)), logits(load_tuned(base, adapter)), **CLOSE
    )


def test_ranks_and_scales_may_differ_between_modules(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "up_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 3},
        lora_bias=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied embeddings, which are the point
        tuned = get_peft_model(fp32(tiny_model), config)
    folder, expected = saved_by_peft(tuned, tmp_path / "adapter")
    adapter = seal(folder, str(tiny_model), {"name": "lora"})
    model = run(str(tiny_model), adapter, tmp_path / "out")
    torch.testing.assert_close(logits(load_base(model.path)), expected, **CLOSE)
    # the embeddings changed and the output layer did not: they can't be one tensor any more
    assert json.loads((model.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(model.path / "model.safetensors")


def fp32(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def saved_by_peft(tuned: Any, folder: Path) -> tuple[Path, torch.Tensor]:
    """Move what trains at random and save; with the logits of before saving."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on saving embeddings too, which is wanted here
        tuned.save_pretrained(folder)
    return folder, logits(tuned)


def test_added_tokens_grow_the_tied_embeddings_and_the_tokenizer_travels(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    base = fp32(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[-2:] = torch.randn(2, 48)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    folder, _ = saved_by_peft(tuned, tmp_path / "adapter")
    tokenizer.save_pretrained(folder)
    adapter = seal(folder, str(tiny_model), {"name": "lora"})
    model = run(str(tiny_model), adapter, tmp_path / "out")
    config = json.loads((model.path / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(model.path / "model.safetensors")
    merged = load_base(model.path)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    new = AutoTokenizer.from_pretrained(model.path).convert_tokens_to_ids("<tool>")
    ids = torch.tensor([[new, 5, 6, new + 1, 7]])
    with torch.inference_mode():
        expected = tuned.eval()(ids).logits
        torch.testing.assert_close(merged.eval()(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("modules", "tied"),
    [(["lm_head"], False), (["embed_tokens"], False), (["model.norm"], True)],
)
def test_whole_modules_beside_the_adapter_are_merged(
    modules: list[str], tied: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on tied embeddings, which are the point
        tuned = get_peft_model(
            fp32(tiny_model),
            LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules),
        )
    folder, expected = saved_by_peft(tuned, tmp_path / "adapter")
    adapter = seal(folder, str(tiny_model), {"name": "lora"})
    model = run(str(tiny_model), adapter, tmp_path / "out")
    config = json.loads((model.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    torch.testing.assert_close(logits(load_base(model.path)), expected, **CLOSE)


def test_trained_tokens_are_merged(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 9, 30]}
    )
    folder, expected = saved_by_peft(get_peft_model(fp32(tiny_model), config), tmp_path / "adapter")
    adapter = seal(folder, str(tiny_model), {"name": "lora"})
    model = run(str(tiny_model), adapter, tmp_path / "out")
    torch.testing.assert_close(logits(load_base(model.path)), expected, **CLOSE)
    assert json.loads((model.path / "config.json").read_text())["tie_word_embeddings"] is True


def stored_as(tiny_model: Path, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """The tiny model in another dtype, or in several files."""
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(folder, **options)
    return folder


def adapter_on(
    base: Path, folder: Path, strength: float = 0.1, method: str = "lora", **options: Any
) -> Artifact:
    """LoRA on every linear layer of a folder's model, or another method."""
    if method == "lora":
        options = {"target_modules": ["all-linear"], **options}
    settings = recipe.method_settings({"name": method, **options})
    model, _, _ = attach(base_model.resolve(str(base)), method_of(settings), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(strength * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    if method == "full":
        base_model.copy_small_files(base, folder)
    return seal(folder, str(base), settings.model_dump(mode="json"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chosen", ["keep", "bf16", "fp16", "fp32"])
def test_any_dtype_can_be_exported_from_any(
    stored: torch.dtype, chosen: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = stored_as(tiny_model, tmp_path / "base", stored)
    adapter = adapter_on(base, tmp_path / "adapter")
    model = run(str(base), adapter, tmp_path / "out", dtype=chosen)
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    wanted = names.get(chosen, str(stored).removeprefix("torch."))
    assert stored_dtype(model.path) == wanted
    assert AutoModelForCausalLM.from_pretrained(model.path).dtype == getattr(torch, wanted)
    proof = model.read_json("proof.json")
    assert proof["dtype"] == wanted and proof["worst_tensor_error"] <= 2**-8
    # each weight is rounded once, from fp32
    expected = load_tuned(base_model.resolve(str(base)), adapter).merge_and_unload().state_dict()  # type: ignore[operator]
    for name, tensor in load_file(model.path / "model.safetensors").items():
        rounded = expected[name].to(tensor.dtype)
        steps = (tensor.float() - rounded.float()).abs() / torch.finfo(tensor.dtype).eps
        assert (steps <= rounded.float().abs() + 1e-6).all()


def test_a_full_model_is_linked_not_copied_unless_it_is_converted(
    make: Make, tmp_path: Path
) -> None:
    reference, adapter = make("llama", "full")
    model = run(reference, adapter, tmp_path / "out")
    name = "model.safetensors"
    assert (model.path / name).samefile(adapter.path / name)
    assert model.read_json("proof.json")["reference"] == "the same bytes"
    half = run(reference, adapter, tmp_path / "half", dtype="bf16")
    assert stored_dtype(half.path) == "bfloat16"
    assert half.read_json("proof.json")["tensors"] == len(load_file(adapter.path / name))


def test_files_keep_their_cut_or_take_another(tiny_model: Path, tmp_path: Path) -> None:
    base = stored_as(tiny_model, tmp_path / "base", torch.float32, max_shard_size="100KB")
    assert len(weight_files(base)) > 2
    adapter = adapter_on(base, tmp_path / "adapter")
    expected = logits(load_tuned(base_model.resolve(str(base)), adapter))
    kept = run(str(base), adapter, tmp_path / "kept")
    assert [p.name for p in weight_files(kept.path)] == [p.name for p in weight_files(base)]
    small = run(str(base), adapter, tmp_path / "small", max_shard_size_gb=5e-5)
    assert len(weight_files(small.path)) > len(weight_files(base))
    assert all(path.stat().st_size < 80_000 for path in weight_files(small.path))
    one = run(str(base), adapter, tmp_path / "one", max_shard_size_gb=1)
    assert [p.name for p in weight_files(one.path)] == ["model.safetensors"]
    for model in (kept, small, one):
        torch.testing.assert_close(logits(load_base(model.path)), expected, **CLOSE)


def soften(base: Path) -> None:
    """Let rounding to 4 bits shake the random model as little as it shakes a trained one."""
    for path in weight_files(base):
        weights = load_file(path)
        for name in weights:
            if name.endswith(("_proj.weight", "c_attn.weight", "c_fc.weight")):
                weights[name] *= 0.1
        save_file(weights, path, {"format": "pt"})


class StopError(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.mark.parametrize("form", [{}, {"quantization": "nf4"}])
def test_a_killed_merge_goes_on_after_the_last_finished_file(
    form: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = stored_as(tiny_model, tmp_path / "base", torch.float32, max_shard_size="100KB")
    if form:
        soften(base)
    adapter = adapter_on(base, tmp_path / "adapter", strength=0.05)
    whole = run(str(base), adapter, tmp_path / "whole", **form)
    files = [path.name for path in weight_files(base)]
    original, written = stream._write, []

    def write(file: Any, path: Path, on_tensor: Any) -> Any:
        if len(written) == 2:
            path.write_bytes(b"half a file")
            raise StopError
        written.append(file.name)
        return original(file, path, on_tensor)

    monkeypatch.setattr(stream, "_write", write)
    with pytest.raises(StopError):
        run(str(base), adapter, tmp_path / "out", **form)
    assert not (tmp_path / "out").exists() and written == files[:2]
    times = [(tmp_path / "out.partial" / name).stat().st_mtime_ns for name in files[:2]]
    written.clear()

    def write_rest(file: Any, path: Path, on_tensor: Any) -> Any:
        written.append(file.name)
        return original(file, path, on_tensor)

    monkeypatch.setattr(stream, "_write", write_rest)
    model = run(str(base), adapter, tmp_path / "out", **form)
    assert written == files[2:]
    assert [(model.path / name).stat().st_mtime_ns for name in files[:2]] == times
    assert not (tmp_path / "out.partial").exists()
    for name in files:
        assert (model.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert artifacts.load(model.path, "merged_model").manifest.files == model.manifest.files


def test_two_processes_do_not_write_one_output(
    lora: tuple[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, adapter = lora
    original = stream.write_files

    def write(*arguments: Any) -> None:
        with pytest.raises(BlockingIOError, match="another process is merging into"):
            stream.Journal(tmp_path / "out.partial", "sha256:mine")
        original(*arguments)

    monkeypatch.setattr(merging, "write_files", write)
    model = run(reference, adapter, tmp_path / "out")
    assert not list(model.path.glob("merge.*"))


def test_another_merges_leftovers_are_not_gone_on_with(
    lora: tuple[str, Artifact], tmp_path: Path
) -> None:
    reference, adapter = lora
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / stream.JOURNAL).write_text("sha256:another\n")
    (left / "model.safetensors").write_text("another's")
    model = run(reference, adapter, tmp_path / "out")
    assert model.read_json("proof.json")["top1_agreement"] == 1.0


def test_a_base_that_changed_since_training_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = stored_as(tiny_model, tmp_path / "base", torch.float32)
    adapter = adapter_on(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="its files have changed since"):
        run(str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_base_cut_short_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    base = stored_as(tiny_model, tmp_path / "base", torch.float32)
    adapter = adapter_on(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MergeError, match=r"is cut short at tensor .*: fetch the model again"):
        run(str(base), adapter, tmp_path / "out")


def test_a_qlora_is_merged_into_what_bitsandbytes_holds(make: Make, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    reference, adapter = make("llama", "qlora", target_modules=("q_proj",))
    base = base_model.resolve(reference)
    model = run(reference, adapter, tmp_path / "out")
    loaded = load_base(
        base.path, quantization=recipe.method_settings({"name": "qlora"}).quantization
    )
    merged = load_file(model.path / "model.safetensors")
    compared = 0
    for name, parameter in loaded.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and "q_proj" not in name:
            assert torch.equal(dequantize_4bit(parameter.data, state), merged[name])
            compared += 1
    assert compared == 12
    assert model.read_json("proof.json")["reference"] == "the adapter on the base in 4 bits"


def test_a_qlora_can_be_merged_into_the_original_base(make: Make, tmp_path: Path) -> None:
    reference, adapter = make("llama", "qlora")
    model = run(reference, adapter, tmp_path / "out", quantized_base="original")
    assert "original base" in model.read_json("proof.json")["reference"]
    expected = PeftModel.from_pretrained(fp32(Path(reference)), str(adapter.path))
    torch.testing.assert_close(logits(load_base(model.path)), logits(expected), **CLOSE)


@pytest.mark.parametrize(
    "values", [{"quantized_base": "nf4"}, {"quantized_base": "4bit"}, {"quantization": "nf4"}]
)
def test_merging_inside_4_bits_is_refused_with_the_reason(
    values: dict[str, str], make: Make, tmp_path: Path
) -> None:
    reference, adapter = make("llama", "qlora")
    with pytest.raises(RecipeError, match="its levels are further apart than the change"):
        run(reference, adapter, tmp_path / "out", **values)


def test_a_qlora_merged_wrongly_is_caught(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, adapter = make("llama", "qlora")
    monkeypatch.setattr(stream, "dequantized", lambda weight, quantization: weight)
    with pytest.raises(
        MergeError, match=r"not the tuned one.*error of a tensor.*worst tensor model\."
    ):
        run(reference, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and artifacts.load(adapter.path, "adapter")


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp16"])
def test_one_tensor_left_out_is_caught_and_named(
    dtype: str,
    lora: tuple[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, adapter = lora
    name = "model.layers.1.mlp.up_proj.weight"
    original = merging._changes

    def without_one(job: Any) -> Any:
        return {key: change for key, change in original(job).items() if key != name}

    monkeypatch.setattr(merging, "_changes", without_one)
    with pytest.raises(MergeError, match=f"worst tensor {name}; the adapter is kept"):
        run(reference, adapter, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strength", [1e-3, 1e-5])
def test_a_weak_tuning_is_kept_or_refused_never_lost(
    strength: float, tiny_model: Path, tmp_path: Path
) -> None:
    base = stored_as(tiny_model, tmp_path / "base", torch.bfloat16)
    adapter = adapter_on(base, tmp_path / "adapter", strength=strength)
    with pytest.raises(MergeError, match=r"lost share .*export\.dtype fp32 keeps it"):
        run(str(base), adapter, tmp_path / "out")
    model = run(str(base), adapter, tmp_path / "out", dtype="fp32")
    assert model.read_json("proof.json")["lost_share"] < 0.1


@pytest.mark.parametrize(
    "values", [{"dtype": "bf16"}, {"quantized_base": "original", "max_shard_size_gb": 5e-5}]
)
def test_a_qlora_on_turned_layers_takes_every_export_choice(
    values: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    reference, adapter = make("gpt2", "qlora")
    model = run(reference, adapter, tmp_path / "out", **values)
    proof = model.read_json("proof.json")
    assert proof["dtype"] == ("bfloat16" if "dtype" in values else "float32")
    assert proof["tensors"] > 10 and logits(load_base(model.path)).isfinite().all()


@pytest.mark.parametrize(("family", "name"), [("gpt2", "lora"), ("llama", "full")])
def test_4_bits_of_turned_layers_and_of_full_weights(
    family: str, name: str, gpt2: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(gpt2 if family == "gpt2" else tiny_model, tmp_path / "base")
    soften(base)
    adapter = adapter_on(base, tmp_path / "adapter", method=name, strength=0.02)
    model = run(str(base), adapter, tmp_path / "out", quantization="nf4")
    proof = model.read_json("proof.json")
    assert proof["dtype"] == "nf4" and 0.01 < proof["worst_tensor_error"] < 0.15
    loaded = AutoModelForCausalLM.from_pretrained(model.path)
    packed = [p for p in loaded.parameters() if getattr(p, "quant_state", None) is not None]
    assert len(packed) == (8 if family == "gpt2" else 14)
