"""What the field's own tools say: yamllint and checkov."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PINS = ROOT / "tests/manifests/checkov.txt"
OF_OTHERS = {"tuneline-postgres", "tuneline-postgres-backup", "tuneline-object-store"}
"""Workloads whose images we don't build; only overlays/local and staging have them."""
SKIPPED = {
    # check -> why, and the workloads that it is for; None: all of them
    "CKV_K8S_35": (
        "MLflow, libpq and boto3 read their passwords from variables and know no files for them",
        {"tuneline-mlflow", "tuneline-mlflow-migrate", "tuneline-object-store-buckets",
         "tuneline-postgres-backup", "tuneline-champions", "tuneline-mlflow-users"},
    ),
    "CKV_K8S_15": (
        "images come by digest or by a release's tag, and a node that has one need not ask for it",
        None,
    ),
    "CKV_K8S_40": ("PostgreSQL's and SeaweedFS' images have users 999 and 1000", OF_OTHERS),
    "CKV_K8S_43": ("images of others in rehearsals come by a release's tag", OF_OTHERS),
}  # fmt: skip


def test_yamllint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "yamllint", "--strict", "--format", "parsable",
            "--config-file", ROOT / "tests/manifests/yamllint.yaml",
            ROOT / "manifests", ROOT / "tests/fixtures/kfp-2.17.0",
            ROOT / "tests/fixtures/custom-resources.yaml",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkov(lacking: Callable[[str, str], NoReturn]) -> Path:
    """It pins an old boto3, packaging and others, so it has an environment of its own."""
    folder = ROOT / "build/checkov"
    program, mark = folder / "bin/checkov", folder / "pins"
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()
    if not mark.is_file() or mark.read_text() != digest:
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-progress"]
        for command in (
            [*uv, "venv", "--clear", "--python", sys.executable, folder],
            [*uv, "pip", "install", "--no-deps", "--python", folder, "--requirement", PINS],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lacking("checkov", f"checkov can't be installed: {done.stderr.strip()[-300:]}")
        mark.write_text(digest)
    return program


def findings(checkov: Path, folder: Path) -> list[tuple[str, str]]:
    """Check and resource, of each one that failed."""
    done = subprocess.run(
        [
            checkov, "--framework", "kubernetes", "--skip-download", "--quiet", "--compact",
            "--output", "json", "--directory", folder,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["resource_count"] > 0
    return [(f["check_id"], f["resource"]) for f in report["results"]["failed_checks"]]


ROOT_USER = """
apiVersion: v1
kind: Pod
metadata: {name: careless, namespace: tuneline}
spec:
  containers:
    - {name: careless, image: "careless:latest", securityContext: {privileged: true}}
"""


@pytest.mark.slow
def test_checkov_finds_nothing_but_what_is_explained(
    checkov: Path, ours: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    for where, thing in ours:
        if where == "local":  # what staging has, with an image that is built on the machine
            continue
        metadata = thing["metadata"]
        name = f"{thing['kind']}-{metadata.get('namespace', '')}-{metadata['name']}.yaml"
        (tmp_path / where).mkdir(exist_ok=True)
        (tmp_path / where / name).write_text(yaml.safe_dump(thing))
    (tmp_path / "careless.yaml").write_text(ROOT_USER)
    found = findings(checkov, tmp_path)
    careless = {check for check, resource in found if resource.endswith(".careless")}
    assert {"CKV_K8S_16", "CKV_K8S_14", "CKV_K8S_23"} <= careless  # it does look
    found = [(check, r.rpartition(".")[2]) for check, r in found if not r.endswith(".careless")]
    unexplained = {
        (check, name)
        for check, name in found
        if check not in SKIPPED or (SKIPPED[check][1] is not None and name not in SKIPPED[check][1])
    }
    assert unexplained == set()
    assert {check for check, _ in found} == SKIPPED.keys()  # no explanation outlives its reason
