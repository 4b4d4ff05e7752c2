"""EvalReport as one self-contained HTML page: no request, no script, inline SVG.

KFP shows it in a sandboxed frame and MLflow in its artifact view; it also opens from disk. All
geometry is computed here, so that the template holds no arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from tuneline.evaluate.compare import BASE, CHAMPION, TUNED

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 150, 16, 42
_STRIP, _LANE, _MARGIN = 180, 15, 8
"""Of the small plots in tables: width, height of a model's lane, room at both ends."""
_MOST_SLICE_ROWS: Final = 60
_MOST_CHECKS: Final = 40
_MOST_TASK_ROWS: Final = 80
_MOST_POINTS: Final = 400
_LONGEST_TEXT: Final = 1500
"""Characters of a sample; a page has to stay below 1 MB."""
_RISE: Final = 0.02
"""Validation loss that ends this share above its lowest is a sign of overfitting: less is the
noise of a validation split of some hundred rows."""
_WIDE_GAP: Final = 5.0
"""Validation over training loss from which the page warns, however both still fall."""


def render_report(
    result: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, Any]],
    contract: Mapping[str, Any],
    config: Mapping[str, Any],
    base_model: Mapping[str, str],
) -> str:
    """The page; every value that comes from data is escaped.

    Args:
        result: content of report.json.
        history: what training logged, entries with `step` and `loss` or `eval_loss`.
        contract: of the data.
        config: how the adapter was trained.
        base_model: its identity.
    """
    from jinja2 import Environment

    template = files("tuneline.evaluate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    models = [m for m in (BASE, TUNED, CHAMPION) if m in result["metrics"][result["metric"]]]
    return environment.from_string(template).render(
        result=result,
        models=models,
        deciding=_row(result["metric"], result["metrics"][result["metric"]], models),
        comparison=[_row(name, block, models) for name, block in result["metrics"].items()],
        slices=_slices(result, models),
        forgetting=_forgetting(result, models),
        tasks=_tasks(result),
        curves=loss_curves(history),
        checks=[c | {"sentence": _cut(c["sentence"], 300)} for c in _checks(result["verdict"])],
        samples=[_sample(sample, models) for sample in result["samples"]],
        splits=_splits(contract),
        counts=_counts(contract),
        settings=_settings(config),
        base_model=base_model,
        strip=_STRIP,
    )


def _checks(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conditions that failed before those that held; of very many the first."""
    checks = verdict["checks"]
    ordered = [c for c in checks if not c["passed"]] + [c for c in checks if c["passed"]]
    return ordered[:_MOST_CHECKS]


def _row(name: str, block: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A metric as a table row: numbers as text, a strip with a dot and an interval per model."""
    highest = block["highest"]
    scored = block["rows"] > 0 and all(block[m]["interval"][0] is not None for m in models)
    row: dict[str, Any] = {
        "name": name,
        "title": block["title"],
        "unit": block["unit"],
        "better": "higher" if block["higher_is_better"] else "lower",
        "rows": block["rows"],
        "excluded": block["rows_excluded"],
        "scores": {m: _number(block[m]["score"], highest) for m in models},
        "intervals": {m: _range(block[m]["interval"], highest) for m in models},
        "gains": [
            {
                "over": other,
                "change": _number(over["difference"], highest, signed=True),
                "interval": _range(over["difference_interval"], highest, signed=True),
                "sign": _sign(over["gain_interval"]),
            }
            for other in models
            if (over := block.get(f"over_{other}"))
        ],
        "height": _LANE * len(models) + 2,
        "dots": [],
    }
    if not scored:
        return row
    low, high = _scale(block, models)
    row["dots"] = [
        _dot(model, lane, block[model]["score"], block[model]["interval"], low, high)
        for lane, model in enumerate(models)
    ]
    return row


def _dot(
    model: str, lane: int, score: float, bounds: Sequence[float], low: float, high: float
) -> dict[str, Any]:
    return {
        "model": model,
        "y": 1 + _LANE * (lane + 0.5),
        "x": _place(score, low, high),
        "from": _place(bounds[0], low, high),
        "to": _place(bounds[1], low, high),
    }


def _place(value: float, low: float, high: float) -> float:
    share = (value - low) / ((high - low) or 1.0)
    return round(_MARGIN + min(max(share, 0.0), 1.0) * (_STRIP - 2 * _MARGIN), 1)


def _sign(gain_interval: Sequence[float | None]) -> str:
    low, high = gain_interval
    if low is None or high is None:
        return "none"
    if low > 1e-9:  # sums over rows are rounded
        return "better"
    return "worse" if high < -1e-9 else "even"


def _number(value: float | None, highest: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "n/a"
    plus = "+" if signed else ""
    if highest is None:
        magnitude = abs(value)
        digits = 3 if magnitude < 100 else 1
        return f"{value:{plus}.{digits}f}" if magnitude < 1e6 else f"{value:{plus}.2e}"
    return f"{value:{plus}.{1 if highest > 1 else 3}f}"


def _range(bounds: Sequence[float | None], highest: float | None, *, signed: bool = False) -> str:
    if bounds[0] is None:
        return ""
    return " to ".join(_number(bound, highest, signed=signed) for bound in bounds)


def _slices(result: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    metric = result["metric"]
    floors = result["verdict"]["slice_floors"]
    left = _MOST_SLICE_ROWS
    columns, hidden = [], 0
    for column, parts in result["slices"].items():
        shown = []
        for part in parts[:left]:
            block = part["metrics"][metric]
            row = _row(metric, block, models)
            floor = floors.get(column)
            if part["value"] is not None:
                floor = floors.get(f"{column}={part['value']}", floor)
            row["value"] = None if part["value"] is None else _cut(part["value"], 80)
            row["of_slice"] = part["rows"]
            if floor is not None and row["dots"]:
                low, high = _scale(block, models)
                row["floor"] = _place(floor, low, high)
                row["floor_text"] = _number(floor, block["highest"])
            shown.append(row)
        hidden += len(parts) - len(shown)
        left -= len(shown)
        without = result["verdict"]["rows_without_floor"].get(column, 0)
        columns.append({"column": _cut(column, 80), "rows": shown, "without_floor": without})
    return {"columns": columns, "hidden": hidden}


def _tasks(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of every task as a table row, the first of a task with its name."""
    shown = []
    everything = [
        (label, found, metric, block)
        for label, found in result["tasks"].items()
        for metric, block in found["metrics"].items()
    ]
    for label, found, metric, block in everything[:_MOST_TASK_ROWS]:
        models = [m for m in (BASE, TUNED, CHAMPION) if m in block]
        row = _row(metric, block, models)
        row["task"], row["title"] = _cut(label, 80), _cut(metric, 80)
        row["stderr"] = {
            m: "" if (e := block[m]["stderr"]) is None else f"± {_number(e, block['highest'])}"
            for m in models
        }
        row["documents"] = f"{found['documents']:,}"
        if found["of_documents"] > found["documents"]:
            row["documents"] += f" of {found['of_documents']:,}"
        row["cut"] = max(found["cut"].values())
        shown.append(row)
    models = [m for m in (BASE, TUNED, CHAMPION) if any(m in row["scores"] for row in shown)]
    digests = [(_cut(label, 80), found["digest"]) for label, found in result["tasks"].items()]
    return {
        "rows": shown,
        "models": models,
        "hidden": len(everything) - len(shown),
        "digests": digests[:_MOST_TASK_ROWS],
        "cut": [(row["task"], row["cut"]) for row in shown if row["cut"]],
        "lm_eval": next((found["lm_eval"] for found in result["tasks"].values()), ""),
    }


def _scale(block: Mapping[str, Any], models: Sequence[str]) -> tuple[float, float]:
    bounds = [block[m]["interval"] for m in models]
    low = min(0.0, *(b[0] for b in bounds))
    high = block["highest"]
    return low, high if high is not None else (max(b[1] for b in bounds) * 1.05 or 1.0)


def _forgetting(result: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Changes of loss on one common scale around 0, the budget on it."""
    sets = result["forgetting"]
    budget = result["verdict"]["max_forgetting"]
    changed = [m for m in models if m != BASE]
    bounds = [found[m]["change_interval"] for found in sets.values() for m in changed]
    marks = [0.0, *([budget] if budget is not None else []), *(b for pair in bounds for b in pair)]
    reach = max(map(abs, marks)) * 1.1 or 1.0
    rows = []
    for name, found in sets.items():
        rows.append(
            {
                "name": _cut(name, 80),
                "texts": found["texts"],
                "tokens": found["tokens"],
                "base": f"{found[BASE]['score']:.3f}",
                "perplexity": f"{math.exp(min(found[BASE]['score'], 700)):.1f}",
                "changes": [
                    {
                        "model": model,
                        "change": f"{found[model]['change']:+.3f}",
                        "interval": _range(found[model]["change_interval"], None, signed=True),
                    }
                    for model in changed
                ],
                "dots": [
                    _dot(
                        model,
                        lane,
                        found[model]["change"],
                        found[model]["change_interval"],
                        -reach,
                        reach,
                    )
                    for lane, model in enumerate(changed)
                ],
                "height": _LANE * len(changed) + 2,
            }
        )
    return {
        "rows": rows,
        "zero": _place(0, -reach, reach),
        "budget": None if budget is None else _place(budget, -reach, reach),
        "budget_text": None if budget is None else f"{budget:g}",
    }


def loss_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training and validation loss by step, and what their courses say.

    The axis is logarithmic where the losses span more than a factor of 20, as they do when a
    small model learns a narrow task.
    """
    train = _finite(history, "loss")
    validation = _finite(history, "eval_loss")
    losses = [y for _, y in train + validation]
    last = max((x for x, _ in train + validation), default=1.0)
    top, bottom = max(losses, default=1.0) or 1.0, min(losses, default=0.0)
    logarithmic = bottom > 0 and top / bottom > 20
    ticks = _log_ticks(bottom, top) if logarithmic else _ticks(top)
    low, high = (ticks[0], ticks[-1])

    def height(y: float) -> float:
        if logarithmic:
            share = math.log(max(y, low) / low) / math.log(high / low)
        else:
            share = (y - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def across(x: float) -> float:
        return round(_LEFT + x / last * (_WIDTH - _LEFT - _RIGHT), 1)

    def line(series: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{across(x)},{height(y)}" for x, y in series)

    labels = _apart(
        [
            {"name": name, "y": height(series[-1][1]), "text": f"{label} {series[-1][1]:.3g}"}
            for name, label, series in (
                ("train", "training", train),
                ("validation", "validation", validation),
            )
            if series
        ]
    )
    best = min(validation, key=lambda p: p[1]) if validation else None
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "middle": (_LEFT + _WIDTH - _RIGHT) / 2,
        "train": line(train),
        "validation": line(validation),
        "points": [(across(x), height(y)) for x, y in validation],
        "best": None if best is None else (across(best[0]), height(best[1])),
        "labels": labels,
        "y_ticks": [(height(t), f"{t:g}") for t in ticks],
        "x_ticks": [(across(x), f"{x:g}") for x in _ticks(last) if x <= last],
        "logarithmic": logarithmic,
        "sign": overfitting(train, validation),
    }


def overfitting(
    train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]
) -> dict[str, str]:
    """What training against validation loss says: `level` is ok, warn or unknown."""
    if not validation:
        return {
            "level": "unknown",
            "text": "Validation loss was not measured, so overfitting can't be seen: set "
            "data.validation_fraction.",
        }
    step, lowest = min(validation, key=lambda p: p[1])
    _, end = validation[-1]
    if len(validation) == 1:
        return {
            "level": "unknown",
            "text": "Validation loss was measured once, so its course can't be seen: raise "
            "training.evaluations.",
        }
    if end > lowest * (1 + _RISE):
        return {
            "level": "warn",
            "text": f"Overfitting: validation loss was lowest, {lowest:.3g}, at step {step:g} and "
            f"has risen to {end:.3g} since. Train for fewer epochs, or with more rows.",
        }
    where = (
        "at its lowest at the end"
        if end <= lowest
        else f"at the end within {_RISE:.0%} of its lowest"
    )
    gap = ""
    if train:
        count = max(1, len(train) // 10)
        recent = sum(y for _, y in train[-count:]) / count
        ratio = end / recent if recent > 0 else math.inf
        if ratio > _WIDE_GAP:
            return {
                "level": "warn",
                "text": f"Validation loss is {where}, but {ratio:.3g} times the training loss: the "
                "model knows its training rows by heart. More varied rows would help.",
            }
        gap = f", {ratio:.2g} times the training loss"
    return {"level": "ok", "text": f"No sign of overfitting: validation loss is {where}{gap}."}


def _finite(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [
        (float(entry["step"]), float(entry[key]))
        for entry in history
        if key in entry and math.isfinite(float(entry[key]))
    ]
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    thinned = points[::stride]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


def _ticks(top: float) -> list[float]:
    """0 to at least `top` in round steps, about four of them."""
    power = 10 ** math.floor(math.log10(top / 4))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= top / 4 - 1e-12)
    return [round(n * step, 12) for n in range(math.ceil(top / step - 1e-9) + 1)]


def _log_ticks(bottom: float, top: float) -> list[float]:
    first, last = math.floor(math.log10(bottom)), math.ceil(math.log10(top))
    ticks = [m * 10.0**n for n in range(first, last + 1) for m in (1, 3)]
    below = max(t for t in ticks if t <= bottom)
    above = min((t for t in ticks if t >= top), default=10.0**last)
    return [t for t in ticks if below <= t <= above]


def _apart(labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the end labels of two lines apart where they would overlap."""
    if len(labels) == 2 and (gap := abs(labels[0]["y"] - labels[1]["y"])) < 16:
        upper, lower = sorted(labels, key=lambda label: label["y"])
        upper["y"] -= (16 - gap) / 2
        lower["y"] += (16 - gap) / 2
    return labels


def _sample(sample: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    return {
        "question": _cut(sample["question"]),
        "reference": _cut(sample["reference"]),
        "answers": [
            {
                "model": model,
                "text": _cut(sample[model]),
                "right": sample[f"{model}_exact_match"] == 1,
            }
            for model in models
            if model in sample
        ],
    }


def _cut(text: str, length: int = _LONGEST_TEXT) -> str:
    if len(text) <= length:
        return text
    return f"{text[:length]} … ({len(text) - length:,} more characters)"


def _splits(contract: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, split in contract.get("splits", {}).items():
        tokens, supervised = split.get("tokens", 0), split.get("supervised_tokens", 0)
        rows.append(
            {
                "name": name,
                "rows": f"{split.get('rows', 0):,}",
                "tokens": f"{tokens:,}",
                "supervised": f"{100 * supervised / max(tokens, 1):.0f} %",
                "longest": f"{split.get('longest_tokens', 0):,}",
            }
        )
    return rows


def _counts(contract: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every other figure of the contract, by its name there."""
    return [
        (name.replace("_", " "), f"{value:,}")
        for name, value in _flat({k: v for k, v in contract.items() if k != "splits"})
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ][:40]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in _flat(config)
        if value is not None
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
