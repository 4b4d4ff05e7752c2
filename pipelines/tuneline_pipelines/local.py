"""Run a recipe on this machine: the compiled pipeline's own function under `kfp.local`.

Every step is a process of its own, as on the cluster. The work folder holds everything: `kfp/`
with the artifacts, `mlflow.db` and `mlflow-artifacts/` unless `MLFLOW_TRACKING_URI` names a
server, `checkpoints/` unless `TUNELINE_CHECKPOINTS` names a place, `run.log` with the full output,
and `summary.json` with what came out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

from tuneline import by_uri, images
from tuneline.errors import Terminated, TunelineError
from tuneline.form import arguments_of
from tuneline.progress import RECORD_PREFIX, REPORT_PREFIX, TICK_PREFIX, peak_memory_bytes
from tuneline.recipe import Recipe, method_of
from tuneline.tracking import safe_uri, tracking_uri

SUMMARY: Final = "summary.json"
OUTCOME: Final = "retrain.json"
_ERROR_PREFIX: Final = "error: "
_STOP_SECONDS: Final = 30
"""A training step's grace period, as on the cluster: it writes a checkpoint."""
_KFP_LINE: Final = re.compile(r" - (INFO|ERROR|WARNING) - ")


class Console(io.TextIOBase):
    """Keeps everything in a log and shows a person the lines that are meant for one.

    In a terminal, progress replaces the line before; elsewhere each line stays.
    """

    def __init__(self, terminal: TextIO, log: TextIO, *, quiet: bool) -> None:
        self._terminal = terminal
        self._log = log
        self._quiet = quiet
        self._tty = terminal.isatty()
        self._pending = ""
        self._on_tick = False
        self.last_error = ""
        """The sentence that a failed step ended with."""
        self.last_line = ""
        """The last line of the failed step that says something."""
        self.records: list[dict[str, Any]] = []
        """What each finished step recorded of itself, in order."""

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Take text in pieces of any size."""
        self._log.write(text)
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._show(line.strip())
        return len(text)

    def flush(self) -> None:
        """Flush the log."""
        self._log.flush()

    def _show(self, line: str) -> None:
        if line and not line.startswith("-") and not _KFP_LINE.search(line):
            self.last_line = line
        if line.startswith(_ERROR_PREFIX):
            self.last_error = line.removeprefix(_ERROR_PREFIX)
        elif self.last_error and line.startswith("- "):
            self.last_error += f"\n  {line}"
        if line.startswith(RECORD_PREFIX):
            self.records.append(json.loads(line.removeprefix(RECORD_PREFIX)))
        if self._quiet:
            return
        if line.startswith(TICK_PREFIX):
            text = "  " + line.removeprefix(TICK_PREFIX)
            self._terminal.write(f"\r\033[K{text}" if self._tty else f"{text}\n")
            self._on_tick = self._tty
        elif line.startswith(REPORT_PREFIX):
            text = line.removeprefix(REPORT_PREFIX)
            self.end_tick()
            self._terminal.write(f"{text}\n" if text.startswith("==") else f"  {text}\n")
        self._terminal.flush()

    def end_tick(self) -> None:
        """Clear a progress line that still stands."""
        if self._on_tick:
            self._terminal.write("\r\033[K")
            self._on_tick = False


def run_recipe(
    recipe: Recipe, workdir: Path, *, contained: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run the pipeline; returns the summary, which is also written to the work folder.

    Args:
        recipe: to run.
        workdir: for everything that comes out.
        contained: run each step in a container of its component's image (`TUNELINE_IMAGE` names
            one for all) instead of this environment.
        quiet: show nothing while it runs.

    Raises:
        TunelineError: the work folder can't be written.
        TunelineError: a step failed; the message is that step's own.
    """
    from tuneline import pools
    from tuneline_pipelines import finetune, resources

    started = time.monotonic()
    workdir = workdir.absolute()
    outputs, records = _run(
        lambda: finetune.build(
            resources.on_this_machine,
            method_of(recipe.method),
            default_pool=pools.read().without_accelerator,
        ),
        lambda pipeline: arguments_for(pipeline, recipe),
        workdir,
        (SUMMARY,),
        contained=recipe if contained else None,
        quiet=quiet,
    )
    wall_seconds = time.monotonic() - started
    summary = summarize(outputs, records, recipe.registry.model_name, workdir, wall_seconds)
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    _replace(workdir / SUMMARY, text)
    return summary


def run_retrain(recipe: Recipe, workdir: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the pipeline `retrain`; returns the outcome, which is also written to the work folder.

    Raises:
        TunelineError: as `run_recipe`.
    """
    from tuneline import pools
    from tuneline.retrain.ledger import RUNNER_VARIABLE, runner
    from tuneline_pipelines import resources, retrain

    started = time.monotonic()
    workdir = workdir.absolute()
    os.environ[RUNNER_VARIABLE] = runner()
    outputs, records = _run(
        lambda: retrain.build(
            resources.on_this_machine, default_pool=pools.read().without_accelerator
        ),
        lambda pipeline: arguments_for(pipeline, recipe),
        workdir,
        (OUTCOME,),
        quiet=quiet,
    )
    if outputs["action"] != "nothing" and not any(r["task"] == "promote" for r in records):
        raise TunelineError(
            f"the pipeline was to {outputs['action']} and ended before the promotion: see "
            f"{workdir / 'run.log'}"
        )
    name = recipe.registry.model_name
    done: dict[str, Any] = (
        # a run with nothing to do has said all in its reason, and MLflow takes seconds to import
        {"model_name": name, "version": int(outputs["version"])}
        if outputs["action"] == "nothing"
        else _registered(name, outputs["key"])
    )
    outcome = {
        **{key: outputs[key] for key in ("action", "reason", "key")},
        **done,
        "tracking_uri": safe_uri(),
        "wall_seconds": time.monotonic() - started,
    }
    _replace(workdir / OUTCOME, json.dumps(outcome, indent=2, ensure_ascii=False) + "\n")
    return outcome


def _registered(model_name: str, key: str) -> dict[str, Any]:
    """The version that the work of a retraining's key has given."""
    from tuneline.register import tags
    from tuneline.retrain.decide import version_of
    from tuneline.tracking import mlflow_errors, open_client

    client = open_client()
    with mlflow_errors(f"reading {model_name}"):
        number = version_of(client, model_name, key)
        found: dict[str, Any] = {"model_name": model_name, "version": number}
        if not number:
            return found
        held = client.get_registered_model(model_name).aliases.items()
        version = client.get_model_version(model_name, str(number))
    aliases = sorted(alias for alias, holder in held if int(holder) == number)
    return {**found, "aliases": aliases, "gate": version.tags[tags.GATE]}


def run_compare(
    recipe: Recipe, methods: Sequence[str], workdir: Path, *, quiet: bool = False
) -> dict[str, Any]:
    """Run the pipeline `compare`, one leg after the other; returns the leaderboard, whose files are
    also put into the work folder.

    Raises:
        TunelineError: as `run_recipe`; or no leg finished.
    """
    from tuneline import artifacts, pools
    from tuneline.compare import leaderboard
    from tuneline_pipelines import compare, resources

    workdir = workdir.absolute()
    outputs, _ = _run(
        lambda: compare.build(
            resources.on_this_machine, parallelism=1, default_pool=pools.read().without_accelerator
        ),
        lambda pipeline: {**arguments_for(pipeline, recipe), "methods": list(methods)},
        workdir,
        (leaderboard.JSON, leaderboard.HTML),
        quiet=quiet,
    )
    board = artifacts.load(Path(outputs["Output"].path), "leaderboard")
    for name in (leaderboard.JSON, leaderboard.HTML):
        _replace(workdir / name, (board.path / name).read_text(encoding="utf-8"))
    return board.read_json(leaderboard.JSON)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def _track_locally(workdir: Path) -> None:
    if not tracking_uri():
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{workdir / 'mlflow.db'}"
        os.environ["TUNELINE_MLFLOW_ARTIFACTS"] = (workdir / "mlflow-artifacts").as_uri()
    os.environ.pop(by_uri.VARIABLE, None)  # a pod's: here the work folder has all of a run


def _run(
    build: Callable[[], Any],
    arguments: Callable[[Any], dict[str, Any]],
    workdir: Path,
    results: Sequence[str],
    *,
    contained: Recipe | None = None,
    quiet: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a pipeline; returns its outputs, and what its steps recorded.

    Args:
        build: makes the pipeline.
        arguments: gives the parameters of the pipeline.
        workdir: absolute.
        results: files in it that an earlier run may have left.
        contained: the recipe, where the steps are to run in containers.
        quiet: show nothing while it runs.
    """
    if contained is None and any(character.isspace() for character in sys.executable):
        raise TunelineError(
            f"the interpreter's path '{sys.executable}' has white space in it, and KFP's local "
            "runner can't start that: set tuneline up in a folder without"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name in results:
            (workdir / name).unlink(missing_ok=True)
        log = (workdir / "run.log").open("w", encoding="utf-8")
    except OSError as error:
        raise TunelineError(
            f"work folder {workdir} can't be written ({error.strerror}): "
            "name another with --workdir"
        ) from error
    _track_locally(workdir)
    # the same run again goes on where this one was stopped
    if not os.environ.get("TUNELINE_CHECKPOINTS"):
        os.environ["TUNELINE_CHECKPOINTS"] = str(workdir / "checkpoints")
    with log, _children_stop_with_us():
        console = Console(sys.stdout, log, quiet=quiet)
        return _run_in(workdir, console, build, arguments, contained), console.records


def _run_in(
    workdir: Path,
    console: Console,
    build: Callable[[], Any],
    arguments: Callable[[Any], dict[str, Any]],
    contained: Recipe | None,
) -> dict[str, Any]:
    from kfp import local

    from tuneline_pipelines import containers

    if contained is not None:
        for image in sorted({images.CPU, images.GPU}):
            containers.check(image)
    runner = (
        local.SubprocessRunner(use_venv=False)
        if contained is None
        else containers.runner(contained, workdir)
    )
    local.init(runner=runner, pipeline_root=str(workdir / "kfp"))
    try:
        with contextlib.redirect_stdout(console), containers.waited_for():
            pipeline = build()
            task = pipeline(**arguments(pipeline))
    except RuntimeError as error:
        sentence = console.last_error or f"{error} It ended with: {console.last_line}"
        raise TunelineError(f"{sentence}\n(full output: {workdir / 'run.log'})") from error
    finally:
        console.end_tick()
    return dict(task.outputs)


def arguments_for(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    """The recipe as parameters of a built pipeline."""
    return arguments_of(recipe, list(pipeline.pipeline_spec.root.input_definitions.parameters))


@contextlib.contextmanager
def _children_stop_with_us() -> Iterator[None]:
    """On SIGTERM or Ctrl-C the running step is stopped first, and ends without an artifact."""

    def terminate(number: int, frame: FrameType | None) -> None:
        del number, frame
        _stop_children()
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        _stop_children()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_children() -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=_STOP_SECONDS)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def summarize(
    outputs: dict[str, Any],
    steps: list[dict[str, Any]],
    model_name: str,
    workdir: Path,
    wall_seconds: float,
) -> dict[str, Any]:
    """What came out, from the run's own artifacts and what each step recorded of itself."""
    from tuneline import artifacts

    report = artifacts.load(Path(outputs["eval_report"].path), "eval_report")
    # the register step has verified every byte of the model; here only its proof is read
    exported = _exported(Path(outputs["model"].path))
    result = report.read_json("report.json")
    own_peak = peak_memory_bytes()
    return {
        "metric": (metric := result["metric"]),
        f"base_{metric}": result["base"],
        f"tuned_{metric}": result["tuned"],
        "tuned_interval": result["tuned_interval"],
        "difference_interval": result["difference_interval"],
        "test_rows": result["rows"],
        "gate": result["verdict"],
        "model_name": model_name,
        "registered_version": int(outputs["version"]),
        "alias": outputs["alias"],
        **exported,
        "samples": result["samples"],
        "adapter_dir": outputs["adapter"].path,
        "report_html": str(report.path / "report.html"),
        "tracking_uri": safe_uri(),
        "workdir": str(workdir),
        "steps": {step["task"]: step["wall_seconds"] for step in steps},
        "wall_seconds": wall_seconds,
        # steps run one after the other, beside this process
        "peak_memory_bytes": own_peak + max(step["peak_memory_bytes"] for step in steps),
    }


def _exported(model: Path) -> dict[str, Any]:
    """In which form the model leaves, with the proof of a merge or the reason against it."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((model / name).read_text(encoding="utf-8"))

    if (model / "loader.json").exists():
        reason = read("loader.json")["not_merged"]
        return {"form": "packaged", "not_merged": reason, "packaged_dir": str(model)}
    proof = read("proof.json")
    return {
        "form": "merged",
        "merged_dir": str(model),
        "merge_reference": proof["reference"],
        **{
            f"merge_{name}": proof[name]
            for name in ("max_logit_diff", "mean_kl", "top1_agreement", "tuned_loss", "merged_loss")
        },
    }
