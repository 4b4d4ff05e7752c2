"""The compiled package is what was reviewed, and KFP takes it."""

from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_file

from tuneline.finetune.methods import METHODS
from tuneline_pipelines.compile import compile_pipelines

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_pipelines(tmp_path_factory.mktemp("compiled"))


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def test_the_package_is_the_golden_one(packages: list[Path], pytestconfig: pytest.Config) -> None:
    assert packages
    for package in packages:
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
