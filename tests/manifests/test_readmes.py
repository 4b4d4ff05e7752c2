"""What the READMEs tell one to type works as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tuneline import images

ROOT = Path(__file__).parents[2]
COMPILES = {
    f"{file.relative_to(ROOT)}:{number}": match[0]
    for file in (
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("images/*.md")),
        *sorted(ROOT.glob("manifests/**/*.md")),
    )
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    if (match := re.match(r"tuneline compile --release[^&`#]*", line))
}
"""Where it stands -> command."""


@pytest.mark.parametrize("where", COMPILES)
def test_a_release_is_compiled_as_it_is_written_down(where: str, tmp_path: Path) -> None:
    """After `make push-images`, which leaves a file of digests at the top of the repository."""
    digests = {
        name: f"registry.example.com/ml/tuneline-{name}@sha256:{digit * 64}"
        for name, digit in zip(images.NAMES, "12", strict=True)
    }
    (tmp_path / "images.lock").write_text(yaml.safe_dump(digests), encoding="utf-8")
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    shutil.copyfile(ROOT / "manifests/base/pools.yaml", tmp_path / "pools.yaml")
    program, *arguments = shlex.split(COMPILES[where])
    assert program == "tuneline"
    done = subprocess.run(
        [sys.executable, "-m", "tuneline_pipelines.cli", *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [file.read_text(encoding="utf-8") for file in (tmp_path / "build").glob("*.yaml")]
    used = {image for text in written for image in re.findall(r"image: (.*tuneline.*)", text)}
    assert used == set(digests.values())


def test_the_release_of_every_overlay_with_digests_is_written_down() -> None:
    named = {place.rpartition(":")[0] for place in COMPILES}
    assert {
        "docs/cluster.md",
        "images/README.md",
        "manifests/overlays/staging/README.md",
        "manifests/overlays/production/README.md",
    } <= named


@pytest.mark.parametrize(
    "readme", sorted(ROOT.glob("manifests/**/README.md")), ids=lambda file: file.parent.name
)
def test_jobs_are_deleted_before_anything_is_compared_or_applied(readme: Path) -> None:
    """They can't be changed, which kubectl diff fails by too."""
    for block in re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        lines = block.splitlines()
        meets = [
            n for n, line in enumerate(lines) if re.match(r"kubectl (diff|apply) -k mani", line)
        ]
        deletes = [n for n, line in enumerate(lines) if "delete job" in line]
        assert not meets or (deletes and deletes[0] < min(meets)), block
