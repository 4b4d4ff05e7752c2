"""Our own rules for what is applied, each of which is shown to find what it is for."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]
Rule = Callable[[Manifest], Iterator[str]]

SERVERS = ("Deployment", "StatefulSet")
WITH_TOKEN: set[str] = set()
"""Workloads that talk to Kubernetes' API."""
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|(^|_)KEY($|_)|PRIVATE", re.IGNORECASE)
LOGIN = re.compile(r"://[^/\s:@]+:[^/\s@]+@|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")
POWERS = {"pods/exec", "pods/attach", "pods/ephemeralcontainers", "serviceaccounts/token"}
ZERO = "sha256:" + 64 * "0"


def pod(thing: Manifest) -> Manifest | None:
    """The pod that it makes."""
    spec = thing.get("spec", {})
    if thing["kind"] == "Pod":
        return spec
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec.get("template", {}).get("spec")


def containers(thing: Manifest) -> list[Manifest]:
    """All of its pod."""
    spec = pod(thing) or {}
    return [*spec.get("initContainers", ()), *spec.get("containers", ())]


def runs_as_nobody_special(thing: Manifest) -> Iterator[str]:
    """A numeric user that is not root, for all containers."""
    if (spec := pod(thing)) is None:
        return
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "the pod may run as root"
    for container in containers(thing):
        own = container.get("securityContext", {})
        if own.get("runAsUser", 1) == 0 or own.get("runAsNonRoot") is False:
            yield f"{container['name']} runs as root"


def is_confined(thing: Manifest) -> Iterator[str]:
    """No way to more rights, and the standard filter of system calls."""
    if (spec := pod(thing)) is None:
        return
    if spec.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    for container in containers(thing):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{container['name']} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"


def shares_nothing_with_the_node(thing: Manifest) -> Iterator[str]:
    """No folder, network or processes of the node."""
    spec = pod(thing) or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", ()):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a folder of the node"


def writes_to_volumes_only(thing: Manifest) -> Iterator[str]:
    """A root filesystem that is read-only."""
    for container in containers(thing):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} can write to its image"


def says_what_it_needs(thing: Manifest) -> Iterator[str]:
    """Requests and limits of CPU and memory."""
    for container in containers(thing):
        for part in ("requests", "limits"):
            for resource in ("cpu", "memory"):
                if resource not in container.get("resources", {}).get(part, {}):
                    yield f"{container['name']} has no {part} of {resource}"


def says_when_it_is_well(thing: Manifest) -> Iterator[str]:
    """Probes of servers; and jobs end."""
    if thing["kind"] in SERVERS:
        for container in thing["spec"]["template"]["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield f"{container['name']} has no {probe}"
    job = thing.get("spec", {}).get("jobTemplate", thing if thing["kind"] == "Job" else {})
    if job and "activeDeadlineSeconds" not in job.get("spec", {}):
        yield "the job may run for ever"


def has_an_image_that_stays(thing: Manifest) -> Iterator[str]:
    """A digest, or a tag that is a release."""
    for container in containers(thing):
        name, _, digest = container["image"].partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not digest and not re.search(r"[0-9]+\.[0-9]+", tag):
            yield f"{container['image']} is no release"


def has_no_token_without_need(thing: Manifest) -> Iterator[str]:
    """Of Kubernetes' API."""
    spec = pod(thing)
    if spec is None or thing["metadata"]["name"] in WITH_TOKEN:
        return
    if spec.get("automountServiceAccountToken") is not False:
        yield "a token is mounted"


def holds_no_secret(thing: Manifest) -> Iterator[str]:
    """No value that is secret, in whatever object."""
    if thing["kind"] == "Secret" and (thing.get("data") or thing.get("stringData")):
        yield "a secret with its values"
    for container in containers(thing):
        for variable in container.get("env", ()):
            # a path is none, and what comes from a secret has no value here
            value = variable.get("value", "/")
            if SECRET_NAME.search(variable["name"]) and not value.startswith("/"):
                yield f"variable {variable['name']} has its value here"
    if thing["kind"] == "ConfigMap":
        for key, value in thing.get("data", {}).items():
            if SECRET_NAME.search(key) and "/" not in value:
                yield f"{key} sounds secret"
    if LOGIN.search(yaml.safe_dump(thing, width=10**6)):
        yield "a login or private key"


def grants_little(thing: Manifest) -> Iterator[str]:
    """No wildcards, no listing of secrets, no way into pods or to more rights."""
    if thing["kind"] not in ("Role", "ClusterRole"):
        return
    for rule in thing["rules"]:
        asked = [*rule.get("apiGroups", ()), *rule["resources"], *rule["verbs"]]
        if "*" in asked:
            yield "a wildcard"
        named = rule["verbs"] == ["get"] and "resourceNames" in rule
        if "secrets" in rule["resources"] and not named:
            yield "secrets that are not named"
        yield from POWERS & set(rule["resources"])
        if {"escalate", "bind", "impersonate"} & set(rule["verbs"]):
            yield "a way to more rights"


def is_reached_through_tls(thing: Manifest) -> Iterator[str]:
    """From outside of the cluster by an ingress with a certificate, and no other way."""
    spec = thing.get("spec", {})
    if thing["kind"] == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield f"type {spec['type']}"
    if thing["kind"] == "Ingress":
        covered = {host for entry in spec.get("tls", ()) for host in entry["hosts"]}
        if {rule.get("host") for rule in spec["rules"]} - covered:
            yield "a host without TLS"


CONTAINER = "containers: [{name: a, image: a:1.0}]"
RULES: dict[Rule, tuple[str, ...]] = {
    runs_as_nobody_special: (
        f"{{kind: Pod, spec: {{{CONTAINER}}}}}",
        """
        kind: CronJob
        spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: a, image: a:1.0}]}}}}}
        """,
        """
        kind: Pod
        spec:
          securityContext: {runAsNonRoot: true, runAsUser: 1}
          containers: [{name: a, image: a:1.0, securityContext: {runAsUser: 0}}]
        """,
    ),
    is_confined: (
        f"{{kind: Pod, spec: {{{CONTAINER}}}}}",
        """
        kind: Pod
        spec:
          securityContext: {seccompProfile: {type: RuntimeDefault}}
          initContainers:
            - {name: a, image: a:1.0, securityContext: {allowPrivilegeEscalation: false}}
        """,
    ),
    shares_nothing_with_the_node: (
        "{kind: Pod, spec: {hostNetwork: true, containers: []}}",
        "{kind: Pod, spec: {volumes: [{name: a, hostPath: {path: /}}]}}",
    ),
    writes_to_volumes_only: (f"{{kind: Pod, spec: {{{CONTAINER}}}}}",),
    says_what_it_needs: (
        """
        kind: Pod
        spec:
          containers:
            - name: a
              image: a:1.0
              resources: {requests: {cpu: 1, memory: 1Gi}, limits: {cpu: 1}}
        """,
    ),
    says_when_it_is_well: (
        f"{{kind: Deployment, spec: {{template: {{spec: {{{CONTAINER}}}}}}}}}",
        "{kind: Job, spec: {template: {spec: {containers: []}}}}",
        "{kind: CronJob, spec: {jobTemplate: {spec: {template: {spec: {}}}}}}",
    ),
    has_an_image_that_stays: (
        "{kind: Pod, spec: {containers: [{name: a, image: host:80/a:latest}]}}",
        "{kind: Pod, spec: {containers: [{name: a, image: host:80/a}]}}",
    ),
    has_no_token_without_need: ("{kind: Pod, spec: {containers: []}}",),
    holds_no_secret: (
        "{kind: Secret, stringData: {password: hunter2}}",
        "{kind: ConfigMap, data: {uri: 'postgresql://mlflow:hunter2@db/mlflow'}}",
        "{kind: ConfigMap, data: {AWS_SECRET_ACCESS_KEY: hunter2}}",
        """
        kind: Pod
        spec: {containers: [{name: a, image: a:1.0, env: [{name: DB_PASSWORD, value: hunter2}]}]}
        """,
    ),
    grants_little: (
        "{kind: Role, rules: [{apiGroups: [''], resources: [secrets], verbs: [get]}]}",
        "{kind: Role, rules: [{apiGroups: [''], resources: [pods/exec], verbs: [create]}]}",
        "{kind: Role, rules: [{apiGroups: [''], resources: [roles], verbs: [bind]}]}",
        "{kind: ClusterRole, rules: [{apiGroups: ['*'], resources: [a], verbs: [get]}]}",
        """
        kind: Role
        rules:
          - {apiGroups: [''], resources: [secrets], resourceNames: [a], verbs: [get, list]}
        """,
    ),
    is_reached_through_tls: (
        "{kind: Ingress, spec: {rules: [{host: a.example}]}}",
        "{kind: Service, spec: {type: LoadBalancer}}",
    ),
}
"""Rule -> objects that break it."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_for_all_that_is_ours(rule: Rule, ours: list[tuple[str, Manifest]]) -> None:
    broken = [
        f"{where}: {thing['kind']} {thing['metadata']['name']}: {fault}"
        for where, thing in ours
        for fault in rule(thing)
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("rule", "bad"), [(rule, bad) for rule, all_bad in RULES.items() for bad in all_bad]
)
def test_rule_finds_what_breaks_it(rule: Rule, bad: str) -> None:
    assert list(rule({"metadata": {"name": "bad"}} | yaml.safe_load(bad)))


def test_production_and_staging_run_our_image_by_digest(
    ours: list[tuple[str, Manifest]],
) -> None:
    images = {
        (where, container["image"])
        for where, thing in ours
        if where in ("staging", "production")
        for container in containers(thing)
    }
    of_others = ("docker.io/library/postgres:", "ghcr.io/chrislusf/seaweedfs:")
    assert {image for where, image in images if where == "production"} == {
        f"registry.example.com/ml/tuneline-cpu@{ZERO}"
    }
    for _, image in images:
        assert image.startswith(of_others) or re.search(r"@sha256:[0-9a-f]{64}$", image)


def test_local_runs_the_image_of_this_release(ours: list[tuple[str, Manifest]]) -> None:
    from tuneline import __version__

    images = {
        container["image"]
        for where, thing in ours
        if where == "local"
        for container in containers(thing)
        if container["image"].startswith("tuneline")
    }
    (image,) = images
    assert image.startswith(f"tuneline-cpu:{__version__}-")


def test_every_pod_is_under_a_policy_that_denies(ours: list[tuple[str, Manifest]]) -> None:
    """Our services by their namespace's, steps and the clocks' pods by their own."""
    policies = [t for where, t in ours if where == "staging" and t["kind"] == "NetworkPolicy"]
    denying = {
        (p["metadata"]["namespace"], tuple(p["spec"]["podSelector"].get("matchLabels", {}).items()))
        for p in policies
        if set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    }
    assert denying == {
        ("tuneline", ()),
        ("kubeflow", (("pipelines.kubeflow.org/v2_component", "true"),)),
        ("kubeflow", (("app.kubernetes.io/name", "tuneline-schedules"),)),
        ("kubeflow", (("app.kubernetes.io/name", "tuneline-champions"),)),
    }
    homes = {
        (thing["metadata"]["namespace"], thing["metadata"]["name"])
        for where, thing in ours
        if where == "staging" and pod(thing) is not None
    }
    assert {name for namespace, name in homes if namespace == "kubeflow"} == {
        "tuneline-schedules",
        "tuneline-champions",
    }


def test_namespace_of_our_services_is_restricted(ours: list[tuple[str, Manifest]]) -> None:
    labels = [t["metadata"]["labels"] for _, t in ours if t["kind"] == "Namespace"]
    assert labels
    assert {found["pod-security.kubernetes.io/enforce"] for found in labels} == {"restricted"}
