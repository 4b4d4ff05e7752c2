"""What can be said of the images without building them."""

import difflib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tuneline import images
from tuneline.errors import UsageError

ROOT = Path(__file__).parents[2]


def dockerfile(name: str) -> str:
    return (ROOT / "images" / name / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", images.NAMES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    found = subprocess.run(
        [hadolint, "--no-color", "-"], input=dockerfile(name), capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")
    broken = subprocess.run(
        [hadolint, "-"], input=dockerfile(name) + "\nRUN cd /tmp\n", capture_output=True, text=True
    )
    assert broken.returncode != 0


def test_the_images_differ_in_their_names_extras_and_the_driver_only() -> None:
    cpu, gpu = (dockerfile(name).splitlines() for name in images.NAMES)
    differing = {
        line[2:].strip()
        for line in difflib.ndiff(cpu, gpu)
        if line[0] in "+-" and not line[2:].startswith("#")
    }
    words = (
        "org.opencontainers.image.",
        "EXTRAS=",
        "TORCH_NEEDS=",
        "NVIDIA_",
        "PYTHONUNBUFFERED=1",
    )
    assert [line for line in differing if not any(word in line for word in words)] == []


def test_every_step_has_the_image_of_what_it_does(tmp_path: Path) -> None:
    lock = tmp_path / "images.lock"
    references = {
        name: f"registry.example.org/tuneline-{name}@sha256:{digit * 64}"
        for name, digit in zip(images.NAMES, "12", strict=True)
    }
    lock.write_text(yaml.safe_dump(references), encoding="utf-8")
    done = subprocess.run(
        f"{sys.executable} -m tuneline_pipelines.cli compile --release --images {lock}"
        f" --out {tmp_path / 'out'}".split(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    used: dict[str, set[str]] = {name: set() for name in references.values()}
    for package in (tmp_path / "out").glob("*.yaml"):
        spec, _ = yaml.safe_load_all(package.read_text(encoding="utf-8"))
        for name, executor in spec["deploymentSpec"]["executors"].items():
            used[executor["container"]["image"]].add(name.removeprefix("exec-"))
    cpu, gpu = used.values()
    assert {name.partition("-")[0] for name in gpu} == {"finetune", "evaluate", "measure"}
    assert {"check-recipe", "prepare-data", "merge", "register", "promote"} <= cpu
    assert not cpu & gpu


def test_a_lock_file_that_lacks_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "images.lock"
    monkeypatch.setenv(images.LOCK_VARIABLE, str(lock))
    with pytest.raises(UsageError, match=r"images\.lock can't be read"):
        images.reference("cpu")
    for text in ("cpu: a@sha256:1\n", "- cpu\n", "gpu: {a: b}\n", ""):
        lock.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=r"no reference for 'gpu'.*make push-images"):
            images.reference("gpu")
    monkeypatch.setenv("TUNELINE_IMAGE", "one")
    assert images.reference("gpu") == "one"
