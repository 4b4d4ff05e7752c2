"""Data preparation against the bare tokenizers batch encoder, on the same rows and cores.

    python benchmarks/data_prep.py 10000 100000 1000000 [--base-model demo] [--without-bare]

Writes chats of about 220 tokens, composed at random, into a temporary folder, and for each number
of rows runs, in processes of their own:

- the bare encoder: `encode_batch` of the rendered texts, 1,000 at a time, with as many threads as
  there are cores; the texts are rendered beforehand and nothing is kept;
- `prepare`: reading, checking, rendering, tokenizing, masking, deduplication, splits, contract,
  Arrow files and their digests, with an empty cache;
- `prepare` again, with the cache that the first one left.

Seconds are counted after imports and without the digest of the model's weights in both. CPU seconds
of the whole process tree are the measure that holds on a machine that is shared; memory is the
highest sum of the tree's resident sets, seen every 50 ms (pages that processes share count once
per process, so it errs upwards).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from machine import machine

_COMMON = (
    "the of and to in is was for that on with as it by from at his an were are which this be or "
    "had not but first one their has its after new who they two her she been other when time "
    "during there into all may only over more some would make like him them then could your use "
    "how each said do many water long very day down most people part find any work place year "
    "back thing our just name good sentence man think great where help through much before line "
    "right too mean old tell boy follow came want show around form three small set put end does"
).split()
_SYLLABLES = "ba ce do fi ga jo ka lu mi no pe ra sa ti ul ya bre cla dri fen gor hus ist".split()


def write_rows(path: Path, rows: int) -> None:
    """Chats of one exchange, no two alike."""
    draw = random.Random(rows)
    rare = ["".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))) for _ in range(20_000)]

    def words(count: int) -> str:
        picked = [draw.choice(_COMMON if draw.random() < 0.75 else rare) for _ in range(count)]
        return " ".join(picked).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = [
                {"role": "user", "content": words(draw.randint(20, 100))},
                {"role": "assistant", "content": words(draw.randint(20, 90))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def bare(folder: Path, rows_file: Path) -> dict[str, float]:
    """The encoder alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    rows = tokens = 0
    seconds = cpu = 0.0

    def encode(texts: list[str]) -> None:
        nonlocal rows, tokens, seconds, cpu
        started, before = time.perf_counter(), time.process_time()
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
        cpu += time.process_time() - before
        rows += len(texts)
        tokens += sum(len(encoding.ids) for encoding in encodings)

    batch: list[str] = []
    with rows_file.open(encoding="utf-8") as file:
        for line in file:
            batch.append(
                tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            )
            if len(batch) == 1000:
                encode(batch)
                batch = []
    if batch:
        encode(batch)
    return {"rows": rows, "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}


def prepared(reference: str, rows_file: Path, output: Path) -> dict[str, float]:
    """Our preparation, after its imports."""
    import datasets  # noqa: F401

    from tuneline import base_model
    from tuneline.data_prep import contract, duplicates, ledger, report  # noqa: F401
    from tuneline.data_prep import prepare as module
    from tuneline.data_prep.chat import load_tokenizer
    from tuneline.recipe import DataSection

    found = base_model.resolve(reference)
    load_tokenizer(str(found.path))  # imports torch and the model's own module
    base_model.resolve = lambda reference: found
    data = DataSection.model_validate({"train": str(rows_file), "max_seq_len": 1024})
    before = _tree_cpu()
    started = time.perf_counter()
    dataset = module.prepare(reference, data, output)
    seconds = time.perf_counter() - started
    result = dataset.read_json(module.CONTRACT)
    return {
        "rows": result["rows_in"],
        "kept": result["rows_out"],
        "tokens": sum(split["tokens"] for split in result["splits"].values()),
        "seconds": seconds,
        "cpu_seconds": _tree_cpu() - before,
    }


def _tree_cpu() -> float:
    """CPU seconds of this process and of the workers that it waited for."""
    times = os.times()
    alive = 0.0
    for child in psutil.Process().children(recursive=True):
        used = child.cpu_times()
        alive += used.user + used.system + used.children_user + used.children_system
    return times.user + times.system + times.children_user + times.children_system + alive


def measure(*arguments: str, **environment: str) -> dict[str, Any]:
    """Run one variant in a process of its own; returns its figures and the tree's peak memory."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not done.wait(0.05):
            total = 0
            try:
                for part in (root, *root.children(recursive=True)):
                    total += part.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return json.loads(output.splitlines()[-1]) | {"peak_bytes": peak}


def _ratio(base: dict[str, Any] | None, got: dict[str, Any], name: str) -> str:
    return f"{base[name] / got[name]:.2f}" if base else ""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--base-model", default="demo")
    parser.add_argument(
        "--without-bare", action="store_true", help="no comparison: what memory does at many rows"
    )
    options = parser.parse_args()
    from tuneline import base_model

    folder = str(base_model.resolve(options.base_model).path)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f} at the start\n")
    print("| rows | tokens a row | variant | rows/s | CPU s | rows/s against bare "
          "| CPU s against bare | peak memory |")  # fmt: skip
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for count in options.rows:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            path = Path(scratch)
            rows_file = path / "rows.jsonl"
            write_rows(rows_file, count)
            cache = str(path / "cache")
            variants = (
                []
                if options.without_bare
                else [
                    (
                        "bare encoder",
                        measure("--bare", folder, str(rows_file), TOKENIZERS_PARALLELISM="true"),
                    ),
                ]
            )
            variants += [
                ("prepare", measure("--prepare", folder, str(rows_file), str(path / "a"),
                                    TUNELINE_CACHE=cache)),
                ("prepare again", measure("--prepare", folder, str(rows_file), str(path / "b"),
                                          TUNELINE_CACHE=cache)),
            ]  # fmt: skip
        base = None if options.without_bare else variants[0][1]
        for name, got in variants:
            mean = got["tokens"] / max(got.get("kept", got["rows"]), 1)
            print(
                f"| {count:,} | {mean:.0f} | {name} "
                f"| {got['rows'] / got['seconds']:,.0f} | {got['cpu_seconds']:.1f} "
                f"| {_ratio(base, got, 'seconds')} | {_ratio(base, got, 'cpu_seconds')} "
                f"| {got['peak_bytes'] / 1e6:,.0f} MB |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(bare(Path(sys.argv[2]), Path(sys.argv[3]))))
    elif sys.argv[1:2] == ["--prepare"]:
        print(json.dumps(prepared(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
