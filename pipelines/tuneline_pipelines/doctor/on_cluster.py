"""All that a run on a cluster finds around it, in the order in which a run would meet it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline.errors import TunelineError, UsageError
from tuneline.tracking import CLUSTER_URI_VARIABLE
from tuneline_pipelines import packages
from tuneline_pipelines.connection import Connection
from tuneline_pipelines.doctor import (
    kfp_server,
    mlflow_plugin,
    mlflow_service,
    needs,
    nodes,
    objects,
)
from tuneline_pipelines.doctor.cluster import Cluster, Denied, Unusable
from tuneline_pipelines.doctor.finding import Check, Finding, error, ok, warning

if TYPE_CHECKING:
    from tuneline.pools import Pools
    from tuneline_pipelines.packages import Package

_RUNNERS: Final = ("tuneline", "pipeline-runner", "default-editor")
"""What pods that name no account run as: set by tuneline's manifests, KFP's own with one user, and
with several."""
_KFP_NAMESPACE: Final = "kubeflow"


@dataclass(frozen=True)
class Place:
    """What to look at."""

    host: str | None = None
    """Of KFP; None: as `Connection` finds it."""
    ca_cert: Path | None = None
    """Certificates of KFP to trust."""
    context: str | None = None
    """Of the kubeconfig."""
    namespace: str | None = None
    """Of the pods."""
    service_account: str | None = None
    """Of the pods; None: one of those that KFP takes by itself."""
    pool: str | None = None
    """Node pool; None: all."""
    packages: Path | None = None
    """Folder with compiled ones; None: the published ones, or compiled here."""
    references: tuple[str, ...] = ()
    """Base model and data of a recipe."""


@dataclass
class _Known:
    """What a check has found that a later one stands on."""

    values: dict[str, str] = field(default_factory=dict)
    """Of the variables that config maps set."""
    wants_login: bool | None = None
    """Whether MLflow does."""
    plugin: mlflow_plugin.Plugin | objects.Unknown | None = field(default_factory=objects.Unknown)
    """Of KFP, for MLflow; None: it is off."""
    pools: Pools | None = None
    """Of the cluster."""


class _Stop(TunelineError):
    """Nothing further can be looked at."""


def checks(place: Place) -> Iterator[Finding]:
    """A finding for each thing.

    Args:
        place: what to look at.
    """
    connection, found = _kfp(place)
    yield from found
    try:
        compiled, found = _packages(place, connection)
    except TunelineError as fault:
        yield error("packages", str(fault))
        return
    yield from found
    needed = needs.of(compiled)
    yield from kfp_server.images(needed.images)
    try:
        cluster = Cluster(place.context, place.namespace)
    except UsageError as fault:
        yield error("Kubernetes", str(fault))
        return
    for name, check in _checks(cluster, needed, place):
        try:
            yield from check()
        except Denied as fault:
            yield warning(name, str(fault), fault.advice)
        except Unusable as fault:
            yield error("Kubernetes", str(fault))
            return
        except _Stop:
            return
        except TunelineError as fault:
            yield error(name, str(fault))


def _kfp(place: Place) -> tuple[Connection | None, list[Finding]]:
    try:
        connection = Connection(place.host, place.namespace, place.ca_cert)
        return connection, [kfp_server.reachable(connection)]
    except TunelineError as fault:
        return None, [error("KFP", str(fault))]


def _packages(place: Place, connection: Connection | None) -> tuple[list[Package], list[Finding]]:
    findings: list[Finding] = []
    if place.packages is not None:
        return packages.read_folder(place.packages), [ok("packages", str(place.packages))]
    if connection is not None:
        try:
            versions, findings = kfp_server.published(connection)
        except TunelineError as fault:
            versions, findings = [], [error("packages", str(fault))]
        if versions:
            return [version.package for version in versions], findings
    from tuneline import form, pools
    from tuneline.finetune.methods import METHODS
    from tuneline_pipelines import compile, finetune, resources

    known = pools.read()
    pipeline = finetune.build(
        resources.on_cluster(known.largest_shm), METHODS[0], default_pool=known.names[0]
    )
    made = compile.package_of(pipeline, form.literals_of((METHODS[0],), known.names))
    package = packages.of(made.documents)
    assert package is not None  # it was compiled a line above
    return [package], [*findings, ok("packages", "what is compiled here is looked at")]


def _checks(cluster: Cluster, needed: needs.Needs, place: Place) -> Iterator[tuple[str, Check]]:
    from tuneline_pipelines.resources import QUEUE_LABEL

    known = _Known()

    def version() -> Iterator[Finding]:
        found = cluster.ask("get", "/version", cluster.version_api.get_code)
        told = found.git_version if found else "of no version"
        yield ok("Kubernetes", f"{cluster.host}, {told}")

    def namespace() -> Iterator[Finding]:
        for found in objects.namespace(cluster):
            yield found
            if found.level == "error":
                raise _Stop

    kfp_namespaces = (cluster.namespace, _KFP_NAMESPACE)

    def plugin() -> Iterator[Finding]:
        known.plugin = found = mlflow_plugin.find(cluster, kfp_namespaces)
        yield from objects.plugin(cluster, found)

    def mlflow() -> Iterator[Finding]:
        known.values = objects.settings(cluster, needed)
        if uri := known.values.get(CLUSTER_URI_VARIABLE):
            answer = mlflow_service.look(cluster, uri)
            known.wants_login = answer.wants_login
            yield from answer.findings

    def pool_file() -> Iterator[Finding]:
        pools, found = objects.node_pools(cluster, needed)
        known.pools = pools
        yield from found

    def pool_nodes() -> Iterator[Finding]:
        if known.pools is not None:
            yield from nodes.checks(cluster, known.pools, place.pool)

    def queue() -> Iterator[Finding]:
        pools = known.pools.pools.values() if known.pools else ()
        wanted = {pool.accelerator for pool in pools if pool.accelerator}
        yield from objects.queue(cluster, needed, QUEUE_LABEL, wanted)

    yield "Kubernetes", version
    yield "namespace", namespace
    yield "KFP version", lambda: kfp_server.version(cluster, kfp_namespaces)
    yield objects.PLUGIN, plugin
    yield "config maps", lambda: objects.config_maps(cluster, needed, known.plugin)
    yield "MLflow of the pods", mlflow
    yield (
        "secrets",
        lambda: objects.secrets(
            cluster,
            needed,
            known.values,
            wants_login=known.wants_login,
            plugin=known.plugin,
            references=place.references,
        ),
    )
    yield "volume claims", lambda: objects.claims(cluster, needed)
    yield (
        "service account",
        lambda: objects.service_account(
            cluster, [place.service_account] if place.service_account else _RUNNERS
        ),
    )
    yield "pools", pool_file
    yield "pools", pool_nodes
    yield "queue", queue
