"""What one model does on the evaluation set: likelihoods, answers, likelihoods of general text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tuneline.evaluate.final_answer import FinalAnswer
from tuneline.evaluate.forgetting import TextSet
from tuneline.evaluate.generate import Generated, generate_answers
from tuneline.evaluate.likelihood import negative_log_likelihoods
from tuneline.evaluate.metrics import Answer, Metric, score_row
from tuneline.evaluate.rows import EvalRow
from tuneline.evaluate.tasks import LoadedTask, TaskResult, run_tasks
from tuneline.progress import minutes, tick
from tuneline.recipe import EvaluationSection

if TYPE_CHECKING:
    from torch import nn

_TICK_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Measured:
    """One model on all rows."""

    scores: dict[str, list[float | None]]
    """Metric -> a score a row; None where it does not apply."""
    answers: list[Generated | None] | None
    """None if no metric needed any."""
    general: dict[str, list[float]]
    """Text set -> negative log-likelihood a text, in nats."""
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    """Task of lm-eval -> what it found."""


def measure(
    name: str,
    model: nn.Module,
    rows: Sequence[EvalRow],
    tokens: Sequence[int],
    text_sets: Sequence[TextSet],
    metrics: Sequence[Metric],
    evaluation: EvaluationSection,
    max_new_tokens: int,
    final: FinalAnswer,
    tasks: Sequence[LoadedTask] = (),
    task_tokenizer: Any = None,
    generated: Sequence[Generated] | None = None,
) -> Measured:
    """Measure one model; answers are generated only where a metric needs them.

    Args:
        name: `base`, `tuned` or `champion`.
        model: on its device.
        rows: the evaluation set.
        tokens: supervised tokens of each row.
        text_sets: general text.
        metrics: to score with.
        evaluation: batch size and the like.
        max_new_tokens: longest answer.
        final: what of the tokens is the answer.
        tasks: of lm-eval.
        task_tokenizer: for them; one that adds what plain text starts with.
        generated: answers to all prompts, in order, where another engine gave them.

    Raises:
        ModelError: a likelihood is not finite.
        DataError: a package's metric or a task failed.
    """
    scores: dict[str, list[float | None]] = {}
    if any(metric.kind == "tokens" for metric in metrics):
        nlls = negative_log_likelihoods(
            model,
            [(row.input_ids, row.supervised) for row in rows],
            what=f"{name} model on the test split",
            on_row=_pace(f"{name}: loss of", "test rows"),
        )
        per_token = [nll / count for nll, count in zip(nlls, tokens, strict=True)]
        for metric in metrics:
            if metric.kind == "tokens":  # all of them are functions of this one
                scores[metric.name] = [*per_token]
    general = {
        text_set.name: negative_log_likelihoods(
            model,
            text_set.rows,
            what=f"{name} model on {text_set.name}",
            on_row=_pace(f"{name}: loss of", f"texts of {text_set.name}"),
        )
        for text_set in text_sets
    }
    answers = None
    if any(metric.kind == "answer" for metric in metrics):
        answers = _answers(name, model, rows, evaluation, max_new_tokens, final, generated)
        scores |= score_answers(metrics, rows, [a.text if a else None for a in answers])
    of_tasks = run_tasks(name, model, task_tokenizer, tasks, evaluation, _pace)
    return Measured(scores, answers, general, of_tasks)


def _answers(
    name: str,
    model: nn.Module,
    rows: Sequence[EvalRow],
    evaluation: EvaluationSection,
    max_new_tokens: int,
    final: FinalAnswer,
    generated: Sequence[Generated] | None,
) -> list[Generated | None]:
    asked = {position: row.prompt for position, row in enumerate(rows) if row.prompt is not None}
    if generated is None:
        generated = generate_answers(
            model,
            final.tokenizer,
            list(asked.values()),
            batch_size=evaluation.batch_size,
            batch_tokens=evaluation.batch_tokens,
            max_new_tokens=max_new_tokens,
            on_batch=_pace(f"{name}:", "answers"),
            read=final.of_ids,
            cut_prompts=True,
        )
    answers: list[Generated | None] = [None] * len(rows)
    for position, answer in zip(asked, generated, strict=True):
        answers[position] = answer
    return answers


def score_answers(
    metrics: Sequence[Metric], rows: Sequence[EvalRow], texts: Sequence[str | None]
) -> dict[str, list[float | None]]:
    """Scores of answers, metric by metric; None for a row without an answer.

    Raises:
        DataError: a package's metric failed.
    """
    return {
        metric.name: [
            None
            if text is None
            else score_row(metric, Answer(text, row.reference, row.fields), row.number)
            for row, text in zip(rows, texts, strict=True)
        ]
        for metric in metrics
        if metric.kind == "answer"
    }


def longest_answer(tokenizer: Any, rows: Sequence[EvalRow]) -> int:
    """A limit for answers in tokens: the longest reference plus a quarter, and an end token."""
    references = [row.rendered_reference for row in rows if row.prompt is not None]
    encoded: Mapping[str, Any] = tokenizer(references or [""], add_special_tokens=False)
    return math.ceil(1.25 * max(map(len, encoded["input_ids"]))) + 1


def _pace(before: str, after: str) -> Callable[[int, int], None]:
    started = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _TICK_SECONDS and not (done == total and shown > started):
            return
        shown = now
        left = (now - started) / done * (total - done)
        tick(f"{before} {done}/{total} {after}  ETA {minutes(left)}")

    return progress
