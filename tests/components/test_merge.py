"""The merged weights are what the adapter computes, or the step fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tuneline.base_model import stored_dtype, weight_files
from tuneline.errors import MergeError
from tuneline.finetune.methods.lora import LoraSettings, attach, open_merge
from tuneline.merge.merge import merge_shard, prove


def onto(adapter: Path) -> Callable[[PreTrainedModel], PeftModel]:
    """Puts an adapter folder on a loaded base."""
    return lambda base: PeftModel.from_pretrained(base, str(adapter))


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with random, not zero, B."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = attach(base, LoraSettings(target_modules=("all-linear",), rank=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def merged_folder(tiny_model: Path, adapter: Path, target: Path) -> tuple[Path, set[str]]:
    shutil.copytree(tiny_model, target)
    merge_tensor, targets = open_merge(str(adapter))
    name = "model.safetensors"
    changed = merge_shard(tiny_model / name, target / name, merge_tensor)
    assert changed == targets
    return target, changed


def test_merging_equals_pefts_own(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder, changed = merged_folder(tiny_model, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = load_file(folder / "model.safetensors")
    assert len(changed) == 14
    for name, tensor in ours.items():
        # one fp32 matrix product in another order
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6)


def test_header_and_untouched_tensors_stay_byte_for_byte(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder, changed = merged_folder(tiny_model, adapter, tmp_path / "merged")
    before = (tiny_model / "model.safetensors").read_bytes()
    after = (folder / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(before[:8], "little")
    assert after[:size] == before[:size] and len(after) == len(before)
    for name, entry in json.loads(before[8:size]).items():
        if name != "__metadata__":
            start, end = (size + offset for offset in entry["data_offsets"])
            assert (after[start:end] == before[start:end]) == (name not in changed)


def test_the_proof_holds_for_a_right_merge_and_catches_a_lost_one(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder, _ = merged_folder(tiny_model, adapter, tmp_path / "merged")
    proof = prove(tiny_model, folder, onto(adapter))
    assert proof.max_logit_diff < 1e-3 and proof.top1_agreement == 1.0
    with pytest.raises(MergeError, match="the merged model is not the tuned one"):
        prove(tiny_model, tiny_model, onto(adapter))  # the tuning is lost


def test_one_tensor_left_out_is_caught(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    folder, changed = merged_folder(tiny_model, adapter, tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    name = sorted(changed)[0]
    weights[name] = load_file(tiny_model / "model.safetensors")[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match="the merged model is not the tuned one"):
        prove(tiny_model, folder, onto(adapter))


def test_a_base_cut_short_is_an_error(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-100])
    merge_tensor, _ = open_merge(str(adapter))
    with pytest.raises(MergeError, match="is cut short"):
        merge_shard(tmp_path / "short.safetensors", tmp_path / "out", merge_tensor)


def test_an_adapter_that_needs_more_than_a_low_rank_change_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "all"}))
    with pytest.raises(MergeError, match="bias='all' can't be merged"):
        open_merge(str(adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_stored_in_half_precision_is_judged_by_its_own_limits(
    tiny_model: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "half"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    folder, _ = merged_folder(base, adapter, tmp_path / "merged")
    assert stored_dtype(folder) == str(dtype).removeprefix("torch.")
    proof = prove(base, folder, onto(adapter))
    assert 0 < proof.max_logit_diff < proof.max_logit_diff_allowed
    with pytest.raises(MergeError, match="the merged model is not the tuned one"):
        prove(base, base, onto(adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weak_tuning_that_was_lost_is_caught_too(
    tiny_model: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    weak = {name: tensor * (0.001 if "lora_B" in name else 1) for name, tensor in weights.items()}
    save_file(weak, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"lost share of the tuning 1\.00"):
        prove(base, base, onto(adapter))


def test_a_conv1d_base_merges_as_pefts_own_does(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tuned = attach(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base"), LoraSettings(target_modules=("c_attn",))
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    merge_tensor, targets = open_merge(str(tmp_path / "adapter"))
    source = tmp_path / "base" / "model.safetensors"
    assert merge_shard(source, tmp_path / "merged.safetensors", merge_tensor) == targets
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    reference = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    expected = reference.state_dict()
    for name in targets:
        torch.testing.assert_close(
            load_file(tmp_path / "merged.safetensors")[name], expected[name], rtol=1e-5, atol=1e-6
        )


def test_only_the_files_that_transformers_loads_are_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "consolidated.safetensors").write_bytes(b"another copy")
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    index = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(folder)] == ["m-1.safetensors", "m-2.safetensors"]
