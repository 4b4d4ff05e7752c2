"""What one part names, another one makes: compiled packages, pools, services, policies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline.pools import read
from tuneline_pipelines import schedules

ROOT = Path(__file__).parents[2]
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUNS = "kubeflow"

Overlays = dict[str, list[dict[str, Any]]]
Secrets = dict[tuple[str, str], dict[str, str]]
Made = Callable[[str, str], dict[str, set[str]]]


@pytest.fixture(scope="module")
def executors() -> list[dict[str, Any]]:
    """What the steps of all compiled packages ask of Kubernetes."""
    found = []
    for package in sorted((ROOT / "tests/golden").glob("*.yaml")):
        for document in yaml.safe_load_all(package.read_text()):
            platform = document.get("platforms", {}).get("kubernetes", {})
            found += platform.get("deploymentSpec", {}).get("executors", {}).values()
    assert found
    return found


def names(things: list[dict[str, Any]], kind: str, namespace: str = RUNS) -> dict[str, Any]:
    """Name -> object, of a kind."""
    return {
        t["metadata"]["name"]: t
        for t in things
        if t["kind"] == kind and t["metadata"].get("namespace") == namespace
    }


@pytest.fixture
def made(overlays: Overlays, secrets: Secrets) -> Made:
    """Secret -> its keys, in a namespace: of external secrets, or of the script that makes them."""

    def find(overlay: str, namespace: str) -> dict[str, set[str]]:
        if overlay == "production":
            return {
                secret["spec"]["target"]["name"]: {e["secretKey"] for e in secret["spec"]["data"]}
                for secret in names(overlays[overlay], "ExternalSecret", namespace).values()
            }
        return {name: set(data) for (where, name), data in secrets.items() if where == namespace}

    return find


def test_packages_find_their_settings(executors: list[dict[str, Any]], overlays: Overlays) -> None:
    for overlay, things in overlays.items():
        maps = names(things, "ConfigMap")
        for executor in executors:
            for entry in executor.get("configMapAsEnv", ()):
                keys = {pair["configMapKey"] for pair in entry["keyToEnv"]}
                assert keys <= maps[entry["configMapName"]]["data"].keys(), overlay
            for entry in executor.get("configMapAsVolume", ()):
                assert "pools.yaml" in maps[entry["configMapName"]]["data"], overlay


def test_packages_find_their_secrets(
    executors: list[dict[str, Any]], overlays: Overlays, made: Made
) -> None:
    by_hand = {"tuneline-hub"}  # a token that nobody can make up; secrets.sh says how
    for overlay in overlays:
        found = made(overlay, RUNS)
        for executor in executors:
            for entry in executor.get("secretAsEnv", ()):
                if overlay != "production" and entry["secretName"] in by_hand:
                    continue
                keys = {pair["secretKey"] for pair in entry["keyToEnv"]}
                assert keys <= found[entry["secretName"]], overlay


def test_no_step_holds_the_login_of_mlflow_s_administrator(overlays: Overlays) -> None:
    def entries(name: str, namespace: str) -> set[str]:
        secret = names(overlays["production"], "ExternalSecret", namespace)[name]
        return {one["remoteRef"]["key"] for one in secret["spec"]["data"]}

    steps = entries("tuneline-mlflow-steps", "tuneline")
    assert entries("tuneline-mlflow", RUNS) == entries("kfp-mlflow-credentials", RUNS) == steps
    assert not steps & entries("tuneline-mlflow-admin", "tuneline")


def test_packages_find_their_volumes(executors: list[dict[str, Any]], overlays: Overlays) -> None:
    for overlay, things in overlays.items():
        claims = names(things, "PersistentVolumeClaim")
        for executor in executors:
            for mount in executor.get("pvcMount", ()):
                mode = "ReadWriteOnce" if overlay == "local" else "ReadWriteMany"
                assert claims[mount["constant"]]["spec"]["accessModes"] == [mode]


def test_packages_find_their_queue(executors: list[dict[str, Any]], overlays: Overlays) -> None:
    queues = {e.get("podMetadata", {}).get("labels", {}).get(QUEUE_LABEL) for e in executors}
    assert queues - {None}
    for overlay, things in overlays.items():
        if overlay == "local":  # without Kueue the label does nothing
            assert not names(things, "LocalQueue")
        else:
            assert names(things, "LocalQueue").keys() == queues - {None}


def test_runs_act_as_an_account_that_is_there(overlays: Overlays) -> None:
    for overlay, things in overlays.items():
        accounts = names(things, "ServiceAccount")
        config = next(
            v for k, v in names(things, "ConfigMap").items() if k.startswith("tuneline-kfp")
        )
        account = yaml.safe_load(config["data"]["config.json"])[
            "DEFAULTPIPELINERUNNERSERVICEACCOUNT"
        ]
        assert account in accounts, overlay


def test_every_pool_has_its_flavor(overlays: Overlays) -> None:
    pools = read(ROOT / "manifests/base/pools.yaml").pools
    for overlay in ("staging", "production"):
        things = overlays[overlay]
        flavors = {
            t["metadata"]["name"]: t["spec"] for t in things if t["kind"] == "ResourceFlavor"
        }
        assert flavors.keys() == pools.keys()
        (queue,) = (t["spec"] for t in things if t["kind"] == "ClusterQueue")
        (group,) = queue["resourceGroups"]
        quotas = {
            flavor["name"]: {r["name"]: r["nominalQuota"] for r in flavor["resources"]}
            for flavor in group["flavors"]
        }
        assert quotas.keys() == pools.keys()
        for name, pool in pools.items():
            assert flavors[name].get("nodeLabels", {}) == pool.node_selector
            taints = flavors[name].get("nodeTaints", [])
            # a step of a pool without accelerators must not be given nodes that have some
            assert bool(taints) == bool(pool.count)
            for taint in taints:
                assert any(
                    t.key == taint["key"] and t.effect == taint["effect"] for t in pool.tolerations
                )
            for resource in {pool.accelerator} - {""}:
                assert int(quotas[name][resource]) >= pool.count
            assert set(quotas[name]) == set(group["coveredResources"])


def test_schedules_are_the_examples() -> None:
    for name in ("schedules.yaml", "demo.yaml"):
        example = (ROOT / "examples" / name).read_text()
        assert (ROOT / "manifests/components/schedules" / name).read_text() == example


def test_production_has_no_schedule_but_the_user_s_own(overlays: Overlays, tmp_path: Path) -> None:
    """Those of the demo would train and promote its model every night."""
    maps = names(overlays["production"], "ConfigMap")
    (files,) = (m["data"] for name, m in maps.items() if name.startswith("tuneline-schedules-"))
    assert files.keys() == {"schedules.yaml"}
    file = tmp_path / "schedules.yaml"
    file.write_text(files["schedules.yaml"])
    read_file = schedules.read(file)
    assert read_file.schedules == () and read_file.group == "example"
    # the entry that it shows is one
    shown = (
        files["schedules.yaml"].replace("schedules: []\n# ", "schedules:\n").replace("\n# ", "\n")
    )
    file.write_text("group: example\n" + shown[shown.index("schedules:") :])
    (entry,) = schedules.read(file).schedules
    assert (entry.name, entry.pipeline) == ("example-nightly", "retrain")


def references(spec: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """Kind, name and key of what the containers of a pod read."""
    found: list[tuple[str, str, str | None]] = []
    for container in spec.get("initContainers", []) + spec["containers"]:
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                found.append(("ConfigMap", source["configMapRef"]["name"], None))
        for variable in container.get("env", ()):
            for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if reference := variable.get("valueFrom", {}).get(field):
                    found.append((kind, reference["name"], reference["key"]))
    for volume in spec.get("volumes", ()):
        if "configMap" in volume:
            found.append(("ConfigMap", volume["configMap"]["name"], None))
        if "secret" in volume:
            keys = [item["key"] for item in volume["secret"].get("items", ())]
            found += [("Secret", volume["secret"]["secretName"], key) for key in keys or [None]]
        if "persistentVolumeClaim" in volume:
            found.append(
                ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None)
            )
    return found


def pod_specs(thing: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the pods that an object makes."""
    spec = thing.get("spec", {})
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return (
        [spec["template"]["spec"]]
        if "containers" in spec.get("template", {}).get("spec", {})
        else []
    )


def test_services_find_what_they_read(
    overlays: Overlays, foreign: set[tuple[str, ...]], made: Made
) -> None:
    seen = 0
    for overlay, things in overlays.items():
        for thing in things:
            namespace = thing["metadata"].get("namespace", "")
            if (thing["kind"], namespace, thing["metadata"]["name"]) in foreign:
                continue
            for spec in pod_specs(thing):
                for kind, name, key in references(spec):
                    seen += 1
                    where = f"{overlay}: {thing['kind']} {thing['metadata']['name']}"
                    if kind == "Secret":
                        found = made(overlay, namespace)
                        assert name in found, where
                        assert key is None or key in found[name], where
                    else:
                        assert name in names(things, kind, namespace), where
    assert seen > 40


def test_policies_and_services_select_pods_that_are_there(overlays: Overlays) -> None:
    labels = [
        {"pipelines.kubeflow.org/v2_component": "true"},  # the steps of runs
        {"app.kubernetes.io/name": "prometheus"},
        {"acme.cert-manager.io/http01-solver": "true"},
    ]
    for thing in overlays["staging"]:
        spec = thing.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            labels.append(spec["template"]["metadata"]["labels"])

    def selects(selector: dict[str, Any]) -> bool:
        def fits(label: dict[str, str]) -> bool:
            return selector.get("matchLabels", {}).items() <= label.items() and all(
                label.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", ())
            )

        return any(map(fits, labels))

    for where, things in overlays.items():
        for thing in things:
            spec = thing.get("spec", {})
            if thing["kind"] == "Service":
                assert selects({"matchLabels": spec["selector"]}), (where, thing["metadata"])
            if thing["kind"] == "NetworkPolicy":
                assert selects(spec["podSelector"]), (where, thing["metadata"])
                peers = [p for rule in spec.get("ingress", ()) for p in rule.get("from", ())]
                peers += [p for rule in spec.get("egress", ()) for p in rule["to"]]
                for peer in peers:
                    assert selects(peer.get("podSelector", {})), (where, thing["metadata"])
