"""A pools file becomes what Kubernetes is asked for, or one error with all its faults."""

from pathlib import Path

import pytest
import yaml

from tuneline import pools
from tuneline.errors import UsageError

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "pools.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_shipped_pools_are_read_and_the_first_is_the_default() -> None:
    found = pools.read()
    assert found.names == ["gpu", "cpu"] and found.without_accelerator == "cpu"
    assert found.largest_shm == "16Gi"
    placed = found.named("gpu").placement()
    assert (placed["accelerator"], placed["count"]) == ("nvidia.com/gpu", "1")
    assert placed["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    cpu = found.named("cpu").placement()
    assert (cpu["count"], cpu["node_selector"], cpu["tolerations"]) == ("0", {}, [])


def test_everything_that_a_resource_is_made_of_is_a_string(tmp_path: Path) -> None:
    pool = {"accelerator": "amd.com/gpu", "count": 8, "node_selector": {"a": "b"}, "cpu": "7.5"}
    placed = pools.read(written(tmp_path, {"pools": {"x": pool}})).named("x").placement()
    for name in ("accelerator", "count", "cpu", "memory"):
        assert isinstance(placed[name], str), name


@pytest.mark.parametrize("file", sorted((ROOT / "manifests/pools").glob("*.yaml")), ids=str)
def test_the_examples_are_valid_and_have_prices_and_spot(file: Path) -> None:
    found = pools.read(file).pools
    assert any(pool.spot for pool in found.values()) or "on-premise" in file.name
    for pool in found.values():
        if pool.count:
            assert pool.accelerator_memory_gb and pool.tolerations


def test_the_config_map_holds_the_shipped_pools() -> None:
    in_manifest = (ROOT / "manifests/base/pools.yaml").read_text()
    assert in_manifest == Path(pools.__file__).with_name("pools.yaml").read_text()


def test_quantities_are_compared_by_size(tmp_path: Path) -> None:
    sizes = ("512Mi", "1G", "1Gi", "0.5Ti", "64Gi")
    content = {"pools": {f"p{n}": {"shm": size} for n, size in enumerate(sizes)}}
    assert pools.read(written(tmp_path, content)).largest_shm == "0.5Ti"
    assert pools.bytes_of("1500m") == 1.5


@pytest.mark.parametrize(
    ("pool", "fault"),
    [
        ({"accelerator": "nvidia.com/gpu"}, "accelerator and count belong together"),
        ({"count": 1}, "accelerator and count belong together"),
        ({"accelerator": "nvidia.com/gpu", "count": 1}, "needs node_selector or node_affinity"),
        ({"accelerator": "gpu", "count": 1, "node_selector": {"a": "b"}}, "accelerator"),
        ({"count": -1}, "count"),
        ({"memory": "lots"}, "memory"),
        ({"cpu": "two"}, "cpu"),
        ({"gpus": 1}, "gpus: Extra inputs"),
        ({"tolerations": [{"operator": "Exists", "value": "x"}]}, "Exists takes no value"),
        ({"tolerations": [{"operator": "Equal"}]}, "needs a key"),
        ({"node_affinity": {"required": {}}}, "required is unknown"),
        ({"node_selector": {"a": 1}}, "node_selector.a"),
    ],
)
def test_a_wrong_pool_is_refused_with_its_place(pool: dict, fault: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"pools": {"bad": pool}})
    with pytest.raises(UsageError) as error:
        pools.read(path)
    assert str(path) in str(error.value) and "pools.bad" in str(error.value)
    assert fault in str(error.value)


def test_a_file_that_is_none_and_a_name_that_is_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("[", "- 1", "pools: {}"):
        with pytest.raises(UsageError, match="pools file"):
            pools.read(written(tmp_path, content))
    monkeypatch.setenv(pools.VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UsageError, match="apply the config map tuneline-pools"):
        pools.read()
    monkeypatch.delenv(pools.VARIABLE)
    with pytest.raises(
        UsageError, match=r"'gpus' is unknown; pools are gpu, cpu. Did you mean 'gpu'"
    ):
        pools.read().named("gpus")
