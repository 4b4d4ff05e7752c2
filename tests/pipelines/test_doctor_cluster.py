"""`tuneline doctor --cluster` against a server that speaks Kubernetes' API: each fault of a cluster
is told with its object and with what to do."""

import base64
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneline.pools import read as read_pools
from tuneline_pipelines import packages
from tuneline_pipelines.cli import main
from tuneline_pipelines.doctor import needs, on_cluster

ROOT = Path(__file__).parents[2]
PASSWORD = "a-very-secret-password"
Look = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A compiled package, as the golden files hold it."""
    made = tmp_path / "packages"
    made.mkdir()
    shutil.copyfile(ROOT / "tests/golden/finetune-lora.yaml", made / "finetune-lora.yaml")
    return made


def node(cluster: Any, name: str, *, ready: str = "True", **parts: Any) -> None:
    """A node with an L4, as GPU feature discovery and the device plugin show it."""
    allocatable = {"cpu": "7910m", "memory": "30530000Ki", "nvidia.com/gpu": "1"}
    cluster.put(
        "nodes", name,
        metadata={"labels": parts.get("labels", {"nvidia.com/gpu.present": "true"})},
        spec=parts.get("spec", {}),
        status={
            "conditions": [{"type": "Ready", "status": ready}],
            "allocatable": parts.get("allocatable", allocatable),
        },
    )  # fmt: skip


@pytest.fixture
def cluster(
    load_fixture: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A cluster that has all that a run needs; KUBECONFIG names it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("KUBERNETES_SERVICE_HOST", "KFP_NAMESPACE", "KFP_HOST"):
        monkeypatch.delenv(name, raising=False)
    api = load_fixture("kubernetes_api").KubernetesApi()
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    api.put("namespaces", "tuneline", status={"phase": "Active"})
    uri = "http://mlflow.tracking.svc:5000"
    api.put("configmaps", "tuneline", data={"mlflow_tracking_uri": uri})
    pools = (ROOT / "components/tuneline/pools.yaml").read_text()
    api.put("configmaps", "tuneline-pools", data={"pools.yaml": pools})
    api.put("secrets", "tuneline-mlflow", data=encoded(username="ada", password=PASSWORD))
    for claim in ("tuneline-model-cache", "tuneline-checkpoints"):
        put_claim(api, claim)
    api.put("serviceaccounts", "pipeline-runner")
    node(api, "gpu-1")
    api.put("services", "mlflow", "tracking", spec={"ports": [{"port": 5000}]})
    put_endpoint(api, ready=True)
    api.proxied["tracking/mlflow:5000/health"] = 200, "OK"
    api.proxied["tracking/mlflow:5000/api/2.0/mlflow/registered-models/search"] = 401, "login"
    put_kfp(api, "ghcr.io/kubeflow/kfp-api-server:2.17.0")
    put_queue(api)
    yield api
    api.close()


def encoded(**values: str) -> dict[str, str]:
    return {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}


def put_claim(
    api: Any, name: str, phase: str = "Bound", mode: str = "ReadWriteMany", **metadata: Any
) -> None:
    api.put(
        "persistentvolumeclaims", name, metadata=metadata,
        spec={"accessModes": [mode], "storageClassName": "nfs",
              "resources": {"requests": {"storage": "50Gi"}}},
        status={"phase": phase},
    )  # fmt: skip


def put_endpoint(api: Any, *, ready: bool) -> None:
    api.put(
        "endpointslices", "mlflow-x7k2p", "tracking",
        metadata={"labels": {"kubernetes.io/service-name": "mlflow"}}, addressType="IPv4",
        endpoints=[{"addresses": ["10.0.0.1"], "conditions": {"ready": ready}}],
    )  # fmt: skip


def put_kfp(api: Any, image: str) -> None:
    api.put(
        "deployments", "ml-pipeline", "kubeflow",
        spec={"selector": {}, "template": {
            "spec": {"containers": [{"name": "ml-pipeline-api-server", "image": image}]}}},
    )  # fmt: skip


def put_queue(api: Any, active: str = "True", covers: str = "nvidia.com/gpu") -> None:
    group = "/apis/kueue.x-k8s.io"
    api.put_custom(group, kind="APIGroup", preferredVersion={"version": "v1beta2"})
    api.put_custom(
        f"{group}/v1beta2/namespaces/tuneline/localqueues/tuneline",
        spec={"clusterQueue": "gpus"}, status={"pendingWorkloads": 3},
    )  # fmt: skip
    api.put_custom(
        f"{group}/v1beta2/clusterqueues/gpus",
        spec={"resourceGroups": [{"coveredResources": ["cpu", "memory", covers]}]},
        status={"conditions": [
            {"type": "Active", "status": active, "message": "flavor l4 is not found"}]},
    )  # fmt: skip


@pytest.fixture
def look(cluster: Any, folder: Path) -> Look:
    """Runs the checks; name of what was looked at -> its finding as text."""

    def run(**place: Any) -> dict[str, Any]:
        place = {"packages": folder, **place}
        found = {}
        for finding in on_cluster.checks(on_cluster.Place(**place)):
            assert PASSWORD not in str(finding) and cluster.token not in str(finding)
            found[finding.name] = " ".join(str(finding).split())
        return found

    return run


def test_what_is_looked_for_is_what_the_packages_refer_to(folder: Path) -> None:
    from tuneline_pipelines import resources

    found = needs.of(packages.read_folder(folder))
    assert list(found.claims.items()) == [
        (resources.MODEL_CACHE, resources.CACHE_PATH),
        (resources.CHECKPOINTS, resources.CHECKPOINTS_PATH),
    ]
    assert found.pools_files == {resources.POOLS: "pools.yaml"}
    assert found.labels == {resources.QUEUE_LABEL: resources.QUEUE}
    assert found.config_maps["tuneline"]["mlflow_tracking_uri"] == "TUNELINE_MLFLOW_TRACKING_URI"
    assert found.secrets["tuneline-mlflow"]["password"] == "MLFLOW_TRACKING_PASSWORD"
    assert found.pools == ["gpu", "cpu"]


def test_a_sound_cluster_has_no_error(look: Look, endpoint: Any, cluster: Any) -> None:
    found = look(host=endpoint.host)
    assert [text for text in found.values() if text.startswith("error")] == []
    assert found["KFP"] == f"ok KFP {endpoint.host}, one user"
    assert found["KFP version"] == "ok KFP version 2.17.0, in namespace kubeflow"
    assert found["Kubernetes"] == f"ok Kubernetes {cluster.host}, v1.33.2"
    assert found["MLflow of the pods"].endswith(
        "http://mlflow.tracking.svc:5000 answers, with a login"
    )
    assert found["secret tuneline-mlflow"].endswith("has username, password")
    assert found["secret tuneline-hub"].startswith("ok") and found["secret tuneline-s3"].startswith(
        "ok"
    )
    assert found["volume claim tuneline-checkpoints"].endswith("Bound, 50Gi, ReadWriteMany")
    assert found["pool gpu"].endswith("1 of 1 matching nodes could take a step")
    assert found["queue tuneline"].endswith("active, 3 waiting, ClusterQueue gpus")
    assert found["image"].startswith("warning image tuneline-")
    assert found["service account pipeline-runner"].startswith("ok")


def test_the_command_reads_what_is_published_and_ends_with_the_errors(
    cluster: Any, endpoint: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneline_pipelines import client

    list(client.publish(endpoint.connect(), packages.read_folder(folder)))
    arguments = ["doctor", "--cluster", "--host", endpoint.host, "--workdir", str(tmp_path)]
    assert main([*arguments, "--pool", "gpu"]) == 0
    told = capsys.readouterr()
    assert "warning  packages" in told.out and "not published: compare, finetune-bitfit" in told.out
    assert (
        told.out.count("finetune-lora)") == 2 and told.err == ""
    )  # the images, of the published one
    cluster.remove("secrets", "tuneline-mlflow")
    assert main([*arguments, "--pool", "gqu", "--json"]) == 1
    told = capsys.readouterr()
    errors = {c["name"] for c in json.loads(told.out)["checks"] if c["level"] == "error"}
    assert errors == {"secret tuneline-mlflow", "pools"}
    assert told.err.startswith("error: 2 of ")
    assert "Did you mean 'gpu'?" in told.out


def test_without_published_packages_what_would_be_compiled_is_looked_at(
    look: Look, endpoint: Any
) -> None:
    found = look(host=endpoint.host, packages=None)
    assert found["packages"].startswith("ok packages what is compiled here")
    assert found["secret tuneline-mlflow"].startswith("ok")
    assert found["volume claim tuneline-checkpoints"].startswith("ok")


def test_a_missing_secret_is_an_error_where_mlflow_wants_a_login(look: Look, cluster: Any) -> None:
    cluster.remove("secrets", "tuneline-mlflow")
    text = look()["secret tuneline-mlflow"]
    assert text.startswith("error") and "http://mlflow.tracking.svc:5000 wants a login" in text
    assert "kubectl -n tuneline create secret generic tuneline-mlflow --from-file=username" in text
    cluster.proxied.clear()
    assert "wants a login can't be told" in look()["secret tuneline-mlflow"]
    cluster.proxied["tracking/mlflow:5000/health"] = 200, "OK"
    cluster.proxied["tracking/mlflow:5000/api/2.0/mlflow/registered-models/search"] = 200, "{}"
    text = look()["secret tuneline-mlflow"]
    assert text.startswith("ok") and text.endswith("wants no login")


def test_a_missing_or_damaged_key_of_a_secret_is_an_error(look: Look, cluster: Any) -> None:
    cluster.put("secrets", "tuneline-mlflow", data=encoded(user="ada", password=PASSWORD + "\n"))
    found = look()
    text = found["secret tuneline-mlflow, key username"]
    assert text.startswith("error") and "the pods get no MLFLOW_TRACKING_USERNAME" in text
    assert "the secret has password, user. Did you mean 'user'?" in text
    assert "ends with white space" in found["secret tuneline-mlflow, key password"]
    cluster.put("secrets", "tuneline-mlflow", data=encoded(username="ada", password=""))
    assert (
        "empty, so that MLFLOW_TRACKING_PASSWORD is"
        in (look()["secret tuneline-mlflow, key password"])
    )


def test_an_object_store_without_its_secret_is_an_error(look: Look, cluster: Any) -> None:
    reference = "s3://models/base"
    assert look(references=(reference,))["secret tuneline-s3"].startswith("warning")
    uri = "http://mlflow.tracking.svc:5000"
    values = {"mlflow_tracking_uri": uri, "s3_endpoint_url": "http://seaweedfs:8333"}
    cluster.put("configmaps", "tuneline", data=values)
    assert look()["secret tuneline-s3"].startswith("error")


@pytest.mark.parametrize(
    ("data", "name", "level", "what"),
    [
        (None, "config map tuneline", "error", "create configmap tuneline --from-literal=mlflow"),
        ({"mlflow_uri": "x"}, "config map tuneline, key mlflow_uri", "warning",
         "Did you mean 'mlflow_tracking_uri'?"),
        ({}, "config map tuneline, key mlflow_tracking_uri", "error", "the pods know no MLflow"),
        ({"mlflow_tracking_uri": "sqlite:///m.db"}, "config map tuneline, key mlflow_tracking_uri",
         "error", "each pod would have one of its own"),
        ({"mlflow_tracking_uri": f"https://ada:{PASSWORD}@mlflow.example.org"},
         "config map tuneline, key mlflow_tracking_uri", "error", "with a login in it"),
        ({"mlflow_tracking_uri": "http://mlflow.tracking.svc\n"},
         "config map tuneline, key mlflow_tracking_uri", "error", "white space"),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_config_map_is_told(
    look: Look, cluster: Any, data: Any, name: str, level: str, what: str
) -> None:
    cluster.remove("configmaps", "tuneline")
    if data is not None:
        cluster.put("configmaps", "tuneline", data=data)
    text = look()[name]
    assert text.startswith(level) and what in text


def test_an_mlflow_without_a_ready_pod_or_on_another_port_is_an_error(
    look: Look, cluster: Any
) -> None:
    name = "MLflow of the pods"
    put_endpoint(cluster, ready=False)
    assert "no pod of the service mlflow is ready: kubectl -n tracking get pods" in look()[name]
    put_endpoint(cluster, ready=True)
    cluster.proxied["tracking/mlflow:5000/health"] = 502, "bad gateway"
    assert "answers 502 (bad gateway)" in look()[name]
    cluster.denied.append("/proxy/")
    text = look()[name]
    assert text.startswith("warning") and "1 pods ready; not asked" in text
    cluster.put("services", "mlflow", "tracking", spec={"ports": [{"port": 80}]})
    assert "the service listens on 80: correct the port" in look()[name]
    cluster.remove("services", "mlflow", "tracking")
    assert "there is no service mlflow in namespace tracking" in look()[name]


def test_an_mlflow_outside_of_the_cluster_is_asked_from_here(look: Look, cluster: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    cluster.put("configmaps", "tuneline", data={"mlflow_tracking_uri": uri})
    text = look()["MLflow of the pods"]
    assert text.startswith("warning") and "(Connection refused) from here" in text
    # the cluster's own server stands in for one that wants a login
    cluster.remove("secrets", "tuneline-mlflow")
    cluster.put("configmaps", "tuneline", data={"mlflow_tracking_uri": cluster.host})
    found = look()
    assert "behind something that wants a login first (401)" in found["MLflow of the pods"]
    assert f"not there, and {cluster.host} wants a login" in found["secret tuneline-mlflow"]


def test_a_volume_claim_that_no_pod_could_mount_is_an_error(look: Look, cluster: Any) -> None:
    name = "volume claim tuneline-checkpoints"
    put_claim(cluster, "tuneline-checkpoints", "Pending")
    text = look()[name]
    assert text.startswith("error") and "no volume of class nfs for it" in text
    assert "kubectl -n tuneline describe pvc tuneline-checkpoints says why" in text
    cluster.put(
        "storageclasses", "nfs", provisioner="nfs", volumeBindingMode="WaitForFirstConsumer"
    )
    assert "bound with the first pod that uses it" in look()[name]
    put_claim(cluster, "tuneline-checkpoints", "Lost")
    assert look()[name].startswith("error")
    put_claim(cluster, "tuneline-checkpoints", deletionTimestamp="2026-01-01T00:00:00+00:00")
    assert "is being deleted" in look()[name]
    cluster.remove("persistentvolumeclaims", "tuneline-checkpoints")
    assert "the pods mount it at /var/lib/tuneline/checkpoints" in look()[name]


def test_a_claim_for_one_node_is_a_warning_where_there_are_more(look: Look, cluster: Any) -> None:
    name = "volume claim tuneline-model-cache"
    put_claim(cluster, "tuneline-model-cache", mode="ReadWriteOnce")
    assert look()[name].startswith("ok")
    node(cluster, "gpu-2")
    text = look()[name]
    assert text.startswith("warning") and "there are 2 nodes" in text


@pytest.mark.parametrize(
    ("parts", "level", "what"),
    [
        ({"labels": {"nvidia.com/gpu.present": "false"}}, "warning",
         "no node of 1 matches; their nvidia.com/gpu.present is false"),
        ({"labels": {}}, "warning", "none has the label nvidia.com/gpu.present"),
        ({"spec": {"taints": [{"key": "team", "value": "b", "effect": "NoSchedule"}]}}, "error",
         "have the taint team=b:NoSchedule: add a toleration of it to the pool"),
        ({"spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]}}, "ok", "1 of 1"),
        ({"ready": "False"}, "warning", "not ready or cordoned"),
        ({"spec": {"unschedulable": True}}, "warning", "not ready or cordoned"),
        ({"allocatable": {"cpu": "8", "memory": "32Gi"}}, "error",
         "has 1 nvidia.com/gpu (has 0) to give"),
        ({"allocatable": {"cpu": "3920m", "memory": "32Gi", "nvidia.com/gpu": "1"}}, "error",
         "has 4 cpu (has 3920m) to give"),
        ({"allocatable": {"cpu": "8", "memory": "15000Mi", "nvidia.com/gpu": "1"}}, "error",
         "has 16Gi memory (has 15000Mi) to give"),
    ],
)  # fmt: skip
def test_a_pool_that_no_node_can_serve_is_told_with_why(
    look: Look, cluster: Any, parts: dict[str, Any], level: str, what: str
) -> None:
    node(cluster, "gpu-1", **parts)
    text = look(pool="gpu")["pool gpu"]
    assert text.startswith(level) and what in text


@pytest.mark.parametrize("operator", ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"])
def test_a_pool_by_affinity_matches_as_kubernetes_does(
    look: Look, cluster: Any, operator: str
) -> None:
    key = "example.org/size"
    values = {"Exists": [], "DoesNotExist": []}.get(operator, ["4"])
    fits = {"In": "4", "NotIn": "3", "Exists": "x", "DoesNotExist": None, "Gt": "5", "Lt": "3"}
    fails = {"In": "3", "NotIn": "4", "Exists": None, "DoesNotExist": "x", "Gt": "4", "Lt": "4"}
    pools = {"pools": {"p": {"cpu": "1", "node_affinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "no/such", "operator": "Exists"}]},
            {"matchExpressions": [{"key": key, "operator": operator, "values": values}]},
        ]}}}}}  # fmt: skip
    cluster.put("configmaps", "tuneline-pools", data={"pools.yaml": json.dumps(pools)})
    for values_of, level in ((fits, "ok"), (fails, "warning")):
        label = values_of[operator]
        node(cluster, "gpu-1", labels={key: label} if label else {})
        assert look(pool="p")["pool p"].startswith(level)


def test_pools_that_the_forms_offer_and_the_cluster_has_not_are_errors(
    look: Look, cluster: Any
) -> None:
    text = json.dumps({"pools": {"gpu-l4": {"cpu": "1"}}})
    cluster.put("configmaps", "tuneline-pools", data={"pools.yaml": text})
    found = look()
    assert found["pool gpu"].startswith("error pool gpu offered by the run forms")
    assert "Did you mean 'gpu-l4'?" in found["pool gpu"]
    assert look(pool="a100")["pools"].startswith("error pools gpu_pool 'a100' is unknown")
    cluster.put("configmaps", "tuneline-pools", data={"pools.yaml": "pools: {a: {count: 1}}"})
    assert "accelerator and count belong together" in look()["pools"]
    cluster.put("configmaps", "tuneline-pools", data={"pools.yml": text})
    assert "has no pools.yaml but pools.yml" in look()["config map tuneline-pools"]
    cluster.remove("configmaps", "tuneline-pools")
    assert look()["config map tuneline-pools"].startswith("error")
    assert read_pools().names == ["gpu", "cpu"]  # what the package was compiled with


def test_a_service_account_that_is_not_there_is_an_error(look: Look, cluster: Any) -> None:
    assert look(service_account="me")["service account me"].startswith("error")
    cluster.put(
        "serviceaccounts", "tuneline",
        metadata={"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/t"}},
    )  # fmt: skip
    assert look()["service account tuneline"].endswith("role arn:aws:iam::1:role/t")
    cluster.remove("serviceaccounts", "tuneline")
    cluster.remove("serviceaccounts", "pipeline-runner")
    name = "service account tuneline or pipeline-runner or default-editor"
    assert look()[name].startswith("error")


def test_a_queue_that_would_never_admit_a_pod_is_an_error(look: Look, cluster: Any) -> None:
    put_queue(cluster, active="False")
    assert "ClusterQueue gpus is not active (flavor l4 is not found)" in look()["queue tuneline"]
    put_queue(cluster, covers="amd.com/gpu")
    text = look()["queue tuneline"]
    assert (
        text.startswith("error")
        and "covers amd.com/gpu, cpu, memory and not nvidia.com/gpu" in text
    )
    for path in [path for path in cluster.objects if "localqueues" in path]:
        del cluster.objects[path]
    assert "pods with the label wait for ever" in look()["queue tuneline"]
    for path in [path for path in cluster.objects if "kueue" in path]:
        del cluster.objects[path]
    assert "Kueue is not installed" in look()["queue tuneline"]


def test_what_a_login_may_not_look_at_is_a_warning_that_names_the_verb(
    look: Look, cluster: Any
) -> None:
    cluster.denied += ["/secrets/", "/nodes", "/deployments", "/localqueues/"]
    found = look()
    text = found["secrets"]
    assert text.startswith("warning secrets not looked at: this login may not get secrets in names")
    assert text.endswith("(kubectl auth can-i get secrets -n tuneline)")
    assert "may not list nodes" in found["pools"] and found["pools"].startswith("warning")
    assert "may not get deployments.apps" in found["KFP version"]
    text = found["queue"]
    assert "may not get localqueues.kueue.x-k8s.io in namespace tuneline:" in text
    assert found["MLflow of the pods"].startswith("ok")  # the rest is looked at all the same


def test_a_config_map_is_looked_at_by_a_login_that_may_read_no_secret(
    look: Look, cluster: Any
) -> None:
    cluster.denied.append("/secrets/")
    cluster.put("configmaps", "tuneline", data={"mlflow_tracking_uri": "sqlite:///m.db"})
    text = look()["config map tuneline, key mlflow_tracking_uri"]
    assert text.startswith("error") and "each pod would have one of its own" in text
    cluster.denied.append("/deployments/")  # so that the plugin is unknown
    cluster.put("configmaps", "tuneline", data={})
    found = look()
    text = found["config map tuneline, key mlflow_tracking_uri"]
    assert text.startswith("error") and "plugin sets it, which can't be told" in text
    assert "may not get deployments.apps" in found["KFP's MLflow plugin"]


def test_claims_are_looked_at_by_a_login_that_may_list_no_nodes(look: Look, cluster: Any) -> None:
    cluster.denied += ["/nodes", "/storageclasses"]
    put_claim(cluster, "tuneline-model-cache", mode="ReadWriteOnce")
    put_claim(cluster, "tuneline-checkpoints", "Lost")
    found = look()
    text = found["volume claim tuneline-model-cache"]
    assert text.startswith("warning") and "may not list nodes" in text
    assert found["volume claim tuneline-checkpoints"].startswith("error")
    put_claim(cluster, "tuneline-checkpoints", "Pending")
    text = look()["volume claim tuneline-checkpoints"]
    assert text.startswith("warning") and "may not get storageclasses.storage.k8s.io" in text
    put_claim(cluster, "tuneline-model-cache", mode="ReadOnlyMany")
    assert "can't be written" in look()["volume claim tuneline-model-cache"]


def put_plugin(cluster: Any, mount: str = "/config/config.json", **settings: Any) -> None:
    """KFP's API server with settings of its own, as manifests/components/kfp has them."""
    given = {
        "authType": "basic-auth",
        "credentialSecretRef": {"usernameKey": "username", "passwordKey": "password"},
        "injectUserEnvVars": True,
        **settings,
    }
    mlflow = {"endpoint": "http://mlflow.tracking.svc:5000", "settings": given}
    text = json.dumps({"plugins": {"mlflow": mlflow}})
    cluster.put("configmaps", "kfp-config", "kubeflow", data={"config.json": text})
    mounted = {"name": "config", "mountPath": mount}
    if mount.endswith(".json"):
        mounted["subPath"] = "config.json"
    container = {
        "name": "ml-pipeline-api-server", "image": "ghcr.io/kubeflow/kfp-api-server:2.17.0",
        "volumeMounts": [{"name": "other", "mountPath": "/etc/other"}, mounted],
    }  # fmt: skip
    volumes = [
        {"name": "other", "emptyDir": {}},
        {"name": "config", "configMap": {"name": "kfp-config"}},
    ]
    cluster.put(
        "deployments", "ml-pipeline", "kubeflow",
        spec={"selector": {},
              "template": {"spec": {"containers": [container], "volumes": volumes}}},
    )  # fmt: skip


@pytest.mark.parametrize("mount", ["/config/config.json", "/config"])
def test_a_login_of_kfp_s_plugin_counts_where_it_is_handed_to_the_steps(
    look: Look, cluster: Any, mount: str
) -> None:
    cluster.remove("secrets", "tuneline-mlflow")
    cluster.put("configmaps", "tuneline", data={})
    put_plugin(cluster, mount)
    cluster.put("secrets", "kfp-mlflow-credentials", data=encoded(username="ada", password="x"))
    found = look()
    assert found["KFP's MLflow plugin"].startswith("ok")
    assert found["secret kfp-mlflow-credentials"].endswith("has username, password")
    assert found["secret tuneline-mlflow"].startswith("ok")
    assert found["config map tuneline, key mlflow_tracking_uri"].startswith("warning")
    cluster.put("secrets", "kfp-mlflow-credentials", data=encoded(username="ada", pass_word="x"))
    text = look()["secret kfp-mlflow-credentials, key password"]
    assert text.startswith("error") and "Did you mean 'pass_word'?" in text
    cluster.remove("secrets", "kfp-mlflow-credentials")
    text = look()["secret kfp-mlflow-credentials"]
    assert text.startswith("error") and "no pod would start" in text


@pytest.mark.parametrize("settings", [None, {"injectUserEnvVars": False}, {"authType": "none"}])
def test_a_secret_of_the_plugin_s_name_alone_is_no_login(
    look: Look, cluster: Any, settings: dict[str, Any] | None
) -> None:
    cluster.remove("secrets", "tuneline-mlflow")
    cluster.put("secrets", "kfp-mlflow-credentials", data=encoded(username="ada", password="x"))
    if settings is not None:
        put_plugin(cluster, **settings)
    text = look()["secret tuneline-mlflow"]
    assert text.startswith("error") and "wants a login" in text


def test_a_kueue_that_leaves_pods_alone_is_told(look: Look, cluster: Any) -> None:
    def configure(text: str) -> None:
        data = {"controller_manager_config.yaml": text}
        cluster.put("configmaps", "kueue-manager-config", "kueue-system", data=data)

    configure("integrations: {frameworks: [batch/job, ray.io/rayjob]}")
    text = look()["queue tuneline"]
    assert text.startswith("warning") and "leaves plain pods alone" in text
    assert "kueue-system/kueue-manager-config" in text
    configure("integrations: {frameworks: [batch/job, pod]}")
    assert look()["queue tuneline"].startswith("ok")
    cluster.denied.append("/kueue-manager-config")
    assert look()["queue tuneline"].startswith("ok")


def test_a_login_that_is_not_accepted_ends_the_looking(
    look: Look, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = cluster.kubeconfig(tmp_path / "other", token="an-expired-token")
    monkeypatch.setenv("KUBECONFIG", str(wrong))
    found = look()
    assert "does not know who asks (401): log in again" in found["Kubernetes"]
    assert found["Kubernetes"].startswith("error") and "namespace tuneline" not in found
    assert "an-expired-token" not in str(found)


def test_a_cluster_that_is_away_or_unnamed_is_an_error(
    look: Look, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.broken["/configmaps/"] = 500
    assert "answers 500 (etcd is away)" in look()["Kubernetes"]
    assert (
        "context 'there' is unknown; the kubeconfig has here" in look(context="there")["Kubernetes"]
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, cluster.host = cluster.host, f"http://127.0.0.1:{probe.getsockname()[1]}"
    cluster.kubeconfig(tmp_path / "kubeconfig")
    assert "can't be reached (Connection refused)" in look()["Kubernetes"].replace(
        "[Errno 111] ", ""
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    assert "no Kubernetes cluster is configured" in look()["Kubernetes"]
    cluster.host = host


def test_a_wrong_namespace_is_told_once(look: Look) -> None:
    found = look(namespace="tunelin")
    assert (
        found["namespace tunelin"].startswith("error")
        and "--namespace" in (found["namespace tunelin"])
    )
    assert not any(name.startswith("secret") for name in found)


def test_a_kfp_that_is_away_of_another_version_or_unnamed_is_told(look: Look, cluster: Any) -> None:
    assert "no KFP endpoint" in look()["KFP"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{probe.getsockname()[1]}"
    text = look(host=host)["KFP"]
    assert text.startswith("error") and "Connection refused" in text
    put_kfp(cluster, "ghcr.io/kubeflow/kfp-api-server:2.5.0")
    text = look()["KFP version"]
    assert text.startswith("warning") and "2.5.0, and packages are compiled with 2.17.0" in text


def test_images_that_move_are_told(look: Look, folder: Path) -> None:
    file = folder / "finetune-lora.yaml"
    golden = file.read_text()
    for image, level in (
        (f"registry.example.org:5000/tuneline@sha256:{'a' * 64}", "ok"),
        ("registry.example.org:5000/tuneline:1.0", "warning"),
        ("registry.example.org:5000/tuneline", "error"),
        ("tuneline:latest", "error"),
    ):
        file.write_text(re.sub(r"image: tuneline-\w+:.*", f"image: {image}", golden))
        assert look()["image"].startswith(f"{level} image {image}")
