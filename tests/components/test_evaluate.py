"""Scores, intervals, the verdict and the page."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneline.evaluate.evaluate import compare
from tuneline.evaluate.metrics import bootstrap_interval, exact_match
from tuneline.evaluate.report import render_report
from tuneline.recipe import GateSection


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


def test_the_interval_agrees_with_the_normal_one_where_that_holds() -> None:
    scores = [1.0] * 700 + [0.0] * 300
    low, high = bootstrap_interval(scores)
    half = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    # the bootstrap's own noise with 10,000 resamples is below a tenth of the interval
    assert low == pytest.approx(0.7 - half, abs=half / 10)
    assert high == pytest.approx(0.7 + half, abs=half / 10)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=50))
def test_the_interval_holds_the_mean_and_is_reproducible(scores: list[float]) -> None:
    low, high = bootstrap_interval(scores)
    assert low <= sum(scores) / len(scores) <= high
    assert bootstrap_interval(scores) == (low, high)


def rows(base: int, tuned: int, count: int) -> list[dict[str, float]]:
    return [
        {"base_exact_match": float(i < base), "tuned_exact_match": float(i < tuned)}
        for i in range(count)
    ]


def test_a_clear_gain_passes() -> None:
    result = compare(rows(5, 90, 120), GateSection(min_gain=0.3))
    assert result["verdict"]["passed"] and result["verdict"]["reasons"] == []


@pytest.mark.parametrize(
    ("base", "tuned", "count", "reason"),
    [
        (50, 50, 200, "not above"),  # a tie does not promote
        (90, 5, 120, "not above"),
        (50, 53, 200, "not above"),  # inside the noise
        (0, 50, 50, "fewer than gate.min_rows 100"),
    ],
)
def test_a_doubtful_gain_is_refused_with_the_reason(
    base: int, tuned: int, count: int, reason: str
) -> None:
    verdict = compare(rows(base, tuned, count), GateSection())["verdict"]
    assert not verdict["passed"]
    assert reason in "; ".join(verdict["reasons"])


class Page(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]


def test_the_page_is_self_contained_and_escapes_what_data_says() -> None:
    evil = "<script>alert(1)</script>"
    result = compare(rows(5, 90, 120), GateSection())
    result["eval_set_digest"] = "sha256:0"
    result["samples"] = [
        {
            "question": evil,
            "reference": evil,
            "base": evil,
            "tuned": evil,
            "base_exact_match": 0.0,
            "tuned_exact_match": 1.0,
        }
    ]
    split = {"rows": 1, "tokens": 2, "supervised_tokens": 1, "longest_tokens": 2}
    html = render_report(
        result,
        history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}],
        contract={
            "rows_in": 1,
            "duplicates_dropped": 0,
            "in_test_dropped": 0,
            "too_long_dropped": 0,
            "splits": {"train": split},
        },
        config={"method": {"name": "lora"}},
        base_model={"reference": evil, "digest": "sha256:1"},
    )
    page = Page()
    page.feed(html)
    assert "script" not in page.tags and page.links == []
    assert "polyline" in page.tags and "Gate passed" in html
    assert len(html) < 1_000_000
