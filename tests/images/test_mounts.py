"""What a container of a local run gets to see, without an engine."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tuneline.recipe import Recipe
from tuneline_pipelines import containers


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user stands: a model, data, and a file that is nobody's business."""
    here = tmp_path / "here"
    for name in ("model", "data"):
        (here / name).mkdir(parents=True)
        (here / name / "a.jsonl").touch()
    (here / "secret").touch()
    monkeypatch.chdir(here)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)  # a file that would be seen too
    monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(here / "work/checkpoints"))
    return here


def seen(
    work: Path, base_model: str = "model", evaluation: dict[str, Any] | None = None, **data: Any
) -> tuple[dict[str, tuple[str, bool]], dict[str, Any]]:
    """Inside -> (outside, whether it is read-only); and all options."""
    recipe = Recipe.model_validate(
        {"model": {"base_model": base_model}, "data": data, "registry": {"model_name": "m"},
         "evaluation": evaluation or {}}
    )  # fmt: skip
    options = containers.runner(recipe, work / "work").container_run_args
    mounts = {m["Target"]: (m["Source"], bool(m["ReadOnly"])) for m in options["mounts"]}
    return mounts, options


def test_a_container_sees_what_the_recipe_names_and_writes_to_work_and_cache(
    work: Path, tmp_path: Path
) -> None:
    mounts, options = seen(work, train="data/*.jsonl")
    assert mounts == {
        str(work / "work"): (str(work / "work"), False),
        containers.CACHE: (str(tmp_path / "cache"), False),
        str(work / "model"): (str(work / "model"), True),
        str(work / "data"): (str(work / "data"), True),
    }
    assert options["working_dir"] == str(work)
    assert options["read_only"] and options["cap_drop"] == ["ALL"]
    assert options["network_mode"] == "none"
    user = containers.USER if os.getuid() == 0 else os.getuid()
    assert options["user"].partition(":")[0] == str(user)
    assert (work / "work").stat().st_uid == user


def test_a_glob_where_the_user_stands_shows_that_folder_to_be_read(work: Path) -> None:
    (work / "b.jsonl").touch()
    mounts, _ = seen(work, train="*.jsonl")
    assert mounts[str(work)] == (str(work), True)
    assert mounts[str(work / "work")] == (str(work / "work"), False)


def test_checkpoints_elsewhere_can_be_written_also_inside_of_the_cache(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in (tmp_path / "elsewhere", tmp_path / "cache", tmp_path / "cache/checkpoints"):
        monkeypatch.setenv("TUNELINE_CHECKPOINTS", str(root))
        mounts, options = seen(work, train="data/a.jsonl")
        assert mounts[str(root)] == (str(root), False)
        assert mounts[containers.CACHE] == (str(tmp_path / "cache"), False)
        assert options["environment"]["TUNELINE_CHECKPOINTS"] == str(root)
        assert options["environment"]["TUNELINE_CACHE"] == containers.CACHE


@pytest.mark.parametrize(
    ("name", "value", "network"),
    [
        ("MLFLOW_TRACKING_URI", "sqlite:////data/mlflow.db", "none"),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", "host"),
        ("MLFLOW_TRACKING_URI", "https://mlflow.example.org", "bridge"),
        ("MLFLOW_REGISTRY_URI", "https://registry.example.org", "bridge"),
        ("AWS_ENDPOINT_URL", "http://localhost:8333", "host"),
        ("TUNELINE_CHECKPOINTS", "s3://bucket/checkpoints", "bridge"),
    ],
)
def test_there_is_a_network_only_where_something_has_to_be_reached(
    work: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, network: str
) -> None:
    monkeypatch.setenv(name, value)
    assert seen(work, train="data/a.jsonl")[1]["network_mode"] == network


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("named", "network"),
    [
        ({"train": "s3://bucket/train.jsonl"}, "bridge"),
        ({"train": "gs://bucket/train.jsonl"}, "bridge"),
        ({"train": "hf://org/rows"}, "bridge"),
        ({"test": "s3://bucket/test.jsonl"}, "bridge"),
        ({"base_model": "s3://bucket/model"}, "bridge"),
        ({"base_model": f"hf://org/name@{COMMIT}"}, "bridge"),
        ({"evaluation": {"tasks": ["hellaswag"]}}, "bridge"),
        ({"evaluation": {"tasks": ["own.yaml"]}}, "none"),
        ({"base_model": "demo"}, "none"),
    ],
)
def test_there_is_a_network_where_the_recipe_names_another_machine(
    work: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any], network: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    given = {"train": "data/a.jsonl", **named}
    options = seen(work, **given)[1]
    assert options["network_mode"] == network
    assert (options["environment"].get("HF_HUB_OFFLINE") == "1") == (network == "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    assert seen(work, **given)[1]["network_mode"] == "host"


def test_a_mirror_of_the_hub_on_this_machine_is_reached(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:8080")
    assert seen(work, train="data/a.jsonl")[1]["network_mode"] == "none"
    options = seen(work, train="hf://org/rows")[1]
    assert options["network_mode"] == "host"
    assert options["environment"]["HF_ENDPOINT"] == "http://localhost:8080"


def test_a_base_model_of_the_hub_needs_no_network_once_it_is_in_the_cache(
    work: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    reference = f"hf://org/name@{COMMIT}"
    snapshot = tmp_path / "cache/hub/models--org--name/snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot)
    assert seen(work, reference, train="data/a.jsonl")[1]["network_mode"] == "none"
    assert seen(work, reference, train="hf://org/rows")[1]["network_mode"] == "bridge"
    (snapshot / "model.safetensors").unlink()  # a fetch that was cut off
    assert seen(work, reference, train="data/a.jsonl")[1]["network_mode"] == "bridge"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert seen(work, reference, train="data/a.jsonl")[1]["network_mode"] == "none"
