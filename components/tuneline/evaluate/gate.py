"""The verdict: every condition of the gate with the numbers that it was decided by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tuneline.evaluate.compare import BASE, CHAMPION, TUNED
from tuneline.recipe import GateSection, slice_of

_ROUNDING: Final = 1e-9
"""Sums over rows are rounded: a tie may come out as 1e-17, and a tie does not promote."""


def decide(result: Mapping[str, Any], gate: GateSection) -> dict[str, Any]:
    """Check each condition; what could not be measured is refused, not passed over.

    Args:
        result: the report so far: `metrics`, `slices`, `forgetting`, `champion`, `tasks`.
        gate: the conditions.

    Returns:
        `passed`; `reasons`, a sentence for each condition that does not hold; `checks`, every
        condition with `check`, `passed`, `value`, `limit` and `sentence`; `rows_without_floor`, how
        many rows of a column with floors none of them judges; `refused`, what becomes of a model
        that did not pass; and the gate's settings.
    """
    block = result["metrics"][gate.metric]
    checks = [
        _check(
            "min_rows",
            block["rows"] >= gate.min_rows,
            block["rows"],
            gate.min_rows,
            f"{block['rows']} test rows, at least {gate.min_rows} are needed",
            f"{block['rows']} test rows are fewer than gate.min_rows {gate.min_rows}",
        ),
        _gain("min_gain", "gain", block[f"over_{BASE}"], gate.min_gain, "gate.min_gain"),
    ]
    checks += _excluded(block, f"metric {gate.metric}", "test rows")
    if gate.champion != "ignore" and result["champion"] is not None:
        checks.append(_champion(block, result["champion"], gate))
    checks += _floors(result, gate)
    if gate.max_forgetting is not None:
        checks += _forgetting(result["forgetting"], gate.max_forgetting)
    checks += [_drop(result["tasks"], place, most) for place, most in gate.max_task_drop.items()]
    reasons = [check["sentence"] for check in checks if not check["passed"]]
    return {
        "passed": not reasons,
        "reasons": reasons,
        "checks": checks,
        "rows_without_floor": _without_floor(result["slices"], gate),
        **gate.model_dump(mode="json"),
    }


def _check(
    name: str, passed: bool, value: float | None, limit: float, holds: str, fails: str
) -> dict[str, Any]:
    return {
        "check": name,
        "passed": passed,
        "value": value,
        "limit": limit,
        "sentence": holds if passed else fails,
    }


def _excluded(block: Mapping[str, Any], metric: str, what: str) -> list[dict[str, Any]]:
    """A metric that has no score for some models' answers takes their failures out of the mean."""
    if not block["rows_excluded"]:
        return []
    named = ", ".join(map(str, block["excluded"]))
    more = ", ..." if block["rows_excluded"] > len(block["excluded"]) else ""
    sentence = (
        f"{metric} scores only some of the models on {block['rows_excluded']} {what} "
        f"({named}{more}): it may be None for what the row is, never for what a model answered; "
        "give the lowest score there"
    )
    return [_check("rows_excluded", False, block["rows_excluded"], 0, sentence, sentence)]


def _gain(
    name: str, what: str, over: Mapping[str, Any], limit: float, setting: str
) -> dict[str, Any]:
    low = over["gain_interval"][0]
    start = f"the 95 % interval of the {what} starts at {_text(low)}"
    return _check(
        name,
        low is not None and low > limit + _ROUNDING,
        low,
        limit,
        f"{start}, above {setting} {limit:g}",
        f"{start}, which is not above {setting} {limit:g}",
    )


def _champion(
    block: Mapping[str, Any], champion: Mapping[str, Any], gate: GateSection
) -> dict[str, Any]:
    label = f"champion (version {champion['version']})"
    name = "champion"
    limit = gate.champion_margin if gate.champion == "better" else -gate.champion_margin
    if not champion["compared"]:
        sentence = (
            f"the {label} can't be compared: {champion['reason']}; gate.champion: ignore decides "
            "without it"
        )
        return _check(name, False, None, limit, sentence, sentence)
    over = block[f"over_{CHAMPION}"]
    what = f"gain over the {label}"
    if gate.champion == "better":
        found = _gain(name, what, over, limit, "gate.champion_margin")
    else:
        low = over["gain_interval"][0]
        start = f"the 95 % interval of the {what} starts at {_text(low)}"
        found = _check(
            name,
            low is not None and low >= limit - _ROUNDING,
            low,
            limit,
            f"{start}, not below {limit:g}",
            f"{start}, below minus gate.champion_margin {gate.champion_margin:g}",
        )
    return found


def _floors(result: Mapping[str, Any], gate: GateSection) -> list[dict[str, Any]]:
    checks = []
    for place, floor in gate.slice_floors.items():
        column, value = slice_of(place, result["slices"])
        parts = result["slices"].get(column, [])
        found = [part for part in parts if value is None or part["value"] == value]
        name = f"slice_floors.{place}"
        if not found:
            sentence = f"slice {place} has no test rows, so gate.slice_floors can't be checked"
            checks.append(_check(name, False, None, floor, sentence, sentence))
        checks += [_floor(name, column, part, floor, gate) for part in found]
    return checks


def _without_floor(slices: Mapping[str, Any], gate: GateSection) -> dict[str, int]:
    places = [slice_of(place, slices) for place in gate.slice_floors]
    found = {}
    for column, parts in slices.items():
        judged = {value for of, value in places if of == column}
        if judged and None not in judged:
            found[column] = sum(part["rows"] for part in parts if part["value"] not in judged)
    return found


def _floor(
    name: str, column: str, part: Mapping[str, Any], floor: float, gate: GateSection
) -> dict[str, Any]:
    block = part["metrics"][gate.metric]
    score = block[TUNED]["score"]
    place = f"slice {column}={part['value']} ({block['rows']} rows)"
    if part["value"] is None:
        place = f"slice without {column} ({block['rows']} rows)"
    if score is None:
        sentence = f"{place} has no score in {gate.metric}"
        return _check(name, False, None, floor, sentence, sentence)
    if block["rows"] < gate.min_slice_rows:
        sentence = (
            f"{place} has fewer rows than gate.min_slice_rows {gate.min_slice_rows}, so its floor "
            "can't be checked: give more test rows, or floors to other slices"
        )
        return _check(name, False, score, floor, sentence, sentence)
    higher = block["higher_is_better"]
    passed = score >= floor - _ROUNDING if higher else score <= floor + _ROUNDING
    side = "below" if higher else "above"
    return _check(
        name,
        passed,
        score,
        floor,
        f"{place} scores {score:.3f}, the floor is {floor:g}",
        f"{place} scores {score:.3f}, {side} the floor {floor:g}",
    )


def _forgetting(sets: Mapping[str, Any], budget: float) -> list[dict[str, Any]]:
    if not sets:
        sentence = (
            "forgetting was not measured, so gate.max_forgetting can't be checked: set "
            "evaluation.general_text or evaluation.forgetting_sets"
        )
        return [_check("max_forgetting", False, None, budget, sentence, sentence)]
    checks = []
    for name, found in sets.items():
        high = found[TUNED]["change_interval"][1]
        end = f"the loss on {name} rose by up to {high:.3f} nats per token (95 % interval)"
        checks.append(
            _check(
                f"max_forgetting.{name}",
                high <= budget + _ROUNDING,
                high,
                budget,
                f"{end}, within gate.max_forgetting {budget:g}",
                f"{end}, more than gate.max_forgetting {budget:g}",
            )
        )
    return checks


def _drop(tasks: Mapping[str, Any], place: str, most: float) -> dict[str, Any]:
    task, _, metric = place.partition(":")
    blocks: Mapping[str, Any] = tasks[task]["metrics"] if task in tasks else {}
    metric = metric or next(iter(blocks), "")
    name = f"max_task_drop.{place}"
    if metric not in blocks:
        known = f"it has {', '.join(blocks)}" if blocks else "it was not measured"
        sentence = f"task {task} has no metric {metric}, so it can't be checked: {known}"
        return _check(name, False, None, most, sentence, sentence)
    if excluded := _excluded(blocks[metric], f"task {task}: {metric}", "documents"):
        return excluded[0] | {"check": name, "limit": most}
    low = blocks[metric][f"over_{BASE}"]["gain_interval"][0]
    if low is None:
        sentence = (
            f"task {task}: {metric} has no score a document, so no interval, and can't be checked: "
            "name another metric in gate.max_task_drop"
        )
        return _check(name, False, None, most, sentence, sentence)
    drop = max(0.0, -low)
    end = f"task {task} lost up to {drop:.3f} in {metric} (95 % interval)"
    return _check(
        name,
        drop <= most + _ROUNDING,
        drop,
        most,
        f"{end}, within gate.max_task_drop {most:g}",
        f"{end}, more than gate.max_task_drop {most:g}",
    )


def _text(value: float | None) -> str:
    return "no value" if value is None else f"{value:.3f}"
