"""Checkpoints in a real object store: which is sent, found, kept, skipped and removed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline.compare import watch
from tuneline.compare.leg import Job
from tuneline.errors import StorageError, Terminated, TrainingError
from tuneline.finetune import checkpoint
from tuneline.finetune.checkpoint import MARKER, ROOT_VARIABLE, Checkpoint, Checkpoints

pytestmark = pytest.mark.slow
BUCKET = "checkpoints"


class Run:
    """One run's checkpoints, seen from several disks."""

    def __init__(self, client: Any, name: str, tmp_path: Path) -> None:
        self.client = client
        self._tmp_path = tmp_path
        self.identity = {"run": name}

    def on(self, disk: str, monkeypatch: pytest.MonkeyPatch, *, limit: int = 2, **more: Any):
        monkeypatch.setenv("TUNELINE_CACHE", str(self._tmp_path / disk))
        output = self._tmp_path / "out"
        return checkpoint.checkpoints_of(self.identity, output, limit=limit, **more)

    @property
    def prefix(self) -> str:
        return f"units/{checkpoint._key(self.identity)}/"

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=self.prefix)
        return [entry["Key"].removeprefix(self.prefix) for entry in found.get("Contents", ())]

    def steps(self) -> list[int]:
        """Of the complete ones."""
        return [int(n.split("-")[1]) for n in self.names() if n.endswith(MARKER)]

    def key(self, step: int, file: str) -> str:
        (name,) = [n for n in self.names() if n.startswith(f"step-{step:08d}-") and file in n]
        return self.prefix + name

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)


@pytest.fixture
def run(
    store_client: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Run:
    client = store_client(BUCKET)
    monkeypatch.setenv(ROOT_VARIABLE, f"s3://{BUCKET}/units/")
    return Run(client, request.node.name, tmp_path)


def write(checkpoints: Checkpoints, step: int, best: int | None = None, *, what: int = 0) -> None:
    def fill(folder: Path) -> None:
        (folder / "data").write_bytes(bytes([step, what]) * 10)
        (folder / "more").write_bytes(b"more")

    checkpoints.write(step, {"of": step}, fill, best)


def newest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.newest()
    assert found is not None and found.path == checkpoints.folder / found.path.name
    assert (found.path / "data").read_bytes()[:1] == bytes([found.step])
    return found


def test_the_store_keeps_what_the_disk_keeps_and_ends_empty(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.on("a", monkeypatch) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            write(checkpoints, step, best=2 if step >= 2 else None)
        assert run.steps() == [2, 4, 5]
        document = run.client.get_object(Bucket=BUCKET, Key=f"{run.prefix}run.json")["Body"].read()
        assert json.loads(document) == run.identity
    with run.on("b", monkeypatch) as elsewhere:
        assert newest(elsewhere).notes == {"of": 5}
        best = elsewhere.find(2)
        assert best is not None and best.notes == {"of": 2}
        assert elsewhere.find(3) is None
        write(elsewhere, 6, best=2)
        assert run.steps() == [2, 5, 6]
        begun = run.client.create_multipart_upload(Bucket=BUCKET, Key=f"{run.prefix}step-1/big")
        assert begun["UploadId"]
        elsewhere.discard()
    assert run.names() == []
    uploads = run.client.list_multipart_uploads(Bucket=BUCKET, Prefix=run.prefix)
    assert uploads.get("Uploads", []) == []


def test_the_marker_is_sent_last_and_removed_first(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(event_name: str, params: dict[str, Any], **_: Any) -> None:
        seen.append(f"{event_name.rpartition('.')[2]} {params['Key'].rpartition('/')[2]}")

    with run.on("a", monkeypatch, limit=1) as checkpoints:
        assert checkpoints._store is not None
        events = checkpoints._store._folder._client.meta.events
        for operation in ("PutObject", "DeleteObject"):
            events.register(f"before-parameter-build.s3.{operation}", watched)
        write(checkpoints, 1)
        write(checkpoints, 2)
    assert seen == [
        *("PutObject data", "PutObject more", f"PutObject {MARKER}") * 2,
        *(f"DeleteObject {MARKER}", "DeleteObject data", "DeleteObject more"),
    ]


def test_one_without_its_marker_is_none_and_is_removed_when_training_is_past_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.on("a", monkeypatch) as checkpoints:
        write(checkpoints, 1)
        write(checkpoints, 2)
    run.client.delete_object(Bucket=BUCKET, Key=run.key(2, MARKER))
    with run.on("b", monkeypatch) as elsewhere:
        assert newest(elsewhere).step == 1
        write(elsewhere, 3)
    assert run.steps() == [1, 3]
    assert not any(name.startswith("step-00000002") for name in run.names())


DAMAGE: dict[str, tuple[Callable[[Run], None], str]] = {
    "changed": (lambda run: run.put(run.key(2, "/data"), b"x" * 20), "differs from its SHA-256"),
    "cut": (lambda run: run.put(run.key(2, "/data"), b"x"), "data has 1 bytes, not 20"),
    "lost": (
        lambda run: run.client.delete_object(Bucket=BUCKET, Key=run.key(2, "/data")),
        "data is missing",
    ),
    "half a marker": (lambda run: run.put(run.key(2, MARKER), b"{"), "Expecting property name"),
    "no mapping": (lambda run: run.put(run.key(2, MARKER), b"[]"), "is none: list indices"),
    "another marker": (
        lambda run: run.put(run.key(2, MARKER), b'{"files": {}}'),
        "is not the one that was sent",
    ),
    "a path": (
        lambda run: run.put(
            run.key(2, MARKER), b'{"files": {"../../data": {"size_bytes": 1, "sha256": "x"}}}'
        ),
        "../../data is no name of a file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_for_the_one_before_and_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, said = DAMAGE[kind]
    with run.on("a", monkeypatch) as checkpoints:
        write(checkpoints, 1)
        write(checkpoints, 2)
    damage(run)
    capsys.readouterr()
    with run.on("b", monkeypatch) as elsewhere:
        assert newest(elsewhere).step == 1
        output = capsys.readouterr().out
        assert f"warning: checkpoint s3://{BUCKET}/{run.prefix}step-00000002-" in output
        assert said in output
        assert not list(elsewhere.folder.glob("*.partial"))
        write(elsewhere, 2)  # the same once more
    with run.on("c", monkeypatch) as third:
        assert newest(third).step == 2


def test_a_damaged_one_on_disk_is_fetched_and_takes_no_place(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.on("a", monkeypatch, limit=1) as checkpoints:
        write(checkpoints, 4)
        (checkpoints.folder / "step-00000004" / "data").write_bytes(b"damaged")
        assert newest(checkpoints).step == 4  # the store's
        (checkpoints.folder / "step-00000004" / "data").write_bytes(b"damaged")
        run.put(run.key(4, "/data"), b"damaged")
        assert checkpoints.newest() is None
        write(checkpoints, 1)
        assert newest(checkpoints).step == 1 and run.steps() == [1]


def test_two_that_train_the_same_do_not_mix_their_files(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.on("a", monkeypatch) as first, run.on("b", monkeypatch) as second:
        write(first, 3, what=1)
        (stale,) = {name.partition("/")[0] for name in run.names() if name.startswith("step-")}
        write(second, 3, what=2)
        assert run.steps() == [3]
        assert not any(name.startswith(stale) for name in run.names())
        write(second, 7)
        write(second, 8)
        write(first, 4, what=1)  # behind: nothing to send
        assert run.steps() == [7, 8] and first.unsent == ""
    with run.on("c", monkeypatch) as third:
        assert newest(third).step == 8


def test_what_could_not_be_sent_is_sent_with_the_next_one(
    run: Run, door: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", door.environment["AWS_ENDPOINT_URL"])
    with run.on("a", monkeypatch) as checkpoints:
        write(checkpoints, 1)
        door.close()
        write(checkpoints, 2, best=2)
        (warning,) = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
        assert f"checkpoint {checkpoints.folder}/step-00000002 is on this disk only" in warning
        assert "Could not connect" in checkpoints.unsent
        with pytest.raises(StorageError, match="Could not connect"):
            checkpoints.newest()
        door.open()
        write(checkpoints, 3, best=2)
        assert checkpoints.unsent == "" and run.steps() == [2, 3]
        door.close()
        checkpoints.discard()
        assert "warning: the checkpoints in s3://" in capsys.readouterr().out
        assert not checkpoints.folder.exists()


def test_a_damaged_one_on_disk_is_not_sent_and_stops_nothing(
    run: Run, door: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", door.environment["AWS_ENDPOINT_URL"])
    with run.on("a", monkeypatch) as checkpoints:
        door.close()
        write(checkpoints, 1)
        (checkpoints.folder / "step-00000001" / "data").unlink()
        door.open()
        write(checkpoints, 2)
        assert checkpoints.unsent == "" and run.steps() == [2]
        assert "step-00000001 is skipped: data is missing" in capsys.readouterr().out


def test_a_full_disk_is_no_damage(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import resource

    with run.on("a", monkeypatch) as checkpoints:
        checkpoints.write(1, {}, lambda f: (f / "data").write_bytes(bytes(20_000)) and None, None)
    with run.on("b", monkeypatch) as elsewhere:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(
                TrainingError, match=r"can't be brought to .*File too large.*TUNELINE_CACHE"
            ):
                elsewhere.newest()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(elsewhere.folder.glob("step-*"))


def test_another_machine_takes_exactly_what_the_first_process_found(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with run.on("a", monkeypatch) as checkpoints:
        write(checkpoints, 1)
        found = newest(checkpoints)
        others = run.on("b", monkeypatch, own=False)
        stale = others.folder / found.path.name
        shutil.copytree(found.path, stale)
        (stale / MARKER).write_bytes((stale / MARKER).read_bytes() + b" ")
        here = others.same(found, brings=True)
        assert here.path == stale and here.stored_as == found.stored_as
        assert (stale / MARKER).read_bytes() == (found.path / MARKER).read_bytes()
        shutil.move(found.path, tmp_path / "moved")  # as a path of another machine
        assert others.same(found, brings=False).path == stale
        checkpoints._store.remove(checkpoints._store.found())  # type: ignore[union-attr]
        shutil.rmtree(stale)
        with pytest.raises(StorageError, match=f"does not have {found.stored_as}"):
            others.same(found, brings=True)


def test_a_leg_of_a_comparison_counts_its_lost_pods_in_the_store(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(
        leg={"name": "x"}, base_model="", dataset="", base_scores="", evaluation={}, gate={},
        adapter="", eval_report="", result="", run_id=hashlib.sha256(b"run").hexdigest(),
        experiment="",
    )  # fmt: skip

    def legs() -> list[int]:
        found = run.client.list_objects_v2(Bucket=BUCKET, Prefix="units/legs/")
        return [entry["Size"] for entry in found.get("Contents", ())]

    for lost in (0, 1):
        monkeypatch.setenv("TUNELINE_CACHE", str(tmp_path / f"pod{lost}"))
        with pytest.raises(KeyboardInterrupt), watch._attempt(job) as before:
            assert before == lost
            raise KeyboardInterrupt  # as good as killed
    with pytest.raises(Terminated), watch._attempt(job) as before:
        assert before == 2 and legs() == [3]
        raise Terminated
    assert legs() == [2]
    with watch._attempt(job) as before:
        assert before == 2
    assert legs() == []
