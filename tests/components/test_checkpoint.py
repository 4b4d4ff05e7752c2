"""Which checkpoint is found, which are kept, and what is in them."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tuneline.errors import TrainingError
from tuneline.finetune.checkpoint import (
    MARKER,
    ROOT_VARIABLE,
    Checkpoints,
    folder_of,
    load_trainable,
    save_state,
    save_trainable,
    trainable,
)


def write(
    checkpoints: Checkpoints, step: int, best: int | None = None, size: int = 10, of: str = ""
) -> None:
    def fill(folder: Path) -> None:
        (folder / "data").write_bytes(bytes([step % 256]) * size)

    checkpoints.write(step, {"of": of or step}, fill, best)


def steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.glob("step-*"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "root" / "key", limit=2) as checkpoints:
        yield checkpoints


def test_the_newest_are_kept_and_the_best_however_old(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3, 4, 5):
        write(checkpoints, step, best=2 if step >= 2 else None)
    assert steps(checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]
    found = checkpoints.newest()
    assert found is not None and found.step == 5 and found.notes == {"of": 5}
    best = checkpoints.find(2)
    assert best is not None and best.notes == {"of": 2}
    assert checkpoints.find(3) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / MARKER).unlink(), f"it is half: {MARKER} is missing"),
        (lambda path: (path / MARKER).write_text("{"), "Expecting property name"),
        (lambda path: (path / MARKER).write_text("[]"), "list indices"),
        (lambda path: (path / "data").unlink(), "data is missing"),
        (lambda path: (path / "data").write_bytes(b"12345"), "data has 5 bytes, not 10"),
        (lambda path: (path / "data").write_bytes(b"0123456789"), "differs from its SHA-256"),
    ],
    ids=["no marker", "half marker", "no mapping", "lost file", "cut file", "changed file"],
)
def test_a_damaged_one_is_skipped_with_its_name(
    checkpoints: Checkpoints, damage, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkpoints, 1)
    write(checkpoints, 2)
    damage(checkpoints.folder / "step-00000002")
    found = checkpoints.newest()
    assert found is not None and found.step == 1
    output = capsys.readouterr().out
    assert str(checkpoints.folder / "step-00000002") in output and said in output
    write(checkpoints, 2)  # in its place
    again = checkpoints.newest()
    assert again is not None and again.step == 2


def test_what_a_kill_left_half_written_is_removed(checkpoints: Checkpoints) -> None:
    half = checkpoints.folder / "step-00000009.partial"
    half.mkdir()
    (half / "data").write_bytes(b"1")
    assert checkpoints.newest() is None
    checkpoints.close()
    with Checkpoints(half.parent, limit=1) as again:
        assert not half.exists() and again.newest() is None


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["bytes", "torch", "safetensors"])
def test_a_full_disk_is_one_sentence_and_leaves_the_previous_one(
    checkpoints: Checkpoints, kind: str
) -> None:
    write(checkpoints, 1)
    model = torch.nn.Linear(100, 100)

    def fill(folder: Path) -> None:
        if kind == "bytes":
            (folder / "data").write_bytes(bytes(20_000))
        elif kind == "torch":
            save_state(folder, "optimizer.pt", model.state_dict())
        else:
            save_trainable(trainable(model), folder)

    with _files_no_larger_than(10_000), pytest.raises(TrainingError) as caught:
        checkpoints.write(2, {}, fill, None)
    text = str(caught.value)
    assert "step-00000002 can't be written" in text and "File too large" in text, text
    assert "the last complete one is step-00000001" in text and ROOT_VARIABLE in text
    assert steps(checkpoints) == ["step-00000001"]
    assert checkpoints.newest() is not None


def test_a_second_living_process_goes_on_from_the_first_in_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    with Checkpoints(tmp_path / "key", limit=1) as first:
        write(first, 1)
        with Checkpoints(tmp_path / "key", limit=1, patience_seconds=0) as second:
            assert first.folder != second.folder and second.folder.name == "key.2"
            found = second.newest()
            assert found is not None and found.notes == {"of": 1}
            assert found.path == second.folder / "step-00000001"
            write(second, 2)
            assert steps(first) == ["step-00000001"], "nobody writes in another's folder"
    with Checkpoints(tmp_path / "key", limit=1) as third:
        assert third.folder == first.folder
        found = third.newest()
        assert found is not None and found.step == 2, "of the one that had come further"
        with Checkpoints(tmp_path / "key", limit=1, patience_seconds=0) as fourth:
            write(fourth, 3)
            third.discard()
            assert fourth.newest() is not None and not third.folder.exists()


def test_what_ended_processes_left_beside_goes_with_the_run(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "key", limit=1) as first:
        with Checkpoints(tmp_path / "key", limit=1, patience_seconds=0) as second:
            write(second, 1)
        with Checkpoints(tmp_path / "other", limit=1) as other:
            write(other, 1)
        first.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


_WAITING = """
import sys
from pathlib import Path
from tuneline.finetune.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1]), limit=1) as checkpoints:
    found = checkpoints.newest()
    print(checkpoints.folder.name, found and found.step, flush=True)
"""


@pytest.mark.parametrize("ends_well", [False, True])
def test_a_retry_waits_for_the_lock_of_a_process_that_is_not_quite_gone(
    tmp_path: Path, ends_well: bool
) -> None:
    with Checkpoints(tmp_path / "key", limit=1) as first:
        write(first, 7)
        retry = subprocess.Popen(
            [sys.executable, "-c", _WAITING, str(tmp_path / "key")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert retry.stdout is not None
        waits = retry.stdout.readline()
        assert f"another process holds {tmp_path / 'key'}: waiting up to 120 s" in waits
        if ends_well:
            first.discard()
    rest, _ = retry.communicate(timeout=60)
    assert rest.split() == ["key", "None" if ends_well else "7"]


@pytest.mark.parametrize("survives", ["new", "old"])
def test_writing_a_step_again_leaves_one_that_is_complete_at_any_moment(
    tmp_path: Path, survives: str
) -> None:
    folder = tmp_path / "key"
    with Checkpoints(folder, limit=1) as checkpoints:
        write(checkpoints, 4)
    # as the disk is when a kill comes between the two renames: the old one is out of the way
    (folder / "step-00000004").rename(folder / "step-00000004.replaced.partial")
    if survives == "new":
        with Checkpoints(tmp_path / "other", limit=1) as other:
            write(other, 4, of="again")
        (tmp_path / "other" / "step-00000004").rename(folder / "step-00000004.partial")
    with Checkpoints(folder, limit=1) as again:
        found = again.newest()
        assert found is not None
        assert found.notes == {"of": "again" if survives == "new" else 4}
        assert not list(folder.glob("*.partial"))


def test_a_kill_at_any_call_of_a_second_write_loses_no_step(tmp_path: Path) -> None:
    """Each system call that changes a name or removes something, one after the other."""
    done = False
    number = 0
    while not done:
        folder = tmp_path / str(number)
        with Checkpoints(folder, limit=1) as checkpoints:
            write(checkpoints, 4)
        pid = os.fork()
        if pid == 0:
            _write_again_and_die_at(folder, number)
        _, status = os.waitpid(pid, 0)
        done = os.waitstatus_to_exitcode(status) == 0
        with Checkpoints(folder, limit=1) as again:
            found = again.newest()
            assert found is not None and found.step == 4, f"killed at call {number}"
        number += 1
    assert number > 5


def _write_again_and_die_at(folder: Path, number: int) -> None:
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            if seen == number:
                os._exit(1)
            seen += 1

    with Checkpoints(folder, limit=1) as checkpoints:
        assert checkpoints.newest() is not None
        sys.addaudithook(count)
        write(checkpoints, 4, of="again")
    os._exit(0)


def test_a_place_that_can_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"can't be kept in .*file/key \(Not a directory\)"):
        Checkpoints(tmp_path / "file" / "key", limit=1)


def test_the_folder_follows_the_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = folder_of({"a": 1, "b": 2}, tmp_path / "out")
    assert beside.parent == tmp_path / "out.checkpoints"
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "root"))
    folder = folder_of({"b": 2, "a": 1}, tmp_path / "elsewhere")
    assert folder.parent == tmp_path / "root" and folder.name == beside.name
    assert folder_of({"a": 1, "b": 3}, tmp_path / "out").name != folder.name


def test_only_trainable_parameters_are_kept(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    save_trainable(trainable(model), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["1.bias", "1.weight"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model[1].weight.add_(1)
    load_trainable(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_trainable(trainable(torch.nn.Linear(3, 3)), tmp_path)
    with pytest.raises(TrainingError, match="is of another model or method"):
        load_trainable(torch.nn.Linear(3, 3, bias=False), tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="weight is not finite"):
        save_trainable(trainable(model), tmp_path)


def test_the_marker_lists_every_file(checkpoints: Checkpoints) -> None:
    write(checkpoints, 7, size=3)
    marker = json.loads((checkpoints.folder / "step-00000007" / MARKER).read_text())
    assert marker["files"]["data"]["size_bytes"] == 3 and marker["step"] == 7
