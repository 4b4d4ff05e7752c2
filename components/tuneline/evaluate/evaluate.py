"""Base against tuned on the same rows -> EvalReport with the gate's verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.base_model import BaseModel
from tuneline.data_prep.prepare import CONTRACT, TEST_ROWS
from tuneline.errors import ArtifactError
from tuneline.evaluate.report import render_report
from tuneline.progress import minutes, report, tick
from tuneline.recipe import EvaluationSection, GateSection
from tuneline.tracking import Step

if TYPE_CHECKING:
    import torch

SCORES: Final = "scores.jsonl"
REPORT: Final = "report.json"
HTML: Final = "report.html"
_SAMPLES: Final = 3


def evaluate(
    model_reference: str,
    adapter_dir: Path,
    dataset_dir: Path,
    evaluation: EvaluationSection,
    gate: GateSection,
    output: Path,
    step: Step,
) -> Artifact:
    """Answer the test split with the base and with the adapter, compare, and decide.

    Raises:
        ArtifactError: adapter, data set and base don't belong together.
    """
    adapter = artifacts.load(adapter_dir, "adapter")
    dataset = artifacts.load(dataset_dir, "prepared_dataset")
    base = base_model.resolve(model_reference)
    check_lineage(adapter, base, dataset)
    rows = dataset.read_jsonl(TEST_ROWS)[: evaluation.max_rows]
    with artifacts.writing(output) as aside:
        answers = _answer(base, adapter, rows, evaluation)
        scores = _scores(rows, answers)
        with (aside / SCORES).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(score, ensure_ascii=False) + "\n" for score in scores)
        result = compare(scores, gate)
        result["eval_set_digest"] = artifacts.digest_of(
            [[row["prompt"], row["reference"]] for row in rows]
        )
        result["samples"] = _samples(scores)
        text = json.dumps(result, indent=2, ensure_ascii=False)
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
            inputs={"adapter": adapter.digest, "prepared_dataset": dataset.digest},
        )
    step.log_metrics(
        {
            "base_exact_match": result["base"],
            "tuned_exact_match": result["tuned"],
            "difference": result["difference"],
            "difference_low": result["difference_interval"][0],
            "test_rows": result["rows"],
        }
    )
    step.log_file(output / HTML)
    low, high = result["tuned_interval"]
    report(
        f"exact match on {result['rows']} rows: base {result['base']:.3f}, "
        f"tuned {result['tuned']:.3f} (95 % interval {low:.3f} to {high:.3f})"
    )
    verdict = result["verdict"]
    report(
        f"gate: {'passed' if verdict['passed'] else 'refused: ' + '; '.join(verdict['reasons'])}"
    )
    return artifacts.load(output, "eval_report")


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


def _answer(
    base: BaseModel, adapter: Artifact, rows: list[dict[str, str]], evaluation: EvaluationSection
) -> dict[str, list[str]]:
    from tuneline.data_prep.chat import load_tokenizer
    from tuneline.evaluate.generate import generate_answers
    from tuneline.finetune.load import load_base, load_tuned, stands_on_base

    tokenizer = load_tokenizer(str(base.path), trust_code=base.trusts_code)
    limit = evaluation.max_new_tokens or _longest_reference(tokenizer, rows)

    def answer(name: str, model: torch.nn.Module) -> list[str]:
        def progress(done: int, total: int, seconds: float) -> None:
            left = seconds / done * (total - done)
            tick(f"{name}: {done}/{total} answers  ETA {minutes(left)}")

        return generate_answers(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            batch_size=evaluation.batch_size,
            max_new_tokens=limit,
            on_batch=progress,
        )

    loaded = load_base(base.path, trust_code=base.trusts_code)
    answers = {"base": answer("base", loaded)}
    if stands_on_base(adapter):
        answers["tuned"] = answer("tuned", load_tuned(base, adapter, loaded))
    else:
        del loaded  # two models at once would need twice the memory
        answers["tuned"] = answer("tuned", load_tuned(base, adapter))
    return answers


def _longest_reference(tokenizer: Any, rows: list[dict[str, str]]) -> int:
    encoded = tokenizer([row["reference"] for row in rows], add_special_tokens=False)["input_ids"]
    return math.ceil(1.25 * max(map(len, encoded))) + 1


def _scores(rows: list[dict[str, str]], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    from tuneline.evaluate.metrics import exact_match

    return [
        {
            "question": row["question"],
            "reference": row["reference"],
            "base": base,
            "tuned": tuned,
            "base_exact_match": exact_match(base, row["reference"]),
            "tuned_exact_match": exact_match(tuned, row["reference"]),
        }
        for row, base, tuned in zip(rows, answers["base"], answers["tuned"], strict=True)
    ]


def compare(scores: list[dict[str, Any]], gate: GateSection) -> dict[str, Any]:
    """Means, paired difference, intervals and the verdict, from per-row scores."""
    from tuneline.evaluate.metrics import bootstrap_interval

    base = [score[f"base_{gate.metric}"] for score in scores]
    tuned = [score[f"tuned_{gate.metric}"] for score in scores]
    gains = [after - before for before, after in zip(base, tuned, strict=True)]
    low, high = bootstrap_interval(gains)
    rows = len(scores)
    reasons = []
    if rows < gate.min_rows:
        reasons.append(f"{rows} test rows are fewer than gate.min_rows {gate.min_rows}")
    if not low > gate.min_gain:
        reasons.append(
            f"the gain's 95 % interval starts at {low:.3f}, which is not above "
            f"gate.min_gain {gate.min_gain}"
        )
    return {
        "metric": gate.metric,
        "rows": rows,
        "base": sum(base) / rows,
        "tuned": sum(tuned) / rows,
        "tuned_interval": list(bootstrap_interval(tuned)),
        "difference": sum(gains) / rows,
        "difference_interval": [low, high],
        "verdict": {
            "passed": not reasons,
            "reasons": reasons,
            "min_gain": gate.min_gain,
            "min_rows": gate.min_rows,
        },
    }


def _samples(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before and after, a failure among them where there is one: nobody learns from picked wins."""
    right = [score for score in scores if score["tuned_exact_match"] == 1.0]
    wrong = [score for score in scores if score["tuned_exact_match"] < 1.0]
    chosen = (right[: _SAMPLES - 1] + wrong[:1]) if wrong else right[:_SAMPLES]
    return chosen + [score for score in scores if score not in chosen][: _SAMPLES - len(chosen)]
