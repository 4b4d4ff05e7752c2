"""Base, tuned model and champion on the same rows -> EvalReport with the gate's verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact, digest_of
from tuneline.base_model import BaseModel
from tuneline.data_prep import chat
from tuneline.data_prep.prepare import CONTRACT
from tuneline.errors import ArtifactError, DataError, ModelError, RegistryError
from tuneline.evaluate.bootstrap import CONFIDENCE, RESAMPLES
from tuneline.evaluate.champion import Champion, current_champion, why_not_comparable
from tuneline.evaluate.compare import BASE, CHAMPION, TUNED, compare, compare_texts
from tuneline.evaluate.final_answer import FinalAnswer, final_answer
from tuneline.evaluate.forgetting import GENERAL, TextSet, read_text_sets
from tuneline.evaluate.gate import decide
from tuneline.evaluate.generate import Generated
from tuneline.evaluate.likelihood import predicted_tokens
from tuneline.evaluate.measure import Measured, longest_answer, measure, score_answers
from tuneline.evaluate.metrics import METRICS, Metric, metric_named
from tuneline.evaluate.report import render_report
from tuneline.evaluate.rows import EvalRow, digest_of_rows, read_test_rows, slices_of
from tuneline.evaluate.tasks import (
    LoadedTask,
    TaskResult,
    compare_tasks,
    document_scores,
    load_tasks,
    tell,
)
from tuneline.evaluate.vllm_answers import chosen_engine, served_by_vllm
from tuneline.progress import report
from tuneline.recipe import EvaluationSection, GateSection
from tuneline.tracking import Step, mlflow_key

SCORES: Final = "scores.jsonl"
TASK_SCORES: Final = "task_scores.jsonl"
REPORT: Final = "report.json"
HTML: Final = "report.html"
_MEASURED: Final = "measured.json"
_SAMPLES: Final = 3


def evaluate(
    model_reference: str,
    adapter_dir: Path,
    dataset_dir: Path,
    evaluation: EvaluationSection,
    gate: GateSection,
    output: Path,
    step: Step,
    *,
    champion_of: str = "",
    base_scores_dir: Path | None = None,
) -> Artifact:
    """Measure base, tuned model and champion on the test split, compare them, and decide.

    Args:
        model_reference: the base model.
        adapter_dir: an Adapter.
        dataset_dir: the PreparedDataset that it was trained on.
        evaluation: what is measured, and how.
        gate: what has to hold.
        output: folder of the EvalReport.
        step: the tracked step.
        champion_of: registered model whose champion is measured too; empty for none.
        base_scores_dir: of `measure_base`, where the base was measured before; None: it is now.

    Raises:
        ArtifactError: adapter, data set, base and the base's scores don't belong together.
        DataError: a metric, slice, text set or task that does not fit.
        ModelError: a model's losses are not finite.
        RecipeError: a task or an engine that is not there.
        RegistryError: the champion can't be fetched.
    """
    adapter = artifacts.load(adapter_dir, "adapter")
    dataset = artifacts.load(dataset_dir, "prepared_dataset")
    base = base_model.resolve(model_reference)
    check_lineage(adapter, base, dataset)
    metrics = [metric_named(name) for name in evaluation.metrics]
    rows, final = read_rows(base, dataset, evaluation.max_rows)
    # what can be wrong with the settings shows before a model is loaded
    _check_applies(metrics, rows, gate.metric)
    slices = slices_of(rows, evaluation.slices)
    tasks = load_tasks(evaluation)
    with artifacts.writing(output) as aside, ExitStack() as stack:
        champion = None
        if champion_of and gate.champion != "ignore":
            champion = stack.enter_context(current_champion(champion_of))
        found = _Evaluation(base, adapter, champion, rows, final, metrics, tasks, evaluation)
        if base_scores_dir is not None:
            found.measured[BASE] = _read_base_scores(base_scores_dir, base, dataset, evaluation)
        found.run()
        result = found.result(slices, gate)
        _write_lines(aside / SCORES, map(found.row, range(len(rows))))
        if tasks:
            _write_lines(aside / TASK_SCORES, document_scores(found.of_tasks(), tasks))
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        (aside / REPORT).write_text(text + "\n", encoding="utf-8")
        html = render_report(
            result,
            history=adapter.read_jsonl("history.jsonl"),
            contract=dataset.read_json(CONTRACT),
            config=adapter.manifest.config,
            base_model=base.identity(),
        )
        (aside / HTML).write_text(html, encoding="utf-8")
        artifacts.seal(
            aside,
            kind="eval_report",
            config={
                "evaluation": evaluation.model_dump(mode="json"),
                "gate": gate.model_dump(mode="json"),
            },
            base_model=base.identity(),
            inputs={
                "adapter": adapter.digest,
                "prepared_dataset": dataset.digest,
                **({"champion": champion.digest} if champion else {}),
            },
        )
    step.log_metrics(_figures(result))
    try:
        step.log_file(output / HTML)
    except RegistryError as error:  # the report is there; a retry would measure it all again
        report(f"warning: the report is not in MLflow: {error}")
    _tell(result)
    return artifacts.load(output, "eval_report")


def measure_base(
    model_reference: str, dataset_dir: Path, evaluation: EvaluationSection, output: Path
) -> Artifact:
    """Measure the base on the test split once, for the evaluations of several adapters.

    Raises:
        ArtifactError: the data set was prepared for another model.
        DataError: a metric, text set or task that does not fit.
        ModelError: the model's losses are not finite.
        RecipeError: a task or an engine that is not there.
    """
    dataset = artifacts.load(dataset_dir, "prepared_dataset")
    base = base_model.resolve(model_reference)
    _check_prepared_for(dataset, base)
    metrics = [metric_named(name) for name in evaluation.metrics]
    rows, final = read_rows(base, dataset, evaluation.max_rows)
    slices_of(rows, evaluation.slices)  # the legs' evaluations would fail, after their trainings
    tasks = load_tasks(evaluation)
    with artifacts.writing(output) as aside:
        found = _Evaluation(base, None, None, rows, final, metrics, tasks, evaluation)
        found.run()
        text = json.dumps(asdict(found.measured[BASE]), ensure_ascii=False, allow_nan=False)
        (aside / _MEASURED).write_text(text + "\n", encoding="utf-8")
        artifacts.seal(
            aside,
            kind="base_scores",
            config={"evaluation": evaluation.model_dump(mode="json")},
            base_model=base.identity(),
            inputs={"prepared_dataset": dataset.digest},
        )
    return artifacts.load(output, "base_scores")


def check_fits(
    base: BaseModel, dataset: Artifact, evaluation: EvaluationSection, gate: GateSection | None
) -> None:
    """Refuse, before anything is trained, an evaluation that the prepared test rows can't give.

    Args:
        base: the base model.
        dataset: a PreparedDataset.
        evaluation: what is to be measured on it.
        gate: what has to hold; None: not known yet.

    Raises:
        DataError: there is no test row, no row has a column of evaluation.slices, or gate.metric
            applies to none.
    """
    rows, _ = read_rows(base, dataset, evaluation.max_rows)
    found = slices_of(rows, evaluation.slices)
    if gate is None:
        return
    if gate.metric in METRICS:  # a package's own may not be in every step's image
        _check_applies([metric_named(gate.metric)], rows, gate.metric)
    if len(rows) < gate.min_rows:
        report(
            f"warning: {len(rows)} test rows are fewer than gate.min_rows {gate.min_rows}, so the "
            "gate will refuse: give more rows, or raise data.test_fraction or evaluation.max_rows"
        )
    for column in {place.partition("=")[0] for place in gate.slice_floors}:
        for value, positions in found.get(column, {}).items():
            if len(positions) < gate.min_slice_rows:
                which = "without a value" if value is None else f"with {value!r}"
                report(
                    f"warning: {len(positions)} test rows {which} in column '{column}' are fewer "
                    f"than gate.min_slice_rows {gate.min_slice_rows}: if gate.slice_floors covers "
                    "them, the gate will refuse"
                )


def _check_prepared_for(dataset: Artifact, base: BaseModel) -> None:
    prepared_for = dataset.manifest.base_model
    if prepared_for["digest"] != base.digest:
        raise ArtifactError(
            f"{dataset.path} was prepared for {prepared_for['reference']} "
            f"({prepared_for['digest'][:19]}), not for {base.reference} ({base.digest[:19]}): "
            "prepare the data again"
        )


def _read_base_scores(
    folder: Path, base: BaseModel, dataset: Artifact, evaluation: EvaluationSection
) -> Measured:
    found = artifacts.load(folder, "base_scores")
    settings = {"evaluation": evaluation.model_dump(mode="json")}
    for what, there, wanted in (
        ("base model", found.manifest.base_model["digest"], base.digest),
        ("data set", found.manifest.inputs["prepared_dataset"], dataset.digest),
        ("evaluation settings", found.manifest.config, settings),
    ):
        if there != wanted:
            raise ArtifactError(
                f"{folder} holds the base's scores for another {what}: measure the base again"
            )
    values = found.read_json(_MEASURED)
    answers = values["answers"]
    return Measured(
        scores=values["scores"],
        answers=answers and [answer and Generated(**answer) for answer in answers],
        general=values["general"],
        tasks={label: TaskResult(**result) for label, result in values["tasks"].items()},
    )


def check_lineage(adapter: Artifact, base: BaseModel, dataset: Artifact | None) -> None:
    """Refuse parts that were not made for each other.

    Raises:
        ArtifactError: names the part and both digests.
    """
    trained_on = adapter.manifest.base_model
    if trained_on["digest"] != base.digest:
        raise ArtifactError(
            f"{adapter.path} was trained on {trained_on['reference']} "
            f"({trained_on['digest'][:19]}), not on {base.reference} "
            f"({base.digest[:19]}): give the base it was trained on"
        )
    if dataset is not None and adapter.manifest.inputs["prepared_dataset"] != dataset.digest:
        raise ArtifactError(
            f"{adapter.path} was trained on another data set than {dataset.path}: its rows may be "
            "in this test split; give the data set it was trained on"
        )


def read_rows(
    base: BaseModel, dataset: Artifact, max_rows: int
) -> tuple[list[EvalRow], FinalAnswer]:
    """The test rows, and how their references and generated answers are read alike."""
    rows = read_test_rows(dataset, max_rows)
    tokenizer = chat.load_tokenizer(str(base.path), trust_code=base.trusts_code)
    renderer = None
    if any(row.prompt is not None for row in rows):
        fallback = dataset.manifest.config.get("fallback_template", "")
        renderer = chat.Renderer(chat.chat_format(tokenizer, base.path, fallback))
    final = final_answer(tokenizer, renderer)
    return final.of_rows(rows), final


def _check_applies(metrics: Sequence[Metric], rows: Sequence[EvalRow], deciding: str) -> None:
    """Score the references against themselves: a metric that fails does so before any answer."""
    own = [None if row.prompt is None else row.reference for row in rows]
    scores = score_answers(metrics, rows, own)
    if deciding in scores and all(score is None for score in scores[deciding]):
        raise DataError(
            f"gate.metric {deciding} applies to none of the {len(rows)} test rows: choose another"
        )


class _Evaluation:
    """The models' measurements on one set of rows."""

    def __init__(
        self,
        base: BaseModel,
        adapter: Artifact | None,
        champion: Champion | None,
        rows: Sequence[EvalRow],
        final: FinalAnswer,
        metrics: Sequence[Metric],
        tasks: Sequence[LoadedTask],
        evaluation: EvaluationSection,
    ) -> None:
        self.rows = rows
        self.tokens = [predicted_tokens(row.supervised) for row in rows]
        self.measured: dict[str, Measured] = {}
        self.champion_note = ""
        self.engine = ""
        """What generated the answers of all models; empty where none were needed."""
        self._base, self._adapter, self._champion = base, adapter, champion
        self._metrics, self._tasks, self._settings = metrics, tasks, evaluation
        self._final = final
        self._text_sets: list[TextSet] = []

    def run(self) -> None:
        """Load one model after the other; two at once would need twice the memory.

        What `measured` has of the base already is not measured again.
        """
        from transformers import AutoTokenizer

        from tuneline.finetune.load import load_base, load_tuned, stands_on_base

        base, settings = self._base, self._settings
        engine = chosen_engine(settings.engine)
        tokenizer = self._final.tokenizer
        limit = settings.max_new_tokens or longest_answer(tokenizer, self.rows)
        # a second one: the rows' tokenizer no longer adds what plain text starts with
        plain = AutoTokenizer.from_pretrained(base.path, trust_remote_code=base.trusts_code)
        self._text_sets = read_text_sets(
            plain,
            settings.forgetting_sets,
            general=settings.general_text,
            max_rows=settings.max_rows,
        )

        generated = self._generated(engine, limit)

        def take(name: str, model: Any) -> None:
            self.measured[name] = measure(
                name,
                model,
                self.rows,
                self.tokens,
                self._text_sets,
                self._metrics,
                settings,
                limit,
                self._final,
                self._tasks,
                plain,
                generated.get(name),
            )

        adapter = self._adapter
        loaded = None
        if BASE not in self.measured:
            loaded = load_base(base.path, trust_code=base.trusts_code)
            take(BASE, loaded)
        if adapter is None:
            return
        if not stands_on_base(adapter):
            loaded = None
        take(TUNED, load_tuned(base, adapter, loaded))
        del loaded
        if (champion := self._champion) is None:
            return
        own = chat.load_tokenizer(str(champion.artifact.path), trust_code=base.trusts_code)
        self.champion_note = why_not_comparable(own, tokenizer)
        if not self.champion_note:
            take(CHAMPION, champion.load(trust_code=base.trusts_code))

    def _generated(self, engine: str, limit: int) -> dict[str, list[Generated]]:
        """Answers of all models by vLLM, before any is loaded for the rest; of none where it can't
        serve one: their differences would be those of two engines."""
        if not any(metric.kind == "answer" for metric in self._metrics):
            return {}
        found: dict[str, list[Generated]] = {}
        if engine == "vllm":
            try:
                found = served_by_vllm(
                    self._base,
                    self._adapter,
                    self._champion.artifact if self._champion else None,
                    self._final,
                    [row.prompt for row in self.rows if row.prompt is not None],
                    max_new_tokens=limit,
                    measured_before=BASE in self.measured,
                )
            except ModelError as error:
                if self._settings.engine == "vllm":
                    raise
                report(f"warning: answers by transformers: {error}")
        name = "vllm" if found else "transformers"
        self.engine = f"{name} {version(name)}"
        return found

    def of_tasks(self) -> dict[str, dict[str, TaskResult]]:
        """Model -> task -> result."""
        return {name: measured.tasks for name, measured in self.measured.items()}

    def result(
        self, slices: Mapping[str, Mapping[str | None, Sequence[int]]], gate: GateSection
    ) -> dict[str, Any]:
        """The content of report.json."""
        scores = {name: measured.scores for name, measured in self.measured.items()}
        everything = range(len(self.rows))
        numbers = [row.number for row in self.rows]
        blocks = compare(scores, self.tokens, self._metrics, everything, numbers)
        if not blocks[gate.metric]["rows"]:
            raise DataError(
                f"gate.metric {gate.metric} has no test row that every model has a score for: "
                "choose another"
            )
        result: dict[str, Any] = {
            **_headline(blocks[gate.metric], gate.metric),
            "test_rows": len(self.rows),
            "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": 0},
            "metrics": blocks,
            "slices": {
                column: [
                    {
                        "value": value,
                        "rows": len(positions),
                        "metrics": compare(scores, self.tokens, self._metrics, positions, numbers),
                    }
                    for value, positions in values.items()
                ]
                for column, values in slices.items()
            },
            "forgetting": {
                text_set.name: {
                    "digest": text_set.digest,
                    **compare_texts(
                        {name: m.general[text_set.name] for name, m in self.measured.items()},
                        text_set.tokens,
                    ),
                }
                for text_set in self._text_sets
            },
            "engine": self.engine,
            "answers": {
                name: _of_answers(measured)
                for name, measured in self.measured.items()
                if measured.answers is not None
            },
            "champion": self._of_champion(blocks[gate.metric]),
            "tasks": compare_tasks(self.of_tasks(), self._tasks),
        }
        result["verdict"] = decide(result, gate)
        result["eval_set_digest"] = digest_of_rows(self.rows)
        result["samples_by"], result["samples"] = self._samples(gate.metric)
        return result

    def _of_champion(self, block: Mapping[str, Any]) -> dict[str, Any] | None:
        if (champion := self._champion) is None:
            return None
        return {
            "name": champion.name,
            "version": champion.version,
            "digest": champion.digest,
            "compared": not self.champion_note,
            "reason": self.champion_note,
            **block.get(CHAMPION, {"score": None, "interval": [None, None]}),
        }

    def _samples(self, deciding: str) -> tuple[str, list[dict[str, Any]]]:
        """Before and after, and the title of the metric that they were taken by: the first rows
        that the tuned model does best, and one that it does less well, since nobody learns from
        picked wins."""
        if self.measured[TUNED].answers is None:
            return "", []
        # what the deciding one says of an answer's probability, nobody sees in its text
        metric = next(
            metric
            for metric in sorted(self._metrics, key=lambda metric: metric.name != deciding)
            if metric.kind == "answer"
        )
        sign = 1 if metric.higher_is_better else -1
        rows = [self.row(n) for n, r in enumerate(self.rows) if r.prompt is not None]
        scored = [
            (sign * score, row)
            for row in rows
            if (score := row["scores"][TUNED][metric.name]) is not None
        ]
        highest = max((score for score, _ in scored), default=0.0)
        best = [row for score, row in scored if score == highest]
        less = [row for score, row in scored if score < highest]
        chosen = (best[: _SAMPLES - 1] + less[:1]) if less else best[:_SAMPLES]
        chosen += [row for row in rows if row not in chosen][: _SAMPLES - len(chosen)]
        return metric.title, [_sample(row) for row in chosen]

    def row(self, position: int) -> dict[str, Any]:
        """All that is known of a row, as it is kept in scores.jsonl."""
        row = self.rows[position]
        answers = {n: m.answers[position] for n, m in self.measured.items() if m.answers}
        return {
            "row": row.number,
            "question": row.question,
            "reference": row.reference,
            "columns": row.fields.get("columns") or {},
            "tokens": self.tokens[position],
            "answers": {n: answer.text for n, answer in answers.items() if answer},
            "ended": {n: answer.ended for n, answer in answers.items() if answer},
            "scores": {
                name: {metric: values[position] for metric, values in measured.scores.items()}
                for name, measured in self.measured.items()
            },
        }


def _write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    from tuneline.evaluate.metrics import exact_match

    return {
        "question": row["question"],
        "reference": row["reference"],
        **row["answers"],
        **{
            f"{name}_exact_match": exact_match(answer, row["reference"])
            for name, answer in row["answers"].items()
        },
    }


def _headline(block: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "higher_is_better": block["higher_is_better"],
        "rows": block["rows"],
        "base": block[BASE]["score"],
        "base_interval": block[BASE]["interval"],
        "tuned": block[TUNED]["score"],
        "tuned_interval": block[TUNED]["interval"],
        **block[f"over_{BASE}"],
    }


def _of_answers(measured: Measured) -> dict[str, Any]:
    answers = [answer for answer in measured.answers or () if answer is not None]
    return {
        "count": len(answers),
        "cut": sum(not answer.ended for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
        "prompts_cut": sum(answer.prompt_cut for answer in answers),
    }


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow shows of the step."""
    figures = {"test_rows": result["rows"], "gate_passed": float(result["verdict"]["passed"])}
    figures["difference"] = result["difference"]
    figures["difference_low"] = result["difference_interval"][0]

    def put(value: float | None, *parts: str) -> None:
        key = mlflow_key("_".join(parts))
        if key in figures:  # a task `a` with a metric `b_c` beside a task `a_b` with a metric `c`
            key = mlflow_key(f"{key}-{digest_of(parts)[7:15]}")
        if value is not None:
            figures[key] = value

    models = (BASE, TUNED, CHAMPION)
    for name, block in result["metrics"].items():
        for model in models:
            if model in block:
                put(block[model]["score"], model, name)
    for name, found in result["forgetting"].items():
        known = name.replace(" ", "_") if name == GENERAL else name
        put(found[TUNED]["change"], "forgetting", known)
    for label, found in result["tasks"].items():
        for metric, block in found["metrics"].items():
            for model in models:
                if model in block:
                    put(block[model]["score"], model, "task", label, metric)
    return figures


def _tell(result: Mapping[str, Any]) -> None:
    block = result["metrics"][result["metric"]]
    low, high = result["tuned_interval"]
    line = (
        f"{block['title']} on {result['rows']} rows: base {result['base']:.3f}, "
        f"tuned {result['tuned']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    )
    if CHAMPION in block:
        line += f", champion {block[CHAMPION]['score']:.3f}"
    report(line)
    for name, found in result["forgetting"].items():
        report(f"{name}: loss {found[BASE]['score']:.3f}, tuned {found[TUNED]['change']:+.3f}")
    tell(result["tasks"])
    cut = result["answers"].get(TUNED, {}).get("cut", 0)
    if cut:
        report(f"warning: {cut} answers of the tuned model did not end and were cut")
    if cut := result["answers"].get(TUNED, {}).get("prompts_cut", 0):
        report(
            f"warning: {cut} prompts left no room for an answer in the model's context and lost "
            "their start: lower data.max_seq_len or evaluation.max_new_tokens"
        )
    verdict = result["verdict"]
    report(
        f"gate: {'passed' if verdict['passed'] else 'refused: ' + '; '.join(verdict['reasons'])}"
    )
