"""What the end-to-end tests share; without a KFP they are skipped."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """What `tuneline` needs to reach the cluster."""
    host = request.config.getoption("--kfp-host")
    mlflow = request.config.getoption("--mlflow-uri")
    if not host or not mlflow:
        pytest.skip("needs --kfp-host and --mlflow-uri")
    namespace = request.config.getoption("--namespace")
    return {
        **os.environ,
        "KFP_HOST": host,
        **({"KFP_NAMESPACE": namespace} if namespace else {}),
        "MLFLOW_TRACKING_URI": mlflow,
    }


@pytest.fixture(scope="session")
def name() -> str:
    """Of everything that this session makes on the cluster."""
    return f"tuneline-e2e-{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def recipe_file(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a few steps of training, and a gate that a few steps can pass."""
    recipe = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
    recipe["training"] |= {"epochs": 0.1}
    recipe["evaluation"] = {"metrics": ["cross_entropy"], "max_rows": 40, "general_text": False}
    recipe["gate"] = {"metric": "cross_entropy", "min_rows": 20, "champion": "ignore"}
    recipe["registry"] = {"model_name": name, "experiment": name}
    path = tmp_path_factory.mktemp("e2e") / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def tuneline(environment: dict[str, str]) -> Callable[..., str]:
    """Runs a command as a person would; returns what it printed."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tuneline_pipelines.cli", *arguments],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run
