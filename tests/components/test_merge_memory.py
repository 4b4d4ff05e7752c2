"""A merge needs the memory of a few files, whatever the size of the model."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tuneline import artifacts, base_model, recipe

PEAK = """
import sys, threading, time
from pathlib import Path
import torch, transformers, peft, accelerate
from tuneline.merge import merge as merging
from tuneline.recipe import ExportSection
from tuneline.tracking import Untracked

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

peak, floor, prove, writing = 0, resident(), merging.prove, True

def watch():
    global peak
    while writing:
        peak = max(peak, resident())
        time.sleep(0.002)

def proved(*arguments, **options):  # the real one; the files are written when it is called
    global writing
    writing = False
    return prove(*arguments, **options)

merging.prove = proved
threading.Thread(target=watch, daemon=True).start()
merging.merge(sys.argv[1], Path(sys.argv[2]), ExportSection(), Path(sys.argv[3]), Untracked())
print(peak - floor)
"""


def lora_on(model: torch.nn.Module, base: Path, folder: Path) -> Path:
    """A LoRA of every linear layer with random numbers, as the artifact that training leaves."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    tuned.save_pretrained(folder)
    settings = recipe.method_settings(
        {"name": "lora", "rank": 8, "alpha": 16, "target_modules": ["all-linear"]}
    )
    artifacts.seal(
        folder,
        kind="adapter",
        config={"method": settings.model_dump(mode="json"), "training": {}},
        base_model=base_model.resolve(str(base)).identity(),
        inputs={},
    )
    return folder


def test_merging_needs_two_shards_and_300_mb_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shard_bytes = 60 * 10**6
    config = LlamaConfig(
        vocab_size=20000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size=shard_bytes)
    (base / "tokenizer_config.json").write_text("{}")
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(sizes) > 15 and max(sizes) <= shard_bytes * 1.01
    bound = 2 * max(sizes) + 300 * 10**6
    assert sum(sizes) > 2 * bound  # who loads the model breaks it
    adapter = lora_on(model, base, tmp_path / "adapter")
    del model
    places = [str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, *places],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) <= bound
