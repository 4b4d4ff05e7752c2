"""What a person sees while a step runs: one prefix, plain lines, readable in a pod log.

`report` prints a line that stays. `tick` prints progress that replaces the one before where a
terminal shows it; elsewhere the caller's pace decides how many lines there are. `record` is for
the process that started the step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence

REPORT_PREFIX = "[tuneline] "
TICK_PREFIX = "[tuneline~] "
RECORD_PREFIX = "[tuneline=] "


def ranks() -> tuple[int, int]:
    """Which of torchrun's processes this is, and how many there are; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def report(text: str) -> None:
    """A line for the person who runs the step; of several processes the first one says it."""
    if ranks()[0] == 0:
        print(f"{REPORT_PREFIX}{text}", flush=True)


def tick(text: str) -> None:
    """Progress that the next line may replace."""
    print(f"{TICK_PREFIX}{text}", flush=True)


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
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text, the first row being the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))
