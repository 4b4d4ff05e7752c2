"""The only module that writes MLflow runs.

The run tree looks the same everywhere: a parent run per pipeline run, a child per step, both found
by their tags `kfp.run_id` and `kfp.task`.

1. `MLFLOW_RUN_ID` is set (KFP's MLflow plugin made the runs): that run is resumed, none is created.
   It gets the step's name, tags and status, and hangs directly below the pipeline's run: the plugin
   puts a run of its own between them for each condition and loop, which stays there, empty.
2. Else the parent is found by its tag `kfp.run_id`, or created, and the step's child by its tag
   `kfp.task`: a retried step goes on in its run.
3. A step outside of a pipeline (no run id) is not tracked.

Parameters get the prefix `tuneline.`: MLflow's parameters can't change, KFP's plugin logs a
component's inputs by their own names, and a clash would lose the plugin's whole batch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from tuneline.checkpoints_root import local_root, remote_root
from tuneline.errors import RegistryError
from tuneline.progress import ranks, report
from tuneline.spool import Entry, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PATIENCE_SECONDS: Final = 120.0
"""How long a step that ended well waits for an MLflow that is away, before it leaves its metrics to
the next step."""
_FAILED_PATIENCE_SECONDS: Final = 5.0
"""How long one that ends otherwise does: SIGKILL may be near."""
PARAM_PREFIX: Final = "tuneline."
RUN_TAG: Final = "kfp.run_id"
TASK_TAG: Final = "kfp.task"
_PIPELINE_TASK: Final = "pipeline"
"""What that tag holds of a parent run."""
_PARENT_TAG: Final = "mlflow.parentRunId"
_PARAM_LENGTH: Final = 6000
URI_VARIABLE: Final = "MLFLOW_TRACKING_URI"
CLUSTER_URI_VARIABLE: Final = "TUNELINE_MLFLOW_TRACKING_URI"
"""What a package sets, from the config map. KFP's MLflow plugin puts the other one into a container
as a value; an entry of the same name that refers to a config map would be merged with it, and
Kubernetes refuses a pod whose variable has both."""


class Step(Protocol):
    """What a step tells of itself while it runs."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, once."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a training step."""
        ...

    def log_file(self, path: Path) -> None:
        """A small file to keep with the run."""
        ...

    def log_folder(self, path: Path, name: str) -> None:
        """A folder of some MB to keep with the run, under its own name."""
        ...

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Which data the step read."""
        ...


class Untracked:
    """A step that nobody records."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def log_file(self, path: Path) -> None:
        """Do nothing."""

    def log_folder(self, path: Path, name: str) -> None:
        """Do nothing."""

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Do nothing."""


class TrackedStep:
    """A step's MLflow run.

    Attributes:
        client: of the tracking server.
        run_id: of this step's run.
        failed: set where the run ends FAILED although the step itself goes on.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.failed = False
        path = _spool_folder() / f"{run_id}.jsonl"
        # the spool of the pod before was on its own disk, if that is not a volume of all
        known = {} if remote_root() is None or path.exists() else _latest_steps(client, run_id)
        try:
            self._spool = Spool(path, self._send, known)
        except BlockingIOError:  # a pod that is not quite gone yet writes to the same run
            self._spool = Spool(path.with_name(f"{run_id}.{os.getpid()}.jsonl"), self._send)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; a value that was logged by an earlier try of the step is kept."""
        from mlflow.entities import Param

        with mlflow_errors("logging parameters"):
            self._log_params(params, Param)

    def _log_params(self, params: Mapping[str, Any], param: Any) -> None:
        known = self.client.get_run(self.run_id).data.params
        entries = [
            param(PARAM_PREFIX + key, str(value)[:_PARAM_LENGTH])
            for key, value in params.items()
            if PARAM_PREFIX + key not in known
        ]
        self.client.log_batch(self.run_id, params=entries)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a training step; they are sent by and by, however long MLflow is away."""
        self._spool.put(metrics, step)

    def _send(self, entries: Sequence[Entry]) -> None:
        send_entries(self.client, self.run_id, entries)

    def close(self, status: str) -> None:
        """Send what is left; what can't be sent waits for the next process that tracks anything.

        Args:
            status: how the run ended, or empty where KFP's plugin ends it.
        """
        finished = status != "FAILED"
        if finished and status:
            self._spool.put_status(status)
        patience = _PATIENCE_SECONDS if finished else _FAILED_PATIENCE_SECONDS
        if not self._spool.close(patience):
            report(
                f"warning: MLflow at {safe_uri()} is away; the metrics of run {self.run_id} wait "
                f"in {_spool_folder()} and are sent by the next step that finds it back"
            )
        elif finished:
            self._spool.remove()

    def log_file(self, path: Path) -> None:
        """Upload a small file."""
        with mlflow_errors(f"uploading {path.name}"):
            self.client.log_artifact(self.run_id, str(path))

    def log_folder(self, path: Path, name: str) -> None:
        """Upload a folder of some MB."""
        with mlflow_errors(f"uploading {name}"):
            self.client.log_artifacts(self.run_id, str(path), name)

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Data set lineage: its name and digest, and whether it was for training or evaluation."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=name,
            digest=digest.removeprefix("sha256:")[:36],  # MLflow's limit
            source_type="tuneline",
            source=json.dumps({"digest": digest}),
        )
        lineage = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        with mlflow_errors("logging the data set"):
            self.client.log_inputs(self.run_id, datasets=[lineage])


def send_entries(client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
    """Log spooled figures in one request.

    Raises:
        RegistryError: MLflow can't be reached or refuses them.
    """
    from mlflow.entities import Metric

    points = [
        Metric(key, value, entry.time_ms, entry.step)
        for entry in entries
        for key, value in entry.metrics.items()
    ]
    with mlflow_errors("logging metrics"):
        client.log_batch(run_id, metrics=points)
        for entry in entries:
            if entry.status:
                client.set_terminated(run_id, entry.status, entry.time_ms)


def _latest_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    with mlflow_errors("reading the metrics of an earlier try"):
        return {
            key: max(point.step for point in client.get_metric_history(run_id, key))
            for key in client.get_run(run_id).data.metrics
        }


def _spool_folder() -> Path:
    """Beside the checkpoints, where a retried pod finds it; one for each server."""
    root = local_root()
    folder = (
        root / "metrics"
        if root
        else Path(tempfile.gettempdir()) / f"tuneline-metrics-{os.getuid()}"
    )
    return folder / hashlib.sha256(safe_uri().encode()).hexdigest()[:12]


def _send_leftovers(client: MlflowClient) -> None:
    """What earlier processes could not send; MLflow has just answered."""
    for path in sorted(_spool_folder().glob("*.jsonl")):
        run_id = path.name.partition(".")[0]
        try:
            spool = Spool(path, partial(send_entries, client, run_id))
        except OSError:  # another process is at it
            continue
        # of a run that did not end it stays: a retry must know what it need not send again
        if spool.close(_FAILED_PATIENCE_SECONDS) and spool.finished:
            spool.remove()


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow and its stores raise into one sentence, without a password.

    Raises:
        RegistryError: names the server and what was being done.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # ImportError: no driver for that database; ValueError: not a URI
    except (MlflowException, RequestException, SQLAlchemyError, ImportError, ValueError) as error:
        code = error.error_code if isinstance(error, MlflowException) else ""
        if code == "UNAUTHENTICATED" or "error code 401" in str(error):
            raise RegistryError(
                f"MLflow at {safe_uri()} refused the credentials ({doing}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        uri = tracking_uri()
        text = " ".join(str(error).replace(uri, safe_uri()).split())
        login = uri.partition("://")[2].partition("/")[0].rpartition("@")[0]
        if password := login.partition(":")[2]:
            text = text.replace(password, "***")
        raise RegistryError(f"MLflow at {safe_uri()}: {doing}: {text[:500]}") from error


def tracking_uri() -> str:
    """Of the MLflow server: `MLFLOW_TRACKING_URI`, else the cluster's own; empty for none."""
    return os.environ.get(URI_VARIABLE) or os.environ.get(CLUSTER_URI_VARIABLE, "")


def open_client() -> MlflowClient:
    """A client of `tracking_uri`.

    Raises:
        RegistryError: the variable is not set, or names no store that MLflow can open.
    """
    import logging

    if not (uri := tracking_uri()):
        raise RegistryError(
            "no MLflow server is named: set MLFLOW_TRACKING_URI, for example to "
            "sqlite:///mlflow.db or https://mlflow.example.com"
        )
    for name in ("alembic", "mlflow.store.db.utils"):  # migration chatter of a new sqlite file
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow

    with mlflow_errors("connecting"):
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        client.get_experiment_by_name("Default")  # opens the store, so that a wrong one shows now
        return client


@contextmanager
def tracked(
    run_id: str, task: str, *, experiment: str, pipeline: str = "finetune"
) -> Iterator[Step]:
    """The run of one step of a pipeline run; it ends FINISHED or FAILED.

    Args:
        run_id: of the pipeline run; empty for a step on its own.
        task: name of the step.
        experiment: of MLflow, created if it does not exist.
        pipeline: what the parent run is named after by the first step.

    Raises:
        RegistryError: MLflow can't be reached.
    """
    if not run_id or ranks()[0] > 0:
        yield Untracked()
        return
    client = open_client()
    _send_leftovers(client)
    with mlflow_errors(f"opening the run of {task}"):
        step_run_id, parent = _run_of_step(client, run_id, task, experiment, pipeline)
    step = TrackedStep(client, step_run_id)
    status, failed = "FAILED", [step_run_id, *([parent] if parent else [])]
    try:
        yield step
        if step.failed:
            failed = [step_run_id]
        else:
            status = "FINISHED"
    finally:
        step.close(status if parent or status == "FAILED" else "")
        if parent and status == "FAILED":
            _end_runs(client, failed, status)


def _end_runs(client: MlflowClient, runs: list[str], status: str) -> None:
    try:
        with mlflow_errors("ending a run"):
            for run in runs:
                client.set_terminated(run, status)
    except RegistryError:
        # a step that ends well must be recorded; one that fails has its own error to tell
        if status == "FINISHED":
            raise


def finish_run(run_id: str, experiment: str) -> None:
    """End the parent run well; where KFP's plugin made it, the plugin ends it."""
    if os.environ.get("MLFLOW_RUN_ID"):
        return
    client = open_client()
    with mlflow_errors("finding the pipeline's run"):
        parent = _find_or_create(client, _experiment_id(client, experiment), run_id, None, None)
    _end_runs(client, [parent], "FINISHED")


def _run_of_step(
    client: MlflowClient, run_id: str, task: str, experiment: str, pipeline: str
) -> tuple[str, str | None]:
    if injected := os.environ.get("MLFLOW_RUN_ID"):
        _resume(client, injected, run_id, task)
        return injected, None
    experiment_id = _experiment_id(client, experiment)
    parent = _find_or_create(client, experiment_id, run_id, None, None, pipeline)
    step = _find_or_create(client, experiment_id, run_id, task, parent)
    for run in (parent, step):  # an earlier try may have failed them
        client.update_run(run, "RUNNING")
    return step, parent


def _resume(client: MlflowClient, injected: str, run_id: str, task: str) -> None:
    """Make a run of KFP's plugin look like one of ours; the plugin ends it, and finds it by its id.

    It is named after the task in the pipeline, has no tags, and is FAILED where an earlier try was.
    """
    known = client.get_run(injected)
    root = known
    while parent := root.data.tags.get(_PARENT_TAG):
        root = client.get_run(parent)
    tags = {RUN_TAG: run_id, TASK_TAG: task}
    if root is not known:
        tags[_PARENT_TAG] = root.info.run_id
        _set_tags(client, root, {RUN_TAG: run_id, TASK_TAG: _PIPELINE_TASK})
    _set_tags(client, known, tags)
    if (known.info.run_name, known.info.status) != (task, "RUNNING"):
        client.update_run(injected, "RUNNING", task)


def _set_tags(client: MlflowClient, run: Any, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        if run.data.tags.get(key) != value:
            client.set_tag(run.info.run_id, key, value)


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    artifacts = os.environ.get("TUNELINE_MLFLOW_ARTIFACTS")
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:  # another step created it in between
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def _find_or_create(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    task: str | None,
    parent: str | None,
    pipeline: str = "finetune",
) -> str:
    task_tag = task or _PIPELINE_TASK
    query = f"tags.`{RUN_TAG}` = '{run_id}' and tags.`{TASK_TAG}` = '{task_tag}'"
    found = client.search_runs([experiment_id], query, max_results=1)
    if found:
        return found[0].info.run_id
    tags = {RUN_TAG: run_id, TASK_TAG: task_tag}
    if parent:
        tags[_PARENT_TAG] = parent
    name = task or f"{pipeline}-{run_id[:8]}"
    return client.create_run(experiment_id, tags=tags, run_name=name).info.run_id


def safe_uri() -> str:
    """The server's URI without user and password."""
    uri = tracking_uri()
    # by hand: putting sqlite:////path together again would lose its slashes, and not every text is
    # a URI
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
