"""Which retrainings of a model began, and whether one is still at work: the ledger `NAME.retrain`.

Two runs of a schedule may overlap, a schedule may catch up, a person may start one by hand. Each
that wants to train appends an entry first and reads the ledger back: of the entries with the same
content key, the first whose run has ended well or is still alive has the work, and every other run
leaves it alone. The entries are versions of a registered model, whose order MLflow's database
gives (`tuneline.register.history` says why that decides a race).

Whether a run is alive is read from its MLflow runs, so that nothing has to be renewed while a pod
waits for a node. A run that shows no sign for a day counts as lost.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from tuneline.errors import RegistryError
from tuneline.recipe import RETRAIN_SUFFIX
from tuneline.register.tags import TAG
from tuneline.tracking import TASK_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUNNER_VARIABLE: Final = "TUNELINE_RUNNER"
"""Of a step of a local run: host, process id and start of the process that runs the pipeline."""
_KEY: Final = f"{TAG}retrain_key"
PROFILE: Final = "data_profile.json"
"""In the MLflow run of the step that wrote an entry: what the data was like."""
_LOST_SECONDS: Final = 24 * 3600
_RETRY_SECONDS: Final = 15 * 60
"""A failed step of a cluster's run may be tried again for so long."""
_PAGE: Final = 1000
State = Literal["done", "alive", "dead"]


@dataclass(frozen=True)
class Entry:
    """One retraining that began."""

    number: int
    key: str
    run_id: str
    """Of the pipeline run."""
    mlflow_run_id: str
    """Of the step that wrote the entry; its parent is the pipeline's run."""
    runner: str
    """Of a local run, else empty."""
    written_at_ms: int


def ledger_name(model_name: str) -> str:
    """The registered model that holds the ledger of `model_name`."""
    return model_name + RETRAIN_SUFFIX


def runner() -> str:
    """This process as the runner of local runs."""
    import psutil

    process = psutil.Process()
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"


def read(client: MlflowClient, model_name: str) -> list[Entry]:
    """All entries, in order."""
    found, token = [], None
    while True:
        page = client.search_model_versions(
            f"name = '{ledger_name(model_name)}'",
            max_results=_PAGE,
            order_by=["version_number ASC"],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            break
    return [
        Entry(
            number=int(version.version),
            key=version.tags[_KEY],
            run_id=version.tags.get(f"{TAG}run_id", ""),
            mlflow_run_id=version.tags.get(f"{TAG}mlflow_run_id", ""),
            runner=version.tags.get(f"{TAG}runner", ""),
            written_at_ms=int(version.creation_timestamp),
        )
        for version in found
        if _KEY in version.tags
    ]


def append(
    client: MlflowClient, model_name: str, key: str, run_id: str, mlflow_run_id: str
) -> list[Entry]:
    """Write that this run wants to do the work of `key`; returns the ledger as it stands then."""
    from mlflow.exceptions import MlflowException

    name = ledger_name(model_name)
    try:
        client.create_registered_model(
            name,
            tags={f"{TAG}retrain_of": model_name},
            description=f"The retrainings of {model_name} that began, one version each.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(
        name,
        source=f"runs:/{mlflow_run_id}/{PROFILE}",
        tags={
            _KEY: key,
            f"{TAG}run_id": run_id,
            f"{TAG}mlflow_run_id": mlflow_run_id,
            f"{TAG}runner": os.environ.get(RUNNER_VARIABLE, ""),
        },
        description=f"pipeline run {run_id}",
        await_creation_for=0,
    )
    entries = read(client, model_name)
    if not any(entry.run_id == run_id and entry.key == key for entry in entries):
        raise RegistryError(f"{name} does not keep what is written to it")
    return entries


def holder(client: MlflowClient, entries: Sequence[Entry], key: str) -> tuple[Entry, State] | None:
    """The entry whose run has done or is doing the work of `key`, or None."""
    for entry in entries:
        if entry.key == key and (state := state_of(client, entry)) != "dead":
            return entry, state
    return None


def state_of(client: MlflowClient, entry: Entry) -> State:
    """Whether an entry's run ended well, may still be at work, or is lost."""
    from mlflow.exceptions import MlflowException

    try:
        step = client.get_run(entry.mlflow_run_id)
        parent_id = step.data.tags.get("mlflow.parentRunId", entry.mlflow_run_id)
        parent = client.get_run(parent_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return "dead"
        raise
    if parent.info.lifecycle_stage == "deleted":
        return "dead"
    if parent.info.status == "FINISHED":
        return "done"
    if entry.runner:
        return "alive" if _runs(entry.runner, default=parent.info.status == "RUNNING") else "dead"
    below = _runs_below(client, parent)
    signs = [t for run in (parent, *below) for t in (run.info.start_time, run.info.end_time)]
    for run in below:
        # whatever its status: a step that is tried again is not RUNNING before it is at it
        if "loss" in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, "loss")
            signs.append(history[-1].timestamp)
    silent_seconds = time.time() - max(sign or 0 for sign in signs) / 1000
    patience = _RETRY_SECONDS if parent.info.status in ("FAILED", "KILLED") else _LOST_SECONDS
    return "alive" if silent_seconds < patience else "dead"


def _runs_below(client: MlflowClient, parent: Run) -> list[Run]:
    """All runs below one: KFP's MLflow plugin makes those of steps that did not begin yet below
    its run of a condition or loop."""
    found: list[Run] = []
    waiting = [parent.info.run_id]
    while waiting:
        query = f"tags.mlflow.parentRunId = '{waiting.pop()}'"
        below = client.search_runs([parent.info.experiment_id], query, max_results=_PAGE)
        found += below
        waiting += [run.info.run_id for run in below if TASK_TAG not in run.data.tags]
    return found


def _runs(runner_id: str, *, default: bool) -> bool:
    """Whether the process of a local run still does; `default` where another machine knows."""
    import psutil

    host, pid, created = runner_id.rsplit(":", 2)
    if host != socket.gethostname():
        return default
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 2
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
