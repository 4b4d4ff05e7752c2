"""Publishing pipelines on KFP: each package once, whatever is lost on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline_pipelines import client, packages
from tuneline_pipelines.cli import main


def test_publishing_twice_uploads_once(
    endpoint: Any, write_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    package = packages.read(write_package())
    arguments = ["publish", "--packages", str(write_package().parent)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == ["uploaded", package.name, package.version_name]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == ["was", "there", package.name, package.version_name]
    connection = endpoint.connect()
    found = client.published(connection, package.name)
    assert found is not None
    names = [v.display_name for v in client._versions(connection, found.pipeline_id)]
    assert names == [package.version_name]
    assert found.package == package


def test_a_changed_package_becomes_the_newest_version(
    endpoint: Any, write_package: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = packages.read(write_package(word="one"))
    arguments = ["publish", "--packages", str(write_package(word="one").parent)]
    assert main(arguments) == 0
    second = packages.read(write_package(word="two"))
    assert main(arguments) == 0
    connection = endpoint.connect()
    newest = client.published(connection, first.name)
    named = client.published(connection, first.name, first.version_name)
    assert newest is not None and newest.package.inputs["word"]["defaultValue"] == "two"
    assert named is not None and named.package.inputs["word"]["defaultValue"] == "one"
    capsys.readouterr()
    write_package(word="one")
    assert main(arguments) == 0
    assert f"newest is {second.version_name}" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/pipelines$", "/upload_version$"])
@pytest.mark.parametrize(
    "fault", [{"drop": True, "after": True}, {"drop": True}, {"status": 503}, {"status": 409}]
)
def test_a_lost_answer_while_publishing_leaves_one_version(
    api: Any, write_package: Callable[..., Path], path: str, fault: dict[str, Any]
) -> None:
    if fault.get("status") == 409:
        fault = {**fault, "after": True}  # another publisher was faster
    api.fail("POST", path, **fault)
    assert main(["publish", "--packages", str(write_package().parent)]) == 0
    assert len(api.pipelines) == 1
    assert len(api.versions) == 1


def test_kfps_own_client_sees_what_was_made(
    endpoint: Any, api: Any, write_package: Callable[..., Path]
) -> None:
    """The tests' own server is KFP enough for the SDK."""
    import kfp

    package = packages.read(write_package())
    list(client.publish(endpoint.connect(), [package]))
    _, run = endpoint.submit(write_package(), word="hello")
    with pytest.warns(FutureWarning, match="only works with Kubeflow Pipeline"):
        sdk = kfp.Client(host=endpoint.host)
    pipeline_id = sdk.get_pipeline_id(package.name)
    (version,) = sdk.list_pipeline_versions(pipeline_id).pipeline_versions
    assert version.display_name == package.version_name
    assert sdk.get_run(run.run_id).display_name == run.display_name
    assert [found.run_id for found in sdk.list_runs().runs] == [run.run_id]


def test_all_packages_of_tuneline_are_published(
    endpoint: Any, api: Any, packages_folder: Path
) -> None:
    api.largest_page = 2
    assert main(["publish", "--packages", str(packages_folder)]) == 0
    names = {path.stem for path in packages_folder.glob("*.yaml")}
    assert {p["name"] for p in api.pipelines.values()} == names
    with pytest.raises(Exception, match=r"there are compare, .*finetune-qlora, promote"):
        raise client.unpublished(endpoint.connect(), "finetune-qlorra")


def test_with_several_users_a_pipeline_goes_into_the_namespace(
    api: Any,
    write_package: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api.multi_user = True
    arguments = ["publish", "--packages", str(write_package().parent)]
    assert main(arguments) == 2
    assert "name the namespace with --namespace or KFP_NAMESPACE" in capsys.readouterr().err
    assert not api.pipelines
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    assert main(arguments) == 0
    assert [p["namespace"] for p in api.pipelines.values()] == ["team-a"]


def test_a_pipeline_that_all_namespaces_share_is_found(
    endpoint: Any, api: Any, write_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_package()
    assert main(["publish", "--packages", str(path.parent)]) == 0
    api.multi_user = True
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    assert client.published(endpoint.connect(), packages.read(path).name) is not None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "has no packages"),
        ("a: 1", "is no compiled KFP v2 pipeline"),
        ("a: [", "can't be read"),
    ],
)
def test_a_folder_without_packages_is_refused(
    api: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    assert main(["publish", "--packages", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not api.requests
