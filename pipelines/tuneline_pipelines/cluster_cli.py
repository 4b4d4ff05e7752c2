"""The commands around Kubeflow Pipelines: publish, submit, wait, runs, logs, schedule."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tuneline.errors import EXIT_TERMINATED, ClusterError, Terminated, UsageError, did_you_mean
from tuneline.progress import aligned, complain, minutes

if TYPE_CHECKING:
    from tuneline.recipe import Recipe
    from tuneline_pipelines.client import Version
    from tuneline_pipelines.connection import Connection
    from tuneline_pipelines.packages import Package, Step
    from tuneline_pipelines.runs import TaskState

_EXIT_DIFFERS: Final = 3
_EXIT_INTERRUPTED: Final = 130
_LONGEST_STEM: Final = 80
_PIPELINES: Final = ("finetune", "retrain", "compare", "promote")


def add_commands(commands: Any) -> None:
    """Add all of them to the parser of `tuneline`."""
    _add_publish(commands)
    _add_submit(commands)
    _add_wait(commands)
    _add_runs(commands)
    _add_logs(commands)
    _add_schedule(commands)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which KFP, and where its users have namespaces."""
    parser.add_argument(
        "--host", metavar="URL", help="of KFP (default: KFP_HOST, or the service in this cluster)"
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="where KFP has several users (default: KFP_NAMESPACE)"
    )
    parser.add_argument(
        "--ca-cert", type=Path, metavar="FILE", help="certificates to trust (default: KFP_CA_CERT)"
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which images a package names."""
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FILE",
        help="images.lock with a reference for each image (default: TUNELINE_IMAGES, or tags)",
    )


def add_release(parser: argparse.ArgumentParser) -> None:
    """Add the option that asks for digests."""
    parser.add_argument(
        "--release", action="store_true", help="refuse images that are not named by digest"
    )


def use_images(options: argparse.Namespace) -> None:
    """Take `--images`; before a component is imported, which reads it."""
    if options.images:
        os.environ["TUNELINE_IMAGES"] = str(options.images)


def _warn_of_images(packages: Sequence[Package]) -> None:
    moving = sorted({image for package in packages for image in package.moving_images})
    if moving:
        print(
            f"warning: {', '.join(moving)} can be other content tomorrow, which no content key "
            "would see: name images by digest, as --images FILE does with the file of "
            "`make push-images`",
            file=sys.stderr,
        )


def _connect(options: argparse.Namespace) -> Connection:
    from tuneline_pipelines.connection import Connection

    return Connection(options.host, options.namespace, options.ca_cert)


def _add_publish(commands: Any) -> None:
    publish = commands.add_parser(
        "publish", help="upload the pipelines to KFP, those that are not there yet"
    )
    what = publish.add_mutually_exclusive_group()
    what.add_argument(
        "--packages", type=Path, metavar="DIR", help="compiled packages (default: compile them now)"
    )
    what.add_argument(
        "--pools", type=Path, metavar="FILE", help="pools.yaml to compile with, as for compile"
    )
    add_images(publish)
    add_release(publish)
    add_server(publish)
    publish.set_defaults(command=_publish)


def _publish(options: argparse.Namespace) -> int:
    if options.packages and options.images:
        raise UsageError(
            "--images is for packages that are compiled now: those of --packages name theirs"
        )
    use_images(options)
    from tuneline_pipelines import client, packages

    if options.packages:
        found = packages.read_folder(options.packages)
        faults = [
            f"{package.name}: {', '.join(package.moving_images)}"
            for package in found
            if options.release and package.moving_images
        ]
        if faults:
            raise UsageError(
                "nothing is published: a release names its images by digest:\n"
                + "\n".join(f"- {fault}" for fault in faults)
            )
    else:
        found = list(packages.compile_all(options.pools, release=options.release).values())
    _warn_of_images(found)
    connection = _connect(options)
    for done in client.publish(connection, found):
        what = "uploaded" if done.uploaded else "was there"
        print(f"{what:<10}{done.name} {done.version_name}", flush=True)
        if done.newest != done.version_name:
            print(
                f"{'':<10}newest is {done.newest}: name this one with --version "
                f"{done.version_name} to run it"
            )
    return 0


def _add_submit(commands: Any) -> None:
    submit = commands.add_parser("submit", help="run a recipe on Kubeflow Pipelines")
    submit.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    submit.add_argument(
        "--pipeline", choices=_PIPELINES, default="finetune", help="(default: %(default)s)"
    )
    submit.add_argument("--method", metavar="NAME", help="instead of the recipe's method.name")
    submit.add_argument(
        "--methods", metavar="NAME,NAME", help="that compare trains (default: all of them)"
    )
    submit.add_argument(
        "--model-version", type=_positive, metavar="N", help="of the model, that promote is about"
    )
    submit.add_argument("--pool", metavar="NAME", help="node pool (default: the package's)")
    submit.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting; may be given several times",
    )
    what = submit.add_mutually_exclusive_group()
    what.add_argument("--version", metavar="V", help="published version (default: the newest)")
    what.add_argument(
        "--package", type=Path, metavar="FILE", help="compiled package that goes with this run only"
    )
    add_images(submit)
    submit.add_argument(
        "--experiment", metavar="NAME", help="of KFP (default: the recipe's registry.experiment)"
    )
    submit.add_argument("--service-account", default="", metavar="NAME", help="of the run's pods")
    submit.add_argument(
        "--submission-id",
        metavar="ID",
        help="of your own: the same id submits the same run once, however often it is called",
    )
    submit.add_argument(
        "--wait", action="store_true", help="until the run ends, with its steps as they change"
    )
    add_server(submit)
    submit.set_defaults(command=_submit)


def _submit(options: argparse.Namespace) -> int:
    use_images(options)
    from tuneline import recipe
    from tuneline.compare.legs import ALL, legs_of
    from tuneline_pipelines import client

    compares, promotes = options.pipeline == "compare", options.pipeline == "promote"
    if options.methods and not compares:
        raise UsageError("--methods belongs to --pipeline compare: use --method here")
    if options.method and compares:
        raise UsageError("compare trains several methods: use --methods")
    if promotes != (options.model_version is not None):
        raise UsageError(
            "promote is about one version of the model: name it with --model-version N"
            if promotes
            else "--model-version belongs to --pipeline promote: leave it out"
        )
    values = recipe.read_values(options.recipe)
    if options.method:
        values, dropped = recipe.with_method(values, options.method)
        if dropped:
            print(
                f"{options.method} has no {', '.join(dropped)}: left out of the recipe's method",
                file=sys.stderr,
            )
    resolved = recipe.resolve(
        recipe.apply_overrides(values, options.overrides),
        source=str(options.recipe),
        exports=not compares,
    )
    methods = [name.strip() for name in (options.methods or ALL).split(",") if name.strip()]
    if compares:
        legs_of(resolved, methods, source=str(options.recipe))
    if options.images and options.package:
        raise UsageError("--images compiles a package, --package names one: leave one of them out")
    connection = _connect(options)
    source = _source(options, connection, resolved)
    if options.images and isinstance(source, client.Version):
        complain(
            f"warning: --images {options.images} has no effect: the run is of "
            f"{source.version_name}, which is published with images of its own"
        )
    package = source.package if isinstance(source, client.Version) else source
    _warn_of_images([package])
    token = options.submission_id or secrets.token_hex(6)
    submission = client.Submission(
        name=f"{options.recipe.stem[:_LONGEST_STEM]} {token}",
        source=source,
        arguments=client.arguments_of(
            package,
            None if promotes else resolved,
            pool=options.pool,
            further={"methods": methods}
            if compares
            else _promotion(resolved, options.model_version)
            if promotes
            else {},
        ),
        experiment=options.experiment or resolved.registry.experiment,
        service_account=options.service_account,
    )
    try:
        run, made = client.submit(connection, submission)
    except (KeyboardInterrupt, Terminated) as stopped:
        complain(
            f"stopped while the run was being made: look for '{submission.name}' in "
            "`tuneline runs` before you submit again"
        )
        return EXIT_TERMINATED if isinstance(stopped, Terminated) else _EXIT_INTERRUPTED
    which = source.version_name if isinstance(source, client.Version) else "sent with the run"
    print(f"{'submitted' if made else 'was there':<11}{submission.name}")
    print(f"{'pipeline':<11}{package.name} ({which})")
    print(f"{'run':<11}{run.run_id}")
    print(f"{'page':<11}{connection.host}/#/runs/details/{run.run_id}", flush=True)
    return _follow(connection, run.run_id, package) if options.wait else 0


def _promotion(resolved: Recipe, version: int) -> dict[str, Any]:
    registry = resolved.registry
    return {
        "model_name": registry.model_name,
        "version": version,
        "copy_to_model": registry.to_model or "",
        "experiment": registry.experiment,
    }


def _source(
    options: argparse.Namespace, connection: Connection, recipe: Recipe
) -> Version | Package:
    from tuneline_pipelines import client, packages

    if options.package:
        return packages.read(options.package)
    name = client.pipeline_name(options.pipeline, recipe)
    version = client.published(connection, name, options.version or client.NEWEST)
    if version is not None:
        return version
    package = None if options.version else packages.compile_all().get(name)
    if package is None:
        raise client.unpublished(connection, name)
    print(f"{name} is not published: compiled here and sent with this run", file=sys.stderr)
    return package


def _follow(connection: Connection, run_id: str, package: Package | None) -> int:
    from tuneline_pipelines import runs
    from tuneline_pipelines.connection import Fault

    steps = package.steps if package else {}
    goes_on = f"run {run_id} goes on; `tuneline wait {run_id}` waits for it"
    try:
        run = runs.wait(connection, run_id, steps, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        complain(f"interrupted; {goes_on}")
        return _EXIT_INTERRUPTED
    except Terminated:
        complain(f"stopped by SIGTERM; {goes_on}")
        return EXIT_TERMINATED
    except Fault as fault:
        raise ClusterError(f"{fault}; {goes_on}") from fault
    if run.state != "SUCCEEDED":
        raise ClusterError(runs.failure_of(connection, run, steps))
    print(f"run {run.display_name} succeeded")
    return 0


def _add_wait(commands: Any) -> None:
    wait = commands.add_parser("wait", help="follow a run on KFP until it ends")
    wait.add_argument("run", metavar="RUN", help="id of the run")
    add_server(wait)
    wait.set_defaults(command=_wait)


def _wait(options: argparse.Namespace) -> int:
    from tuneline_pipelines import runs

    connection = _connect(options)
    run = runs.get_run(connection, options.run)
    return _follow(connection, options.run, runs.package_of(connection, run))


def _add_runs(commands: Any) -> None:
    runs = commands.add_parser("runs", help="the newest runs on KFP")
    runs.add_argument("--limit", type=_positive, default=20, metavar="N", help="(default: 20)")
    runs.add_argument("--json", action="store_true", help="for programs")
    add_server(runs)
    runs.set_defaults(command=_runs)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 on")
    return int(text)


def _runs(options: argparse.Namespace) -> int:
    from tuneline_pipelines import runs

    found = runs.newest_runs(_connect(options), options.limit)
    if options.json:
        print(json.dumps([_run_row(run) for run in found], indent=2))
        return 0
    rows = [list(_run_row(run).values()) for run in found]
    print(aligned([["run", "name", "state", "made (UTC)", "took"], *rows]))
    return 0


def _run_row(run: Any) -> dict[str, str]:
    ended = run.finished_at is not None and run.finished_at.timestamp() > 0
    took = (run.finished_at - run.created_at).total_seconds() if ended else 0
    return {
        "run_id": run.run_id,
        "name": run.display_name or "",
        "state": (run.state or "unknown").lower(),
        "created_at": f"{run.created_at:%Y-%m-%d %H:%M}" if run.created_at else "",
        "took": minutes(took) if ended else "",
    }


def _add_logs(commands: Any) -> None:
    logs = commands.add_parser("logs", help="what the steps of a run on KFP printed")
    logs.add_argument("run", metavar="RUN", help="id of the run")
    logs.add_argument("--step", metavar="S", help="one step only, as `tuneline wait` names it")
    add_server(logs)
    logs.set_defaults(command=_logs)


def _logs(options: argparse.Namespace) -> int:
    from tuneline_pipelines import runs

    connection = _connect(options)
    run = runs.get_run(connection, options.run)
    package = runs.package_of(connection, run)
    if package is None:
        raise ClusterError(
            "what the run was made from is deleted, so its steps can't be told. On the cluster: "
            f"{runs.kubectl(connection, options.run)}"
        )
    tasks = runs.tasks_of(run, package.steps)
    if options.step is not None:
        tasks = _chosen(options.step, tasks, package.steps)
    return _print_logs(connection, run, tasks, head=len(tasks) > 1)


def _chosen(wanted: str, tasks: list[TaskState], steps: dict[str, Step]) -> list[TaskState]:
    found = [task for task in tasks if wanted in (task.label, task.step.name)]
    if found:
        return found
    if wanted in steps:
        raise ClusterError(f"step {wanted} has not begun")
    raise UsageError(
        f"the run has no step '{wanted}'; it has {', '.join(steps)}.{did_you_mean(wanted, steps)}"
    )


def _print_logs(connection: Connection, run: Any, tasks: Sequence[TaskState], *, head: bool) -> int:
    from tuneline_pipelines import runs

    if not tasks:
        print("no step has begun", file=sys.stderr)
    missing: list[str] = []
    for task in tasks:
        if head:
            print(f"==> {task.label} ({task.state.lower()})", flush=True)
        try:
            runs.copy_log(connection, run, task, sys.stdout.buffer.write)
            sys.stdout.buffer.flush()
        except ClusterError as error:
            if not head:
                raise
            missing.append(task.label)
            print(f"({error})", file=sys.stderr)
    if missing and len(missing) == len(tasks):
        raise ClusterError("no log is to be had from the server")
    return 0


def _add_schedule(commands: Any) -> None:
    schedule = commands.add_parser("schedule", help="runs by the clock: apply, diff, list")
    actions = schedule.add_subparsers(title="actions", required=True, metavar="ACTION")
    apply = actions.add_parser("apply", help="make KFP's schedules equal to the file's")
    diff = actions.add_parser("diff", help="what apply would change")
    diff.add_argument(
        "--exit-code",
        action="store_true",
        help=f"exit with {_EXIT_DIFFERS} if something would change, and with 0 if not",
    )
    for action, command in ((apply, _apply), (diff, _diff)):
        action.add_argument("file", type=Path, metavar="SCHEDULES.yaml")
        add_server(action)
        action.set_defaults(command=command)
    listing = actions.add_parser("list", help="every schedule of the namespace")
    listing.add_argument("--json", action="store_true", help="for programs")
    add_server(listing)
    listing.set_defaults(command=_list)


def _changes(options: argparse.Namespace, connection: Connection) -> list[Any]:
    from tuneline_pipelines import schedules

    file = schedules.read(options.file)
    wanted = schedules.definitions(connection, file, options.file.parent)
    return schedules.changes(wanted, file.group, schedules.present(connection))


def _show(change: Any) -> None:
    print(f"{change.action:<11}{change.name:<28}{change.reason}".rstrip(), flush=True)


def _diff(options: argparse.Namespace) -> int:
    found = _changes(options, _connect(options))
    for change in found:
        _show(change)
    differs = any(change.action != "unchanged" for change in found)
    return _EXIT_DIFFERS if differs and options.exit_code else 0


def _apply(options: argparse.Namespace) -> int:
    from tuneline_pipelines import schedules

    connection = _connect(options)
    schedules.apply(connection, _changes(options, connection), _show)
    return 0


def _list(options: argparse.Namespace) -> int:
    from tuneline_pipelines import schedules

    rows = [_schedule_row(one) for one in schedules.present(_connect(options))]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    head = ["schedule", "cron", "state", "group", "runs"]
    print(aligned([head, *(list(row.values())[1:] for row in rows)]))
    return 0


def _schedule_row(recurring: Any) -> dict[str, str]:
    from tuneline_pipelines import schedules

    mark = schedules.mark_of(recurring)
    first_line = (recurring.description or "").partition("\n")[0]
    return {
        "recurring_run_id": recurring.recurring_run_id,
        "name": recurring.display_name or "",
        "cron": schedules.cron_of(recurring) or "(interval)",
        "state": "enabled" if schedules.is_enabled(recurring) else "disabled",
        "group": mark[0] if mark else "(not by tuneline)",
        "runs": first_line.partition(",")[0] if mark else "",
    }
