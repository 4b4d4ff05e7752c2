"""A packaged model and its EvalReport -> one version of a registered model in MLflow.

Four things are written, in an order that a retry can take up wherever a try before it died: a
LoggedModel (pending), its files, the LoggedModel's end (ready), the version. The key that a retry
looks for is pipeline run, step, and the digests of model and report.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline import artifacts
from tuneline.artifacts import Artifact
from tuneline.errors import ArtifactError
from tuneline.progress import report
from tuneline.register import tags
from tuneline.register.package import lay_out, package_of
from tuneline.register.tags import TAG
from tuneline.tracking import Step, TrackedStep, mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

CHALLENGER: Final = "challenger"
_KEY: Final = (tags.RUN_ID, tags.STEP, tags.MODEL_DIGEST, tags.REPORT_DIGEST)


def register(
    model_dir: Path,
    report_dir: Path,
    model_name: str,
    run_id: str,
    step: Step,
    *,
    step_name: str = "register",
    require_approval: bool = False,
    retrain_key: str = "",
) -> int:
    """Register once per pipeline run, step and content, however often the step is retried.

    Args:
        model_dir: a MergedModel.
        report_dir: the EvalReport of the adapter that was merged.
        model_name: of the registered model; created if it does not exist.
        run_id: of the pipeline run, empty outside of one.
        step: the tracked step whose run becomes the version's source, if there is one.
        step_name: of the step in its pipeline.
        require_approval: whether promotion has to wait for `tuneline approve`.
        retrain_key: content key of a retraining: one version for it, whichever run registers it.

    Returns:
        The version's number.

    Raises:
        ArtifactError: model and report are not of the same adapter.
        RegistryError: MLflow refuses or can't be reached.
    """
    package = package_of(model_dir)
    model = artifacts.load(model_dir, package.kind)
    evaluation = artifacts.load(report_dir, "eval_report")
    if model.manifest.inputs["adapter"] != evaluation.manifest.inputs["adapter"]:
        raise ArtifactError(
            f"{report_dir} evaluates another adapter than the one of {model_dir}: a model is "
            "registered with its own evaluation only"
        )
    described = {
        **tags.describe(model, evaluation),
        tags.RUN_ID: run_id,
        tags.STEP: step_name,
        tags.IMAGE: os.environ.get("TUNELINE_IMAGE", "none"),
        tags.APPROVAL_REQUIRED: "true" if require_approval else "false",
    }
    if require_approval:
        described[tags.APPROVAL] = "waits for `tuneline approve`"
    if retrain_key:
        described[tags.RETRAIN_KEY] = retrain_key
    client = open_client()
    with mlflow_errors(f"registering {model_name}"):
        number = _existing(client, model_name, described)
        if number is None:
            logged = _logged_model(client, model_name, described, step)
            with tempfile.TemporaryDirectory() as aside:
                folder = Path(aside)
                described[tags.PACKAGE_DIGEST] = lay_out(
                    package, model, evaluation, folder, logged.model_id
                )
                _upload(client, logged, folder)
            number = _version(client, logged, model_name, described, step)
            report(f"registered {model_name} version {number}")
        else:
            report(f"{model_name} version {number} is already of this work: nothing to register")
        _log_lineage(evaluation, step)
        # of the version: one that is there already may be of another run's evaluation
        found = client.get_model_version(model_name, str(number))
        if found.tags.get(tags.GATE) == tags.PASSED:
            _set_challenger(client, model_name, number)
    return number


def _existing(client: MlflowClient, model_name: str, described: dict[str, str]) -> int | None:
    key = (tags.RETRAIN_KEY,) if tags.RETRAIN_KEY in described else _KEY
    same = [
        int(found.version)
        for found in client.search_model_versions(f"name = '{model_name}'")
        if all(found.tags.get(name) == described[name] for name in key)
    ]
    return min(same, default=None)


def _experiment_id(client: MlflowClient, step: Step) -> str:
    if isinstance(step, TrackedStep):
        return client.get_run(step.run_id).info.experiment_id
    return "0"


def _logged_model(
    client: MlflowClient, model_name: str, described: dict[str, str], step: Step
) -> LoggedModel:
    """The LoggedModel of this key: that of an earlier try, or a new one."""
    experiment_id = _experiment_id(client, step)
    query = " AND ".join(f"tags.`{key}` = '{described[key]}'" for key in _KEY)
    found = client.search_logged_models(
        [experiment_id],
        filter_string=f"name = '{model_name}' AND {query}",
        order_by=[{"field_name": "creation_time", "ascending": True}],
    )
    if found:
        return found[0]
    return client.create_logged_model(
        experiment_id,
        name=model_name,
        source_run_id=step.run_id if isinstance(step, TrackedStep) else None,
        tags=described,
    )


def _upload(client: MlflowClient, logged: LoggedModel, folder: Path) -> None:
    """Send the files that are not there yet, one by one from disk, small ones last."""
    from mlflow.entities import LoggedModelStatus

    if logged.status == LoggedModelStatus.READY:
        return
    there = _sizes(client, logged.model_id)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    for file in files:
        name = file.relative_to(folder)
        if there.get(name.as_posix()) == file.stat().st_size:
            continue
        parent = name.parent.as_posix()
        client.log_model_artifact(logged.model_id, str(file), None if parent == "." else parent)
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def _sizes(client: MlflowClient, model_id: str) -> dict[str, int]:
    """Path -> size in bytes of what is uploaded; a file appears there only when it is whole."""
    sizes: dict[str, int] = {}
    folders: list[str | None] = [None]
    while folders:
        for entry in client.list_logged_model_artifacts(model_id, folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                sizes[entry.path] = entry.file_size or 0
    return sizes


def _version(
    client: MlflowClient,
    logged: LoggedModel,
    model_name: str,
    described: dict[str, str],
    step: Step,
) -> int:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        model_name,
        source=logged.artifact_location,
        run_id=step.run_id if isinstance(step, TrackedStep) else None,
        tags=described,
        description=_description(described),
        model_id=logged.model_id,
        await_creation_for=0,
    )
    # MLflow's client repeats a request whose answer was lost: then there are two of them
    first = _existing(client, model_name, described)
    if first is not None and first < int(created.version):
        client.delete_model_version(model_name, created.version)
        return first
    return int(created.version)


def _description(described: dict[str, str]) -> str:
    """What a person reads first on the version's page in MLflow."""
    metric = described[tags.METRIC]
    gate = described[tags.GATE]
    if described[tags.GATE_REASONS]:
        gate += f" ({described[tags.GATE_REASONS]})"
    return (
        f"{described[f'{TAG}method']} on {described[f'{TAG}base_model']}: {metric} "
        f"{described[tags.of_score('base', metric)]} -> "
        f"{described[tags.of_score('tuned', metric)]} on "
        f"{described[f'{TAG}test_rows']} test rows, compared with "
        f"{described[tags.COMPARED_WITH]}. Gate: {gate}."
    )


def _log_lineage(evaluation: Artifact, step: Step) -> None:
    """Which data the version was trained and evaluated on, at its source run."""
    result = evaluation.read_json("report.json")
    step.log_dataset("train", evaluation.manifest.inputs["prepared_dataset"], "training")
    step.log_dataset("test", result["eval_set_digest"], "evaluation")


def _set_challenger(client: MlflowClient, model_name: str, number: int) -> None:
    """Name the newest version that passed its gate; a late retry of an older run does not take the
    name back."""
    before = client.get_registered_model(model_name).aliases.get(CHALLENGER)
    if before is None or int(before) < number:
        client.set_registered_model_alias(model_name, CHALLENGER, str(number))
