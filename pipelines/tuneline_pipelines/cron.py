"""When a schedule fires, in the dialect of KFP (robfig/cron 1.2): six fields, seconds first.

KFP takes five fields too, and reads the first of them as seconds: `0 3 * * 1`, meant for Mondays at
three, fires at three minutes past every hour of every day in January. So five are refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_MONTHS: Final = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_DAYS: Final = "sun mon tue wed thu fri sat".split()
_LONGEST_MONTHS: Final = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
_RANGE: Final = re.compile(r"(?:(?P<all>[*?])|(?P<low>\w+)(?:-(?P<high>\w+))?)(?:/(?P<step>\d+))?")


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int:
        if text.lower() in self.names:
            return self.names.index(text.lower()) + self.low
        if not text.isdecimal() or not self.low <= int(text) <= self.high:
            words = f" or {self.names[0]} to {self.names[-1]}" if self.names else ""
            raise ValueError(
                f"the {self.name} '{text}' is not from {self.low} to {self.high}{words}"
            )
        return int(text)

    def values(self, text: str) -> set[int]:
        found: set[int] = set()
        for part in text.split(","):
            match = _RANGE.fullmatch(part)
            if match is None:
                raise ValueError(f"'{part}' is no {self.name}: use N, N-N, *, */N and commas")
            low, high = self.low, self.high
            if match["low"]:
                low = self.number(match["low"])
                if match["high"]:
                    high = self.number(match["high"])
                elif not match["step"]:
                    high = low
            if low > high:
                raise ValueError(f"the {self.name} '{part}' begins after its end")
            step = int(match["step"] or 1)
            if step == 0:
                raise ValueError(f"the {self.name} '{part}' has a step of 0")
            found.update(range(low, high + 1, step))
        return found


_FIELDS: Final = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, tuple(_MONTHS)),
    _Field("day of week", 0, 6, tuple(_DAYS)),
)


def check(text: str) -> str:
    """Refuse what KFP refuses, and what it takes and nobody means; returns it with single spaces.

    Raises:
        ValueError: with the sentence for it.
    """
    parts = text.split()
    if len(parts) == 5:
        raise ValueError(
            f"has five fields, and KFP would read the first as seconds: write '0 {' '.join(parts)}'"
        )
    if len(parts) != len(_FIELDS):
        raise ValueError(
            "must have six fields: second, minute, hour, day of month, month, day of week, as in "
            "'0 0 3 * * 1' for Mondays at three"
        )
    values = [field.values(part) for field, part in zip(_FIELDS, parts, strict=True)]
    if len(values[0]) != 1:
        raise ValueError(
            f"'{parts[0]}' starts {len(values[0])} runs within a minute: the first field is the "
            "second, for example 0"
        )
    any_weekday = parts[5][0] in "*?"
    days, months = values[3], values[4]
    reachable = any(min(days) <= _LONGEST_MONTHS.get(month, 31) for month in months)
    if any_weekday and not reachable:
        raise ValueError(f"never fires: no month of '{parts[4]}' has a day '{parts[3]}'")
    return " ".join(parts)
