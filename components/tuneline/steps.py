"""The steps on plain values: what a KFP component and a CLI command both call.

Each function checks its settings, opens the step's MLflow run, does the work and records how long
it took and how much memory it needed. `guard` is what a KFP component's body calls them through:
it turns an error into one sentence and an exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from safetensors import SafetensorError

from tuneline import by_uri, form, pools, recipe
from tuneline.artifacts import MANIFEST, digest_of
from tuneline.base_model import CODE_PIN, cache_dir, is_local
from tuneline.errors import (
    EXIT_FAILED,
    EXIT_TERMINATED,
    DataError,
    RecipeError,
    RegistryError,
    Terminated,
    TunelineError,
)
from tuneline.progress import complain, peak_memory_bytes, ranks, record, report
from tuneline.termination import raise_on_sigterm
from tuneline.tracking import Step, TrackedStep, finish_run, mlflow_errors, tracked

if TYPE_CHECKING:
    from tuneline.artifacts import Artifact
    from tuneline.compare.leg import Job

T = TypeVar("T")
RESOLVED: Final = ("data", "training", "evaluation", "gate", "export", "registry")
"""The sections that the steps of a pipeline read."""
NOT_REGISTERED: Final = 0
"""In place of a version: the gate refused the model, and the recipe says to skip it then."""
_MOST_FILES: Final = 100
_TORCH = ("torch", "transformers", "peft")


def guard(step: Callable[..., T], **arguments: Any) -> T:
    """Run a step in a process of its own.

    SIGTERM (a reclaimed node, a cancelled run) ends it with exit code 143 and no artifact.
    """
    raise_on_sigterm()
    try:
        return step(**arguments)
    except TunelineError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except (SafetensorError, MemoryError) as error:  # safetensors reports a full disk as its own
        complain(f"{step.__name__}: {error or 'out of memory'}")
        sys.exit(EXIT_FAILED)
    except OSError as error:  # disk full, no permission, a file that went away
        complain(f"{step.__name__}: {error}")
        sys.exit(EXIT_FAILED)
    except Terminated as stopped:
        what = str(stopped) or "nothing was written, run it again"
        complain(f"{step.__name__} was stopped by SIGTERM; {what}")
        sys.exit(EXIT_TERMINATED)


def quiet_libraries() -> None:
    """Before any is imported: no loading bars, which would bury the lines that a person needs."""
    # unless the user wants them
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # a model's own pinned code is copied there before it is imported
    os.environ.setdefault("HF_MODULES_CACHE", str(cache_dir() / "modules"))
    # peft 0.21 on transformers 5.23
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")


@contextmanager
def _step(
    task: str,
    run_id: str,
    experiment: str,
    imports: tuple[str, ...] = (),
    *,
    pipeline: str = "finetune",
    is_patient: bool = False,
) -> Iterator[Step]:
    report(f"== {task}")
    quiet_libraries()
    for module in (*imports, "mlflow") if run_id else imports:
        importlib.import_module(module)
    # what a step takes is counted from here: its own work, MLflow's record of it included, not the
    # start of its process and its imports
    started = time.monotonic()
    with tracked(
        run_id, task, experiment=experiment, pipeline=pipeline, is_patient=is_patient
    ) as step:
        yield step
        peak = peak_memory_bytes()
        seconds = time.monotonic() - started
        step.log_metrics({"wall_seconds": seconds, "step_peak_memory_bytes": peak})
    if run_id:  # a step on its own has no process that waits for figures
        record(task=task, wall_seconds=seconds, peak_memory_bytes=peak)


def check_recipe(
    values: Mapping[str, Any],
    method: str,
    hyperparameters: Mapping[str, Any],
    overrides: Mapping[str, Any],
    run_id: str,
    experiment: str,
) -> tuple[Any, ...]:
    """Check a filled run form as a whole recipe, before anything asks for an accelerator.

    Returns:
        The base model, the sections `RESOLVED`, and every hyperparameter of the method.
    """
    with _step("check_recipe", run_id, experiment) as step:
        sections = form.sections_of(
            values, overrides, method=method, hyperparameters=hyperparameters
        )
        resolved = _resolved(recipe.resolve(sections, source="run form"), step)
        settings = resolved["method"]
        return (
            resolved["model"]["base_model"],
            *(resolved[section] for section in RESOLVED),
            *(value for key, value in settings.items() if key != "name"),
        )


def _resolved(checked: recipe.Recipe, step: Step) -> dict[str, Any]:
    _check_evaluation(checked.evaluation)
    _tell_of_context(checked)
    values = checked.model_dump(mode="json", exclude_none=True)  # KFP has no null in a dict
    step.log_params({section: values[section] for section in recipe.SECTIONS})
    return values


def _check_evaluation(evaluation: recipe.EvaluationSection) -> None:
    """Refuse files, tasks and an engine that the evaluation would miss after hours of training."""
    from tuneline.evaluate.forgetting import faults_of_text_sets
    from tuneline.evaluate.task_files import faults_of_tasks
    from tuneline.evaluate.vllm_answers import faults_of_engine

    faults = [
        *faults_of_text_sets(evaluation.forgetting_sets),
        *faults_of_tasks(evaluation),
        *faults_of_engine(evaluation.engine),
    ]
    if faults:
        raise RecipeError("evaluation", faults)


def _tell_of_context(checked: recipe.Recipe) -> None:
    """Say before the training that rows may not fit, where the base is a folder to look into."""
    reference = checked.model.base_model.partition(CODE_PIN)[0]
    if not is_local(reference):
        return
    try:
        config = json.loads((Path(reference).expanduser() / "config.json").read_text("utf-8"))
        context = int(config["max_position_embeddings"])
    except (OSError, ValueError, LookupError, TypeError):  # what is wrong with it is told later
        return
    longest = checked.data.max_seq_len + (checked.evaluation.max_new_tokens or 0)
    if longest > context:
        report(
            f"warning: data.max_seq_len {checked.data.max_seq_len} and evaluation.max_new_tokens "
            f"{checked.evaluation.max_new_tokens or 0} are more than the model's context of "
            f"{context} tokens: prompts that leave no room for an answer will lose their start"
        )


def resolve_pool(gpu_pool: str, run_id: str, experiment: str) -> tuple[Any, ...]:
    """What the steps with an accelerator ask of Kubernetes."""
    with _step("resolve_pool", run_id, experiment) as step:
        pool = pools.read().named(gpu_pool)
        step.log_params({"gpu_pool": gpu_pool, **pool.model_dump(mode="json", exclude_none=True)})
        return tuple(pool.placement().values())


def check_retrain(
    values: Mapping[str, Any],
    method: str,
    overrides: Mapping[str, Any],
    run_id: str,
    experiment: str,
) -> tuple[Any, ...]:
    """Check a filled run form, and find out whether there is anything to do.

    Returns:
        The base model, the sections `RESOLVED`, the method, what the data and the base model were
        (for `prepare_data`, which reads them later), and the decision: what to do, why, the content
        key, and the version that the same work has given, or 0.
    """
    from tuneline import base_model
    from tuneline.data_prep.sources import pinned
    from tuneline.retrain import decide, ledger
    from tuneline.retrain.profile import profile_of

    with _step("check_retrain", run_id, experiment, pipeline="retrain") as step:
        sections = form.sections_of(values, overrides, method=method, hyperparameters={})
        checked = recipe.resolve(sections, source="run form")
        _check_evaluation(checked.evaluation)
        if not isinstance(step, TrackedStep):
            raise RegistryError(
                "retraining needs MLflow, where it finds out what was done: set MLFLOW_TRACKING_URI"
            )
        sources = {
            name: tuple(map(pinned, getattr(checked.data, name)))
            for name in ("train", "test", "evaluation_sets")
        }
        data = checked.data.model_copy(update=sources)
        profile = profile_of(data)
        base_key = base_model.content_key(checked.model.base_model)
        work = decide.work_of(checked, base_key)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ledger.PROFILE
            path.write_text(json.dumps(profile.as_json()), encoding="utf-8")
            step.log_file(path)
        with mlflow_errors("deciding whether to retrain"):
            decision = decide.decide(step.client, checked, profile, work, run_id, step.run_id)
        report(f"{decision.action}: {decision.reason}")
        resolved = _resolved(checked.model_copy(update={"data": data}), step)
        told = {"decision": decision.action, "reason": decision.reason, "key": decision.key}
        step.log_params(told)
        step.log_metrics({"train_rows": profile.rows})
    if decision.action == "nothing":
        finish_run(run_id, experiment)
    return (
        resolved["model"]["base_model"],
        *(resolved[section] for section in RESOLVED),
        resolved["method"],
        _expected(profile.digests, base_key),
        *(decision.action, decision.reason, decision.key, decision.version),
    )


def _expected(digests: Mapping[str, str], base_key: str) -> dict[str, Any]:
    """What `_check_expected` compares, and the files to read.

    A parameter has a limit of size: of more files than `_MOST_FILES` the names are not handed on,
    and then one more that comes in between ends the run.
    """
    return {
        "data": digest_of(dict(sorted(digests.items()))),
        "files": dict(digests) if len(digests) <= _MOST_FILES else {},
        # a hub model's reference names its commit, which can't change
        "base_model": base_key if base_key.startswith("sha256:") else "",
    }


def _check_expected(dataset: Artifact, expected: Mapping[str, Any]) -> None:
    """Refuse a PreparedDataset of another state of things than was decided on."""
    found, files = dataset.manifest.inputs, expected["files"]
    changed = "the data"
    if digest_of(dict(sorted(found.items()))) == expected["data"]:
        if expected["base_model"] in ("", dataset.manifest.base_model["digest"]):
            return
        changed = "the base model"
    elif files:
        names = sorted(n for n in {*found, *files} if found.get(n) != files.get(n))
        changed = f"the data ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    raise DataError(
        f"{changed} changed after check_retrain had decided on it, so that this run's content key "
        "would stand for something else: run the retraining again, it begins with what is there now"
    )


def prepare_data(
    base_model: str,
    data: Mapping[str, Any],
    output: str,
    run_id: str = "",
    experiment: str = "",
    *,
    evaluation: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any] | None = None,
    expected: Mapping[str, Any] | None = None,
) -> None:
    """Raw rows to a PreparedDataset, checked for the evaluation and gate that are to come.

    Args:
        base_model: whose tokenizer and chat template render the rows.
        data: values of the recipe's section.
        output: folder to write.
        run_id: of the pipeline run.
        experiment: of the run.
        evaluation: values of the recipe's section; None if there is none to come.
        gate: the same.
        expected: what `check_retrain` found, for data that must not have changed since.

    Raises:
        DataError: a source can't be read, the contract is broken, or the data changed.
    """
    from tuneline.data_prep.prepare import CONTRACT, PAGE, prepare

    with _step("prepare_data", run_id, experiment, ("transformers",)) as step:
        section = recipe.check(recipe.DataSection, data, source="data")
        # files that came since check_retrain are the next run's: else a bucket that grows all the
        # time would never be found as it was
        only = (expected or {}).get("files") or None
        dataset = prepare(base_model, section, Path(output), step, only)
        if expected:
            try:
                _check_expected(dataset, expected)
            except DataError:
                shutil.rmtree(output)
                raise
        contract = dataset.read_json(CONTRACT)
        for split, counts in contract["splits"].items():
            step.log_metrics({f"{split}_rows": counts["rows"], f"{split}_tokens": counts["tokens"]})
        step.log_metrics({check["name"]: check["value"] for check in contract["checks"]})
        for name in (CONTRACT, PAGE):
            step.log_file(dataset.path / name)
        if evaluation is not None:
            _check_fits(base_model, dataset, evaluation, gate)


def _check_fits(
    base_model: str,
    dataset: Artifact,
    evaluation: Mapping[str, Any],
    gate: Mapping[str, Any] | None,
) -> None:
    from tuneline.base_model import resolve
    from tuneline.evaluate.evaluate import check_fits

    measured = recipe.check(recipe.EvaluationSection, evaluation, source="evaluation")
    conditions = None if gate is None else recipe.check(recipe.GateSection, gate, source="gate")
    base = resolve(base_model, digest=dataset.manifest.base_model["digest"])
    check_fits(base, dataset, measured, conditions)


def finetune(
    base_model: str,
    dataset: str,
    method: Mapping[str, Any],
    training: Mapping[str, Any],
    output: str,
    run_id: str = "",
    experiment: str = "",
) -> None:
    """A PreparedDataset to an Adapter, in one process for each accelerator."""
    from tuneline.finetune import launch, train

    if (count := launch.processes()) > 1:
        launch.train_together(
            {
                "base_model": base_model,
                "dataset": dataset,
                "method": dict(method),
                "training": dict(training),
                "output": output,
                "run_id": run_id,
                "experiment": experiment,
            },
            count,
        )
        return
    settings = recipe.method_settings(method)
    section = recipe.check(recipe.TrainingSection, training, source="training")
    task = f"finetune_{method.get('name', 'lora')}"
    with _step(task, run_id, experiment, _TORCH, is_patient=True) as step:
        if ranks()[0] > 0:
            train.accompany(base_model, Path(dataset), settings, section)
            return
        adapter = train.finetune(base_model, Path(dataset), settings, section, Path(output), step)
        digest = adapter.manifest.inputs["prepared_dataset"]
        place = by_uri.leave(adapter.path) if run_id else ""
        try:
            step.log_dataset("train", digest, "training")
            if place:
                step.log_params({"adapter": place})
            else:
                step.log_folder(adapter.path, "adapter")
        except RegistryError as error:  # the adapter is there; a retry would train it again
            report(f"warning: the adapter is not in MLflow: {error}")


def evaluate(
    base_model: str,
    adapter: str,
    dataset: str,
    evaluation: Mapping[str, Any],
    gate: Mapping[str, Any],
    output: str,
    run_id: str = "",
    experiment: str = "",
    *,
    champion_of: str = "",
) -> dict[str, Any]:
    """Base, tuned model and a registered model's champion to an EvalReport; returns the report."""
    from tuneline.evaluate.evaluate import REPORT
    from tuneline.evaluate.evaluate import evaluate as compare

    measured = recipe.check(recipe.EvaluationSection, evaluation, source="evaluation")
    conditions = recipe.check(recipe.GateSection, gate, source="gate")
    recipe.check_gate(conditions, measured, source="gate")
    with _step("evaluate", run_id, experiment, _TORCH) as step:
        result = compare(
            base_model,
            by_uri.fetch(Path(adapter)),
            Path(dataset),
            measured,
            conditions,
            Path(output),
            step,
            champion_of=champion_of,
        )
        values = result.read_json(REPORT)
        step.log_dataset("test", values["eval_set_digest"], "evaluation")
        return values


def merge(
    base_model: str,
    adapter: str,
    export: Mapping[str, Any],
    output: str,
    run_id: str = "",
    experiment: str = "",
    also: Sequence[str] = (),
    dataset: str = "",
    eval_report: str = "",
) -> None:
    """An Adapter to a MergedModel, or to a package where it can't be merged.

    Args:
        base_model: what the adapter was trained on.
        adapter: an Adapter.
        export: values of the recipe's section.
        output: folder to write, or `s3://bucket/prefix`.
        run_id: of the pipeline run.
        experiment: of the run.
        also: more Adapters, combined with the first.
        dataset: the PreparedDataset, for a proof on its test split.
        eval_report: the adapter's EvalReport, for the model card.
    """
    from tuneline import object_store
    from tuneline.merge.merge import merge as merge_adapter

    section = recipe.check(recipe.ExportSection, export, source="export")
    with _step("merge", run_id, experiment, _TORCH) as step:
        trained, *further = [by_uri.fetch(Path(path)) for path in (adapter, *also)]

        def write(folder: Path) -> None:
            model = merge_adapter(
                base_model,
                trained,
                section,
                folder,
                step,
                also=further,
                dataset_dir=Path(dataset) if dataset else None,
                report_dir=Path(eval_report) if eval_report else None,
            )
            try:
                for name in ("README.md", "proof.json", "loader.json"):
                    if (model.path / name).exists():
                        step.log_file(model.path / name)
            except RegistryError as error:  # the model is there; a retry would merge it again
                report(f"warning: the merge's card and proof are not in MLflow: {error}")

        if object_store.is_remote(output):
            adapters = [(p / MANIFEST).read_text(encoding="utf-8") for p in (trained, *further)]
            key = digest_of([base_model, adapters, section.model_dump(mode="json")])
            object_store.by_way_of(output, cache_dir() / "outgoing", key, write)
        else:
            write(Path(output))
            if run_id and (place := by_uri.leave(Path(output))):
                try:
                    step.log_params({"model": place})
                except RegistryError as error:  # as above
                    report(f"warning: the model's place is not in MLflow: {error}")


def register(
    model: str,
    eval_report: str,
    registry: Mapping[str, Any],
    run_id: str = "",
    experiment: str = "",
    *,
    retrain_key: str = "",
) -> int:
    """A MergedModel and its EvalReport to a registered version; returns its number, or 0 where the
    gate refused the model and a refused one is not registered."""
    from tuneline import artifacts
    from tuneline.register.register import register as register_version

    section = recipe.check(recipe.RegistrySection, registry, source="registry")
    with _step("register", run_id, experiment, ("mlflow",)) as step:
        verdict = artifacts.load(Path(eval_report), "eval_report").read_json("report.json")[
            "verdict"
        ]
        if not verdict["passed"] and verdict["refused"] == "skip":
            report("not registered: the gate refused the model, and gate.refused is skip")
            return NOT_REGISTERED
        return register_version(
            by_uri.fetch(Path(model)),
            Path(eval_report),
            section.model_name,
            run_id,
            step,
            require_approval=section.require_approval,
            retrain_key=retrain_key,
        )


def promote(
    registry: Mapping[str, Any],
    version: int,
    run_id: str = "",
    experiment: str = "",
    *,
    expect_champion: int | None = None,
    by: str = "",
) -> str:
    """A registered version to champion; returns its alias, empty when it was refused."""
    from tuneline.register.copy import copy_and_promote
    from tuneline.register.promote import Promotion, Request
    from tuneline.register.promote import promote as promote_version

    section = recipe.check(recipe.RegistrySection, registry, source="registry")
    asked_by = by or f"pipeline run {run_id}"
    request = Request(version, asked_by, run_id, expect_champion)
    with _step("promote", run_id, experiment, ("torch", "transformers", "mlflow")) as step:
        if version == NOT_REGISTERED:
            promotion = Promotion(version, "", "it was not registered")
        else:
            promotion = promote_version(section.model_name, request)
        if promotion.alias and section.to_model:
            copy_and_promote(section.model_name, section.to_model, request)
        step.log_params({"alias": promotion.alias, "reason": promotion.reason})
    if run_id:
        finish_run(run_id, experiment)
    return promotion.alias


def check_compare(
    values: Mapping[str, Any],
    methods: Sequence[str],
    overrides: Mapping[str, Any],
    run_id: str,
    experiment: str,
) -> tuple[Any, ...]:
    """Check a comparison's form and every leg.

    Returns:
        The base model, the sections data, evaluation and gate, and the legs. Each leg holds all
        that it needs: in a loop kfp.local hands the item in for every output of an earlier task.
    """
    from tuneline.compare.legs import legs_of

    with _step("check_compare", run_id, experiment, pipeline="compare") as step:
        sections = form.sections_of(values, overrides, method=None, hyperparameters={})
        # nothing is registered; the section has to be there
        sections["registry"] = {"model_name": "none", **sections.get("registry", {})}
        checked = recipe.resolve(sections, source="run form", exports=False)
        legs = [leg.values() for leg in legs_of(checked, methods, source="run form")]
        resolved = _resolved(checked, step)
        step.log_params({"legs": [leg["name"] for leg in legs]})
        report(f"legs: {', '.join(leg['name'] for leg in legs)}")
        return (
            resolved["model"]["base_model"],
            resolved["data"],
            resolved["evaluation"],
            resolved["gate"],
            [
                {
                    **leg,
                    "base_model": resolved["model"]["base_model"],
                    "evaluation": resolved["evaluation"],
                    "gate": resolved["gate"],
                }
                for leg in legs
            ],
        )


def measure_base(
    base_model: str,
    dataset: str,
    evaluation: Mapping[str, Any],
    output: str,
    run_id: str = "",
    experiment: str = "",
) -> None:
    """The base's scores on the test split, for the evaluations of several adapters."""
    from tuneline.evaluate.evaluate import measure_base as measure

    section = recipe.check(recipe.EvaluationSection, evaluation, source="evaluation")
    with _step("measure_base", run_id, experiment, _TORCH):
        measure(base_model, Path(dataset), section, Path(output))


def compare_leg(
    leg: Mapping[str, Any],
    base_model: str,
    dataset: str,
    base_scores: str,
    evaluation: Mapping[str, Any],
    gate: Mapping[str, Any],
    adapter: str,
    eval_report: str,
    run_id: str = "",
    experiment: str = "",
) -> dict[str, Any]:
    """Train and evaluate one leg in a process of its own; returns its row, also of a failed one."""
    from tuneline.compare.leg import FAILED, Job
    from tuneline.compare.watch import run_watched

    job = Job(
        leg=dict(leg),
        base_model=base_model,
        dataset=str(Path(dataset).absolute()),
        base_scores=str(Path(base_scores).absolute()),
        evaluation=dict(evaluation),
        gate=dict(gate),
        adapter=str(Path(adapter).absolute()),
        eval_report=str(Path(eval_report).absolute()),
        result="",
        run_id=run_id,
        experiment=experiment,
    )
    quiet_libraries()
    with tracked(run_id, _task_of(job), experiment=experiment) as step:
        # both processes write to one MLflow run
        shared = {"MLFLOW_RUN_ID": step.run_id} if isinstance(step, TrackedStep) else {}
        row = run_watched(job, shared)
        step.log_metrics({k: v for k, v in row.items() if isinstance(v, int | float)})
        if run_id and (Path(adapter) / MANIFEST).is_file():
            by_uri.leave(Path(adapter))
        if row["status"] == FAILED:
            report(f"{row['leg']} failed: {row['reason']}")
            try:
                step.log_params({"failed": row["reason"]})
            except RegistryError as error:  # a leg that fails does not fail its step
                report(f"warning: the reason is not in MLflow: {error}")
            if isinstance(step, TrackedStep):
                step.failed = True
    return row


def _task_of(job: Job) -> str:
    return f"leg_{job.leg['name']}"


def train_leg(job: Job) -> dict[str, Any]:
    """What the process of a leg does; returns its row."""
    from tuneline.compare.leg import run_leg

    with _step(_task_of(job), job.run_id, job.experiment, _TORCH, is_patient=True) as step:
        return run_leg(job, step)


def leaderboard(
    rows: Sequence[Mapping[str, Any]],
    output: str,
    run_id: str = "",
    experiment: str = "",
) -> dict[str, Any]:
    """The legs' rows to a leaderboard; returns its content.

    Raises:
        TrainingError: no leg finished; the leaderboard is there all the same.
    """
    from tuneline.compare import leaderboard as board

    with _step("leaderboard", run_id, experiment) as step:
        made = board.write(board.rank(rows), Path(output))
        content = made.read_json(board.JSON)
        for name in (board.JSON, board.HTML):
            step.log_file(made.path / name)
        step.log_metrics({f"score_{row['leg']}": row["score"] for row in board.finished(content)})
        for line in board.table(content).splitlines():
            report(line)
        board.check_finished(content)
    if run_id:
        finish_run(run_id, experiment)
    return content
