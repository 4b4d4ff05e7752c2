"""An artifact is there and whole, or it is not there."""

import json
from pathlib import Path

import pytest

from tuneline import artifacts
from tuneline.errors import ArtifactError

BASE = {"reference": "x", "revision": "", "digest": "sha256:0"}


def write(output: Path, text: str = "hello") -> artifacts.Artifact:
    with artifacts.writing(output) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a.txt").write_text(text)
        (aside / "sub" / "a.txt").chmod(0o600)
        artifacts.seal(
            aside, kind="adapter", config={"rank": 8}, base_model=BASE, inputs={"data": "d"}
        )
    return artifacts.load(output, "adapter")


def test_what_was_written_loads_with_its_config_and_inputs(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    assert artifact.manifest.config == {"rank": 8}
    assert artifact.manifest.inputs == {"data": "d"}
    assert list(artifact.manifest.files) == ["sub/a.txt"]


def test_the_same_content_has_the_same_digest_anywhere(tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest == write(tmp_path / "b").digest
    assert write(tmp_path / "a2", "other").digest != write(tmp_path / "b2").digest


def test_files_are_readable_for_another_user(tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    assert (artifact.path / "sub" / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: (p / "sub/a.txt").write_text("jello"), "differs from its SHA-256"),
        (lambda p: (p / "sub/a.txt").write_text("longer than it was"), "bytes, not 5"),
        (lambda p: (p / "sub/a.txt").unlink(), "is missing"),
        (lambda p: (p / "more").write_text(""), "more was added"),
        (lambda p: (p / "manifest.json").unlink(), "is not a finished adapter"),
        (lambda p: (p / "manifest.json").write_text("{"), "can't be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "is not a tuneline manifest"),
    ],
)
def test_a_damaged_artifact_is_refused(tmp_path: Path, damage, sentence: str) -> None:
    path = write(tmp_path / "a").path
    damage(path)
    with pytest.raises(ArtifactError, match=sentence):
        artifacts.load(path, "adapter")


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a").path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["config"]["rank"] = 16
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        artifacts.load(path, "adapter")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a").path
    with pytest.raises(ArtifactError, match="is a adapter, this step reads a eval_report"):
        artifacts.load(path, "eval_report")


def test_a_step_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifacts.writing(tmp_path / "a") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_leftover_of_a_killed_step_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "half").write_text("x")
    artifact = write(tmp_path / "a")
    assert list(artifact.manifest.files) == ["sub/a.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_artifact_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="never overwritten"):
        write(tmp_path / "a")


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert artifacts.load(tmp_path / "real", "adapter").manifest.config == {"rank": 8}


def test_an_output_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't be written"):
        write(tmp_path / "file" / "a")
