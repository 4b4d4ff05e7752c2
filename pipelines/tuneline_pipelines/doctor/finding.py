"""What a check found: one line for a person, one object for a program.

A check is a function that yields findings. Each of them says what was looked at, what was found,
and, unless that is fine, what to do. A check that raises has found an error too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tuneline.errors import TunelineError

Check = Callable[[], "Iterable[Finding]"]


class Level(StrEnum):
    """How bad it is: a warning may be meant so, an error makes a run fail."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    name: str
    """What was looked at."""
    value: str
    """What was found."""
    advice: str = ""
    """What to do; empty where it is fine or the value says it."""

    def __str__(self) -> str:
        text = f"{self.value}: {self.advice}" if self.advice else self.value
        return f"{self.level:<8} {self.name:<24} {_flat(text)}"


ok = partial(Finding, Level.OK)
warning = partial(Finding, Level.WARNING)
error = partial(Finding, Level.ERROR)


def run(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run checks one after the other.

    Args:
        checks: name of what is looked at, for a check that raises, and the check.
    """
    for name, check in checks:
        try:
            yield from check()
        except TunelineError as fault:
            yield error(name, _flat(str(fault)))
        except ImportError as fault:
            yield error(name, f"can't be looked at ({fault})", "install what is missing")
        except OSError as fault:
            yield error(name, f"can't be looked at ({fault})")


def _flat(text: str) -> str:
    return " ".join(text.split())
