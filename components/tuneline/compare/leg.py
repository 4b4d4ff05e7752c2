"""One leg of a comparison: train with one method, evaluate, and say what it took and gave.

Runs as a process of its own (`python -m tuneline.compare.leg JOB.json`), so that its memory is its
own, and so that running out of it ends this leg and not the step around it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from tuneline.artifacts import Artifact
from tuneline.compare.legs import Leg, leg_of
from tuneline.errors import EXIT_FAILED, EXIT_TERMINATED, Terminated, TunelineError
from tuneline.recipe import method_of
from tuneline.termination import raise_on_sigterm
from tuneline.tracking import Step

FINISHED: Final = "finished"
FAILED: Final = "failed"


@dataclass(frozen=True)
class Job:
    """What the process is asked to do; all paths are absolute."""

    leg: dict[str, Any]
    base_model: str
    dataset: str
    base_scores: str
    evaluation: dict[str, Any]
    gate: dict[str, Any]
    adapter: str
    eval_report: str
    result: str
    """JSON file to write the result to."""
    run_id: str
    experiment: str


class _Remembering:
    """Passes on what a step tells, and keeps the last value of each figure."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.figures: dict[str, float] = {}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Pass them on; numbers are kept."""
        self.figures |= {k: v for k, v in params.items() if isinstance(v, int | float)}
        self._step.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Pass them on and keep them."""
        self.figures |= metrics
        self._step.log_metrics(metrics, step)

    def log_file(self, path: Path) -> None:
        """Pass it on."""
        self._step.log_file(path)

    def log_folder(self, path: Path, name: str) -> None:
        """Pass it on."""
        self._step.log_folder(path, name)

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Pass it on."""
        self._step.log_dataset(name, digest, context)


def run_leg(job: Job, step: Step) -> dict[str, Any]:
    """Train and evaluate; returns the leg's row of the leaderboard, without nulls.

    Raises:
        TunelineError: as training and evaluation do.
    """
    from tuneline import recipe
    from tuneline.evaluate.evaluate import evaluate
    from tuneline.finetune.memory import peak_bytes
    from tuneline.finetune.train import finetune

    leg = leg_of(job.leg)
    remembering = _Remembering(step)
    started = time.monotonic()
    adapter = finetune(
        job.base_model,
        Path(job.dataset),
        leg.settings,
        leg.training,
        Path(job.adapter),
        remembering,
    )
    seconds = time.monotonic() - started
    peak = float(peak_bytes())  # now: evaluating may need more
    report = evaluate(
        job.base_model,
        Path(job.adapter),
        Path(job.dataset),
        recipe.check(recipe.EvaluationSection, job.evaluation, source="evaluation"),
        recipe.check(recipe.GateSection, job.gate, source="gate"),
        Path(job.eval_report),
        step,
        base_scores_dir=Path(job.base_scores),
    ).read_json("report.json")
    weights = [
        entry.size_bytes
        for name, entry in adapter.manifest.files.items()
        if name.endswith(".safetensors")
    ]
    figures = remembering.figures
    row = {
        **heading(leg),
        "status": FINISHED,
        "base_model": adapter.manifest.base_model["reference"],
        "metric": report["metric"],
        "higher_is_better": report["higher_is_better"],
        "rows": report["rows"],
        "score": report["tuned"],
        "interval": report["tuned_interval"],
        "base": report["base"],
        "base_interval": report["base_interval"],
        "gain_interval": report["gain_interval"],
        "passed": report["verdict"]["passed"],
        "validation_loss": _validation_loss(adapter, best=leg.training.load_best),
        "trainable_parameters": figures["trainable_parameters"],
        "trainable_fraction": figures["trainable_fraction"],
        "train_seconds": seconds,
        "tokens_per_second": figures.get("tokens_per_second"),
        "peak_memory_bytes": peak,
        "adapter_bytes": sum(weights),
        "forgetting": {n: found["tuned"]["change"] for n, found in report["forgetting"].items()},
        "eval_set_digest": report["eval_set_digest"],
    }
    return {key: value for key, value in row.items() if value is not None}


def heading(leg: Leg) -> dict[str, Any]:
    """What is known of a leg before it runs."""
    assert leg.training.learning_rate is not None
    return {
        "leg": leg.name,
        "method": method_of(leg.settings).name,
        "settings": leg.settings.model_dump(mode="json"),
        "learning_rate": leg.training.learning_rate,
    }


def _validation_loss(adapter: Artifact, *, best: bool) -> float | None:
    history = adapter.read_jsonl("history.jsonl")
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if not losses:
        return None
    return min(losses) if best else losses[-1]


def main(path: str) -> int:
    """Run the job in a JSON file; the result, or the reason of a failure, goes where it says."""
    raise_on_sigterm()
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    from tuneline import steps

    try:
        outcome = steps.train_leg(job)
        code = 0
    except TunelineError as error:
        outcome, code = {"reason": str(error)}, error.exit_code
    except (SafetensorError, OSError) as error:  # safetensors reports a full disk as its own
        outcome, code = {"reason": str(error)}, EXIT_FAILED
    except MemoryError:
        outcome, code = {"reason": "out of memory"}, EXIT_FAILED
    except Terminated:
        return EXIT_TERMINATED
    aside = Path(f"{job.result}.partial")
    aside.write_text(json.dumps(outcome, allow_nan=False), encoding="utf-8")
    aside.replace(job.result)
    return code


def write_job(job: Job, path: Path) -> None:
    """Write a job for `main`."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
