"""What packages expect in the namespace of their pods: config maps, secrets, volume claims, a
service account, a queue. Of a secret only the names of its keys are told, never a value."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from tuneline import object_store, pools
from tuneline.base_model import HUB_SCHEME
from tuneline.checkpoints_root import ROOT_VARIABLE
from tuneline.errors import did_you_mean
from tuneline.pools import Pools
from tuneline.tracking import CLUSTER_URI_VARIABLE
from tuneline_pipelines.doctor import mlflow_plugin
from tuneline_pipelines.doctor.cluster import Cluster, Denied, names, shown
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning
from tuneline_pipelines.doctor.mlflow_plugin import Plugin
from tuneline_pipelines.doctor.needs import Needs

PLUGIN: Final = "KFP's MLflow plugin"
_ENDPOINT: Final = "AWS_ENDPOINT_URL"
_LOGIN: Final = "MLFLOW_TRACKING_USERNAME"
_S3_KEY: Final = "AWS_ACCESS_KEY_ID"
_KUEUE_SETTINGS: Final = ("kueue-system", "kueue-manager-config")
"""Namespace and name, as Kueue's own manifests and chart have them."""
_ROLE_ANNOTATIONS: Final = (
    "eks.amazonaws.com/role-arn",
    "iam.gke.io/gcp-service-account",
    "azure.workload.identity/client-id",
)


@dataclass(frozen=True)
class Unknown:
    """In the place of what this login may not look at."""


def namespace(cluster: Cluster) -> Iterator[Finding]:
    """Whether it exists."""
    found = cluster.ask("get", "namespaces", cluster.core.read_namespace, cluster.namespace)
    name = f"namespace {cluster.namespace}"
    if found is None:
        yield error(name, "not there", "name the one that the runs' pods are in with --namespace")
    elif found.status.phase != "Active":
        yield error(name, f"{found.status.phase}", "wait until it is gone, and make it again")
    else:
        yield ok(name, "active")


def settings(cluster: Cluster, needs: Needs) -> dict[str, str]:
    """Variable -> its value, as the pods get them from config maps; without those that packages set
    themselves.

    Raises:
        Denied: this login may not look.
    """
    found: dict[str, str] = {}
    for name, keys in needs.config_maps.items():
        config_map = _config_map(cluster, name)
        data = (config_map.data if config_map else None) or {}
        found |= {variable: data[key] for key, variable in keys.items() if data.get(key)}
    return found


def _config_map(cluster: Cluster, name: str) -> Any | None:
    return cluster.ask(
        "get", "configmaps", cluster.core.read_namespaced_config_map, name, cluster.namespace
    )


def plugin(cluster: Cluster, found: Plugin | None) -> Iterator[Finding]:
    """What KFP's MLflow plugin hands to the steps, and the secret that it needs.

    Args:
        cluster: of the pods.
        found: the plugin; None: it is off.

    Raises:
        Denied: this login may not look at the secret.
    """
    if found is None:
        yield ok(PLUGIN, "hands nothing to the steps")
        return
    yield ok(PLUGIN, f"hands {shown(found.endpoint)} to the steps")
    if not found.keys:
        return
    title = f"secret {mlflow_plugin.SECRET}"
    secret = _secret(cluster, mlflow_plugin.SECRET)
    if secret is None:
        yield error(
            title,
            "not there, and KFP's MLflow plugin has every step read it: no pod would start",
            _create(cluster, mlflow_plugin.SECRET, found.keys),
        )
    else:
        yield from _keys(title, secret.data or {}, found.keys)


def config_maps(
    cluster: Cluster, needs: Needs, plugin: Plugin | Unknown | None
) -> Iterator[Finding]:
    """Those that become variables.

    Args:
        cluster: that they are in.
        needs: of the packages.
        plugin: of KFP; None: it is off.
    """
    for name, keys in needs.config_maps.items():
        title = f"config map {name}"
        found = _config_map(cluster, name)
        by_plugin = isinstance(plugin, Plugin) and bool(plugin.endpoint)
        if found is None:
            text = f"not there, and the pods take {', '.join(keys.values())} from it"
            if by_plugin and CLUSTER_URI_VARIABLE in keys.values():
                yield warning(title, text, "KFP's MLflow plugin sets MLflow's address alone")
            else:
                yield error(
                    title,
                    text,
                    f"kubectl -n {cluster.namespace} create configmap {name} "
                    f"--from-literal={next(iter(keys))}=...",
                )
            continue
        data: Mapping[str, str] = found.data or {}
        for key in sorted(data.keys() - keys.keys()):
            yield warning(
                f"{title}, key {key}",
                "no package reads it",
                f"the keys are {', '.join(keys)}.{did_you_mean(key, keys)}",
            )
        for key, variable in keys.items():
            value = data.get(key, "")
            if value != value.strip():
                yield error(f"{title}, key {key}", "white space around the value", "remove it")
            elif variable == CLUSTER_URI_VARIABLE and not value:
                state, what = error, "the pods know no MLflow"
                if by_plugin:
                    state, what = (
                        warning,
                        "scheduled runs know no MLflow: KFP's plugin serves others",
                    )
                elif isinstance(plugin, Unknown):
                    what += ", unless KFP's MLflow plugin sets it, which can't be told"
                yield state(
                    f"{title}, key {key}", f"not there: {what}", "set it to the server's address"
                )
            elif (
                variable == CLUSTER_URI_VARIABLE
                and "@" in value.partition("://")[2].partition("/")[0]
            ):
                yield error(
                    f"{title}, key {key}",
                    f"{shown(value)} with a login in it",
                    "move the login into the secret: everybody reads config maps",
                )
            elif variable == CLUSTER_URI_VARIABLE and value.startswith(("sqlite:", "file:", "/")):
                yield error(
                    f"{title}, key {key}",
                    f"{shown(value)}: each pod would have one of its own",
                    "set it to the address of a server",
                )
        given = ", ".join(f"{key}={shown(data[key])}" for key in keys if data.get(key))
        yield ok(title, given or "empty")


def _secret(cluster: Cluster, name: str) -> Any | None:
    return cluster.ask(
        "get", "secrets", cluster.core.read_namespaced_secret, name, cluster.namespace
    )


def secrets(
    cluster: Cluster,
    needs: Needs,
    values: Mapping[str, str],
    *,
    wants_login: bool | None,
    plugin: Plugin | Unknown | None = None,
    references: tuple[str, ...] = (),
) -> Iterator[Finding]:
    """Those that become variables, and whether one that is missing matters.

    Args:
        cluster: that they are in.
        needs: of the packages.
        values: of the config maps' variables.
        wants_login: whether MLflow asks for one; None: not known.
        plugin: of KFP; None: it is off.
        references: base model and data of a recipe.
    """
    for name, keys in needs.secrets.items():
        title = f"secret {name}"
        found = _secret(cluster, name)
        if found is not None:
            yield from _keys(title, found.data or {}, keys)
            continue
        create = _create(cluster, name, keys)
        variables = set(keys.values())
        if _LOGIN in variables:
            yield _without_login(title, values, wants_login, create, plugin)
        elif _S3_KEY in variables:
            yield _without_s3(title, needs, values, references, create)
        elif needed := [r for r in references if r.startswith(HUB_SCHEME)]:
            yield warning(title, f"not there, and {needed[0]} may be gated", create)
        else:
            yield ok(title, "not there, and not needed: it is for what is gated on the hub")


def _keys(title: str, data: Mapping[str, str], keys: Mapping[str, str]) -> Iterator[Finding]:
    faults = 0
    for key, variable in keys.items():
        place = f"{title}, key {key}"
        content = base64.b64decode(data.get(key) or "")
        if key not in data:
            there = f"the secret has {names(data)}.{did_you_mean(key, data)}"
            yield error(place, f"not there, so that the pods get no {variable}", there)
        elif not content:
            yield error(place, f"empty, so that {variable} is", "set it")
        elif content != content.strip():
            yield error(
                place,
                "begins or ends with white space, a line break of `echo` maybe",
                "make it again with printf or --from-literal",
            )
        else:
            continue
        faults += 1
    if not faults:
        yield ok(title, f"has {', '.join(keys)}")


def _without_login(
    title: str,
    values: Mapping[str, str],
    wants_login: bool | None,
    create: str,
    plugin: Plugin | Unknown | None,
) -> Finding:
    uri = shown(values.get(CLUSTER_URI_VARIABLE, ""))
    if isinstance(plugin, Plugin) and plugin.keys:
        handed = f"KFP's MLflow plugin hands {mlflow_plugin.SECRET} to the steps"
        if uri and wants_login is not False:
            return warning(
                title, f"not there; {handed}, but not to scheduled runs, which pass it by", create
            )
        return ok(title, f"not there; {handed}")
    if not uri:
        return warning(title, "not there", create)
    if wants_login is None:
        return error(title, f"not there, and whether {uri} wants a login can't be told", create)
    if wants_login:
        return error(title, f"not there, and {uri} wants a login", create)
    return ok(title, f"not there, and {uri} wants no login")


def _create(cluster: Cluster, name: str, keys: Iterable[str]) -> str:
    return f"kubectl -n {cluster.namespace} create secret generic {name} " + " ".join(
        f"--from-file={key}=FILE" for key in keys
    )


def _without_s3(
    title: str, needs: Needs, values: Mapping[str, str], references: tuple[str, ...], create: str
) -> Finding:
    users = [r for r in references if object_store.is_remote(r)]
    root = needs.variables.get(ROOT_VARIABLE, "")
    users += [f"{ROOT_VARIABLE}={root}"] * object_store.is_remote(root)
    if endpoint := values.get(_ENDPOINT):
        return error(
            title, f"not there, and the pods are given the object store {endpoint}", create
        )
    if users:
        return warning(
            title,
            f"not there, and {users[0]} needs access",
            f"fine if the service account has a role; else {create}",
        )
    return ok(title, "not there, and not needed: no object store is named")


def claims(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Volumes: bound, and usable by pods of several nodes."""
    for name, path in needs.claims.items():
        title = f"volume claim {name}"
        found = cluster.ask(
            "get",
            "persistentvolumeclaims",
            cluster.core.read_namespaced_persistent_volume_claim,
            name,
            cluster.namespace,
        )
        if found is None:
            yield error(
                title,
                f"not there, and the pods mount it at {path}",
                "kubectl apply -k manifests/base",
            )
            continue
        size = found.spec.resources.requests["storage"]
        given = (found.status.capacity or {}).get("storage", size)
        modes = found.spec.access_modes or []
        text = f"{found.status.phase}, {given}, {', '.join(modes)}"
        if found.metadata.deletion_timestamp:
            yield error(title, "is being deleted", "stop the pods that use it, and make it again")
        elif found.status.phase == "Bound":
            yield _shared(title, text, modes, cluster)
        elif found.status.phase == "Pending" and (waits := _waits_for_pod(cluster, found)):
            if isinstance(waits, Denied):
                yield warning(title, f"{text}; whether that is fine was {waits}", waits.advice)
            else:
                yield ok(title, f"{text}: bound with the first pod that uses it")
        else:
            storage = found.spec.storage_class_name or "the default class"
            yield error(
                title,
                f"{text}: no volume of class {storage} for it",
                f"kubectl -n {cluster.namespace} describe pvc {name} says why",
            )


def _shared(title: str, text: str, modes: list[str], cluster: Cluster) -> Finding:
    if "ReadWriteMany" in modes:
        return ok(title, text)
    if set(modes) <= {"ReadOnlyMany"}:
        return error(title, f"{text}: can't be written", "use a claim with ReadWriteMany")
    try:
        nodes = len(cluster.nodes)
    except Denied as fault:
        return warning(title, f"{text}, for one node; how many there are was {fault}", fault.advice)
    if nodes < 2:
        return ok(title, text)
    return warning(
        title,
        f"{text}, and there are {nodes} nodes",
        "pods on two of them can't use it at once: use a class with ReadWriteMany",
    )


def _waits_for_pod(cluster: Cluster, claim: Any) -> bool | Denied:
    name = claim.spec.storage_class_name
    try:
        found = name and cluster.ask(
            "get", "storageclasses.storage.k8s.io", cluster.storage.read_storage_class, name
        )
    except Denied as fault:
        return fault
    return bool(found) and found.volume_binding_mode == "WaitForFirstConsumer"


def service_account(cluster: Cluster, names: Sequence[str]) -> Iterator[Finding]:
    """That the pods run as: the first one that is there.

    Args:
        cluster: that it is in.
        names: of accounts that it may be.
    """
    for name in names:
        found = cluster.ask(
            "get",
            "serviceaccounts",
            cluster.core.read_namespaced_service_account,
            name,
            cluster.namespace,
        )
        if found is not None:
            notes = found.metadata.annotations or {}
            role = next((f"role {notes[a]}" for a in _ROLE_ANNOTATIONS if a in notes), "")
            yield ok(f"service account {name}", role or "there, without a role of the cloud")
            return
    yield error(
        f"service account {' or '.join(names)}",
        "not there",
        "name the runs' own with --service-account, here and in `tuneline submit`",
    )


def node_pools(cluster: Cluster, needs: Needs) -> tuple[Pools | None, list[Finding]]:
    """The pools file that runs read, and whether it has what the run forms offer.

    Raises:
        Denied: this login may not look.
        UsageError: it has faults.
    """
    if not needs.pools_files:
        return None, [ok("pools", "no package reads a pools file")]
    name, key = next(iter(needs.pools_files.items()))
    title = f"config map {name}"
    found = _config_map(cluster, name)
    if found is None:
        return None, [
            error(
                title,
                "not there, and every run reads its node pool from it",
                "kubectl apply -k manifests/base",
            )
        ]
    text = (found.data or {}).get(key)
    if text is None:
        return None, [
            error(
                title,
                f"has no {key} but {names(found.data or {})}",
                f"kubectl -n {cluster.namespace} create configmap {name} --from-file={key}=FILE",
            )
        ]
    known = pools.parse(text, f"{title}, {key}")
    findings = [
        error(
            f"pool {offered}",
            f"offered by the run forms, and not in the {title}",
            f"add it, or compile with its pools: {', '.join(known.names)}."
            f"{did_you_mean(offered, known.names)}",
        )
        for offered in needs.pools
        if offered not in known.names
    ]
    return known, [*findings, ok(title, f"pools {', '.join(known.names)}")]


def queue(cluster: Cluster, needs: Needs, label: str, accelerators: set[str]) -> Iterator[Finding]:
    """Kueue's queue that pods wait in.

    Args:
        cluster: that it is in.
        needs: of the packages.
        label: that names the queue.
        accelerators: resources that the pools ask for.
    """
    name = needs.labels.get(label)
    if not name:
        return
    title, group = f"queue {name}", label.partition("/")[0]
    # what every login may read
    found: Any = cluster.raw("get", f"/apis/{group}", f"/apis/{group}")
    if found is None:
        yield ok(title, "Kueue is not installed: the label does nothing")
        return
    version = found["preferredVersion"]["version"]
    local: Any = cluster.ask(
        "get",
        f"localqueues.{group}",
        cluster.custom.get_namespaced_custom_object,
        group,
        version,
        plural="localqueues",
        name=name,
        namespace=cluster.namespace,
    )
    if local is None:
        yield error(
            title,
            f"no LocalQueue of that name in {cluster.namespace}, and Kueue is "
            "installed: pods with the label wait for ever",
            "make it, as the manifests do",
        )
        return
    above = local["spec"]["clusterQueue"]
    shared: Any = cluster.ask(
        "get",
        f"clusterqueues.{group}",
        cluster.custom.get_cluster_custom_object,
        group,
        version,
        "clusterqueues",
        above,
    )
    if shared is None:
        yield error(title, f"its ClusterQueue {above} is not there", "make it")
        return
    for one, what in ((local, f"LocalQueue {name}"), (shared, f"ClusterQueue {above}")):
        active = _condition(one, "Active")
        if active and active["status"] != "True":
            yield error(
                title,
                f"{what} is not active ({active.get('message', 'no reason')})",
                "pods wait until it is",
            )
            return
    covered = {
        resource
        for group in shared["spec"].get("resourceGroups", ())
        for resource in group["coveredResources"]
    }
    if missing := sorted(accelerators - covered):
        yield error(
            title,
            f"ClusterQueue {above} covers {names(covered)} and not {missing[0]}",
            "pods that ask for it are never admitted: add it to a resource group",
        )
        return
    if _ignores_pods(cluster):
        yield warning(
            title,
            "Kueue leaves plain pods alone, so that the label does nothing",
            "add `pod` to integrations.frameworks in the config map "
            f"{'/'.join(_KUEUE_SETTINGS)}; Kueue 0.16 and newer have it by themselves",
        )
        return
    waiting = local.get("status", {}).get("pendingWorkloads", 0)
    yield ok(title, f"active, {waiting} waiting, ClusterQueue {above}")


def _ignores_pods(cluster: Cluster) -> bool:
    """Whether Kueue's settings say so; no, where they can't be seen."""
    namespace, name = _KUEUE_SETTINGS
    try:
        found = cluster.ask(
            "get", "configmaps", cluster.core.read_namespaced_config_map, name, namespace
        )
        text = ((found.data if found else None) or {}).get("controller_manager_config.yaml", "")
        settings = yaml.safe_load(text)
    except (Denied, yaml.YAMLError):
        return False
    if not isinstance(settings, dict):
        return False
    integrations = settings.get("integrations") or {}
    return "pod" not in (integrations.get("frameworks") or ())


def _condition(thing: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    conditions = thing.get("status", {}).get("conditions", ())
    return next((one for one in conditions if one["type"] == kind), None)
