"""Where the demo's time goes: each step's own work, and what starting and importing costs.

    python benchmarks/demo.py [WORKDIR]

Reads the summary.json of a finished `tuneline run` (by default of `make demo`), measures the start
of the command line (median of 5, interpreter start beside it), and prints one table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine


def _median_seconds(*arguments: str) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Print the table."""
    workdir = Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    wall = summary["wall_seconds"]
    print(machine())
    print("\n| step | seconds | share |\n| --- | ---: | ---: |")
    for step, seconds in summary["steps"].items():
        print(f"| {step} | {seconds:.1f} | {seconds / wall:.1%} |")
    rest = wall - sum(summary["steps"].values())
    print(f"| orchestration | {rest:.1f} | {rest / wall:.1%} |")
    print(f"| whole run | {wall:.1f} | |")
    print(f"\npeak memory: {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    bare = _median_seconds("-c", "pass")
    started = _median_seconds("-m", "tuneline_pipelines.cli", "--help")
    print(f"tuneline --help: {started:.2f} s (bare interpreter: {bare:.2f} s)")


if __name__ == "__main__":
    main()
