"""What a benchmark's figures were taken on: one line, the same for all benchmarks."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil


def machine(*packages: str) -> str:
    """Processor, cores, memory, system, Python and the versions of some packages."""
    memory = psutil.virtual_memory().total / 1e9
    parts = [
        f"machine: {_cpu_name()}",
        f"{psutil.cpu_count()} cores",
        f"{memory:.0f} GB",
        platform.system(),
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in packages),
    ]
    return ", ".join(parts)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
