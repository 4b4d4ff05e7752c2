"""Who reaches whom, by the network policies of each overlay as Kubernetes reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

Manifest = dict[str, Any]
Overlays = dict[str, list[Manifest]]
RUNS, OURS = "kubeflow", "tuneline"


@dataclass(frozen=True)
class Pod:
    """What policies know of one."""

    namespace: str
    labels: tuple[tuple[str, str], ...] = ()
    ports: tuple[int, ...] = ()


STEP = Pod(RUNS, (("pipelines.kubeflow.org/v2_component", "true"),))
OTHERS = {
    "step": STEP,
    "prometheus": Pod("monitoring", (("app.kubernetes.io/name", "prometheus"),)),
    "acme-solver": Pod(OURS, (("acme.cert-manager.io/http01-solver", "true"),), (8089,)),
    "ingress": Pod("ingress-nginx", (("app.kubernetes.io/name", "ingress-nginx"),)),
}
STRANGERS = [
    *(Pod(namespace) for namespace in (RUNS, OURS, "default", "monitoring")),
    Pod("default", STEP.labels),  # a label is no passport where it is another namespace
    Pod("default", (("app", "ml-pipeline"),)),
]


def pods(things: list[Manifest]) -> dict[str, Pod]:
    """Name of a workload -> its pod."""
    found = dict(OTHERS)
    for thing in things:
        spec = thing.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if (template := spec.get("template")) is None:
            continue
        ports = {
            port["containerPort"]
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
        }
        labels = tuple(sorted(template["metadata"]["labels"].items()))
        found[thing["metadata"]["name"]] = Pod(
            thing["metadata"]["namespace"], labels, tuple(sorted(ports))
        )
    return found


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", ())
    assert all(one["operator"] == "In" for one in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in expressions
    )


def admits(things: list[Manifest], direction: str, pod: Pod, peer: Pod, port: int) -> bool:
    """Whether a pod's policies of a direction let a peer through."""
    word = {"Ingress": "from", "Egress": "to"}[direction]
    policies = [
        thing["spec"]
        for thing in things
        if thing["kind"] == "NetworkPolicy"
        and thing["metadata"]["namespace"] == pod.namespace
        and direction in thing["spec"]["policyTypes"]
        and selects(thing["spec"]["podSelector"], dict(pod.labels))
    ]

    def is_peer(one: Manifest) -> bool:
        if "ipBlock" in one:
            return False
        if "namespaceSelector" in one:
            name = {"kubernetes.io/metadata.name": peer.namespace}
            if not selects(one["namespaceSelector"], name):
                return False
        elif peer.namespace != pod.namespace:
            return False
        return selects(one.get("podSelector", {}), dict(peer.labels))

    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    return not policies or any(
        (word not in rule or any(map(is_peer, rule[word])))
        and port in {one["port"] for one in rule.get("ports", ({"port": port},))}
        for rule in rules
    )


def reaches(things: list[Manifest], source: Pod, target: Pod, port: int) -> bool:
    return admits(things, "Egress", source, target, port) and admits(
        things, "Ingress", target, source, port
    )


def reached(things: list[Manifest], source: Pod) -> Iterator[tuple[str, int]]:
    for name, target in pods(things).items():
        for port in target.ports:
            if target != source and admits(things, "Ingress", target, source, port):
                yield name, port


@pytest.mark.parametrize("stranger", STRANGERS, ids=str)
def test_a_stranger_reaches_nothing_but_the_webhook_of_kubernetes(
    overlays: Overlays, stranger: Pod
) -> None:
    """KFP's API server, metadata and database ask nobody for a login."""
    for overlay, things in overlays.items():
        listening = sum(len(pod.ports) for pod in pods(things).values())
        assert listening >= 8, overlay
        assert set(reached(things, stranger)) == {("cache-server", 8443)}, overlay


NEEDED = """
step ml-pipeline 8887 8888
step metadata-grpc-deployment 8080
step seaweedfs 8333
step tuneline-mlflow 5000
step tuneline-object-store 8333
ml-pipeline-ui ml-pipeline 8888
ml-pipeline-ui metadata-envoy-deployment 9090
ml-pipeline-ui seaweedfs 8333
ml-pipeline-persistenceagent ml-pipeline 8887 8888
ml-pipeline-scheduledworkflow ml-pipeline 8887 8888
metadata-envoy-deployment metadata-grpc-deployment 8080
metadata-writer metadata-grpc-deployment 8080
metadata-grpc-deployment mysql 3306
cache-server mysql 3306
ml-pipeline mysql 3306
ml-pipeline metadata-grpc-deployment 8080
ml-pipeline seaweedfs 8333
ml-pipeline tuneline-mlflow 5000
ml-pipeline ml-pipeline-visualizationserver 8888
workflow-controller seaweedfs 8333
tuneline-schedules ml-pipeline 8888
tuneline-champions tuneline-mlflow 5000
prometheus ml-pipeline 8888
prometheus workflow-controller 9090
ingress tuneline-mlflow 5000
ingress acme-solver 8089
tuneline-mlflow tuneline-postgres 5432
tuneline-mlflow tuneline-object-store 8333
tuneline-mlflow-migrate tuneline-postgres 5432
tuneline-mlflow-users tuneline-mlflow 5000
tuneline-postgres-backup tuneline-postgres 5432
tuneline-object-store-buckets tuneline-object-store 8333
"""
ONLY_IN = {"prometheus": {"staging", "production"}, "ingress": {"production"}}


@pytest.mark.parametrize("line", NEEDED.strip().splitlines())
def test_what_has_to_talk_can(overlays: Overlays, line: str) -> None:
    source, target, *ports = line.split()
    seen = 0
    for overlay, things in overlays.items():
        known = pods(things)
        if {source, target} <= known.keys() and overlay in ONLY_IN.get(source, {overlay}):
            for port in ports:
                seen += 1
                assert reaches(things, known[source], known[target], int(port)), overlay
    assert seen


def test_a_step_reaches_no_database_and_no_ui(overlays: Overlays) -> None:
    for overlay, things in overlays.items():
        found = {name for name, _ in reached(things, STEP)}
        assert not found & {"mysql", "tuneline-postgres", "ml-pipeline-ui"}, overlay
