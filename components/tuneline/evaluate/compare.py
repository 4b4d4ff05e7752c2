"""From per-row scores to means, paired differences and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from tuneline.evaluate.bootstrap import Array, interval, resampled_means, weighted_mean
from tuneline.evaluate.metrics import Metric

Scores = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Model -> metric -> a score a row."""

BASE: Final = "base"
TUNED: Final = "tuned"
CHAMPION: Final = "champion"
_MOST_NAMED: Final = 10
_HIGHEST_EXPONENT: Final = 700.0  # of exp in doubles


def compare(
    scores: Scores,
    tokens: Sequence[int],
    metrics: Sequence[Metric],
    rows: Sequence[int],
    numbers: Sequence[int] = (),
) -> dict[str, dict[str, Any]]:
    """Every metric over some rows: means and intervals of each model, and the tuned one's gains.

    A row counts for a metric if every model has a score there. Where only some models have one, the
    metric left it out for what a model answered, which says nothing of the row: `rows_excluded`
    counts such rows and `excluded` names the first. Metrics of kind `tokens` weigh a
    row by its supervised tokens; perplexity is the exponential of that mean.

    Args:
        scores: of `base`, `tuned`, and `champion` where there is one that can be compared.
        tokens: supervised tokens of each row.
        metrics: what to report.
        rows: positions of the rows to take.
        numbers: what each row is called; unset: its position.
    """
    models = list(scores)
    columns = [_columns(metric, scores, models, tokens, rows) for metric in metrics]
    values = np.concatenate([values for values, _ in columns], axis=1)
    weights = np.concatenate([weights for _, weights in columns], axis=1)
    resamples = resampled_means(values, weights)
    result = {}
    for index, metric in enumerate(metrics):
        part = slice(index * len(models), (index + 1) * len(models))
        excluded = [row for row in rows if _only_some(metric.name, scores, row)]
        result[metric.name] = _compare_one(
            metric, models, values[:, part], weights[:, part], resamples[:, part]
        ) | {
            "rows_excluded": len(excluded),
            "excluded": [numbers[row] if numbers else row for row in excluded[:_MOST_NAMED]],
        }
    return result


def _only_some(metric: str, scores: Scores, row: int) -> bool:
    return len({of_model[metric][row] is None for of_model in scores.values()}) > 1


def _columns(
    metric: Metric,
    scores: Scores,
    models: Sequence[str],
    tokens: Sequence[int],
    rows: Sequence[int],
) -> tuple[Array, Array]:
    found = np.array(
        [[scores[model][metric.name][row] for model in models] for row in rows], dtype=np.float64
    ).reshape(len(rows), len(models))
    scored = ~np.isnan(found).any(axis=1, keepdims=True)
    weight = np.array([tokens[row] if metric.kind == "tokens" else 1 for row in rows])
    weights = np.broadcast_to(weight.reshape(-1, 1) * scored, found.shape).astype(np.float64)
    return np.where(scored, found, 0.0), weights


def _compare_one(
    metric: Metric, models: Sequence[str], values: Array, weights: Array, resamples: Array
) -> dict[str, Any]:
    means = {m: weighted_mean(values[:, i], weights[:, i]) for i, m in enumerate(models)}
    drawn = {model: resamples[:, i] for i, model in enumerate(models)}
    if metric.name == "perplexity":
        means = {m: math.exp(min(mean, _HIGHEST_EXPONENT)) for m, mean in means.items()}
        drawn = {m: np.exp(np.minimum(d, _HIGHEST_EXPONENT)) for m, d in drawn.items()}
    sign = 1 if metric.higher_is_better else -1
    block: dict[str, Any] = {
        "title": metric.title,
        "unit": metric.unit,
        "highest": metric.highest,
        "higher_is_better": metric.higher_is_better,
        "rows": int((weights[:, 0] > 0).sum()),
    }
    for model in models:
        block[model] = {"score": _number(means[model]), "interval": _pair(drawn[model])}
    for other in models:
        if other == TUNED:
            continue
        difference = drawn[TUNED] - drawn[other]
        block[f"over_{other}"] = {
            "difference": _number(means[TUNED] - means[other]),
            "difference_interval": _pair(difference),
            "gain": _number(sign * (means[TUNED] - means[other])),
            "gain_interval": _pair(sign * difference),
        }
    return block


def compare_texts(nlls: Mapping[str, Sequence[float]], tokens: Sequence[int]) -> dict[str, Any]:
    """Cross-entropy of each model on a set of texts, and how much worse than the base it is.

    Args:
        nlls: model -> summed negative log-likelihood a text, in nats.
        tokens: predicted tokens of each text.
    """
    counts = np.array(tokens, dtype=np.float64)
    models = list(nlls)
    values = np.array([nlls[m] for m in models], dtype=np.float64).T / counts[:, None]
    weights = np.broadcast_to(counts[:, None], values.shape).astype(np.float64)
    resamples = resampled_means(values, weights)
    means = {m: weighted_mean(values[:, i], weights[:, i]) for i, m in enumerate(models)}
    base = models.index(BASE)
    found: dict[str, Any] = {"texts": len(counts), "tokens": int(counts.sum())}
    for index, model in enumerate(models):
        found[model] = {"score": means[model]}
        if model != BASE:
            found[model] |= {
                "change": means[model] - means[BASE],
                "change_interval": _pair(resamples[:, index] - resamples[:, base]),
            }
    return found


def _pair(resamples: Array) -> list[float | None]:
    return [_number(bound) for bound in interval(resamples)]


def _number(value: float) -> float | None:
    """JSON has no NaN: a mean over no row is null."""
    return None if math.isnan(value) else float(value)
