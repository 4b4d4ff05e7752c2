"""Merging against PEFT's merge_and_unload and against a plain copy: time and peak memory.

    python benchmarks/merge.py [--hidden 2048] [--layers 24] [--repeats 3] [--folder DIR]

Makes a random Llama in bf16 (about 1.4B parameters by default) and a random LoRA of rank 16 on all
linear layers, then runs, in turn and each in a process of its own: `cp` and sync; tuneline's merge
(the base's hash, the output's hashes and sync included; proof and process start not); PEFT's
merge_and_unload with save_pretrained and sync. Prints medians, ratios and peak memory, and CPU
seconds, which say more than the clock on a machine that others use too. The proof runs in the first
round only.

Needs about four times the model's size on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from machine import machine

_MAKE = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from tuneline import artifacts, base_model, recipe
folder, hidden, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 64 * 64,
    num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(folder / "base", max_shard_size="100GB")
(folder / "base/tokenizer_config.json").write_text("{}")
print(sum(p.numel() for p in model.parameters()))
tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32,
                                         target_modules="all-linear"))
with torch.no_grad():
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)
tuned.save_pretrained(folder / "adapter")
settings = recipe.method_settings(
    {"name": "lora", "rank": 16, "alpha": 32, "target_modules": ["all-linear"]})
artifacts.seal(folder / "adapter", kind="adapter",
               config={"method": settings.model_dump(mode="json"), "training": {}},
               base_model=base_model.resolve(str(folder / "base")).identity(), inputs={})
"""
_COPY = """
import os, subprocess, time
started = time.perf_counter()
subprocess.run(["cp", "-r", f"{folder}/base", f"{folder}/out"], check=True)
subprocess.run(["sync", "-f", f"{folder}/out"], check=True)
"""
_OURS = """
import time
from pathlib import Path
import torch, transformers, peft, accelerate  # a process's start
from tuneline.merge import merge as merging
from tuneline.recipe import ExportSection
from tuneline.tracking import Untracked
from tuneline.merge.proof import Proof
first_round = sys.argv[2] == "0"
proving, cpu_proving, written_peak, prove = 0.0, 0.0, 0, merging.prove
def timed(*arguments, **options):
    if not first_round:
        return Proof(0.0, 0.0, 1.0, 0.0, 0, "bfloat16", "left out")
    global proving, cpu_proving, peak, written_peak
    written_peak, peak, began, cpu_began = peak, 0, time.perf_counter(), cpu()
    proof = prove(*arguments, **options)
    proving = time.perf_counter() - began
    cpu_proving = cpu() - cpu_began
    return proof
merging.prove = timed
reset_peak()
started = time.perf_counter()
merging.merge(f"{folder}/base", Path(folder) / "adapter", ExportSection(), Path(folder) / "out",
              Untracked())
started += proving
cpu_started += cpu_proving
if first_round:
    extra = {"proof_seconds": proving, "proof_cpu_seconds": cpu_proving,
             "proof_added_bytes": peak - floor}
    peak = written_peak
"""
_PEFT = """
import os, subprocess, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
reset_peak()
started = time.perf_counter()
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, f"{folder}/adapter").merge_and_unload()
model.save_pretrained(f"{folder}/out")
subprocess.run(["sync", "-f", f"{folder}/out"], check=True)
"""
_HEAD = """
import resource, sys
folder = sys.argv[1]
def reset_peak():
    global floor, cpu_started
    floor, cpu_started = rss(), cpu()
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
floor, extra = 0, {}
cpu_started = cpu()
import threading, time as _time
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, rss())
        _time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
"""
_TAIL = """
import json
seconds = time.perf_counter() - started
print("RESULT " + json.dumps({"seconds": seconds, "cpu_seconds": cpu() - cpu_started,
                           "peak_bytes": peak, "added_bytes": peak - floor, **extra}))
"""


def _run(code: str, folder: Path, number: int) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _HEAD + code + _TAIL, str(folder), str(number)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        arguments = [str(folder), str(options.hidden), str(options.layers)]
        made = subprocess.run([sys.executable, "-W", "ignore", "-c", _MAKE, *arguments],
                              check=True, capture_output=True, text=True)  # fmt: skip
        parameters = int(made.stdout.split()[-1])
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        variants = {"cp and sync": _COPY, "tuneline merge": _OURS, "peft merge_and_unload": _PEFT}
        results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for number in range(options.repeats):
            for variant, code in variants.items():
                results[variant].append(_run(code, folder, number))
    print(machine("torch", "peft"))
    print(f"model: random Llama, {parameters / 1e9:.2f}B parameters, bf16, {size / 1e9:.2f} GB; "
          f"median of {options.repeats}")  # fmt: skip
    copy = statistics.median(one["seconds"] for one in results["cp and sync"])
    print("\n| | seconds | spread | times a copy | CPU seconds | memory over imports | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for variant, runs in results.items():
        seconds = [one["seconds"] for one in runs]
        added = max(one["added_bytes"] for one in runs) / 1e6
        peak = max(one["peak_bytes"] for one in runs) / 1e6
        middle = statistics.median(seconds)
        print(f"| {variant} | {middle:.1f} | {min(seconds):.1f} to {max(seconds):.1f} | "
              f"{middle / copy:.2f} | {min(one['cpu_seconds'] for one in runs):.1f} | "
              f"{added:.0f} MB | {peak:.0f} MB |")  # fmt: skip
    first = results["tuneline merge"][0]
    print(
        f"\nproof: {first['proof_seconds']:.1f} s, {first['proof_cpu_seconds']:.1f} CPU seconds, "
        f"{first['proof_added_bytes'] / 1e6:.0f} MB over imports; "
        f"load average {', '.join(f'{load:.1f}' for load in psutil.getloadavg())}"
    )


if __name__ == "__main__":
    main()
