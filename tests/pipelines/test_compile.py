"""The compiled package is what was reviewed, and KFP takes it."""

from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_file

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


def test_no_step_is_cached_and_every_step_is_retried(
    packages: list[Path],
) -> None:
    for package in packages:
        spec, platform = documents(package)
        tasks = spec["root"]["dag"]["tasks"]
        assert len(tasks) == 7
        for name, task in tasks.items():
            assert not task.get("cachingOptions", {}).get("enableCache"), name
            assert task["retryPolicy"]["maxRetryCount"] == 3, name
            assert task["retryPolicy"]["backoffMaxDuration"] == "604800s", name
        executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert len(executors) == 7


def test_no_model_is_registered_before_it_is_evaluated(packages: list[Path]) -> None:
    for package in packages:
        tasks = documents(package)[0]["root"]["dag"]["tasks"]
        assert "evaluate" in tasks["register"]["dependentTasks"]
        assert "register" in tasks["promote"]["dependentTasks"]
        assert "check-recipe" in tasks["prepare-data"]["dependentTasks"]


def test_the_run_form_shows_the_methods_own_hyperparameters(packages: list[Path]) -> None:
    types = {"rank": "NUMBER_INTEGER", "alpha": "NUMBER_DOUBLE", "target_modules": "LIST"}
    for method, package in zip(METHODS, packages, strict=True):
        spec = documents(package)[0]
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        defaults = method.config_class().model_dump(mode="json")
        component = spec["components"][f"comp-finetune-{method.name.replace('_', '-')}"]
        for name, value in defaults.items():
            if name == "name":
                continue
            assert inputs[name].get("defaultValue", value) == value, name
            assert inputs[name]["parameterType"] == types.get(name, inputs[name]["parameterType"])
            assert name in component["inputDefinitions"]["parameters"]


def test_legs_run_side_by_side_and_are_collected(comparison: tuple[dict, dict]) -> None:
    spec, platform = comparison
    tasks = spec["root"]["dag"]["tasks"]
    assert set(tasks) == {"check-compare", "prepare-data", "measure-base", "for-loop-1",
                          "leaderboard"}  # fmt: skip
    loop = tasks["for-loop-1"]
    assert "iteratorPolicy" not in loop  # all at once
    assert loop["parameterIterator"]["items"]["inputParameter"].endswith("check-compare-Output")
    inner = spec["components"]["comp-for-loop-1"]["dag"]["tasks"]["finetune-leg"]
    every = [task for name, task in tasks.items() if name != "for-loop-1"] + [inner]
    for task in every:
        assert not task.get("cachingOptions", {}).get("enableCache")
        assert task["retryPolicy"]["maxRetryCount"] == 3
        assert task["retryPolicy"]["backoffMaxDuration"] == "604800s"
    # every parameter that an inner task reads enters the loop
    entering = spec["components"]["comp-for-loop-1"]["inputDefinitions"]["parameters"]
    for value in inner["inputs"]["parameters"].values():
        if "componentInputParameter" in value:
            assert value["componentInputParameter"] in entering
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    mounted = {
        name: [mount["mountPath"] for mount in entry["pvcMount"]]
        for name, entry in executors.items()
    }
    assert resources.CHECKPOINTS_PATH in mounted["exec-finetune-leg"]
    assert len(mounted) == 5


def test_the_form_of_a_comparison_has_the_recipes_sections(comparison: tuple[dict, dict]) -> None:
    inputs = comparison[0]["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == {"base_model", "data", "methods", "method", "training", "evaluation",
                           "gate", "compare", "experiment"}  # fmt: skip
    assert inputs["methods"]["defaultValue"] == ["all"]
