"""Every kustomization builds, and what comes from elsewhere is pinned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline_pipelines.containers import USER

ROOT = Path(__file__).parents[2]
NAMED_ELSEWHERE = {"kubeflow"}  # KFP's own namespace: made with the objects of the whole cluster


def test_every_overlay_builds(overlays: dict[str, list[dict[str, Any]]]) -> None:
    assert sorted(overlays) == ["local", "production", "staging"]
    assert all(len(things) > 40 for things in overlays.values())


def test_every_component_builds(components: dict[str, list[dict[str, Any]]]) -> None:
    assert all(components.values())
    expected = "base champions kfp kueue mlflow object-store postgres prometheus schedules trainer"
    assert set(expected.split()) <= components.keys()


def test_what_is_remote_is_kfp_at_the_release_of_the_sdk() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    release = re.search(r"^kfp==(\S+)$", constraints, re.MULTILINE)
    assert release is not None
    for file in sorted((ROOT / "manifests").rglob("kustomization.yaml")):
        for resource in yaml.safe_load(file.read_text()).get("resources", ()):
            if "://" in resource or resource.startswith("github.com"):
                assert resource == (
                    "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic"
                    f"?ref={release[1]}"
                ), file
    script = (ROOT / "manifests/kind/up.sh").read_text()
    assert f"\nkfp={release[1]}\n" in script


@pytest.mark.parametrize("readme", sorted((ROOT / "manifests").rglob("README.md")), ids=str)
def test_readmes_name_the_same_release_of_kfp(readme: Path) -> None:
    refs = re.findall(r"kubeflow/pipelines\S*\?ref=([0-9.]+)", readme.read_text())
    assert set(refs) <= {"2.17.0"}


def test_every_object_is_in_a_namespace_that_is_made(
    overlays: dict[str, list[dict[str, Any]]], foreign: set[tuple[str, ...]]
) -> None:
    for name, things in overlays.items():
        made = {t["metadata"]["name"] for t in things if t["kind"] == "Namespace"}
        used = {t["metadata"]["namespace"] for t in things if "namespace" in t["metadata"]}
        assert used <= made | NAMED_ELSEWHERE, name


def test_patches_of_kfp_are_in_what_is_built(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name, things in overlays.items():
        by_name = {(t["kind"], t["metadata"]["name"]): t for t in things}
        settings = by_name["ConfigMap", "workflow-controller-configmap"]["data"]
        defaults = yaml.safe_load(settings["workflowDefaults"])["spec"]["templateDefaults"]
        retry = defaults["retryStrategy"]
        assert retry["retryPolicy"] == "Always", name
        assert "executor" in settings, name  # what is not patched stays
        # without it, graphs of steps would be run again too
        assert retry["expression"] == 'lastRetry.message != ""', name
        # a new volume belongs to root, and steps don't run as root
        assert defaults["securityContext"] == {
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
        }, name
        server = by_name["Deployment", "ml-pipeline"]["spec"]["template"]["spec"]
        mounts = server["containers"][0]["volumeMounts"]
        assert {"/config/config.json", "/etc/mlflow-tracking-ca"} == {
            m["mountPath"] for m in mounts
        }
        assert ("Secret", "mlpipeline-minio-artifact") not in by_name, name


def test_production_keeps_no_state_in_the_cluster(
    overlays: dict[str, list[dict[str, Any]]],
) -> None:
    things = overlays["production"]
    assert not [t for t in things if t["kind"] == "StatefulSet"]
    claims = {t["metadata"]["name"] for t in things if t["kind"] == "PersistentVolumeClaim"}
    assert claims == {"tuneline-model-cache", "tuneline-checkpoints"}  # both can be made again
    assert not [t for t in things if t["metadata"]["name"] in ("mysql", "seaweedfs")]


def test_mlflow_starts_no_job_processes_which_outgrow_its_memory(
    overlays: dict[str, list[dict[str, Any]]],
) -> None:
    """MLflow 3.17 has them on by default: 13 processes and 2.0 GiB at rest, 5 and 0.6 without."""
    for name, things in overlays.items():
        by_name = {(t["kind"], t["metadata"]["name"]): t for t in things}
        server = by_name["Deployment", "tuneline-mlflow"]["spec"]["template"]["spec"]
        (container,) = server["containers"]
        settings: dict[str, str] = {}
        for source in container["envFrom"]:
            settings |= by_name["ConfigMap", source["configMapRef"]["name"]]["data"]
        assert settings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false", name


def test_production_talks_to_databases_with_tls(
    overlays: dict[str, list[dict[str, Any]]],
) -> None:
    """As far as KFP can without a file of the authority's: its README names what is left."""
    things = {(t["kind"], t["metadata"]["name"]): t for t in overlays["production"]}

    def container(name: str) -> dict[str, Any]:
        return things["Deployment", name]["spec"]["template"]["spec"]["containers"][0]

    variables = {v["name"]: v.get("value") for v in container("ml-pipeline")["env"]}
    assert json.loads(variables["DBCONFIG_MYSQLCONFIG_EXTRAPARAMS"]) == {"tls": "true"}
    arguments = container("cache-server")["args"]
    assert len(arguments) == 9  # KFP's own stay
    assert json.loads(arguments[-1].removeprefix("--db_extra_params=")) == {"tls": "true"}
    (server,) = (t for (_, name), t in things.items() if name.startswith("tuneline-mlflow-server"))
    assert server["data"]["PGSSLMODE"] == "verify-full"
    for name in ("local", "staging"):
        assert "tls" not in json.dumps([t for t in overlays[name] if t["kind"] == "Deployment"])


def test_production_has_two_mlflow_servers_apart(
    overlays: dict[str, list[dict[str, Any]]],
) -> None:
    things = {(t["kind"], t["metadata"]["name"]): t for t in overlays["production"]}
    server = things["Deployment", "tuneline-mlflow"]["spec"]
    assert server["replicas"] == 2
    labels = server["template"]["metadata"]["labels"].items()
    budget = things["PodDisruptionBudget", "tuneline-mlflow"]["spec"]
    assert budget["minAvailable"] < server["replicas"]
    for selector in (
        budget["selector"],
        *(c["labelSelector"] for c in server["template"]["spec"]["topologySpreadConstraints"]),
    ):
        assert selector["matchLabels"].items() <= labels
