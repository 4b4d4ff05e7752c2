"""Models in a real object store: SeaweedFS on a free port."""

import json
from pathlib import Path
from typing import Any

import pytest

from tuneline import artifacts, base_model, object_store, recipe, steps
from tuneline.artifacts import Artifact
from tuneline.errors import ModelError, StorageError
from tuneline.finetune.train import attach
from tuneline.recipe import method_of

BUCKET = "models"
pytestmark = pytest.mark.slow


@pytest.fixture
def client(store_client: Any) -> Any:
    """Of a store that the environment names, with one bucket."""
    return store_client(BUCKET)


@pytest.fixture
def base(client: Any, tiny_model: Path, request: pytest.FixtureRequest) -> str:
    """The tiny model in the store."""
    prefix = f"{request.node.name}/base"
    for file in tiny_model.iterdir():
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.name}")
    return f"s3://{BUCKET}/{prefix}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("TUNELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def adapter_on(reference: str, folder: Path) -> Artifact:
    found = base_model.resolve(reference)
    settings = recipe.method_settings({"name": "lora"})
    model, _, _ = attach(found, method_of(settings), settings)
    model.save_pretrained(str(folder))
    artifacts.seal(
        folder,
        kind="adapter",
        config={"method": settings.model_dump(mode="json"), "training": {}},
        base_model=found.identity(),
        inputs={"prepared_dataset": "sha256:of-no-data"},
    )
    return artifacts.load(folder, "adapter")


def sent_at(client: Any, url: str) -> dict[str, Any]:
    """Name of each object below a prefix -> when it was written."""
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    return {entry["Key"].removeprefix(prefix): entry["LastModified"] for entry in found}


def test_a_base_comes_from_the_store_once_and_again_when_it_changed(
    base: str, cache: Path, client: Any, tiny_model: Path
) -> None:
    local, found = base_model.resolve(str(tiny_model)), base_model.resolve(base)
    assert found.reference == base and found.digest == local.digest
    times = {path: path.stat().st_mtime_ns for path in found.path.iterdir()}
    assert base_model.resolve_again(found.identity()) == found
    assert times == {path: path.stat().st_mtime_ns for path in found.path.iterdir()}
    config = json.loads((tiny_model / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    key = base.removeprefix(f"s3://{BUCKET}/") + "/config.json"
    client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(config).encode())
    assert base_model.resolve(base).digest != found.digest
    with pytest.raises(ModelError, match="its files have changed"):
        base_model.resolve_again(found.identity())
    assert not list(cache.rglob("*.half"))


def test_a_merged_model_is_sent_whole_with_its_manifest_last(
    base: str, cache: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    target = base.replace("/base", "/merged")
    original = object_store.send_artifact

    def interrupted(folder: Path, url: str) -> None:
        manifest = (folder / "manifest.json").read_bytes()
        first = dict(list(json.loads(manifest)["files"].items())[:3])
        (folder / "manifest.json").write_text(json.dumps({"files": first}))
        original(folder, url)
        (folder / "manifest.json").write_bytes(manifest)
        client.delete_object(
            Bucket=BUCKET, Key=f"{url.removeprefix(f's3://{BUCKET}/')}/manifest.json"
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(object_store, "send_artifact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.merge(base, str(adapter.path), {}, target)
    assert len(sent_at(client, target)) == 3 and "manifest.json" not in sent_at(client, target)
    monkeypatch.setattr(object_store, "send_artifact", original)
    sent = sent_at(client, target)
    steps.merge(base, str(adapter.path), {}, target)
    assert sent.items() <= sent_at(client, target).items()
    assert not list((cache / "outgoing").iterdir())
    back = tmp_path / "back"
    for name in sent_at(client, target):
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        client.download_file(
            BUCKET, f"{target.removeprefix(f's3://{BUCKET}/')}/{name}", str(back / name)
        )
    merged = artifacts.load(back, "merged_model")
    assert merged.manifest.inputs["adapter"] == adapter.digest
    with pytest.raises(StorageError, match="holds an artifact already"):
        steps.merge(base, str(adapter.path), {}, target)


def test_what_is_not_there_or_in_the_way_is_an_error(
    base: str, cache: Path, client: Any, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="has no model"):
        base_model.resolve(f"s3://{BUCKET}/nothing/here")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/here: .*(NoSuchBucket|not exist)"):
        base_model.resolve("s3://no-such-bucket/here")
    with pytest.raises(StorageError, match="not of the form s3://bucket/prefix"):
        base_model.resolve(f"s3://{BUCKET}")
    adapter = adapter_on(base, tmp_path / "adapter")
    target = base.replace("/base", "/merged")
    client.put_object(
        Bucket=BUCKET, Key=f"{target.removeprefix(f's3://{BUCKET}/')}/notes.txt", Body=b"mine"
    )
    with pytest.raises(StorageError, match=r"holds notes\.txt, which is no part"):
        steps.merge(base, str(adapter.path), {}, target)
    assert cache.exists() and "manifest.json" not in sent_at(client, target)
