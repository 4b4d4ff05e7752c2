"""What kustomize makes of manifests/, built once, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("manifests/overlays/*/kustomization.yaml"))
COMPONENTS = sorted(
    path.parent.name for path in ROOT.glob("manifests/components/*/kustomization.yaml")
)
REMOTE = "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=2.17.0"
STANDS_FOR_IT = "tests/fixtures/kfp-2.17.0"

Manifest = dict[str, Any]


def kustomize(folder: Path) -> list[Manifest]:
    """The objects of a kustomization, by the kubectl of the `dev` extra."""
    done = subprocess.run(
        [Path(sys.executable).with_name("kubectl"), "kustomize", folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecated fields
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """manifests/ with the remote base replaced by what stands for it."""
    folder = tmp_path_factory.mktemp("kustomize")
    shutil.copytree(ROOT / "manifests", folder / "manifests")
    shutil.copytree(ROOT / STANDS_FOR_IT, folder / STANDS_FOR_IT)
    file = folder / "manifests/components/kfp/kustomization.yaml"
    file.write_text(file.read_text().replace(REMOTE, f"../../../{STANDS_FOR_IT}"))
    return folder


@pytest.fixture(scope="session")
def overlays(offline: Path) -> dict[str, list[Manifest]]:
    """Overlay -> its objects."""
    return {name: kustomize(offline / "manifests/overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="session")
def components(offline: Path) -> dict[str, list[Manifest]]:
    """Component, or `base` -> its objects."""
    found = {name: kustomize(offline / "manifests/components" / name) for name in COMPONENTS}
    return {"base": kustomize(offline / "manifests/base"), **found}


@pytest.fixture(scope="session")
def foreign(offline: Path) -> set[tuple[str, ...]]:
    """The objects of KFP, by what names them."""
    return {identity(thing) for thing in kustomize(offline / STANDS_FOR_IT)}


@pytest.fixture(scope="session")
def ours(
    overlays: dict[str, list[Manifest]],
    components: dict[str, list[Manifest]],
    foreign: set[tuple[str, ...]],
) -> list[tuple[str, Manifest]]:
    """What is not KFP's: the objects of all overlays, and of components that no overlay has, each
    with where it is."""
    known = foreign | {identity(thing) for things in overlays.values() for thing in things}
    return [
        (overlay, thing)
        for overlay, things in overlays.items()
        for thing in things
        if identity(thing) not in foreign
    ] + [
        (component, thing)
        for component, things in components.items()
        for thing in things
        if identity(thing) not in known and not re.search(r"-[a-z0-9]{10}$", identity(thing)[2])
    ]


def identity(thing: Manifest) -> tuple[str, ...]:
    """Kind, namespace and name."""
    metadata = thing["metadata"]
    return thing["kind"], metadata.get("namespace", ""), metadata["name"]


@pytest.fixture(scope="session")
def make_secrets(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], dict[tuple[str, str], dict[str, str]]]:
    """Runs secrets.sh on a folder that stands for a cluster; gives namespace, name -> values."""
    programs = tmp_path_factory.mktemp("programs")
    kubectl = programs / "kubectl"
    stand_in = ROOT / "tests/fixtures/secret_store.py"
    kubectl.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    kubectl.chmod(0o755)

    def make(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
        path = f"{programs}:{os.environ['PATH']}"
        subprocess.run(
            [ROOT / "manifests/secrets.sh"],
            check=True,
            env={**os.environ, "PATH": path, "SECRETS": str(folder)},
        )
        return {
            (file.name.partition(".")[0], file.name.partition(".")[2]): json.loads(file.read_text())
            for file in folder.iterdir()
        }

    return make


@pytest.fixture(scope="session")
def secrets(
    make_secrets: Callable[[Path], dict[tuple[str, str], dict[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], dict[str, str]]:
    """What secrets.sh makes in an empty cluster."""
    return make_secrets(tmp_path_factory.mktemp("cluster"))
