"""images/build.sh, with a stand-in for Docker that writes down what it is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tuneline import __version__

ROOT = Path(__file__).parents[2]
DOCKER = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open(os.environ["ASKED"], "a") as file:
    print(json.dumps(words), file=file)
if words[:2] == ["image", "inspect"] and "RepoDigests" in words[3]:
    name = words[4].partition(":")[0]
    print(f"elsewhere.example.org/{{name}}@sha256:{{'f' * 64}}")
    print(f"registry.example.org/team/{{name}}@sha256:{{os.environ['DIGIT'] * 64}}")
"""
Push = Callable[..., list[list[str]]]


@pytest.fixture
def push(tmp_path: Path) -> Push:
    """Runs the script; gives the commands that Docker got."""
    program = tmp_path / "programs/docker"
    program.parent.mkdir()
    program.write_text(DOCKER.format(python=sys.executable))
    program.chmod(0o755)

    def run(digit: str, **variables: str) -> list[list[str]]:
        asked = tmp_path / f"asked-{digit}"
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("IMAGES", "BASE_IMAGE", "BUILD_IMAGE", "TORCH_INDEX_URL")
        }
        subprocess.run(
            [ROOT / "images/build.sh"],
            check=True, stdout=subprocess.PIPE,
            env={**environment, "PATH": f"{program.parent}:{os.environ['PATH']}",
                 "REGISTRY": "registry.example.org/team", "LOCK": str(tmp_path / "images.lock"),
                 "ASKED": str(asked), "DIGIT": digit, **variables},
        )  # fmt: skip
        return [json.loads(line) for line in asked.read_text().splitlines()]

    return run


def test_an_image_that_is_not_built_keeps_its_line_in_the_lock(push: Push, tmp_path: Path) -> None:
    def digests() -> dict[str, str]:
        lock = yaml.safe_load((tmp_path / "images.lock").read_text())
        return {name: reference[-1] for name, reference in lock.items()}

    push("1")
    assert digests() == {"cpu": "1", "gpu": "1"}
    push("2", IMAGES="cpu")
    assert digests() == {"cpu": "2", "gpu": "1"}
    push("3", IMAGES="gpu")
    assert digests() == {"cpu": "2", "gpu": "3"}
    push("4")
    assert digests() == {"cpu": "4", "gpu": "4"}
    assert (tmp_path / "images.lock").read_text().count("# Written by") == 1


def test_images_are_labelled_with_version_and_source_and_no_login(push: Push) -> None:
    (build, *_) = push("1", IMAGES="cpu", IMAGE_SOURCE="https://git.example.org/team/tuneline")
    assert build[0] == "build"
    assert f"VERSION={__version__}" in build
    assert "SOURCE=https://git.example.org/team/tuneline" in build
    for name in ("cpu", "gpu"):
        text = (ROOT / "images" / name / "Dockerfile").read_text()
        for label in ("version", "source", "revision"):
            assert f'org.opencontainers.image.{label}="${{{label.upper()}}}"' in text


@pytest.mark.parametrize(
    ("remote", "source"),
    [
        ("https://ada:a-token@git.example.org/t.git", "https://git.example.org/t.git"),
        ("https://git.example.org/t.git", "https://git.example.org/t.git"),
        ("/srv/a-folder/t.git", ""),
    ],
)
def test_the_label_of_the_source_is_the_remote_without_a_login(
    push: Push, remote: str, source: str
) -> None:
    (build, *_) = push(
        "1", IMAGES="cpu", GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="remote.origin.url",
        GIT_CONFIG_VALUE_0=remote,
    )  # fmt: skip
    assert f"SOURCE={source}" in build
    assert "a-token" not in " ".join(build)
