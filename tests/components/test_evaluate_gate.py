"""Comparisons and the verdict, from per-row scores."""

import json
import math
from typing import Any

import numpy as np
import pytest

from tuneline.errors import RecipeError
from tuneline.evaluate.compare import compare, compare_texts
from tuneline.evaluate.gate import decide
from tuneline.evaluate.metrics import metric_named
from tuneline.recipe import EvaluationSection, GateSection, check, check_gate


def hits(right: int, count: int) -> list[float | None]:
    return [float(i < right) for i in range(count)]


def report(
    base: list[float | None],
    tuned: list[float | None],
    champion: list[float | None] | None = None,
    metric: str = "exact_match",
    **more: Any,
) -> dict[str, Any]:
    scores = {"base": {metric: base}, "tuned": {metric: tuned}}
    if champion is not None:
        scores["champion"] = {metric: champion}
    blocks = compare(scores, [3] * len(base), [metric_named(metric)], range(len(base)))
    known = {"version": 4, "compared": True, "reason": ""} if champion is not None else None
    return {"metrics": blocks, "slices": {}, "forgetting": {}, "champion": known, **more}


def verdict(result: dict[str, Any], **gate: Any) -> dict[str, Any]:
    found = decide(result, GateSection(**gate))
    json.dumps(found, allow_nan=False)  # it goes into report.json
    assert found["reasons"] == [c["sentence"] for c in found["checks"] if not c["passed"]]
    assert found["passed"] == (not found["reasons"])
    return found


def test_a_clear_gain_passes_and_says_by_what() -> None:
    found = verdict(report(hits(5, 120), hits(90, 120)), min_gain=0.3)
    assert found["passed"]
    assert [c["check"] for c in found["checks"]] == ["min_rows", "min_gain"]
    assert found["checks"][0] | {"sentence": ""} == {
        "check": "min_rows", "passed": True, "value": 120, "limit": 100, "sentence": "",
    }  # fmt: skip
    assert 0.6 < found["checks"][1]["value"] < 85 / 120
    assert found["min_gain"] == 0.3 and found["min_rows"] == 100 and found["refused"] == "register"


@pytest.mark.parametrize(
    ("base", "tuned", "count", "reason"),
    [
        (50, 50, 200, "not above"),  # a tie does not promote
        (0, 0, 200, "not above"),  # all scores equal: an interval without width
        (200, 200, 200, "not above"),
        (90, 5, 120, "not above"),
        (50, 53, 200, "not above"),  # inside the noise
        (0, 50, 50, "fewer than gate.min_rows 100"),
    ],
)
def test_a_doubtful_gain_is_refused_with_the_reason(
    base: int, tuned: int, count: int, reason: str
) -> None:
    found = verdict(report(hits(base, count), hits(tuned, count)))
    assert not found["passed"] and reason in "; ".join(found["reasons"])


def test_a_tie_of_uneven_numbers_is_a_tie() -> None:
    scores: list[float | None] = [*np.random.default_rng(0).random(333).tolist()]
    for metric in ("token_f1", "cross_entropy", "perplexity"):
        found = verdict(report(scores, list(scores), list(scores), metric), metric=metric)
        assert not found["passed"] and len(found["reasons"]) == 2, metric


def test_where_lower_is_better_gain_is_what_went_down() -> None:
    rng = np.random.default_rng(0)
    before = (2 + rng.random(200)).tolist()
    after = [b - 1 for b in before]
    result = report(before, after, metric="cross_entropy")
    over = result["metrics"]["cross_entropy"]["over_base"]
    assert over["difference"] == pytest.approx(-1) and over["gain"] == pytest.approx(1)
    assert verdict(result, metric="cross_entropy", min_gain=0.9)["passed"]
    assert not verdict(report(after, before, metric="cross_entropy"), metric="cross_entropy")[
        "passed"
    ]


def test_token_metrics_weigh_rows_by_their_tokens() -> None:
    metrics = [metric_named("cross_entropy"), metric_named("perplexity")]
    scores = {
        m: {metric.name: values for metric in metrics}
        for m, values in {"base": [1.0, 4.0], "tuned": [0.5, 0.5]}.items()
    }
    found = compare(scores, [30, 10], metrics, range(2))
    assert found["cross_entropy"]["base"]["score"] == pytest.approx(1.75)
    assert found["perplexity"]["base"]["score"] == pytest.approx(math.exp(1.75))
    assert found["perplexity"]["over_base"]["difference"] == pytest.approx(
        math.exp(0.5) - math.exp(1.75)
    )


def test_a_row_counts_if_every_model_has_a_score() -> None:
    found = report([1.0, None, 0.0, None], [1.0, 1.0, None, None])["metrics"]["exact_match"]
    assert found["rows"] == 1 and found["base"]["score"] == found["tuned"]["score"] == 1.0
    assert (found["rows_excluded"], found["excluded"]) == (2, [1, 2])


def test_a_metric_that_leaves_out_failures_refuses_and_names_the_rows() -> None:
    base = hits(60, 200)
    # none of the rows that the base had right; right on half of the others
    tuned: list[float | None] = [None if b else float(i % 2) for i, b in enumerate(base)]
    found = verdict(report(base, tuned))
    third = found["checks"][2]
    assert (third["check"], third["passed"], third["value"]) == ("rows_excluded", False, 60)
    assert found["checks"][1]["passed"], "without the check it would pass"
    assert "on 60 test rows (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)" in found["reasons"][0]


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_gate_on_next_to_no_rows_is_a_fault_of_the_recipe(rows: int) -> None:
    with pytest.raises(RecipeError, match="min_rows"):
        check(GateSection, {"min_rows": rows}, source="gate")


def test_a_metric_without_rows_has_no_score_and_is_refused() -> None:
    result = report([None, None], [None, None], [None, None])
    block = result["metrics"]["exact_match"]
    assert block["rows"] == 0 and block["tuned"] == {"score": None, "interval": [None, None]}
    found = verdict(result, min_rows=10)
    assert len(found["reasons"]) == 3 and "no value" in found["reasons"][1]


@pytest.mark.parametrize(
    ("tuned", "champion", "gate", "passed"),
    [
        (150, 60, {}, True),
        (150, 150, {}, False),  # as good as the champion is not better
        (150, 150, {"champion": "not_worse"}, True),
        (150, 158, {"champion": "not_worse", "champion_margin": 0.1}, True),
        (150, 190, {"champion": "not_worse", "champion_margin": 0.1}, False),
        (150, 190, {"champion": "ignore"}, True),
        (150, 60, {"champion_margin": 0.5}, False),
    ],
)
def test_the_champion_has_to_be_beaten(
    tuned: int, champion: int, gate: dict[str, Any], passed: bool
) -> None:
    found = verdict(report(hits(5, 200), hits(tuned, 200), hits(champion, 200)), **gate)
    assert found["passed"] == passed
    assert passed or "version 4" in found["reasons"][0]


def test_a_champion_that_cannot_be_compared_refuses() -> None:
    result = report(hits(5, 200), hits(150, 200))
    result["champion"] = {"version": 3, "compared": False, "reason": "it has another vocabulary"}
    found = verdict(result)
    assert "(version 3) can't be compared: it has another vocabulary" in found["reasons"][0]
    assert verdict(result, champion="ignore")["passed"]


def test_floors_hold_on_every_slice() -> None:
    base, tuned = hits(0, 300), hits(240, 300)
    blocks = {"en": range(200), "zh": range(200, 300)}  # 1.0 and 0.4
    scores = {"base": {"exact_match": base}, "tuned": {"exact_match": tuned}}
    metric = metric_named("exact_match")
    slices = {
        "language": [
            {"value": v, "rows": len(r), "metrics": compare(scores, [1] * 300, [metric], r)}
            for v, r in blocks.items()
        ]
    }
    result = report(base, tuned) | {"slices": slices}
    assert verdict(result, slice_floors={"language": 0.4})["passed"]
    found = verdict(result, slice_floors={"language": 0.5})
    assert found["reasons"] == ["slice language=zh (100 rows) scores 0.400, below the floor 0.5"]
    assert verdict(result, slice_floors={"language=en": 0.9})["passed"]
    absent = verdict(result, slice_floors={"language=fr": 0.1})
    assert "slice language=fr has no test rows" in absent["reasons"][0]


def sliced(right: dict[str | None, tuple[int, int]]) -> dict[str, Any]:
    """A report with a slice for each value: right answers of so many."""
    tuned = [hit for found, count in right.values() for hit in hits(found, count)]
    scores = {"base": {"exact_match": hits(0, len(tuned))}, "tuned": {"exact_match": tuned}}
    metric = metric_named("exact_match")
    parts, start = [], 0
    for value, (_, count) in right.items():
        rows = range(start, start := start + count)
        blocks = compare(scores, [1] * len(tuned), [metric], rows)
        parts.append({"value": value, "rows": count, "metrics": blocks})
    return report(hits(0, len(tuned)), tuned) | {"slices": {"language": parts}}


def test_a_floor_on_next_to_no_rows_is_not_held() -> None:
    result = sliced({"en": (190, 200), "zh": (1, 1)})
    (reason,) = verdict(result, slice_floors={"language": 0.5})["reasons"]
    assert "slice language=zh (1 rows) has fewer rows than gate.min_slice_rows 10" in reason
    assert verdict(result, slice_floors={"language": 0.5}, min_slice_rows=1)["passed"]
    assert verdict(result, slice_floors={"language=en": 0.5})["passed"]


def test_rows_without_the_column_are_judged_by_a_floor_of_the_whole_column() -> None:
    result = sliced({"en": (190, 200), "None": (20, 20), None: (5, 50)})
    found = verdict(result, slice_floors={"language": 0.5})
    assert found["reasons"] == [
        "slice without language (50 rows) scores 0.100, below the floor 0.5"
    ]
    assert found["rows_without_floor"] == {}
    found = verdict(result, slice_floors={"language=en": 0.5, "language=None": 0.9})
    assert found["passed"] and found["rows_without_floor"] == {"language": 50}


def test_the_forgetting_budget_is_held_against_the_upper_bound() -> None:
    rng = np.random.default_rng(0)
    tokens = [100] * 50
    base = (300 + 20 * rng.random(50)).tolist()
    change = (10 * rng.random(50)).tolist()  # 0 to 0.1 a token, 0.05 on average
    texts = compare_texts(
        {"base": base, "tuned": [b + c for b, c in zip(base, change, strict=True)]}, tokens
    )
    low, high = texts["tuned"]["change_interval"]
    assert low < texts["tuned"]["change"] < high and texts["tokens"] == 5000
    result = report(hits(5, 200), hits(150, 200)) | {"forgetting": {"general text": texts}}
    assert verdict(result, max_forgetting=high)["passed"]
    found = verdict(result, max_forgetting=texts["tuned"]["change"])
    assert "more than gate.max_forgetting" in found["reasons"][0]
    assert "can't be checked" in verdict(report(hits(0, 200), hits(200, 200)), max_forgetting=1)[
        "reasons"
    ][0]  # fmt: skip


def test_a_gate_on_what_is_not_measured_is_a_fault_of_the_recipe() -> None:
    gate = GateSection(slice_floors={"language=zh": 0.5}, max_forgetting=0.1)
    evaluation = EvaluationSection(metrics=("cross_entropy",), general_text=False)
    with pytest.raises(RecipeError) as error:
        check_gate(gate, evaluation, source="recipe")
    assert [fault.partition(":")[0] for fault in error.value.faults] == [
        "gate.metric", "gate.slice_floors", "gate.max_forgetting",
    ]  # fmt: skip
