"""Large artifacts stay in an object store; a note of them is what is handed on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline import artifacts, by_uri, steps
from tuneline.errors import ArtifactError
from tuneline.tracking import open_client


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact beyond the limit."""
    monkeypatch.setattr(by_uri, "LARGEST_BYTES", 10)
    with artifacts.writing(tmp_path / "model") as aside:
        (aside / "model.safetensors").write_bytes(b"weights" * 10)
        (aside / "README.md").write_text("card")
        artifacts.seal(aside, kind="merged_model", config={}, base_model={}, inputs={})
    return tmp_path / "model"


def test_a_large_artifact_is_handed_on_as_a_note(
    large: Path, store_client: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = store_client("weights")
    monkeypatch.setenv(by_uri.VARIABLE, "s3://weights/of/us/")
    before = artifacts.load(large, "merged_model")
    url = by_uri.leave(large)
    assert url == f"s3://weights/of/us/{before.digest.removeprefix('sha256:')}"
    assert {path.name for path in large.iterdir()} == {"stored.json", "README.md"}
    with pytest.raises(ArtifactError, match="not a finished merged_model"):
        artifacts.load(large, "merged_model")  # nobody takes the note for the artifact
    fetched = artifacts.load(by_uri.fetch(large), "merged_model")
    assert fetched.digest == before.digest
    key = f"{url.removeprefix('s3://weights/')}/{artifacts.MANIFEST}"
    manifest = json.loads(client.get_object(Bucket="weights", Key=key)["Body"].read())
    manifest["digest"] = "sha256:another"
    client.put_object(Bucket="weights", Key=key, Body=json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match="has digest sha256:another, not"):
        by_uri.fetch(large)


def test_a_step_that_is_tried_again_leaves_its_artifact_in_the_same_place(
    large: Path, store_client: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_client("weights")
    monkeypatch.setenv(by_uri.VARIABLE, "s3://weights/again")
    again = large.with_name("again")
    shutil.copytree(large, again)
    url = by_uri.leave(large)
    assert url and by_uri.leave(again) == url
    assert artifacts.load(by_uri.fetch(again), "merged_model")


@pytest.mark.parametrize("root", ["", "gs://weights", "s3://no-such-bucket/here"])
def test_an_artifact_stays_where_no_store_can_take_it(
    root: str,
    large: Path,
    store_client: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store_client("weights")
    monkeypatch.setenv(by_uri.VARIABLE, root)
    assert by_uri.leave(large) == ""
    assert artifacts.load(by_uri.fetch(large), "merged_model").path == large
    said = capsys.readouterr().out
    assert ("warning: the weights go through KFP's own object store" in said) == bool(root)


def test_a_small_artifact_stays(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(by_uri.VARIABLE, "s3://weights/here")
    monkeypatch.setattr(by_uri, "LARGEST_BYTES", 1000)
    assert by_uri.leave(large) == "" and artifacts.load(large, "merged_model")


def test_a_model_in_the_store_is_registered_from_there(
    tmp_path: Path,
    make_candidate: Callable[..., tuple[Path, Path]],
    store_client: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_client("weights")
    monkeypatch.setenv(by_uri.VARIABLE, "s3://weights/register")
    monkeypatch.setattr(by_uri, "LARGEST_BYTES", 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    model, evaluation = make_candidate("large")
    digest = artifacts.load(model, "merged_model").digest
    assert by_uri.leave(model)
    assert steps.register(str(model), str(evaluation), {"model_name": "m"}, "run", "e") == 1
    tags = open_client().get_model_version("m", "1").tags
    assert digest in tags.values()
