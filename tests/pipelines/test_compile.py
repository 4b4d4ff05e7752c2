"""The compiled package is what was reviewed, and KFP takes it."""

from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_file

from tuneline import form, images
from tuneline.errors import UsageError
from tuneline.finetune.methods import METHODS
from tuneline_pipelines import resources
from tuneline_pipelines.compile import compile_pipelines

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_pipelines(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def packages(compiled: list[Path]) -> list[Path]:
    """Those that train one method."""
    return [path for path in compiled if path.stem.startswith("finetune-")]


@pytest.fixture(scope="module")
def comparison(compiled: list[Path]) -> tuple[dict, dict]:
    """Pipeline and platform spec of `compare`."""
    spec, platform = documents(next(path for path in compiled if path.stem == "compare"))
    return spec, platform


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def test_the_package_is_the_golden_one(compiled: list[Path], pytestconfig: pytest.Config) -> None:
    assert compiled
    for package in compiled:
        golden = GOLDEN / package.name
        if pytestconfig.getoption("--update-golden"):
            golden.write_text(package.read_text())
        assert documents(package) == documents(golden), "run `make golden` and review the diff"


def test_kfp_parses_the_package(packages: list[Path]) -> None:
    assert [load_component_from_file(str(package)).name for package in packages] == [
        f"finetune-{method.name.replace('_', '-')}" for method in METHODS
    ]


def every_task(spec: dict) -> dict[str, dict]:
    """Tasks that run a container, by name, wherever they stand."""
    dags = [spec["root"], *(c for c in spec["components"].values() if "dag" in c)]
    tasks = {name: task for dag in dags for name, task in dag["dag"]["tasks"].items()}
    run = {n for n, c in spec["components"].items() if "executorLabel" in c}
    return {name: task for name, task in tasks.items() if task["componentRef"]["name"] in run}


def test_no_step_is_cached_and_every_step_is_retried_and_ends(compiled: list[Path]) -> None:
    for package in compiled:
        spec, platform = documents(package)
        for name, task in every_task(spec).items():
            assert not task.get("cachingOptions", {}).get("enableCache"), name
            trains = name.startswith("finetune")  # a spot node may be reclaimed many times
            assert task["retryPolicy"]["maxRetryCount"] == (30 if trains else 3), name
            assert task["retryPolicy"]["backoffFactor"] == (1.0 if trains else 2.0), name
            assert task["retryPolicy"]["backoffMaxDuration"] == "604800s", name
        kubernetes = platform["platforms"]["kubernetes"]
        executors = kubernetes["deploymentSpec"]["executors"]
        assert set(executors) == set(spec["deploymentSpec"]["executors"])
        assert all(int(e["activeDeadlineSeconds"]) >= 86400 for e in executors.values())
        config = dict(kubernetes["pipelineConfig"])
        assert config.pop("activeDeadlineSeconds") == 14 * 86400
        # KFP's controller has an hour for success and failure, which go before that for both
        assert len(config) == 3 and set(config.values()) == {30 * 86400}


def test_every_step_runs_as_a_user_and_has_room_kept_for_it(compiled: list[Path]) -> None:
    for package in compiled:
        spec, platform = documents(package)
        for name, placed in platform["platforms"]["kubernetes"]["deploymentSpec"][
            "executors"
        ].items():
            assert placed["securityContext"] == {"runAsUser": "10001", "runAsNonRoot": True}, name
            container = spec["deploymentSpec"]["executors"][name]["container"]
            resources = container["resources"]
            assert resources["resourceCpuRequest"] and resources["resourceMemoryRequest"], name
            if name == "exec-prepare-data":
                assert resources["resourceMemoryRequest"] == "2Gi"
            variables = {v["name"]: v["value"] for v in container["env"]}
            assert variables["TUNELINE_IMAGE"] == images.GPU
            assert variables["TUNELINE_CPU_IMAGE"] == images.CPU
            # what the MLflow plugin sets must not be set twice: Kubernetes refuses the pod
            assert placed["configMapAsEnv"][0]["keyToEnv"][0] == {
                "configMapKey": "mlflow_tracking_uri", "envVar": "TUNELINE_MLFLOW_TRACKING_URI",
            }  # fmt: skip


def test_no_package_holds_a_secret_and_all_secrets_may_be_absent(compiled: list[Path]) -> None:
    for package in compiled:
        _, platform = documents(package)
        for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            secrets = {entry["secretName"]: entry for entry in executor["secretAsEnv"]}
            assert set(secrets) == {"tuneline-mlflow", "tuneline-hub", "tuneline-s3"}
            assert all(entry["optional"] for entry in secrets.values())
        text = package.read_text()
        assert "MLFLOW_TRACKING_PASSWORD" in text and "value: hf_" not in text


def test_no_model_is_registered_before_it_is_evaluated(compiled: list[Path]) -> None:
    for package in compiled:
        if package.stem in ("compare", "promote"):
            continue
        tasks = every_task(documents(package)[0])
        assert "evaluate" in tasks["register"]["dependentTasks"]
        assert "register" in tasks["promote"]["dependentTasks"]
        assert "resolve-pool" in tasks["prepare-data"]["dependentTasks"]


def test_steps_that_train_and_evaluate_run_in_the_chosen_pool(compiled: list[Path]) -> None:
    in_pool = {}
    for package in compiled:
        spec, platform = documents(package)
        executors = spec["deploymentSpec"]["executors"]
        placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        names = {
            n for n, e in executors.items() if "accelerator" in e["container"].get("resources", {})
        }
        in_pool[package.stem] = {name.removeprefix("exec-") for name in names}
        for name in names:
            alone = name in ("exec-evaluate", "exec-measure-base", "exec-finetune-leg")
            count = executors[name]["container"]["resources"]["accelerator"]["resourceCount"]
            assert f"resolve-pool-{'one' if alone else 'count'}'" in count
            labels = placed[name]["podMetadata"]["labels"]
            assert labels == {"kueue.x-k8s.io/queue-name": "tuneline"}
            assert placed[name]["emptyDirMounts"][0]["sizeLimit"] == "16Gi"
        mounted = {
            name.removeprefix("exec-")
            for name, e in placed.items()
            if resources.CHECKPOINTS_PATH in [mount["mountPath"] for mount in e["pvcMount"]]
        }
        assert mounted == {name for name in in_pool[package.stem] if name.startswith("finetune")}
    for method in METHODS:
        name = method.name.replace("_", "-")
        assert in_pool[f"finetune-{name}"] == {f"finetune-{name}", "evaluate"}
    assert in_pool["retrain"] == {"finetune-chosen", "evaluate"}
    assert in_pool["compare"] == {"finetune-leg", "measure-base"}
    assert in_pool["promote"] == set()


def test_the_run_form_is_short_typed_and_has_defaults_and_choices(compiled: list[Path]) -> None:
    for package in compiled:
        inputs = documents(package)[0]["root"]["inputDefinitions"]["parameters"]
        assert len(inputs) <= form.MOST_PARAMETERS, package.stem
        assert all("defaultValue" in value for value in inputs.values()), package.stem
        for value in inputs.values():
            if "literals" in value:
                assert (
                    value["parameterType"] == "STRING"
                    and value["defaultValue"] in value["literals"]
                )
        choices = {name: value["literals"] for name, value in inputs.items() if "literals" in value}
        if package.stem != "promote":
            assert choices["gpu_pool"] == ["gpu", "cpu"]
            assert choices["precision"] == ["auto", "bf16", "fp32"]
            assert "overrides" in inputs
        if package.stem == "retrain":
            assert choices["method"] == [method.name for method in METHODS]


def test_the_run_form_shows_the_methods_own_hyperparameters(packages: list[Path]) -> None:
    types = {"rank": "NUMBER_INTEGER", "alpha": "NUMBER_DOUBLE", "target_modules": "LIST"}
    for method, package in zip(METHODS, packages, strict=True):
        spec = documents(package)[0]
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        defaults = method.config_class().model_dump(mode="json")
        component = spec["components"][f"comp-finetune-{method.name.replace('_', '-')}"]
        for name in [found.name for found in form.shown_of(method)]:
            assert inputs[name]["defaultValue"] == defaults[name], name
            assert inputs[name]["parameterType"] == types.get(name, inputs[name]["parameterType"])
        assert inputs["learning_rate"]["defaultValue"] == method.learning_rate
        for name in defaults.keys() - {"name"}:
            assert name in component["inputDefinitions"]["parameters"]
            assert name in inputs or name in spec["pipelineInfo"]["description"]


def test_a_release_refuses_images_without_a_digest(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no package is written:\n- finetune-full: exec-.*no digest"
    ):
        compile_pipelines(tmp_path, release=True)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_in_an_object_store_need_no_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", "s3://bucket/checkpoints/")
    place = {"name": "TUNELINE_CHECKPOINTS", "value": "s3://bucket/checkpoints"}
    for package in compile_pipelines(tmp_path):
        spec, platform = documents(package)
        for name, executor in spec["deploymentSpec"]["executors"].items():
            trains = name.startswith("exec-finetune")
            assert (place in executor["container"]["env"]) == trains
        for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            assert [mount["mountPath"] for mount in executor["pvcMount"]] == [resources.CACHE_PATH]


def test_legs_run_side_by_side_and_are_collected(comparison: tuple[dict, dict]) -> None:
    spec, _ = comparison
    tasks = spec["root"]["dag"]["tasks"]
    assert set(tasks) == {"check-compare", "resolve-pool", "prepare-data", "measure-base",
                          "for-loop-1", "leaderboard"}  # fmt: skip
    loop = tasks["for-loop-1"]
    assert "iteratorPolicy" not in loop  # all at once
    assert loop["parameterIterator"]["items"]["inputParameter"].endswith("check-compare-Output")
