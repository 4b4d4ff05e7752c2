"""Runs on Kubeflow Pipelines: their steps as they change, why one failed, and its logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tuneline.errors import ClusterError, UsageError
from tuneline.progress import minutes
from tuneline_pipelines.connection import Connection, Fault, absent
from tuneline_pipelines.packages import Package, Step, of

POLL_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 900.0
"""How long a server may be away while a run is waited for: it restarts, the run goes on."""
PENDING_SECONDS: Final = 300.0
"""A step that waits for longer, in a queue or for a node, is told of, and again each so many."""
FINISHED: Final = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_PENDING: Final = "PENDING"
_UNKNOWN_STATES: Final = (None, "", "RUNTIME_STATE_UNSPECIFIED")
_ERROR_PREFIX: Final = "error: "
_LOG_CHUNK_BYTES: Final = 65_536
_FNV_PRIME: Final = 0x0100_0193


def get_run(connection: Connection, run_id: str) -> Any:
    """A run by its id.

    Raises:
        UsageError: there is none.
    """
    try:
        return connection.call(f"reading run {run_id}", connection.runs.run_service_get_run, run_id)
    except Fault as fault:
        if fault.status != 404:
            raise
        raise UsageError(f"there is no run '{run_id}': `tuneline runs` lists them") from fault


def newest_runs(connection: Connection, limit: int) -> list[Any]:
    """The newest runs, the newest first."""
    found = connection.pages(
        "listing runs",
        connection.runs.run_service_list_runs,
        "runs",
        sort_by="created_at desc",
        page_size=min(limit, 100),
        **connection.scope,
    )
    return [run for _, run in zip(range(limit), found, strict=False)]


def package_of(connection: Connection, run: Any) -> Package | None:
    """What a run was made from; None if it was deleted since."""
    if run.pipeline_spec:
        return of(run.pipeline_spec)
    reference = run.pipeline_version_reference
    if reference is None:
        return None
    with absent(404):
        version = connection.call(
            "reading the run's pipeline",
            connection.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        return of(version.pipeline_spec)
    return None


@dataclass(frozen=True)
class TaskState:
    """A step of a run as it is now."""

    label: str
    """The step's name, and a number from its second task on, as in a loop."""
    task_id: str
    step: Step
    state: str
    detail: Any


def tasks_of(run: Any, steps: Mapping[str, Step]) -> list[TaskState]:
    """The tasks of a run that are steps of its pipeline, as they began.

    KFP lists every node of the Argo workflow: drivers, groups and pods among them.
    """
    details = (run.run_details and run.run_details.task_details) or ()
    began = sorted(
        (d for d in details if d.display_name in steps and d.state not in _UNKNOWN_STATES),
        key=lambda d: (d.start_time is None, d.start_time, d.task_id or ""),
    )
    counts: dict[str, int] = {}
    found = []
    for detail in began:
        name = detail.display_name
        counts[name] = counts.get(name, 0) + 1
        label = name if counts[name] == 1 else f"{name} ({counts[name]})"
        found.append(TaskState(label, detail.task_id, steps[name], detail.state, detail))
    return found


class _Watched:
    """What was shown of the steps of a run."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[str, float]] = {}
        self._pending_since: dict[str, float] = {}

    def news(self, task: TaskState, now: float) -> str:
        """What there is to show of a step; empty for nothing new."""
        state, shown_at = self._shown.get(task.task_id, ("", now))
        text = task.state.lower()
        waited = now - self._pending_since.get(task.task_id, now)
        if task.state == _PENDING:
            self._pending_since.setdefault(task.task_id, now)
        else:
            self._pending_since.pop(task.task_id, None)
        if state == task.state:
            if state != _PENDING or now - shown_at < PENDING_SECONDS:
                return ""
            text += f" for {minutes(waited)}"
        elif state == _PENDING and waited >= PENDING_SECONDS:
            text += f" (was pending for {minutes(waited)})"
        self._shown[task.task_id] = (task.state, now)
        return text


def wait(
    connection: Connection, run_id: str, steps: Mapping[str, Step], show: Callable[[str], None]
) -> Any:
    """Follow a run until it ends.

    Args:
        connection: of the server.
        run_id: of the run.
        steps: of its pipeline.
        show: takes a line for each change of a step's state, and one now and then for a step that
            waits for a node.

    Returns:
        The finished run.

    Raises:
        Fault: the server was away for longer than PATIENCE_SECONDS, or refuses.
    """
    began = last_answer = time.monotonic()
    watched = _Watched()
    away = False
    while True:
        try:
            run = connection.attempt(
                f"waiting for run {run_id}", connection.runs.run_service_get_run, run_id
            )
        except Fault as fault:
            if not fault.passing or time.monotonic() - last_answer > PATIENCE_SECONDS:
                raise
            if not away:
                show(f"{fault}; the run goes on, asking again")
            away = True
            time.sleep(POLL_SECONDS)
            continue
        away, last_answer = False, time.monotonic()
        for task in tasks_of(run, steps):
            if news := watched.news(task, last_answer):
                show(f"{minutes(last_answer - began):>6}  {task.label:<26}{news}")
        if run.state in FINISHED:
            return run
        time.sleep(POLL_SECONDS)


def failure_of(connection: Connection, run: Any, steps: Mapping[str, Step]) -> str:
    """Why a run did not succeed, in a sentence: the step and what it said last."""
    which = f"run {run.display_name} ({run.run_id})"
    if run.state == "CANCELED":
        return f"{which} was stopped"
    failed = [task for task in tasks_of(run, steps) if task.state == "FAILED"]
    if not failed:
        stuck = [name for name in steps if f"{name}-driver" in _failed_nodes(run)]
        if stuck:
            return (
                f"{which} could not start step {stuck[0]}: KFP's driver refused what it asks for. "
                f"On the cluster: {kubectl(connection, run.run_id)}"
            )
        said = run.error and run.error.message
        return f"{which} ended as {(run.state or 'unknown').lower()}" + (
            f": {said}" if said else ""
        )
    first = min(failed, key=lambda t: (t.detail.end_time is None, t.detail.end_time))
    said = (first.detail.error and first.detail.error.message) or last_words(connection, run, first)
    return (
        f"{which} failed in step {first.label}: {said or 'it left no message'}\n"
        f"(its log: tuneline logs {run.run_id} --step {first.step.name})"
    )


def _failed_nodes(run: Any) -> set[str]:
    details = (run.run_details and run.run_details.task_details) or ()
    return {detail.display_name for detail in details if detail.state == "FAILED"}


def last_words(connection: Connection, run: Any, task: TaskState) -> str:
    """The sentence that a failed step ended with; empty if its log is not to be had."""
    lines: list[str] = []
    rest = b""

    def take(chunk: bytes) -> None:
        nonlocal rest
        *whole, rest = (rest + chunk).split(b"\n")
        rest = rest[-_LOG_CHUNK_BYTES:]
        lines.extend(line.decode("utf-8", "replace").strip() for line in whole)
        del lines[:-200]

    with contextlib.suppress(ClusterError):
        copy_log(connection, run, task, take)
    lines.append(rest.decode("utf-8", "replace").strip())
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(_ERROR_PREFIX):
            faults = []
            for line in lines[number + 1 :]:
                if not line.startswith("- "):
                    break
                faults.append(line)
            return "\n  ".join([lines[number].removeprefix(_ERROR_PREFIX), *faults])
    return next((line for line in reversed(lines) if line), "")


def copy_log(
    connection: Connection, run: Any, task: TaskState, take: Callable[[bytes], object]
) -> str:
    """Read the log of a step's last attempt; returns the pod's name.

    Args:
        connection: of the server.
        run: whose step it is.
        task: the step.
        take: gets the log in pieces.

    Raises:
        ClusterError: the server has no such log; the message says what to do.
    """
    pods = pod_names(task)
    for pod in reversed(pods):
        if _copy(connection, run.run_id, pod, take):
            return pod
    raise ClusterError(
        f"the server has no log of step {task.label}: its pod has not begun, or is gone. On the "
        f"cluster: {kubectl(connection, run.run_id)}"
    )


def kubectl(connection: Connection, run_id: str) -> str:
    """The command that shows all logs of a run on the cluster."""
    return (
        f"kubectl logs --namespace {connection.pod_namespace} --selector pipeline/runid={run_id} "
        "--container main --prefix --tail=-1"
    )


def pod_names(task: TaskState) -> list[str]:
    """The pods that a step's attempts may have had, the first attempt first.

    KFP's API names a task's children, as Argo's node ids, and no pods. Argo ends a pod's name in
    the same hash as its node's id (32-bit FNV-1a of the node's path), and the path of an attempt is
    that of the step and `(N)`: FNV-1a goes on from where it stopped.
    """
    names = []
    for child in task.detail.child_tasks or ():
        workflow, _, digits = (child.pod_name or "").rpartition("-")
        if not workflow or not digits.isdigit():
            continue
        hashes = [int(digits)]
        if attempts := task.step.attempts:
            hashes = [_fnv_1a(f"({n})".encode(), int(digits)) for n in range(attempts)]
        names += [f"{workflow}-{task.step.template}-{value}" for value in hashes]
    return names


def _fnv_1a(data: bytes, state: int) -> int:
    for byte in data:
        state = ((state ^ byte) * _FNV_PRIME) & 0xFFFF_FFFF
    return state


def _copy(connection: Connection, run_id: str, pod: str, take: Callable[[bytes], object]) -> bool:
    import urllib3

    # Not in the generated client, since it is no gRPC. It answers 200 before it looks, and puts
    # its error into the body.
    def ask(**keywords: Any) -> Any:
        return connection.client.call_api(
            "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log",
            "GET",
            path_params={"run_id": run_id, "node_id": pod},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
            **keywords,
        )

    try:
        answer = connection.attempt(f"reading the log of {pod}", ask)
    except Fault as fault:
        if fault.status in (400, 404, 500):
            return False
        raise
    first = True
    try:
        for chunk in answer.stream(_LOG_CHUNK_BYTES):
            if first and chunk.startswith(b'{"error_message"'):
                return False
            first = False
            take(chunk)
    except urllib3.exceptions.HTTPError as error:
        raise ClusterError(f"the log of {pod} broke off: {error}") from error
    finally:
        answer.release_conn()
    return not first
