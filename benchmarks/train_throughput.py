"""Training speed and memory: tuneline, TRL's SFTTrainer and plain transformers on the same rows.

    python benchmarks/train_throughput.py [--trl-python PYTHON] [--rows 48] [--repeats 3]

The same model (SmolLM2-135M-Instruct), rows, order of magnitude of a batch (4 rows an optimizer
step), LoRA configuration (rank 8, every linear layer, every block), learning rate and fp32 for all:

    ours             tuneline's trainer; one row a micro-batch on a CPU, where that costs nothing
    trainer          transformers.Trainer, train_sampling_strategy="group_by_length", batch 4
    trl              TRL's SFTTrainer with its defaults, batch 4, fp32, no gradient checkpointing
    trl-*            TRL with other settings; the best one counts as TRL tuned for this machine

Variants alternate, each in a process of its own; the tables show medians. TRL runs under
`--trl-python`, an environment with the same torch and transformers; without it, it is left out.
Rates are of real tokens (without padding) per CPU-second of the training loop alone. One thread by
default: on a busy machine several spin while they wait for each other, and CPU-seconds would count
that. The ceiling is what the measured fp32 matrix product would allow: 4 FLOPs a parameter and
token (2 forward, 2 backward to the inputs; frozen weights get no gradient).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
LEARNING_RATE = 5e-4
ROWS_PER_STEP = 4
HELD_OUT_ROWS = 8
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-grouped": {"train_sampling_strategy": "group_by_length"},
    "trl-1x4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP},
    "trl-chunked": {"train_sampling_strategy": "group_by_length", "loss_type": "chunked_nll"},
    "trl-1x4-chunked": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS_PER_STEP,
        "loss_type": "chunked_nll",
    },
}

NAMES = "Ava Ben Chloe David Emma Farid Grace Hugo Ines Jonas Kira Liam Mona Nils".split()
THINGS = "apples pencils stickers marbles cards books candles cookies bottles tickets".split()


def problems(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Word problems of two to five steps with worked answers, in the manner of GSM8K."""
    chance = random.Random(seed)
    chats = []
    for _ in range(count):
        name, friend = chance.sample(NAMES, 2)
        thing = chance.choice(THINGS)
        have = chance.randint(10, 90)
        question = [f"{name} has {have} {thing}."]
        answer = [f"{name} starts with {have} {thing}."]
        for _ in range(chance.randint(2, 5)):
            number = chance.randint(2, 9)
            kind = chance.choice(["buys", "gives", "times"])
            if kind == "buys":
                question.append(f"Then {name} buys {number} more at the shop around the corner.")
                answer.append(
                    f"After buying {number} more, there are {have} + {number} = "
                    f"<<{have}+{number}={have + number}>>{have + number} {thing}."
                )
                have += number
            elif kind == "gives" and have > number:
                question.append(f"{name} gives {number} of them to {friend}.")
                answer.append(
                    f"{friend} gets {number}, which leaves {have} - {number} = "
                    f"<<{have}-{number}={have - number}>>{have - number} {thing}."
                )
                have -= number
            else:
                question.append(f"A machine turns each of them into {number}.")
                answer.append(
                    f"Each becomes {number}, so that there are {have} * {number} = "
                    f"<<{have}*{number}={have * number}>>{have * number} {thing}."
                )
                have *= number
        question.append(f"How many {thing} does {name} have in the end?")
        answer.append(f"#### {have}")
        chats.append(
            [
                {"role": "system", "content": "Solve the problem step by step."},
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": "\n".join(answer)},
            ]
        )
    return chats


def tokenized(model: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `input_ids` and `supervised`."""
    from tuneline.data_prep.chat import Renderer, chat_format, load_tokenizer
    from tuneline.data_prep.records import Record

    renderer = Renderer(chat_format(load_tokenizer(str(model)), model))
    rendered = [row for chat in problems(count, seed) for row in renderer.render(Record(chat))]
    encoded = [tokens for row in renderer.encode(rendered) for tokens in row]
    return [
        {"row": index, "input_ids": tokens.input_ids, "supervised": tokens.supervised}
        for index, tokens in enumerate(encoded)
    ]


def lora_model(path: str) -> Any:
    """The base with LoRA on every linear layer, the same numbers in every variant."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=linear, **LORA))


def labels_of(row: dict[str, Any]) -> list[int]:
    """-100 where not supervised."""
    return [t if s else -100 for t, s in zip(row["input_ids"], row["supervised"], strict=True)]


def arguments_of(kind: Any, folder: str, steps: int, **more: Any) -> Any:
    """What all variants share."""
    return kind(
        **{
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": ROWS_PER_STEP,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            "bf16": False,
            **more,
        }
    )


def make_trainer(variant: str, model: Any, rows: list[dict[str, Any]], folder: str) -> Any:
    """A trainer ready to run; an epoch over the rows, 4 rows an optimizer step."""
    steps = len(rows) // ROWS_PER_STEP
    if variant == "ours":
        return ours(model, rows, steps, folder)
    from datasets import Dataset

    dataset = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": labels_of(row)} for row in rows]
    )
    if variant == "trainer":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        return Trainer(
            model=model,
            args=arguments_of(
                TrainingArguments, folder, steps, train_sampling_strategy="group_by_length"
            ),
            train_dataset=dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer_of(model)),
        )
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    settings = {"gradient_checkpointing": False, "max_length": None, **TRL_SETTINGS[variant]}
    return SFTTrainer(
        model=model,
        args=arguments_of(SFTConfig, folder, steps, **settings),
        train_dataset=dataset,
        processing_class=tokenizer_of(model),
    )


def tokenizer_of(model: Any) -> Any:
    """The base's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.base_model.model.config._name_or_path)


def ours(model: Any, rows: list[dict[str, Any]], steps: int, folder: str) -> Any:
    """tuneline's trainer as `tuneline finetune` sets it up."""
    from functools import partial

    import torch
    from torch.utils.data import DataLoader

    from tuneline.finetune.arguments import training_arguments, use_kernels
    from tuneline.finetune.batching import TokenBudgetSampler, collate
    from tuneline.finetune.methods.lora import METHOD
    from tuneline.finetune.trainer import SupervisedTrainer
    from tuneline.recipe import TrainingSection

    lengths = [len(row["input_ids"]) for row in rows]
    training = TrainingSection(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_fraction=0,
        batch_tokens=max(8, min(lengths)),  # a row alone
        gradient_accumulation_steps=ROWS_PER_STEP,
    )
    use_kernels(model, training)
    loader = DataLoader(
        rows,  # pyright: ignore[reportArgumentType]
        batch_sampler=TokenBudgetSampler(lengths, training.batch_tokens, seed=0),
        collate_fn=partial(collate, pad_token_id=0),
        generator=torch.Generator(),
    )
    arguments = training_arguments(
        training, METHOD, steps=steps, validates=False, output_dir=Path(folder) / "trainer"
    )
    return SupervisedTrainer(
        model=model,
        args=arguments,
        train_loader=loader,
        validation_loader=None,
        create_optimizer=lambda chosen, options: None,
    )


def held_out_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Per supervised token, computed plainly, a row at a time: the same for all variants."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            labels = torch.tensor(labels_of(row))[1:]
            logits = model(input_ids=ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def child(variant: str, folder: str) -> None:
    """Train one variant and print what was measured as JSON."""
    import torch

    task = json.loads((Path(folder) / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    model = lora_model(task["model"])
    trainer = make_trainer(variant, model, task["train"], str(Path(folder) / variant))
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = held_out_loss(model, task["held_out"])
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "loss": loss}))


def gemm_flops_per_cpu_second(threads: int) -> float:
    """fp32 matrix products of the model's own shapes."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(256, 576), torch.randn(1536, 576)
    for _ in range(20):
        left @ right.T
    done, cpu = 0, time.process_time()
    while time.process_time() - cpu < 4:
        for _ in range(20):
            left @ right.T
        done += 20
    return done * 2 * 256 * 576 * 1536 / (time.process_time() - cpu)


def main() -> None:
    """Run all variants in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="*", help="only these")
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return

    from tuneline import base_model

    model = base_model.resolve("demo").path
    train = tokenized(model, options.rows, seed=1)
    held_out = tokenized(model, HELD_OUT_ROWS, seed=2)
    tokens = sum(len(row["input_ids"]) for row in train)
    supervised = sum(sum(row["supervised"]) for row in train)
    variants = ["ours", "trainer", *(TRL_SETTINGS if options.trl_python else ())]
    variants = [v for v in variants if not options.variants or v in options.variants]
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "model": str(model), "train": train, "held_out": held_out, "threads": options.threads
        }  # fmt: skip
        (Path(folder) / "task.json").write_text(json.dumps(task))
        for _ in range(options.repeats):
            for variant in variants:
                python = options.trl_python if variant.startswith("trl") else sys.executable
                done = subprocess.run(
                    [python, __file__, "--child", variant, folder],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                results[variant].append(json.loads(done.stdout.splitlines()[-1]))
                print(variant, results[variant][-1], file=sys.stderr, flush=True)
    parameters = 134_515_008
    ceiling = gemm_flops_per_cpu_second(options.threads) / (4 * parameters)
    print(
        f"{machine('torch', 'transformers')}; {options.threads} threads, {options.rows} rows, "
        f"{tokens} tokens, {supervised / tokens:.0%} supervised, median of {options.repeats}"
    )
    print(f"ceiling: {ceiling:.0f} tokens per CPU-second\n")
    print(
        "| variant | tokens/CPU-s | spread | of the ceiling | tokens/s | peak RSS | held-out loss |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for variant, runs in results.items():
        rates = sorted(tokens / run["cpu"] for run in runs)
        rate = statistics.median(rates)
        wall = statistics.median(tokens / run["wall"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs) / 1e9
        loss = statistics.median(run["loss"] for run in runs)
        print(f"| {variant} | {rate:.1f} | {rates[0]:.1f} to {rates[-1]:.1f} | "
              f"{rate / ceiling:.0%} | {wall:.1f} | {peak:.2f} GB | {loss:.4f} |")  # fmt: skip


if __name__ == "__main__":
    main()
