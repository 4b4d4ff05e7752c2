"""What a person does with Kubeflow Pipelines from a terminal: publish pipelines, submit runs.

A run is made once: its name ends in a token that is looked for before a lost request is sent again.
A published version is named by the digest of its package, and the server keeps names unique: so
publishing twice uploads once, whatever was lost in between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuneline import __version__, form
from tuneline.artifacts import digest_of
from tuneline.errors import ClusterError, UsageError, did_you_mean
from tuneline.recipe import Recipe, method_of
from tuneline_pipelines.connection import Connection, Fault, absent, equals
from tuneline_pipelines.packages import Package, of

NEWEST: Final = "newest"
_MOST_NAMES: Final = 20
"""Of a sentence."""


@dataclass(frozen=True)
class Version:
    """A published version of a pipeline."""

    pipeline_id: str
    version_id: str
    version_name: str
    package: Package

    @property
    def reference(self) -> dict[str, str]:
        """As a run takes it."""
        return {"pipeline_id": self.pipeline_id, "pipeline_version_id": self.version_id}


@dataclass(frozen=True)
class Published:
    """What publishing one package came to."""

    name: str
    version_name: str
    uploaded: bool
    newest: str
    """Version that a run takes which names none."""


def pipeline_name(pipeline: str, recipe: Recipe) -> str:
    """The published name: `finetune` stands for `finetune-METHOD` of the recipe's method."""
    if pipeline != "finetune":
        return pipeline
    return f"finetune-{method_of(recipe.method).name.replace('_', '-')}"


def arguments_of(
    package: Package,
    recipe: Recipe | None,
    *,
    pool: str | None,
    further: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All parameters of a run, checked against the package.

    Args:
        package: that will run.
        recipe: None for a pipeline that takes none, such as `promote`.
        pool: node pool; None: the package's default.
        further: by name, over what the recipe gives.

    Raises:
        UsageError: they don't fit the package.
    """
    arguments = {} if recipe is None else form.arguments_of(recipe, list(package.inputs))
    if pool is not None:
        if "gpu_pool" not in package.inputs:
            raise UsageError(
                f"{package.name} does not choose between node pools: leave --pool {pool} out"
            )
        arguments["gpu_pool"] = pool
    arguments.update(further or {})
    package.check(arguments)
    return arguments


def find_pipeline(connection: Connection, name: str) -> Any | None:
    """The pipeline of this name: the namespace's own, else the one that all share; None if neither
    is there.
    """
    get = connection.pipelines.pipeline_service_get_pipeline_by_name
    doing = f"looking for pipeline {name}"
    with absent(404):
        return connection.call(doing, get, name, **connection.scope)
    if connection.scope:
        # a server that keeps pipelines in namespaces only does not let one ask without
        with absent(400, 403, 404):
            return connection.call(doing, get, name)
    return None


def published(connection: Connection, name: str, version: str = NEWEST) -> Version | None:
    """A published version; None if the pipeline is not published.

    Raises:
        UsageError: the pipeline is there, and this version of it is not.
    """
    pipeline = find_pipeline(connection, name)
    if pipeline is None:
        return None
    found = _version(connection, pipeline.pipeline_id, version)
    if found is None and version == NEWEST:
        return None
    if found is None:
        known = [v.display_name for v in _versions(connection, pipeline.pipeline_id)]
        raise UsageError(
            f"{name} has no version '{version}'; the newest are {', '.join(known[:5]) or 'none'}."
            f"{did_you_mean(version, known)}"
        )
    package = of(found.pipeline_spec)
    if package is None:
        raise UsageError(
            f"{name} version {found.display_name} is no pipeline of KFP 2: publish it again"
        )
    return Version(pipeline.pipeline_id, found.pipeline_version_id, found.display_name, package)


def unpublished(connection: Connection, name: str) -> UsageError:
    """The sentence for a pipeline that is not there."""
    pipelines = connection.pages(
        "listing pipelines",
        connection.pipelines.pipeline_service_list_pipelines,
        "pipelines",
        **connection.scope,
    )
    known = sorted({p.name or p.display_name for p in pipelines})
    shown = known[:_MOST_NAMES]
    if more := known[_MOST_NAMES:]:
        shown.append(f"{len(more)} more")
    return UsageError(
        f"pipeline '{name}' is not published; there are {', '.join(shown) or 'none'}."
        f"{did_you_mean(name, known)} `tuneline publish` brings tuneline's own"
    )


def _versions(connection: Connection, pipeline_id: str, **keywords: Any) -> Iterator[Any]:
    return connection.pages(
        "listing versions",
        connection.pipelines.pipeline_service_list_pipeline_versions,
        "pipeline_versions",
        pipeline_id=pipeline_id,
        sort_by="created_at desc",
        **keywords,
    )


def _version(connection: Connection, pipeline_id: str, name: str) -> Any | None:
    wanted = {} if name == NEWEST else {"filter": equals("display_name", name)}
    return next(_versions(connection, pipeline_id, page_size=1, **wanted), None)


def publish(connection: Connection, packages: Sequence[Package]) -> Iterator[Published]:
    """Upload every package that is not there yet, as a version of the pipeline of its name."""
    for package in packages:
        pipeline_id = _own_pipeline(connection, package)
        name = package.version_name
        uploaded = _version(connection, pipeline_id, name) is None
        if uploaded:
            _upload(connection, pipeline_id, package)
        newest = _version(connection, pipeline_id, NEWEST)
        yield Published(package.name, name, uploaded, newest.display_name if newest else name)


def _own_pipeline(connection: Connection, package: Package) -> str:
    import kfp_server_api

    get = connection.pipelines.pipeline_service_get_pipeline_by_name

    def find() -> Any | None:
        with absent(404):
            return connection.call(
                f"looking for pipeline {package.name}", get, package.name, **connection.scope
            )
        return None

    found = find()
    if found is None:
        body = kfp_server_api.V2beta1Pipeline(
            name=package.name,
            display_name=package.name,
            description=package.description,
            **connection.scope,
        )
        with absent(409):  # another publisher, or this request when its answer was lost
            found = connection.call(
                f"making pipeline {package.name}",
                connection.pipelines.pipeline_service_create_pipeline,
                body,
            )
        found = found or find()
    if found is None:
        raise ClusterError(
            f"pipeline {package.name} is there and can't be read: ask for access to it"
        )
    return found.pipeline_id


def _upload(connection: Connection, pipeline_id: str, package: Package) -> None:
    import yaml

    documents = [dict(package.spec), *([dict(package.platform)] if package.platform else [])]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{package.name}.yaml"  # the generated client takes a path only
        file.write_text(yaml.safe_dump_all(documents, sort_keys=True), encoding="utf-8")
        with absent(409):
            connection.call(
                f"uploading {package.name} {package.version_name}",
                connection.uploads.upload_pipeline_version,
                str(file),
                name=package.version_name,
                display_name=package.version_name,
                pipelineid=pipeline_id,
                description=package.description,
            )


def experiment_id(connection: Connection, name: str) -> str:
    """The KFP experiment of this name, made if it is not there."""
    import kfp_server_api

    listing = connection.experiments.experiment_service_list_experiments
    doing = f"experiment {name}"

    def find() -> Any | None:
        found = connection.pages(
            doing, listing, "experiments", filter=equals("display_name", name), **connection.scope
        )
        return next(found, None)

    experiment = find()
    if experiment is None:
        body = kfp_server_api.V2beta1Experiment(display_name=name, **connection.scope)
        with absent(409):
            experiment = connection.call(
                doing, connection.experiments.experiment_service_create_experiment, body
            )
        experiment = experiment or find()
    if experiment is None:
        raise ClusterError(f"experiment {name} is there and can't be read: ask for access to it")
    return experiment.experiment_id


@dataclass(frozen=True)
class Submission:
    """A run that is asked for.

    Attributes:
        name: of the run, which no other submission has.
        source: published version, or a package that goes with the run.
        arguments: of the pipeline.
        experiment: of KFP.
        service_account: of the pods; empty: the server's default.
    """

    name: str
    source: Version | Package
    arguments: Mapping[str, Any]
    experiment: str
    service_account: str = ""

    @property
    def digest(self) -> str:
        """Of what the run does."""
        source = self.source
        what = source.reference if isinstance(source, Version) else source.body
        return digest_of([what, dict(self.arguments), self.service_account])


def _plugins_input(package: Package, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where KFP's MLflow plugin puts the run: into the experiment of the run's own parameters.

    A server without the plugin takes it too, and does nothing with it. A recurring run must not
    have it: `tuneline_pipelines.schedules` says why.
    """
    given = package.inputs.get("experiment", {})
    name = arguments.get("experiment") or given.get("defaultValue")
    return {"mlflow": {"experiment_name": name}} if name else None


def submit(connection: Connection, submission: Submission) -> tuple[Any, bool]:
    """Make a run unless it is there already; returns it, and whether it was made now.

    Raises:
        UsageError: a run of this name does something else.
    """
    import kfp_server_api

    where = experiment_id(connection, submission.experiment)
    source = submission.source
    package = source.package if isinstance(source, Version) else source
    marker = f"digest={submission.digest}"

    def named() -> list[Any]:
        return list(
            connection.pages(
                f"looking for run {submission.name}",
                connection.runs.run_service_list_runs,
                "runs",
                experiment_id=where,
                sort_by="created_at asc",
                filter=equals("display_name", submission.name),
            )
        )

    for run in named():
        if marker not in (run.description or ""):
            raise UsageError(
                f"there is a run '{submission.name}' already, of another version or with other "
                "parameters: choose another submission id"
            )
        return run, False
    body = kfp_server_api.V2beta1Run(
        display_name=submission.name,
        description=f"Submitted by tuneline {__version__}, {marker}",
        experiment_id=where,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(submission.arguments)),
        service_account=submission.service_account or None,
        plugins_input=_plugins_input(package, submission.arguments),
    )
    if isinstance(source, Version):
        body.pipeline_version_reference = kfp_server_api.V2beta1PipelineVersionReference(
            **source.reference
        )
    else:
        body.pipeline_spec = source.body

    def stop(extra: Any) -> None:
        connection.call(
            f"stopping run {extra.run_id}, a second one of the same request",
            connection.runs.run_service_terminate_run,
            extra.run_id,
        )

    try:
        made = connection.create(
            f"submitting run {submission.name}",
            lambda **keywords: connection.runs.run_service_create_run(body, **keywords),
            named,
            stop,
        )
    except Fault as fault:
        if not fault.sent:
            raise
        raise ClusterError(
            f"{fault}; it may have been done all the same: look for '{submission.name}' in "
            "`tuneline runs` before you submit again"
        ) from fault
    return made, True
