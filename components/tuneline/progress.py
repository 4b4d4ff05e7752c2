"""What a person sees while a step runs: one prefix, plain lines, readable in a pod log.

`report` prints a line that stays. `tick` prints progress that replaces the one before where a
terminal shows it; elsewhere the caller's pace decides how many lines there are. `record` is for
the process that started the step.

A terminal gets the lines without their prefixes, and progress as one line that changes.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence

REPORT_PREFIX = "[tuneline] "
TICK_PREFIX = "[tuneline~] "
RECORD_PREFIX = "[tuneline=] "


def ranks() -> tuple[int, int]:
    """Which of torchrun's processes this is, and how many there are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


_tick_stands = False


def report(text: str) -> None:
    """A line for the person who runs the step; of several processes the first one says it."""
    if ranks()[0] > 0:
        return
    if _is_terminal():
        _end_tick()
        print(text if text.startswith("==") else f"  {text}", flush=True)
    else:
        print(f"{REPORT_PREFIX}{text}", flush=True)


def tick(text: str) -> None:
    """Progress that the next line may replace."""
    global _tick_stands
    if not _is_terminal():
        print(f"{TICK_PREFIX}{text}", flush=True)
        return
    if not _tick_stands:
        atexit.register(_end_tick)
    _tick_stands = True
    # one that wraps could not be replaced
    print(f"\r\033[K  {text}"[: shutil.get_terminal_size().columns + 3], end="", flush=True)


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _end_tick() -> None:
    global _tick_stands
    if _tick_stands:
        print("\r\033[K", end="", flush=True)
        _tick_stands = False
        atexit.unregister(_end_tick)


def minutes(seconds: float) -> str:
    """`m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def peak_memory_bytes() -> int:
    """The most memory that this process has held, resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def record(**values: str | float) -> None:
    """Figures of a finished step, one JSON object, for the process that started it."""
    print(f"{RECORD_PREFIX}{json.dumps(values)}", flush=True)


def complain(text: str) -> None:
    """The sentence that a failed step ends with."""
    _end_tick()
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text, the first row being the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))
