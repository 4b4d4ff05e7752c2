"""The only module that writes MLflow runs.

The run tree looks the same everywhere: a parent run per pipeline run, a child per step, both found
by their tags `kfp.run_id` and `kfp.task`.

1. `MLFLOW_RUN_ID` is set (KFP's MLflow plugin made the runs): that run is resumed, none is created.
   It gets the step's name, tags and status, and hangs directly below the pipeline's run: the plugin
   puts a run of its own between them for each condition and loop, which stays there, empty.
2. Else the parent is found by its tag `kfp.run_id`, or created, and the step's child by its tag
   `kfp.task`: a retried step goes on in its run.
3. A step outside of a pipeline (no run id) is not tracked.

A step that trains for hours opens its run from the thread that sends its figures, so that an MLflow
that is away stops nothing; every other step opens it first, and fails if it can't.

Parameters get the prefix `tuneline.`: MLflow's parameters can't change, KFP's plugin logs a
component's inputs by their own names, and a clash would lose the plugin's whole batch.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from tuneline.checkpoints_root import local_root
from tuneline.errors import RegistryError, Terminated
from tuneline.progress import ranks, report
from tuneline.spool import Entry, Refused, Spool, about

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
_KEY_LENGTH: Final = 250
_NOT_IN_A_KEY: Final = re.compile(r"[^\w./ -]")
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


@dataclass(frozen=True)
class _Address:
    """Whose figures a spool holds: enough to find or make their run in a later process."""

    run_id: str = ""
    task: str = ""
    experiment: str = ""
    pipeline: str = ""
    mlflow_run_id: str = ""
    """Of a run that is there."""


@dataclass(frozen=True)
class _Opened:
    """A run that was found or made.

    Attributes:
        client: of the tracking server.
        run_id: of MLflow.
        parent: of the pipeline run, or None where KFP's plugin made the runs.
        params: names of those that it had.
        steps: metric -> the last step that it had.
    """

    client: MlflowClient
    run_id: str
    parent: str | None
    params: frozenset[str]
    steps: dict[str, int]


class _Run:
    """A step's MLflow run, opened when it is first needed.

    Args:
        find: gives the client, the run and its parent, or raises RegistryError.
    """

    def __init__(self, find: Callable[[], tuple[MlflowClient, str, str | None]]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self.found: _Opened | None = None
        """None until it was opened."""

    def opened(self) -> _Opened:
        """The run, which is found or made if it was not yet.

        Raises:
            Refused: the run that it is to be does not exist.
            RegistryError: MLflow can't be reached.
        """
        with self._lock:
            if self.found is None:
                client, run_id, parent = self._find()
                with _refusals("reading what an earlier try has logged"):
                    data = client.get_run(run_id).data
                    steps = {
                        key: max(point.step for point in client.get_metric_history(run_id, key))
                        for key in data.metrics
                    }
                self.found = _Opened(client, run_id, parent, frozenset(data.params), steps)
            return self.found

    def send(self, entries: Sequence[Entry]) -> None:
        """Log what the run did not have when it was opened.

        Raises:
            Refused: the run is gone.
            RegistryError: MLflow can't be reached.
        """
        from mlflow.entities import Metric, Param

        run = self.opened()
        points = [
            Metric(key, value, entry.time_ms, entry.step)
            for entry in entries
            for key, value in entry.metrics.items()
            if key not in self._refused and entry.step > run.steps.get(key, -1)
        ]
        params = {
            key: Param(key, value)
            for entry in reversed(entries)  # the first one counts
            for key, value in entry.params.items()
            if key not in self._refused and key not in run.params
        }
        if points or params:
            try:
                _log(run, points, list(params.values()))
            except Refused:
                self._log_one_by_one(run, points, list(params.values()))
        for entry in entries:
            if entry.status:
                with _refusals("ending a run"):
                    run.client.set_terminated(run.run_id, entry.status, entry.time_ms)

    def _log_one_by_one(self, run: _Opened, points: list[Any], params: list[Any]) -> None:
        """What is refused for good holds up nothing else."""
        _check_alive(run)
        groups: dict[str, tuple[list[Any], list[Any]]] = {}
        for point in points:
            groups.setdefault(point.key, ([], []))[0].append(point)
        for param in params:
            groups.setdefault(param.key, ([], []))[1].append(param)
        for key, group in groups.items():
            try:
                _log(run, *group)
            except Refused as error:
                report(f"warning: {key} is not in MLflow, which refuses it for good: {error}")
                self._refused.add(key)


def _log(run: _Opened, points: list[Any], params: list[Any]) -> None:
    with _refusals("logging metrics"):
        run.client.log_batch(run.run_id, metrics=points, params=params)


def _check_alive(run: _Opened) -> None:
    with _refusals("looking for a run"):
        stage = run.client.get_run(run.run_id).info.lifecycle_stage
    if stage != "active":
        raise Refused(f"run {run.run_id} was {stage}")


_REFUSALS: Final = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
"""Of what was sent, not of the moment: it would be refused again."""


@contextmanager
def _refusals(doing: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        with mlflow_errors(doing):
            yield
    except RegistryError as error:
        cause = error.__cause__
        if isinstance(cause, MlflowException) and cause.error_code in _REFUSALS:
            raise Refused(str(error)) from cause
        raise


class TrackedStep:
    """A step's MLflow run.

    Attributes:
        failed: set where the run ends FAILED although the step itself goes on.
    """

    def __init__(self, run: _Run, address: _Address, *, is_patient: bool) -> None:
        self.failed = False
        self._run = run
        self._is_patient = is_patient
        path = _spool_folder() / f"{_file_name(address)}.jsonl"
        try:
            self._spool = Spool(path, run.send, asdict(address))
        except BlockingIOError:  # a pod that is not quite gone yet writes to the same run
            other = path.with_suffix(f".{os.getpid()}.jsonl")
            self._spool = Spool(other, run.send, asdict(address))

    @property
    def client(self) -> MlflowClient:
        """Of the tracking server."""
        return self._run.opened().client

    @property
    def run_id(self) -> str:
        """Of this step's run."""
        return self._run.opened().run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; a value that was logged by an earlier try of the step is kept."""
        values = {PARAM_PREFIX + key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
        if self._is_patient:
            self._spool.put_params(values)
            return
        from mlflow.entities import Param

        with mlflow_errors("logging parameters"):
            known = self.client.get_run(self.run_id).data.params
            entries = [Param(key, value) for key, value in values.items() if key not in known]
            self.client.log_batch(self.run_id, params=entries)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a training step; they are sent by and by, however long MLflow is away."""
        self._spool.put(metrics, step)

    def close(self, status: str) -> bool:
        """Send what is left; what can't be sent waits for the next process that tracks anything.

        Args:
            status: how the run ended, or empty where KFP's plugin ends it.

        Returns:
            Whether all was sent.
        """
        finished = status != "FAILED"
        if finished and status:
            self._spool.put_status(status)
        sent = self._spool.close(_PATIENCE_SECONDS if finished else _FAILED_PATIENCE_SECONDS)
        if sent and finished:
            self._spool.remove()
        if not sent and not self._spool.refused:
            report(
                f"warning: MLflow at {safe_uri()} is away; the metrics of this step wait in "
                f"{_spool_folder()} and are sent by the next step that finds it back"
            )
        return sent

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


def _spool_folder() -> Path:
    """Beside the checkpoints, where a retried pod finds it; one for each server."""
    root = local_root()
    folder = (
        root / "metrics"
        if root
        else Path(tempfile.gettempdir()) / f"tuneline-metrics-{os.getuid()}"
    )
    return folder / hashlib.sha256(safe_uri().encode()).hexdigest()[:12]


def _file_name(address: _Address) -> str:
    return re.sub(r"[^\w.-]", "-", f"{address.run_id}.{address.task}")


def _send_leftovers(client: MlflowClient) -> None:
    """What earlier processes could not send; MLflow has just answered."""
    patience = _FAILED_PATIENCE_SECONDS
    for path in sorted(_spool_folder().glob("*.jsonl")):
        try:
            run = _run_of_leftover(client, path)
            spool = Spool(path, run.send)
        except OSError:  # another process is at it
            continue
        # of a run that did not end it stays: a retry must know what it need not send again
        sent = spool.close(patience)
        if sent and spool.finished:
            spool.remove()
        if not sent:  # nor will the others be, most likely
            patience = 1.0


def _run_of_leftover(client: MlflowClient, path: Path) -> _Run:
    try:
        address = _Address(**about(path))
    except TypeError:  # of another version
        address = _Address()

    def find() -> tuple[MlflowClient, str, str | None]:
        if address.mlflow_run_id:
            return client, address.mlflow_run_id, None
        if not address.run_id:  # a file without its first line, or of an earlier version
            return client, path.name.partition(".")[0], None
        with mlflow_errors(f"opening the run of {address.task}"):
            experiment = _experiment_id(client, address.experiment)
            parent = _find_or_create(
                client, experiment, address.run_id, None, None, address.pipeline
            )
            run = _find_or_create(client, experiment, address.run_id, address.task, parent)
        return client, run, parent

    return _Run(find)


def mlflow_key(name: str) -> str:
    """A key that MLflow takes for a metric or tag of any name.

    A name that it takes is its own key. Of others the refused characters are replaced and a digest
    of the whole follows, so that two names never share a key: one refused key would hold up all
    figures that are sent with it and after it.
    """
    plain = _NOT_IN_A_KEY.sub("_", name)
    if posixpath.normpath(plain) != plain or plain.startswith(("/", "..")) or plain == ".":
        plain = plain.replace("/", "_").replace(".", "_")  # MLflow's keys are paths
    if plain == name and len(name) <= _KEY_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: _KEY_LENGTH - 9]}-{digest}"


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
    run_id: str,
    task: str,
    *,
    experiment: str,
    pipeline: str = "finetune",
    is_patient: bool = False,
) -> Iterator[Step]:
    """The run of one step of a pipeline run; it ends FINISHED or FAILED.

    Args:
        run_id: of the pipeline run; empty for a step on its own.
        task: name of the step.
        experiment: of MLflow, created if it does not exist.
        pipeline: what the parent run is named after by the first step.
        is_patient: go on without a server that is away; all that is logged waits for it.

    Raises:
        RegistryError: MLflow can't be reached, and the step is not patient, or no server is named.
    """
    if not run_id or ranks()[0] > 0:
        yield Untracked()
        return

    def find() -> tuple[MlflowClient, str, str | None]:
        client = open_client()
        _send_leftovers(client)
        with mlflow_errors(f"opening the run of {task}"):
            return client, *_run_of_step(client, run_id, task, experiment, pipeline)

    run = _Run(find)
    injected = os.environ.get("MLFLOW_RUN_ID", "")
    # a database that can't be opened is a fault of the settings, not a server that comes back
    is_patient = is_patient and safe_uri().startswith(("http://", "https://"))
    if not is_patient:
        run.opened()
    step = TrackedStep(
        run, _Address(run_id, task, experiment, pipeline, injected), is_patient=is_patient
    )
    status = "FAILED"
    try:
        yield step
        if not step.failed:
            status = "FINISHED"
    except Terminated as stopped:
        if str(stopped):  # sending may take the rest of the time that there is
            report(str(stopped))
        raise
    finally:
        sent = step.close(status if status == "FAILED" or not injected else "")
        if status == "FAILED" and sent and run.found is not None and run.found.parent:
            # a step that fails by itself fails the pipeline's run
            failed = [run.found.run_id, *([] if step.failed else [run.found.parent])]
            _end_hurriedly(run.found.client, failed)


def _end_hurriedly(client: MlflowClient, runs: list[str]) -> None:
    """SIGKILL may be near: a server that does not answer is not waited for."""
    ending = threading.Thread(target=_end_runs, args=(client, runs, "FAILED"), daemon=True)
    ending.start()
    ending.join(_FAILED_PATIENCE_SECONDS)


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
