"""What each method costs over LoRA: CPU-seconds a step and memory, on the same batches.

    python benchmarks/methods.py [--rows 12] [--repeats 1] [--methods full lora ...]

The model is the demo's (SmolLM2-135M-Instruct), in fp32 on the CPU; each method has its default
hyperparameters, and so LoRA adapts query and value, QLoRA every linear layer. `lora all-linear` is
LoRA where QLoRA is, the fair neighbour of both. A step is one row, forward, backward and the
optimizer, by tuneline's trainer; the first step warms up and is not counted.

Each measurement is a process of its own. All train on the same rows in the same order, so that each
step is compared with LoRA's on the same row: the table shows the median of these ratios and their
quartiles. Peak
memory is resident memory of the whole process, imports and loading of the weights included: below
it stands what a process needs that only imports. One thread by default: on a busy machine several
spin while they wait for each other, and CPU-seconds would count that.

The last lines compare the bytes of the base's linear layers in NF4, scales included, with bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from machine import machine

REFERENCE: Final = "lora"
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "full": {},
    "lora": {},
    "lora all-linear": {"name": "lora", "target_modules": ["all-linear"]},
    "lora dora": {"name": "lora", "use_dora": True},
    "qlora": {},
    "bottleneck": {},
    "prompt_tuning": {},
    "ia3": {},
    "bitfit": {"missing_biases": "add"},
}


def prepare_orders(folder: Path) -> None:
    """The demo's orders as a PreparedDataset."""
    from tuneline.data_prep.prepare import prepare
    from tuneline.recipe import DataSection

    data = DataSection(train=("demo:train",), validation_fraction=0, test_fraction=0.1)
    prepare("demo", data, folder / "data")


def child(variant: str, folder: Path, rows: int, threads: int) -> dict[str, Any]:
    """Train on the first rows, one a step; returns CPU-seconds of each step, and bytes."""
    import torch
    from torch.utils.data import DataLoader

    from tuneline import artifacts, base_model, recipe, steps
    from tuneline.data_prep.prepare import load_split
    from tuneline.finetune.arguments import training_arguments
    from tuneline.finetune.batching import TokenBudgetSampler, collate
    from tuneline.finetune.train import attach
    from tuneline.finetune.trainer import SupervisedTrainer
    from tuneline.progress import peak_memory_bytes

    steps.quiet_libraries()
    torch.set_num_threads(threads)
    imported = peak_memory_bytes()
    base = base_model.resolve("demo")
    config = recipe.method_settings({"name": variant, **VARIANTS[variant]})
    method = recipe.method_of(config)
    torch.manual_seed(0)
    model, trainable, total = attach(base, method, config)
    split = load_split(artifacts.load(folder / "data", "prepared_dataset"), "train")
    chosen = [{"row": n, **split[n]} for n in range(rows)]
    lengths = [len(row["input_ids"]) for row in chosen]
    training = recipe.TrainingSection(
        learning_rate=method.learning_rate,
        schedule="constant",
        warmup_fraction=0,
        batch_tokens=max(8, min(lengths)),  # a row alone
        kernels="off",
    )
    loader = DataLoader(
        chosen,  # pyright: ignore[reportArgumentType]
        batch_sampler=TokenBudgetSampler(lengths, training.batch_tokens, seed=0),
        collate_fn=partial(collate, pad_token_id=0),
        generator=torch.Generator(),
    )
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as aside:
        trainer = SupervisedTrainer(
            model=model,
            args=training_arguments(
                training, method, steps=rows, validates=False, output_dir=Path(aside) / "trainer"
            ),
            train_loader=loader,
            validation_loader=None,
            create_optimizer=partial(method.create_optimizer, model, config),
        )
        original = trainer.end_step

        def end_step(control: Any) -> None:
            marks.append(time.process_time())
            original(control)

        trainer.end_step = end_step
        trainer.train()
    return {
        "seconds": [after - before for before, after in pairwise(marks)],
        "peak": peak_memory_bytes(),
        "imported": imported,
        "trainable": trainable,
        "share": trainable / total,
    }


def bytes_of_linear_layers() -> dict[str, float]:
    """Bytes of the base's linear layers in bf16 and in NF4, embeddings and output layer aside."""
    import torch

    from tuneline import base_model, steps
    from tuneline.finetune.load import load_base
    from tuneline.finetune.methods.method import Quantization
    from tuneline.finetune.methods.structure import linear_layers

    steps.quiet_libraries()
    base = base_model.resolve("demo")
    packed = load_base(base.path, quantization=Quantization())
    names = linear_layers(packed)
    four_bit = weights = 0
    for name in names:
        parameter: Any = packed.get_submodule(name).weight
        state = parameter.quant_state
        weights += state.shape.numel()
        held = [parameter, state.absmax, state.code]
        if state.nested:
            held += [state.state2.absmax, state.state2.code, state.offset]
        four_bit += sum(tensor.numel() * tensor.element_size() for tensor in held)
    rest = sum(p.numel() for p in packed.parameters() if getattr(p, "quant_state", None) is None)
    bf16 = torch.finfo(torch.bfloat16).bits // 8
    return {"weights": weights, "bf16": weights * bf16, "nf4": four_bit, "rest": rest * bf16}


def main() -> None:
    """Run all variants in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=12, help="steps of a measurement, at least 3")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=list(VARIANTS), help="only these")
    options = parser.parse_args()
    if options.child:
        variant, folder = options.child
        print(json.dumps(child(variant, Path(folder), options.rows, options.threads)))
        return

    variants = [v for v in VARIANTS if not options.methods or v in (*options.methods, REFERENCE)]
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        prepare_orders(Path(folder))
        for _ in range(options.repeats):
            for variant in variants:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", variant, folder,
                     "--rows", str(options.rows), "--threads", str(options.threads)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )  # fmt: skip
                runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
                print(variant, runs[variant][-1], file=sys.stderr, flush=True)
    print(
        f"{machine('torch', 'transformers')}; {options.threads} thread(s), {options.rows} steps "
        f"of one row, {options.repeats} time(s)\n"
    )
    seconds = {v: [s for run in found for s in run["seconds"]] for v, found in runs.items()}
    print("| method | CPU-s a step | over LoRA | quartiles | peak RSS | over LoRA | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    lora_peak = statistics.median(run["peak"] for run in runs[REFERENCE])
    for variant, found in runs.items():
        pairs = zip(seconds[variant], seconds[REFERENCE], strict=True)
        low, middle, high = statistics.quantiles([own / lora for own, lora in pairs], n=4)
        peak = statistics.median(run["peak"] for run in found)
        print(f"| {variant} | {statistics.median(seconds[variant]):.2f} | {middle:.2f}x | "
              f"{low:.2f} to {high:.2f} | {peak / 1e9:.2f} GB | {peak / lora_peak:.2f}x | "
              f"{found[0]['share']:.3%} |")  # fmt: skip
    imported = min(run["imported"] for run in runs[REFERENCE])
    print(f"\na process that only imports: {imported / 1e9:.2f} GB")
    held = bytes_of_linear_layers()
    share = held["nf4"] / held["bf16"]
    print(
        f"linear layers: {held['weights'] / 1e6:.1f} M weights, bf16 {held['bf16'] / 1e6:.1f} MB, "
        f"NF4 with double quantization {held['nf4'] / 1e6:.1f} MB = {share:.3f}x\n"
        f"embeddings and norms stay in 16 bits: {held['rest'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
