"""The legs of a comparison in order, as JSON, as a table and as one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from tuneline import artifacts
from tuneline.artifacts import Artifact
from tuneline.compare.leg import FINISHED
from tuneline.errors import ArtifactError, TrainingError
from tuneline.progress import aligned, minutes
from tuneline.recipe import method_settings

JSON: Final = "leaderboard.json"
HTML: Final = "leaderboard.html"
_WIDTH, _HEIGHT = 470, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 96, 14, 44
_LINE: Final = 14.0
"""Height of a label in the plots."""


def rank(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Order the legs by the metric that decides; ties by fewer parameters, failed ones last.

    Args:
        rows: as `leg.run_leg` and `watch.run_watched` give them.

    Returns:
        `base_model`, `metric`, `higher_is_better`, `test_rows`, `base` and `base_interval` where a
        leg finished, and `legs`, best first, each finished one with its `rank`.

    Raises:
        ArtifactError: the legs were not evaluated on the same rows by the same metric.
    """
    legs = [_restored(row) for row in rows]
    done = [row for row in legs if row["status"] == FINISHED]
    for key in ("base_model", "metric", "eval_set_digest"):
        if len(found := sorted({str(row[key]) for row in done})) > 1:
            raise ArtifactError(f"the legs differ in {key} ({', '.join(found)}): compare them anew")
    sign = -1 if done and done[0]["higher_is_better"] else 1
    done.sort(key=lambda row: (sign * row["score"], row["trainable_parameters"]))
    for place, row in enumerate(done, 1):
        row["rank"] = place
    shared = {}
    if done:
        first = done[0]
        shared = {
            "base_model": first["base_model"],
            "metric": first["metric"],
            "higher_is_better": first["higher_is_better"],
            "test_rows": first["rows"],
            "eval_set_digest": first["eval_set_digest"],
            "base": first["base"],
            "base_interval": first["base_interval"],
        }
    return {**shared, "legs": [*done, *(row for row in legs if row["status"] != FINISHED)]}


def _restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """KFP makes every number of a dict a float and forgets the order of its keys."""
    whole = ("rows", "trainable_parameters", "peak_memory_bytes", "adapter_bytes")
    settings = method_settings(row["settings"]).model_dump(mode="json")
    numbers = {key: int(row[key]) for key in whole if key in row}
    return {**row, "settings": settings, **numbers}


def finished(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The legs that have a rank."""
    return [row for row in board["legs"] if row["status"] == FINISHED]


def check_finished(board: Mapping[str, Any]) -> None:
    """Refuse a comparison that compares nothing.

    Raises:
        TrainingError: no leg finished; says why each did not.
    """
    if not finished(board):
        reasons = "; ".join(f"{row['leg']}: {row['reason']}" for row in board["legs"])
        raise TrainingError(f"no leg of the comparison finished: {reasons}")


def write(board: Mapping[str, Any], output: Path) -> Artifact:
    """Write the leaderboard's files.

    Args:
        board: of `rank`.
        output: folder of the Leaderboard.
    """
    with artifacts.writing(output) as aside:
        text = json.dumps(board, indent=2, ensure_ascii=False, allow_nan=False)
        (aside / JSON).write_text(text + "\n", encoding="utf-8")
        (aside / HTML).write_text(render(board), encoding="utf-8")
        artifacts.seal(
            aside,
            kind="leaderboard",
            config={},
            base_model={"reference": board.get("base_model", "")},
            inputs={"eval_set": board.get("eval_set_digest", "")},
        )
    return artifacts.load(output, "leaderboard")


_HEAD: Final = [
    "#", "leg", "score", "95 % interval", "gain", "val. loss", "trainable", "share",
    "train time", "tokens/s", "peak", "adapter", "forgetting", "gate",
]  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """A finished leg's figures as short texts, one for each column of the table."""
    low, high = row["interval"]
    lowest, highest = row["gain_interval"]
    loss = row.get("validation_loss")
    rate = row.get("tokens_per_second")
    worst = max(row["forgetting"].values(), default=None)
    return [
        str(row["rank"]),
        str(row["leg"]),
        f"{row['score']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{lowest:+.3f} to {highest:+.3f}",
        "" if loss is None else f"{loss:.4f}",
        f"{int(row['trainable_parameters']):,}",
        f"{row['trainable_fraction']:.3%}",
        minutes(row["train_seconds"]),
        "" if rate is None else f"{rate:.0f}",
        size(row["peak_memory_bytes"]),
        size(row["adapter_bytes"]),
        "" if worst is None else f"{worst:+.3f}",
        "passed" if row["passed"] else "refused",
    ]


def table(board: Mapping[str, Any]) -> str:
    """The leaderboard for a console; why legs failed stands below it."""
    done = finished(board)
    lines = []
    if done:
        low, high = board["base_interval"]
        better = "higher" if board["higher_is_better"] else "lower"
        lines += [
            aligned([_HEAD, *(cells(row) for row in done)]),
            f"score: {board['metric']} on {board['test_rows']} rows, {better} is better; the base "
            f"has {board['base']:.3f} ({low:.3f} to {high:.3f})",
        ]
    lines += [f"failed: {row['leg']}: {row['reason']}" for row in board["legs"] if row not in done]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in the unit that a person reads: `13.4 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def render(board: Mapping[str, Any]) -> str:
    """The page; every value that comes from data is escaped."""
    from jinja2 import Environment

    template = files("tuneline.compare").joinpath("leaderboard.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    done = finished(board)
    return environment.from_string(template).render(
        board=board,
        rows=[
            {**dict(zip(_HEAD, cells(row), strict=True)), "settings": _settings(row)}
            for row in done
        ],
        failed=[row for row in board["legs"] if row not in done],
        failed_settings={r["leg"]: _settings(r) for r in board["legs"] if r not in done},
        plots=[
            plot(board, "trainable_parameters", "trainable parameters", _count),
            plot(board, "peak_memory_bytes", "peak memory while training", size),
            plot(board, "train_seconds", "training time", lambda value: f"{value:.3g} s"),
        ]
        if done
        else [],
    )


def _settings(row: Mapping[str, Any]) -> str:
    """The learning rate, and what differs from the method's defaults."""
    settings = method_settings(row["settings"])
    usual = type(settings)().model_dump(mode="json")
    changed = [
        f"{key} {value}"
        for key, value in settings.model_dump(mode="json").items()
        if value != usual[key]
    ]
    rest = f"; {', '.join(changed)}" if changed else "; defaults"
    return f"{row['method']}, learning_rate {row['learning_rate']:g}{rest}"


def _count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def plot(
    board: Mapping[str, Any], key: str, title: str, text: Callable[[float], str]
) -> dict[str, Any]:
    """Scores over a cost on a logarithmic axis: points with intervals, labels that stay apart.

    Args:
        board: with at least one finished leg.
        key: of the cost in a leg's row.
        title: of the axis.
        text: of a tick.
    """
    done = finished(board)
    scores = [value for row in done for value in (row["score"], *row["interval"])] + [board["base"]]
    bottom, top = _padded(min(scores), max(scores))
    costs = [math.log10(max(float(row[key]), 1e-3)) for row in done]
    left, right = _padded(min(costs), max(costs), least=0.3)

    def across(cost: float) -> float:
        return _LEFT + (cost - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def height(score: float) -> float:
        return _HEIGHT - _BOTTOM - (score - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    points = [
        {
            "leg": row["leg"],
            "x": across(cost),
            "y": height(row["score"]),
            "low": height(row["interval"][0]),
            "high": height(row["interval"][1]),
            "tip": f"{row['leg']}: {row['score']:.3f}, {text(float(row[key]))}",
        }
        for row, cost in zip(done, costs, strict=True)
    ]
    _keep_labels_apart(points, height(board["base"]))
    return {
        "title": title,
        "points": points,
        "base_y": height(board["base"]),
        "x_ticks": [(across(tick), text(10**tick)) for tick in _log_ticks(left, right)],
        "y_ticks": [(height(tick), f"{tick:g}") for tick in _ticks(bottom, top)],
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
    }


def _padded(low: float, high: float, *, least: float = 0.02) -> tuple[float, float]:
    margin = max(0.08 * (high - low), least)
    return low - margin, high + margin


def _ticks(bottom: float, top: float) -> list[float]:
    """Round numbers between the two, about four of them."""
    rough = (top - bottom) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough)
    return [
        round(n * step, 12) for n in range(math.ceil(bottom / step), math.floor(top / step) + 1)
    ]


def _log_ticks(left: float, right: float) -> list[float]:
    """Logarithms of round numbers between the two, at most about five of them."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(left), math.ceil(right) + 1)
        ticks = [e + math.log10(f) for e in exponents for f in factors]
        ticks = [tick for tick in ticks if left <= tick <= right]
        if len(ticks) <= 5:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 5)]


def _keep_labels_apart(points: list[dict[str, Any]], base_y: float) -> None:
    """Set `label_y`: as near to the point as other labels and points allow."""
    placed: list[tuple[float, float, float]] = [(_WIDTH - _RIGHT, _WIDTH, base_y)]
    for point in sorted(points, key=lambda point: point["y"]):
        width = 7.0 * len(point["leg"]) + 14

        taken = placed + [(p["x"] - 6, p["x"] + 6, p["y"]) for p in points if p is not point]

        def is_free(
            y: float,
            start: float = point["x"] + 8,
            end: float = point["x"] + width,
            taken: list[tuple[float, float, float]] = taken,
        ) -> bool:
            return _TOP <= y <= _HEIGHT - _BOTTOM and not any(
                abs(y - other) < _LINE and left < end and start < right
                for left, right, other in taken
            )

        tries = (point["y"] + sign * step for step in range(_HEIGHT) for sign in (-1, 1))
        y = next((y for y in tries if is_free(y)), point["y"])
        placed.append((point["x"], point["x"] + width, y))
        point["label_y"] = y + 4
