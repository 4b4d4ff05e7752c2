"""The command `doctor`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.errors import EXIT_FAILED, RecipeError, TunelineError, UsageError
from tuneline.progress import complain
from tuneline_pipelines import cluster_cli

if TYPE_CHECKING:
    from tuneline.recipe import Recipe
    from tuneline_pipelines.doctor.finding import Check, Finding


def add_commands(commands: Any) -> None:
    """Add it to the parser of `tuneline`."""
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, what it is set to, a recipe's inputs, and a cluster",
        epilog="Exit code 0 if there is no error; warnings may be meant so.",
    )
    doctor.add_argument(
        "recipe", nargs="?", type=Path, metavar="RECIPE.yaml", help="look for what it names too"
    )
    doctor.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="section.key=value",
        help="override one setting of the recipe; may be given several times",
    )
    doctor.add_argument("--pool", metavar="NAME", help="node pool that a run will name")
    doctor.add_argument(
        "--pools",
        type=Path,
        metavar="FILE",
        help="pools.yaml (default: TUNELINE_POOLS, or built in)",
    )
    doctor.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="compiled packages, to compare kfp with and to read what they need of the cluster",
    )
    doctor.add_argument(
        "--workdir", type=Path, metavar="DIR", help="work folder (default: tuneline-runs)"
    )
    doctor.add_argument(
        "--torch", action="store_true", help="compute on each accelerator with torch; takes seconds"
    )
    doctor.add_argument(
        "--offline",
        action="store_true",
        help="look at nothing on other machines, as a container's health check does",
    )
    doctor.add_argument(
        "--cluster", action="store_true", help="look at Kubernetes and KFP too, from here"
    )
    cluster_cli.add_server(doctor)
    doctor.add_argument(
        "--context", metavar="NAME", help="of the kubeconfig (default: the current one)"
    )
    doctor.add_argument(
        "--service-account", metavar="NAME", help="of the runs' pods (default: KFP's own)"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    found: list[Finding] = []
    for finding in _findings(options):
        found.append(finding)
        if not options.json:
            print(finding, flush=True)
    errors = [finding for finding in found if finding.level == "error"]
    warnings = sum(finding.level == "warning" for finding in found)
    if options.json:
        rows = [
            {"level": f.level, "name": f.name, "value": f.value, "advice": f.advice} for f in found
        ]
        print(json.dumps({"ok": not errors, "checks": rows}, indent=2, ensure_ascii=False))
    else:
        print(f"\n{len(found)} checks, {warnings} warnings, {len(errors)} errors")
    if errors:
        complain(
            str(errors[0]).removeprefix("error").strip()
            if len(errors) == 1
            else f"{len(errors)} of {len(found)} checks failed: "
            + ", ".join(finding.name for finding in errors)
        )
        return EXIT_FAILED
    return 0


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    from tuneline_pipelines.doctor import finding, machine

    # what does not need an installed package comes first: without them the rest can't be imported
    yield from finding.run(
        [
            ("python", machine.python),
            ("packages", machine.packages),
            ("kfp", lambda: machine.kfp(_sdks(options.packages))),
            ("accelerators", lambda: machine.accelerators(ask_torch=options.torch)),
            ("bitsandbytes", machine.bitsandbytes),
        ]
    )
    yield from finding.run(_local(options))
    if options.cluster:
        yield from _on_cluster(options)


def _sdks(folder: Path | None) -> set[str]:
    if folder is None:
        return set()
    from tuneline_pipelines import packages

    return {str(package.spec.get("sdkVersion", "")) for package in packages.read_folder(folder)}


def _local(options: argparse.Namespace) -> Iterator[tuple[str, Check]]:
    from tuneline.checkpoints_root import ROOT_VARIABLE
    from tuneline_pipelines.doctor import inputs, mlflow_server, storage

    workdir, offline = options.workdir or Path("tuneline-runs"), options.offline
    yield storage.CACHE_VARIABLE, storage.cache
    yield ROOT_VARIABLE, lambda: storage.checkpoints(offline=offline)
    needed = options.workdir is not None or (options.recipe is not None and not options.cluster)
    yield "work folder", lambda: storage.work_folder(workdir, needed=needed)
    yield "temporary files", storage.temporary
    yield "pools", lambda: _pools(options)
    recipe, faults = _recipe(options)
    yield "recipe", lambda: faults
    if recipe is not None:
        yield "recipe", lambda: inputs.checks(recipe, offline=offline)
    experiment = recipe.registry.experiment if recipe else ""
    yield mlflow_server.VARIABLE, lambda: mlflow_server.checks(experiment, offline=offline)


def _on_cluster(options: argparse.Namespace) -> Iterator[Finding]:
    from tuneline_pipelines.doctor import on_cluster

    recipe, _ = _recipe(options)
    references: list[str] = []
    if recipe is not None:
        data = (*recipe.data.train, *recipe.data.test, *recipe.data.evaluation_sets)
        references = [recipe.model.base_model, *(source.path for source in data)]
    yield from on_cluster.checks(
        on_cluster.Place(
            host=options.host,
            ca_cert=options.ca_cert,
            context=options.context,
            namespace=options.namespace,
            service_account=options.service_account,
            pool=options.pool,
            packages=options.packages,
            references=tuple(references),
        )
    )


def _pools(options: argparse.Namespace) -> Iterator[Finding]:
    from tuneline import pools
    from tuneline_pipelines.doctor.finding import error, ok

    known = pools.read(options.pools)
    source = options.pools or os.environ.get(pools.VARIABLE) or "built in"
    yield ok("pools", f"{', '.join(known.names)} ({source})")
    if options.pool is not None and not options.cluster:  # which has pools of its own
        try:
            pool = known.named(options.pool)
        except UsageError as fault:
            yield error(f"pool {options.pool}", str(fault))
        else:
            what = f"{pool.count} x {pool.accelerator}" if pool.count else "no accelerator"
            yield ok(f"pool {options.pool}", f"{what}, {pool.cpu} CPU, {pool.memory}")


def _recipe(options: argparse.Namespace) -> tuple[Recipe | None, list[Finding]]:
    from tuneline import recipe
    from tuneline_pipelines.doctor.finding import error, ok

    if options.recipe is None:
        if options.overrides:
            raise UsageError("--set belongs to a recipe: name its file too")
        return None, []
    try:
        found = recipe.read(options.recipe, options.overrides)
    except RecipeError as fault:
        return None, [error("recipe", one) for one in fault.faults]
    except TunelineError as fault:
        return None, [error("recipe", str(fault))]
    return found, [ok("recipe", f"{options.recipe} ({recipe.method_of(found.method).name})")]
