"""Per-row scores, and what they say with how much certainty."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.errors import DataError, RecipeError, UsageError
from tuneline.evaluate.bootstrap import RESAMPLES, interval, resampled_means, weighted_mean
from tuneline.evaluate.metrics import (
    METRICS,
    Answer,
    chrf,
    exact_match,
    json_fields,
    metric_named,
    rouge_l,
    score_row,
    token_f1,
    valid_json,
    words,
)
from tuneline.recipe import EvaluationSection, GateSection, check


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("red", "red", 1.0),
        (" red\n", "red", 1.0),
        ("Red", "red", 0.0),
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ('{"a": 1}', '{"a": "1"}', 0.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ("1.0", "1", 0.0),
        ('{"a": 1} and more', '{"a": 1}', 0.0),
        ("", "red", 0.0),
        ("[" * 100_000, "[1]", 0.0),
    ],
)
def test_exact_match(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [  # computed with rouge-score 0.1.2, rougeL, no stemming
        ("the cat sat on the mat", "the cat is on a mat", 0.6666666666666666),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("A B C D, e f!", "b a c f d", 0.5454545454545454),
        (
            "ship 12 crates to Belrin today",
            "please ship 12 crates of figs to Belrin",
            0.7142857142857143,
        ),
    ],
)
def test_rouge_l_agrees_with_the_reference_implementation(
    answer: str, reference: str, score: float
) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score, abs=1e-12)


def test_rouge_l_reads_scripts_without_spaces() -> None:
    assert words("我要 3 杯Tea") == ["我", "要", "3", "杯", "tea"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert rouge_l("我要三杯茶", "我要两杯茶") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the red fox", "red fox the", 1.0),
        ("a a b", "a b b", 2 / 3),
        ("red", "blue", 0.0),
        ("", "blue", 0.0),
        ("", "", 1.0),
        ("?!", "...", 1.0),
    ],
)
def test_token_f1(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)


def test_chrf_is_sacrebleus() -> None:
    from sacrebleu.metrics.chrf import CHRF

    given_, wanted = "the cat sat on a mat", "the cat sits on the mat"
    assert chrf(given_, wanted) == CHRF().sentence_score(given_, [wanted]).score
    assert chrf("same", "same") == 100.0
    assert chrf("", "") == 100.0 and chrf("", "x") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "valid", "fields"),
    [
        ('{"a": 1, "b": {"c": 2}}', '{"b": {"c": 2}, "a": 1}', 1.0, 1.0),
        ('{"a": 1, "b": {"c": 3}}', '{"b": {"c": 2}, "a": 1}', 1.0, 0.5),
        ('{"a": 1, "x": 1}', '{"a": 1}', 1.0, 0.5),  # an invented field is wrong too
        ('{"a": true}', '{"a": 1}', 1.0, 0.0),
        ("[1, 2]", "[2, 1]", 1.0, 0.0),
        ("[]", "{}", 1.0, 0.0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 0.0, 0.0),
        ('{"a": NaN}', '{"a": 1}', 0.0, 0.0),
        ("[" * 100_000, "[1]", 0.0, 0.0),
        ('{"a": 1}', "plain words", None, None),
        ('{"a": 1}', "17", 1.0, None),
    ],
)
def test_json_metrics_apply_where_the_reference_is_json(
    answer: str, reference: str, valid: float | None, fields: float | None
) -> None:
    assert valid_json(answer, reference) == valid
    assert json_fields(answer, reference) == fields


@settings(deadline=None)  # the first example imports the libraries
@given(st.text(max_size=60), st.text(max_size=60))
def test_every_score_lies_on_its_scale(answer: str, reference: str) -> None:
    for name in METRICS:
        metric = metric_named(name)
        if metric.score is None or metric.highest is None:
            continue
        score = score_row(metric, Answer(answer, reference, {}), 0)
        assert score is None or 0 <= score <= metric.highest + 1e-9
        own = score_row(metric, Answer(reference, reference, {}), 0)
        assert own is None or own == pytest.approx(metric.highest)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def test_the_interval_agrees_with_the_normal_one_where_that_holds() -> None:
    scores = column(*[1.0] * 700, *[0.0] * 300)
    low, high = interval(resampled_means(scores, np.ones_like(scores))[:, 0])
    half = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    # the bootstrap's own noise with 10,000 resamples is below a tenth of the interval
    assert low == pytest.approx(0.7 - half, abs=half / 10)
    assert high == pytest.approx(0.7 + half, abs=half / 10)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=50))
def test_the_interval_holds_the_mean_and_is_reproducible(scores: list[float]) -> None:
    values = column(*scores)
    means = resampled_means(values, np.ones_like(values))[:, 0]
    low, high = interval(means)
    assert low <= sum(scores) / len(scores) <= high
    assert np.array_equal(resampled_means(values, np.ones_like(values))[:, 0], means)


def test_columns_share_their_resamples() -> None:
    rng = np.random.default_rng(1)
    first = rng.random((200, 1))
    pair = np.concatenate([first, first + 0.25], axis=1)
    means = resampled_means(pair, np.ones_like(pair))
    assert means.shape == (RESAMPLES, 2)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25, atol=1e-12)
    assert means[:, 0].std() > 0.01  # each column by itself does vary


def test_means_are_weighted() -> None:
    values, weights = column(1.0, 5.0, 9.0), column(3.0, 1.0, 0.0)
    assert weighted_mean(values, weights) == 2.0
    assert math.isnan(weighted_mean(values, np.zeros_like(values)))
    kept = resampled_means(values, weights)[:, 0]
    kept = kept[~np.isnan(kept)]
    assert kept.min() == 1.0 and kept.max() == 5.0  # the row without weight never counts
    assert all(map(math.isnan, interval(np.array([np.nan, np.nan]))))


def install(folder: Path, points: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with entry points, as pip would lay it out."""
    info = folder / "own_metrics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-metrics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tuneline.metrics]\n{points}\n")
    (folder / "own_metrics.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)


OWN = """
from tuneline.evaluate.metrics import Metric
def polite(answer):
    return float("please" in answer.text)
def broken(answer):
    return 1 / 0
def odd(answer):
    return float("nan")
length = Metric("length", "length", lambda a: len(a.text), higher_is_better=False, highest=None)
number = 17
"""


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("polite", "broken", "odd", "length", "number")
    points = "\n".join(f"{name} = own_metrics:{name}" for name in names)
    install(tmp_path, f"{points}\nabsent = own_metrics:absent", OWN, monkeypatch)


@pytest.mark.usefixtures("own_metrics")
def test_packages_bring_metrics() -> None:
    section = check(EvaluationSection, {"metrics": ["polite", "length"]}, source="evaluation")
    polite, length = (metric_named(name) for name in section.metrics)
    answer = Answer("yes please", "yes", {})
    assert score_row(polite, answer, 0) == 1.0 and polite.higher_is_better
    assert score_row(length, answer, 0) == 10.0 and not length.higher_is_better


@pytest.mark.usefixtures("own_metrics")
@pytest.mark.parametrize(
    ("name", "words"), [("broken", "ZeroDivisionError"), ("odd", "finite number")]
)
def test_a_packages_failing_metric_names_itself_and_the_row(name: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"metric {name} .*test row 7.*"):
        score_row(metric_named(name), Answer("x", "y", {}), 7)
    with pytest.raises(DataError, match=words):
        score_row(metric_named(name), Answer("x", "y", {}), 7)


@pytest.mark.usefixtures("own_metrics")
@pytest.mark.parametrize("name", ["absent", "number"])
def test_an_entry_point_that_is_no_metric_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"metric {name} \\(own_metrics:{name}\\)"):
        metric_named(name)


def test_an_unknown_metric_is_a_fault_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'rouge_l'"):
        check(EvaluationSection, {"metrics": ["rougel"]}, source="evaluation")
    with pytest.raises(RecipeError, match="metric 'accuracy' is unknown"):
        check(GateSection, {"metric": "accuracy"}, source="gate")
