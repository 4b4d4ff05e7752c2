"""Tasks of EleutherAI's lm-eval on models that are in memory, document by document.

A task is loaded once and put to each model in turn, so that all of them see the same prompts; that
they did is checked by a digest of every prompt, target and setting. Metrics that lm-eval averages
over documents keep a score each and are compared as the rows of the test split are; of the others
(perplexity over a corpus, F1 over a corpus, BLEU) there is only lm-eval's one figure a model.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tuneline.artifacts import digest_of
from tuneline.base_model import cache_dir
from tuneline.errors import ArtifactError, DataError
from tuneline.evaluate.compare import BASE, TUNED, compare
from tuneline.evaluate.generate import virtual_tokens
from tuneline.evaluate.metrics import Metric
from tuneline.evaluate.task_files import (
    check_tasks,
    of_lm_eval,
    read_task_file,
    unreachable,
    unsafe,
)
from tuneline.progress import report
from tuneline.recipe import EvaluationSection, is_task_file, task_label

_SEED: Final = 1234  # lm-eval's own, of few-shot examples
_NO_FILTER: Final = "none"
_LOCAL_BUILDERS: Final = ("json", "csv", "parquet", "arrow", "text")
_MAX_GEN_TOKENS: Final = 256  # lm-eval's own, where a task sets no max_gen_toks


@dataclass(frozen=True)
class LoadedTask:
    """What one entry of evaluation.tasks stands for."""

    label: str
    leaves: dict[str, Any]
    """lm-eval's name -> its task; several of a group or tag, whose documents are pooled."""


@dataclass(frozen=True)
class TaskResult:
    """One model on one task; a plain JSON value by `asdict`."""

    digest: str
    """Of all prompts, targets and settings, and lm-eval's version."""
    versions: dict[str, str]
    """lm-eval's name -> the version that the task states."""
    documents: list[str]
    """`name:number` of each."""
    cut: int
    """Documents whose prompt was longer than the model's context, and lost its start."""
    metrics: dict[str, dict[str, Any]]
    """Metric -> `higher_is_better`, `score`, `stderr` and `documents`: a score each, or None where
    the metric is not a mean over documents."""


def load_tasks(evaluation: EvaluationSection) -> list[LoadedTask]:
    """Load each task and its data set; without tasks, lm-eval is not imported.

    Raises:
        RecipeError: what `check_tasks` refuses.
        DataError: a data set can't be had, or does not fit its task.
    """
    check_tasks(evaluation)
    if not evaluation.tasks:
        return []
    with _quiet():
        from lm_eval.tasks import TaskManager

        wanted = [task if is_task_file(task) else of_lm_eval(task) for task in evaluation.tasks]
        # groups alone need lm-eval's index of all its tasks, which took it 20 s to build
        manager = TaskManager(include_defaults=not all(map(is_task_file, wanted)))
        if not evaluation.task_code:
            _sandbox_templates()
        return [
            _load(manager, task, name, evaluation)
            for task, name in zip(evaluation.tasks, wanted, strict=True)
        ]


def _load(manager: Any, task: str, wanted: Any, evaluation: EvaluationSection) -> LoadedTask:
    label = task_label(task)
    try:
        if is_task_file(task):
            wanted = _configuration(Path(task), allow_code=evaluation.task_code)
        leaves = manager.load([wanted])["tasks"]
        for leaf in leaves.values():
            if leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
    except _faults() as error:
        if isinstance(error, _unreachable()):
            raise DataError(f"{unreachable(label)} ({_first_line(error)})") from error
        raise DataError(
            f"task {label} can't be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not evaluation.task_code and any(
        getattr(leaf, "UNSAFE_CODE", False) for leaf in leaves.values()
    ):
        raise DataError(unsafe(label))
    return LoadedTask(label, leaves)


def _configuration(path: Path, *, allow_code: bool) -> dict[str, Any]:
    values = read_task_file(path, allow_code=allow_code)
    kwargs = values["dataset_kwargs"]
    if allow_code:
        from lm_eval.tasks._yaml_loader import load_yaml

        values = load_yaml(path, resolve_func=True)
    else:
        _check_metrics(values.get("metric_list") or [])
    if values.get("dataset_path") in _LOCAL_BUILDERS:
        kwargs = {"cache_dir": str(cache_dir() / "datasets"), **kwargs}
    return values | {"dataset_kwargs": kwargs}


def _check_metrics(entries: Sequence[Mapping[str, Any]]) -> None:
    """lm-eval looks for a metric that it does not have on the hub, and runs what it finds."""
    from lm_eval.api import registry

    import_module("lm_eval.api.metrics")  # fills the registries
    for entry in entries:
        name, aggregation = entry["metric"], entry.get("aggregation")
        if name not in registry.metric_registry:
            raise ValueError(f"lm-eval has no metric {name} of its own")
        if aggregation is not None and aggregation not in registry.aggregation_registry:
            raise ValueError(f"metric {name}: lm-eval has no aggregation {aggregation}")


def _sandbox_templates() -> None:
    """lm-eval renders a task's templates in an environment from which Python can be reached."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(
        loader=utils.env.loader,
        undefined=utils.env.undefined,
        keep_trailing_newline=utils.env.keep_trailing_newline,
    )
    sandbox.filters |= utils.env.filters
    utils.env = sandbox


def run_tasks(
    name: str,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[LoadedTask],
    evaluation: EvaluationSection,
    pace: Callable[[str, str], Callable[[int, int], None]],
) -> dict[str, TaskResult]:
    """Put the tasks to one model; label -> result.

    Args:
        name: `base`, `tuned` or `champion`.
        model: a causal LM on its device, wrapped by PEFT or not.
        tokenizer: one of its own, that adds what plain text starts with; it may be changed.
        tasks: as loaded, the same for every model.
        evaluation: batch size, limit and the like.
        pace: of what comes before and after the counts, a function that is told the progress.

    Raises:
        DataError: a task fails on a document.
    """
    if not tasks:
        return {}
    if evaluation.task_chat_template and not tokenizer.chat_template:
        raise DataError(
            "evaluation.task_chat_template: the model's tokenizer has no chat template: set it to "
            "false"
        )
    virtual = virtual_tokens(model)
    with _quiet(), _untouched(model):
        # as a module's attribute: its decorator hides the parameters from a type checker
        wrapper: Any = import_module("lm_eval.models.huggingface").HFLM
        context = getattr(model.config, "max_position_embeddings", None)
        lm = wrapper(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            # behind virtual tokens no padding may come, which batches of one have none of
            batch_size=1 if virtual else evaluation.task_batch_size,
            max_length=context - virtual if context and virtual else None,
            trust_remote_code=False,
        )
        for ask in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, ask, partial(getattr(lm, ask), disable_tqdm=True))
        return {
            task.label: _run(
                task, lm, evaluation, f"{name} model", pace(f"{name}:", f"requests of {task.label}")
            )
            for task in tasks
        }


def _run(
    task: LoadedTask,
    lm: Any,
    evaluation: EvaluationSection,
    who: str,
    on_request: Callable[[int, int], None],
) -> TaskResult:
    from lm_eval.evaluator import evaluate
    from transformers import set_seed

    set_seed(_SEED)  # of tasks that sample
    for leaf in task.leaves.values():
        leaf.set_fewshot_seed(seed=_SEED)
    lm.set_cache_hook(_Counting(task, on_request))
    try:
        found = evaluate(
            lm,
            {"tasks": task.leaves},
            limit=evaluation.task_limit,
            bootstrap_iters=0,  # of corpus metrics, in a pool of processes; means have a formula
            apply_chat_template=evaluation.task_chat_template,
            fewshot_as_multiturn=evaluation.task_chat_template,
            confirm_run_unsafe_code=evaluation.task_code,
        )
    except _faults() as error:
        raise DataError(
            f"task {task.label} failed on the {who}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return _result(task, found, lm)


class _Counting:
    """Stands where lm-eval's cache of answers would, and counts them."""

    def __init__(self, task: LoadedTask, on_request: Callable[[int, int], None]) -> None:
        self._leaves, self._on_request = task.leaves, on_request
        self._done = self._total = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One request is done."""
        self._total = self._total or sum(len(t.instances) for t in self._leaves.values())
        self._done += 1
        self._on_request(self._done, max(self._total, self._done))


def _result(task: LoadedTask, found: Any, lm: Any) -> TaskResult:
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    asked, documents = [], []
    cut = 0
    for name in task.leaves:
        first = samples[name][0]["filter"]
        for sample in sorted(samples[name], key=lambda s: s["doc_id"]):
            if sample["filter"] != first:
                continue
            documents.append(f"{name}:{sample['doc_id']}")
            asked.append([sample["doc_hash"], sample["target_hash"], _plain(sample["arguments"])])
            cut += _is_cut(sample["arguments"], lm)
    versions = {name: str(found["versions"].get(name)) for name in task.leaves}
    return TaskResult(
        digest=digest_of([version("lm_eval"), versions, asked]),
        versions=versions,
        documents=documents,
        cut=cut,
        metrics=_metrics(task, found, samples),
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _is_cut(arguments: Sequence[Sequence[Any]], lm: Any) -> bool:
    """Whether lm-eval took the start of a prompt away, which it only logs."""
    for context, *rest in arguments:
        continuation = rest[0] if rest else ""
        if isinstance(continuation, dict):
            room = lm.max_length - int(continuation.get("max_gen_toks", _MAX_GEN_TOKENS))
            if len(lm.tok_encode(context)) > room:
                return True
        elif rest and len(lm.tok_encode(context + continuation)) > lm.max_length + 1:
            return True
    return False


def _metrics(
    task: LoadedTask, found: Any, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    each = [_of_leaf(name, leaf, found, samples[name]) for name, leaf in task.leaves.items()]
    if len(each) == 1:
        return each[0]
    pooled = {}
    for metric, first in each[0].items():
        parts = [values.get(metric) for values in each]
        if any(part is None or part["documents"] is None for part in parts):
            continue
        scores = [score for part in parts if part for score in part["documents"]]
        pooled[metric] = first | _mean(scores) | {"documents": scores}
    return pooled


def _of_leaf(
    name: str, leaf: Any, found: Any, samples: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    from lm_eval.api.metrics import mean

    result = {}
    for key, score in found["results"][name].items():
        metric, comma, chosen = key.rpartition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        filtered = [s for s in samples if s["filter"] == chosen]
        values = [s.get(metric) for s in sorted(filtered, key=lambda s: s["doc_id"])]
        # without an aggregation of its own, lm-eval takes the mean
        averaged = leaf.aggregation().get(metric, mean) is mean
        rows = _numbers(values) if averaged else None
        known = leaf.higher_is_better().get(metric)
        result[metric if chosen == _NO_FILTER else f"{metric},{chosen}"] = {
            "higher_is_better": known is None or bool(known),
            "score": _finite(score),
            "stderr": None,
            "documents": rows,
        } | ({} if rows is None else {"stderr": _mean(rows)["stderr"]})
    return result


def _numbers(values: Sequence[Any]) -> list[float | None] | None:
    """Scores as numbers, None where a document has none; None if they are something else."""
    if any(value is not None and _finite(value) is None for value in values):
        return None
    rows = [_finite(value) for value in values]
    return rows if any(row is not None for row in rows) else None


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _mean(scores: Sequence[float | None]) -> dict[str, float | None]:
    """The mean and its standard error, s / sqrt(n), as lm-eval computes them."""
    kept = [score for score in scores if score is not None]
    mean = sum(kept) / len(kept)
    if len(kept) < 2:
        return {"score": mean, "stderr": None}
    variance = sum((score - mean) ** 2 for score in kept) / (len(kept) - 1)
    return {"score": mean, "stderr": math.sqrt(variance / len(kept))}


def compare_tasks(
    results: Mapping[str, Mapping[str, TaskResult]], tasks: Sequence[LoadedTask]
) -> dict[str, Any]:
    """What report.json has of each task.

    Args:
        results: model -> label -> result.
        tasks: as loaded.

    Raises:
        ArtifactError: the models were asked different things.
    """
    report_of = {}
    for task in tasks:
        label = task.label
        of_base = results[BASE][label]
        for model, of_model in results.items():
            if of_model[label].digest != of_base.digest:
                raise ArtifactError(
                    f"task {label}: {BASE} and {model} were asked different things: the task, its "
                    "data or lm-eval has changed since the base was measured; measure it again"
                )
        report_of[label] = {
            "names": list(task.leaves),
            "versions": of_base.versions,
            "digest": of_base.digest,
            "lm_eval": version("lm_eval"),
            "documents": len(of_base.documents),
            "of_documents": sum(len(leaf.eval_docs) for leaf in task.leaves.values()),
            "cut": {model: of_model[label].cut for model, of_model in results.items()},
            "metrics": {
                metric: _compare_one(
                    metric, {model: of_model[label] for model, of_model in results.items()}
                )
                for metric in of_base.metrics
                # a task's own function may leave one out
                if all(metric in of_model[label].metrics for of_model in results.values())
            },
        }
    return report_of


def _compare_one(metric: str, results: Mapping[str, TaskResult]) -> dict[str, Any]:
    found = {model: result.metrics[metric] for model, result in results.items()}
    higher: bool = found[BASE]["higher_is_better"]
    if any(values["documents"] is None for values in found.values()):
        return _without_intervals(metric, found, higher)
    scores = {model: {metric: values["documents"]} for model, values in found.items()}
    present = [s for values in scores.values() for s in values[metric] if s is not None]
    counts = len(results[BASE].documents)
    block = compare(
        scores,
        [1] * counts,
        [
            Metric(
                metric,
                metric,
                higher_is_better=higher,
                highest=1.0 if all(0 <= score <= 1 for score in present) else None,
            )
        ],
        range(counts),
    )[metric]
    for model, values in found.items():
        block[model]["stderr"] = values["stderr"]
    return block


def _without_intervals(
    metric: str, found: Mapping[str, Mapping[str, Any]], higher: bool
) -> dict[str, Any]:
    block: dict[str, Any] = {
        "title": metric,
        "unit": "",
        "highest": None,
        "higher_is_better": higher,
        "rows": 0,
        "rows_excluded": 0,
        "excluded": [],
    }
    nothing = [None, None]
    for model, values in found.items():
        block[model] = {"score": values["score"], "interval": nothing, "stderr": None}
    for model in found:
        if model == TUNED or TUNED not in found:
            continue
        tuned, other = found[TUNED]["score"], found[model]["score"]
        difference = None if tuned is None or other is None else tuned - other
        block[f"over_{model}"] = {
            "difference": difference,
            "difference_interval": nothing,
            "gain": difference if difference is None or higher else -difference,
            "gain_interval": nothing,
        }
    return block


def document_scores(
    results: Mapping[str, Mapping[str, TaskResult]], tasks: Sequence[LoadedTask]
) -> Iterator[dict[str, Any]]:
    """The kept scores, a line a document: `task`, `document` and `scores` by model and metric."""
    for task in tasks:
        of_task = {model: of_model[task.label] for model, of_model in results.items()}
        for position, document in enumerate(of_task[BASE].documents):
            yield {
                "task": task.label,
                "document": document,
                "scores": {
                    model: {
                        metric: values["documents"][position]
                        for metric, values in result.metrics.items()
                        if values["documents"] is not None
                    }
                    for model, result in of_task.items()
                },
            }


def tell(tasks: Mapping[str, Any]) -> None:
    """The tasks' first metrics, for the person who runs the step."""
    for label, found in tasks.items():
        for metric, block in list(found["metrics"].items())[:1]:
            if TUNED in block and None not in (block[BASE]["score"], block[TUNED]["score"]):
                report(
                    f"task {label}, {metric} on {found['documents']} documents: base "
                    f"{block[BASE]['score']:.3f}, tuned {block[TUNED]['score']:.3f}"
                )
        if cut := max(found["cut"].values()):
            report(
                f"warning: task {label}: {cut} of {found['documents']} documents were longer than "
                "the model's context and lost their start"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells much at the level of warnings; what matters of it is in the report."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # peft's, of virtual tokens: without padding, positions need not be told
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """HFLM ties a model's weights again, which could undo what was tuned apart."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def _faults() -> tuple[type[Exception], ...]:
    """What lm-eval raises of a task that is not as it should be, or that it can't get."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    return (
        OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError,
        SyntaxError, DatasetsError, TemplateError,
    )  # fmt: skip


def _unreachable() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetNotFoundError

    return (ConnectionError, DatasetNotFoundError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
