"""Every object is one that Kubernetes, or the operator that it is for, takes."""

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.33", "1.35", "1.37")
CUSTOM = {
    (schema["apiVersion"], schema["kind"]): schema["schema"]
    for schema in yaml.safe_load_all((ROOT / "tests/fixtures/custom-resources.yaml").read_text())
}
DEFINITIONS = os.environ.get("TUNELINE_TEST_CRDS", "")
"""A folder of the operators' own CustomResourceDefinitions, as each publishes them: all objects of
theirs are then also held against those. The fixture has what is used of them, written down."""


def definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The schemas in a folder of CustomResourceDefinitions, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        for thing in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if thing and thing["kind"] == "CustomResourceDefinition":
                spec = thing["spec"]
                for version in spec["versions"]:
                    kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    schema = version["schema"]["openAPIV3Schema"]
                    schema["properties"].pop("metadata", None)
                    found[kind] = closed(schema)
    return found


def closed(schema: Any) -> Any:
    """The schema with its unknown fields refused, which a server would drop without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    known = made.get("type") == "object" and isinstance(made.get("properties"), dict)
    if known and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


Placed = list[tuple[str, dict[str, Any]]]


def faults(thing: dict[str, Any], version: str) -> list[str]:
    """What is wrong with an object."""
    kind = (thing["apiVersion"], thing["kind"])
    name = f"{thing['kind']} {thing['metadata']['name']}"
    try:
        if kind in CUSTOM:
            body = {k: v for k, v in thing.items() if k not in ("apiVersion", "kind", "metadata")}
            jsonschema.Draft202012Validator(CUSTOM[kind]).validate(body)
        else:
            kubernetes_validate.validate(thing, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return [f"{name}: {'.'.join(map(str, error.path))}: {error.message}"]
    return []


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(ours: Placed, version: str) -> None:
    seen: dict[str, list[str]] = {}
    for where, thing in ours:
        text = yaml.safe_dump(thing)
        if text not in seen:  # most are in all overlays
            seen[text] = [f"{where}: {fault}" for fault in faults(thing, version)]
    assert len(seen) > 60
    assert [fault for found in seen.values() for fault in found] == []


@pytest.mark.skipif(not DEFINITIONS, reason="TUNELINE_TEST_CRDS names no folder of definitions")
def test_objects_of_operators_are_valid_by_the_definitions_that_these_publish(
    ours: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = definitions(Path(DEFINITIONS))
    assert CUSTOM.keys() <= published.keys()
    for kind in CUSTOM:
        monkeypatch.setitem(CUSTOM, kind, published[kind])
    placed = [(w, t) for w, t in ours if (t["apiVersion"], t["kind"]) in CUSTOM]
    assert {(t["apiVersion"], t["kind"]) for _, t in placed} == CUSTOM.keys()
    assert [f"{where}: {f}" for where, t in placed for f in faults(t, VERSIONS[0])] == []
    broken = [t for t in yaml.safe_load_all(BROKEN) if (t["apiVersion"], t["kind"]) in CUSTOM]
    found = {t["metadata"]["name"] for t in broken if faults(t, VERSIONS[0])}
    assert found == {
        "misspelled",
        "no-key",
        "no-expression",
    }  # what Kueue says by rules in CEL is not run


def test_every_schema_is_of_a_kind_that_is_used(ours: Placed) -> None:
    assert CUSTOM.keys() <= {(thing["apiVersion"], thing["kind"]) for _, thing in ours}


BROKEN = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: wrong-type}
spec:
  replicas: two
  selector: {matchLabels: {a: b}}
  template: {metadata: {labels: {a: b}}, spec: {containers: [{name: a, image: b}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: unknown-field}
spec:
  selector: {matchLabels: {a: b}}
  template: {metadata: {labels: {a: b}}, spec: {containers: [{name: a, image: b, limit: {}}]}}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata: {name: misspelled}
spec: {clusterQueu: tuneline}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata: {name: no-such-effect}
spec: {nodeTaints: [{key: a, effect: Never}]}
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: no-key}
spec: {data: [{secretKey: a, remoteRef: {property: b}}]}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: no-expression}
spec: {groups: [{name: a, rules: [{alert: b}]}]}
"""


@pytest.mark.parametrize(
    "thing", list(yaml.safe_load_all(BROKEN)), ids=lambda thing: thing["metadata"]["name"]
)
def test_a_broken_object_is_found(thing: dict[str, Any]) -> None:
    assert faults(thing, VERSIONS[0])


def test_alerts_use_metrics_that_somebody_has(ours: Placed) -> None:
    known = {
        "resource_manager_workflow_runs_failed",  # KFP 2.17.0, API server
        "argo_workflows_total_count",  # Argo 4.0.5, workflow controller
        "kueue_pending_workloads",  # Kueue 0.19
        "kube_cronjob_status_last_successful_time",  # kube-state-metrics
        "kube_cronjob_created",
        "kube_deployment_created",
        "kube_deployment_status_replicas_available",
        "kubelet_volume_stats_available_bytes",  # kubelet
        "kubelet_volume_stats_capacity_bytes",
    }
    used: set[str] = set()
    for _, thing in ours:
        if thing["kind"] == "PrometheusRule":
            for rule in thing["spec"]["groups"][0]["rules"]:
                bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([a-z_]+\)", "", rule["expr"])
                used |= set(re.findall(r"\b[a-z]+_[a-z_]+\b", bare))
    assert used == known
