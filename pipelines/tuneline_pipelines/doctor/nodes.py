"""Whether a node could take a step of a pool: labels, affinity, taints, and what it has to give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from tuneline.pools import Pool, Pools, Toleration, bytes_of
from tuneline_pipelines.doctor.cluster import Cluster, names
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

_REQUIRED: Final = "requiredDuringSchedulingIgnoredDuringExecution"
_AUTOSCALED: Final = "a pool that scales to zero has none until a pod waits; else correct"


def checks(cluster: Cluster, pools: Pools, chosen: str | None = None) -> Iterator[Finding]:
    """A finding for each pool.

    Args:
        cluster: whose nodes are looked at.
        pools: as the cluster's config map has them.
        chosen: look at this one only.
    """
    wanted = {chosen: pools.named(chosen)} if chosen else pools.pools
    for name, pool in wanted.items():
        yield check(f"pool {name}", pool, cluster.nodes)


def check(name: str, pool: Pool, nodes: list[Any]) -> Finding:
    """Whether one of the nodes could take a step of the pool.

    Args:
        name: of the finding.
        pool: node pool.
        nodes: of the cluster.
    """
    alike = [node for node in nodes if _is_chosen(pool, node)]
    if not alike:
        return warning(
            name,
            f"no node of {len(nodes)} matches{_nearest(pool, nodes)}",
            f"{_AUTOSCALED} node_selector or node_affinity",
        )
    admitted = [node for node in alike if not _refusing_taint(pool, node)]
    if not admitted:
        taint = _refusing_taint(pool, alike[0])
        return error(
            name,
            f"the nodes that match ({len(alike)}) have the taint {taint}",
            "add a toleration of it to the pool",
        )
    usable = [node for node in admitted if _is_ready(node)]
    if not usable:
        return warning(
            name,
            f"the nodes that match ({len(admitted)}) are not ready or cordoned",
            "kubectl get nodes says why",
        )
    lacking = [_lack(pool, node) for node in usable]
    if all(lacking):
        # of the shortest list of wants, since one node of the pool is enough
        what = min(lacking, key=len)
        return error(
            name,
            f"no node that matches ({len(usable)}) has {' and '.join(what)} to give",
            "ask for less, or look at the device plugin if accelerators are missing",
        )
    text = f"{lacking.count([])} of {len(usable)} matching nodes could take a step"
    return ok(name, text)


def _is_chosen(pool: Pool, node: Any) -> bool:
    labels: Mapping[str, str] = node.metadata.labels or {}
    if any(labels.get(key) != value for key, value in pool.node_selector.items()):
        return False
    terms = pool.node_affinity.get(_REQUIRED, {}).get("nodeSelectorTerms")
    if terms is None:
        return True
    fields = {"metadata.name": node.metadata.name}
    return any(
        (term.get("matchExpressions") or term.get("matchFields"))
        and all(_holds(one, labels) for one in term.get("matchExpressions", ()))
        and all(_holds(one, fields) for one in term.get("matchFields", ()))
        for term in terms
    )


def _holds(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    found = labels.get(requirement["key"])
    values = [str(value) for value in requirement.get("values") or ()]
    tests: dict[str, Callable[[], bool]] = {
        "In": lambda: found in values,
        "NotIn": lambda: found not in values,
        "Exists": lambda: found is not None,
        "DoesNotExist": lambda: found is None,
        "Gt": lambda: _number(found) is not None and _number(found) > _number(values[0]),
        "Lt": lambda: _number(found) is not None and _number(found) < _number(values[0]),
    }
    return tests[requirement["operator"]]()


def _number(text: str | None) -> Any:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else None


def _refusing_taint(pool: Pool, node: Any) -> str:
    for taint in node.spec.taints or ():
        keeps_away = taint.effect in ("NoSchedule", "NoExecute")
        # of a node that is cordoned or not ready; told as such
        passing = taint.key.startswith("node.kubernetes.io/")
        if keeps_away and not passing and not any(_admits(t, taint) for t in pool.tolerations):
            value = f"={taint.value}" if taint.value else ""
            return f"{taint.key}{value}:{taint.effect}"
    return ""


def _admits(toleration: Toleration, taint: Any) -> bool:
    if toleration.effect and toleration.effect != taint.effect:
        return False
    if toleration.operator == "Exists":
        return toleration.key in ("", taint.key)
    return toleration.key == taint.key and toleration.value == (taint.value or "")


def _is_ready(node: Any) -> bool:
    conditions = {one.type: one.status for one in node.status.conditions or ()}
    return conditions.get("Ready") == "True" and not node.spec.unschedulable


def _lack(pool: Pool, node: Any) -> list[str]:
    offered = node.status.allocatable or {}
    wants = {"cpu": pool.cpu, "memory": pool.memory}
    if pool.accelerator:
        wants[pool.accelerator] = str(pool.count)
    return [
        f"{amount} {resource} (has {offered.get(resource, '0')})"
        for resource, amount in wants.items()
        if bytes_of(offered.get(resource, "0")) < bytes_of(amount)
    ]


def _nearest(pool: Pool, nodes: list[Any]) -> str:
    """Which values the nodes have for the labels that are asked for."""
    required = pool.node_affinity.get(_REQUIRED, {}).get("nodeSelectorTerms", ())
    asked = [
        *pool.node_selector,
        *(one["key"] for t in required for one in t.get("matchExpressions", ())),
    ]
    for key in asked:
        values = Counter(
            node.metadata.labels[key] for node in nodes if key in (node.metadata.labels or {})
        )
        if values and pool.node_selector.get(key) not in values:
            return f"; their {key} is {names(values)}"
        if not values:
            return f"; none has the label {key}"
    return ""
