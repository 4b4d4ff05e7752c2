"""Per-row scores: what is measured, and what counts as better.

A metric scores one row. Metrics of kind `tokens` come from the model's probabilities of the
supervised tokens and need no generated answer; metrics of kind `answer` compare a generated answer
with its reference. More metrics come from installed packages, through the entry point group
`tuneline.metrics`: a `Metric`, or a function of an `Answer` whose higher values are better.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, Literal

from tuneline.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    import regex

ENTRY_POINTS: Final = "tuneline.metrics"


@dataclass(frozen=True)
class Answer:
    """What a metric sees of one row."""

    text: str
    """As generated, special tokens removed."""
    reference: str
    row: Mapping[str, Any]
    """The row of the test split: `prompt`, `question`, `reference`, `columns`."""


@dataclass(frozen=True)
class Metric:
    """One way to score a row."""

    name: str
    title: str
    score: Callable[[Answer], float | None] | None = None
    """None where it does not apply to the row, which then counts for no model. Metrics of kind
    `tokens` have no function: their values come with the likelihoods."""
    kind: Literal["tokens", "answer"] = "answer"
    higher_is_better: bool = True
    unit: str = ""
    highest: float | None = 1.0
    """Of the scale, which starts at 0; None: open."""


def exact_match(answer: str, reference: str) -> float:
    """1.0 if the answer is the reference: as text without outer white space, or as JSON value."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return 1.0
    try:
        return float(_canonical(_parse(answer)) == _canonical(_parse(reference)))
    except (ValueError, RecursionError):
        return 0.0


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the bag of words (Rajpurkar et al. 2016).

    Unlike SQuAD's script it keeps articles, which only English has.
    """
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1), without stemming."""
    from rapidfuzz.distance import LCSseq

    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted))


def chrf(answer: str, reference: str) -> float:
    """Character n-gram F score, 0 to 100 (Popovic 2015), with sacrebleu's defaults (chrF2)."""
    if not answer.split() or not reference.split():
        return 100.0 * float(answer.split() == reference.split())
    return _chrf().sentence_score(answer, [reference]).score


def valid_json(answer: str, reference: str) -> float | None:
    """Whether the answer parses as JSON; for rows whose reference does.

    A code fence or a sentence around it is not JSON: a program that reads the answer fails on it.
    """
    if not _is_json(reference):
        return None
    return float(_is_json(answer))


def json_fields(answer: str, reference: str) -> float | None:
    """Share of fields with the right value, of all fields that reference or answer have.

    For rows whose reference is a JSON object or array. Nested ones count by their innermost values;
    a missing field and an invented one are both wrong.
    """
    try:
        parsed = _parse(reference)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, (dict, list)):
        return None
    try:
        given = _leaves(_parse(answer))
    except (ValueError, RecursionError):
        return 0.0
    wanted = _leaves(parsed)
    right = sum(given.get(path) == value for path, value in wanted.items())
    return right / len(wanted.keys() | given.keys())


def _of_texts(score: Callable[[str, str], float | None]) -> Callable[[Answer], float | None]:
    return lambda answer: score(answer.text, answer.reference)


BUILT_IN: Final = (
    Metric("exact_match", "exact match", _of_texts(exact_match)),
    Metric("token_f1", "token F1", _of_texts(token_f1)),
    Metric("rouge_l", "ROUGE-L", _of_texts(rouge_l)),
    Metric("chrf", "chrF", _of_texts(chrf), highest=100.0),
    Metric("valid_json", "valid JSON", _of_texts(valid_json)),
    Metric("json_fields", "JSON fields", _of_texts(json_fields)),
    Metric(
        "cross_entropy",
        "cross-entropy",
        kind="tokens",
        higher_is_better=False,
        unit="nats per token",
        highest=None,
    ),
    Metric("perplexity", "perplexity", kind="tokens", higher_is_better=False, highest=None),
)


METRICS: Final = tuple(metric.name for metric in BUILT_IN)
"""What is measured unless a recipe chooses."""


def names() -> list[str]:
    """All metrics that can be named in a recipe."""
    return [*METRICS] + [point.name for point in _entry_points()]


def unknown_metric(name: str) -> str | None:
    """The sentence for a metric that does not exist; None if it does."""
    known = names()
    if name in known:
        return None
    return (
        f"metric '{name}' is unknown; metrics are {', '.join(known)}, and what installed packages "
        f"bring as entry points of the group {ENTRY_POINTS}.{did_you_mean(name, known)}"
    )


def metric_named(name: str) -> Metric:
    """The metric with this name.

    Raises:
        UsageError: there is none, or a package's metric can't be loaded.
    """
    if fault := unknown_metric(name):
        raise UsageError(fault)
    for metric in BUILT_IN:
        if metric.name == name:
            return metric
    point = next(point for point in _entry_points() if point.name == name)
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"metric {name} ({point.value}) can't be loaded: {error}") from error
    if isinstance(found, Metric):
        return found
    if not callable(found):
        raise UsageError(
            f"metric {name} ({point.value}) is {type(found).__name__}: a Metric, or a function of "
            "an Answer that returns a number or None, is needed"
        )
    function: Any = found
    return Metric(name, name.replace("_", " "), function, highest=None)


def _entry_points() -> Sequence[EntryPoint]:
    return [point for point in entry_points(group=ENTRY_POINTS) if point.name not in METRICS]


def score_row(metric: Metric, answer: Answer, number: int) -> float | None:
    """One score, checked.

    Raises:
        DataError: a package's metric failed or gave something else than a finite number.
    """
    assert metric.score is not None
    try:
        value = metric.score(answer)
        score = None if value is None else float(value)
    except Exception as error:  # whatever a package's own code raises
        raise DataError(
            f"metric {metric.name} failed on test row {number}: {type(error).__name__}: {error}"
        ) from error
    if score is not None and not abs(score) < float("inf"):
        raise DataError(
            f"metric {metric.name} gave {score} for test row {number}: a finite number is needed, "
            "or None where it does not apply"
        )
    return score


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits; scripts without spaces by character."""
    return _words().findall(text.lower())


@cache
def _words() -> regex.Pattern[str]:
    import regex

    alone = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    return regex.compile(rf"(?V1)[{alone}]|[\p{{L}}\p{{M}}\p{{N}}--[{alone}]]+")


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _parse(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")  # Python reads NaN and Infinity

    return json.loads(text, parse_constant=refuse)


def _is_json(text: str) -> bool:
    try:
        _parse(text)
    except (ValueError, RecursionError):
        return False
    return True


def _canonical(value: Any) -> str:
    # as text, since Python takes true for 1 and 1 for 1.0
    return json.dumps(value, sort_keys=True)


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], str]:
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {path: _canonical(value)}
    found: dict[tuple[str | int, ...], str] = {}
    for key, inner in items:
        found |= _leaves(inner, (*path, key))
    return found
