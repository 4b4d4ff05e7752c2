"""A retraining does new work once: decided on a real MLflow store, from the data's content."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuneline import base_model, form, recipe, steps
from tuneline.artifacts import digest_of_file
from tuneline.data_prep.sources import BLOCK_ROWS, pinned
from tuneline.errors import DataError, ModelError
from tuneline.register import tags
from tuneline.register.register import register
from tuneline.retrain import decide, fingerprints, ledger
from tuneline.retrain.profile import drift_between, profile_of
from tuneline.tracking import Untracked, finish_run, open_client

COLOURS = ("red", "green", "blue")


def write_rows(path: Path, count: int, word: str = "colour", first: int = 0) -> Path:
    """A chat a line."""
    rows = [
        {"messages": [
            {"role": "user", "content": f"{word} {n}?"},
            {"role": "assistant", "content": COLOURS[n % 3]},
        ]}
        for n in range(first, first + count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class World:
    """A store, a model, a file of rows, and runs on them."""

    def __init__(self, rows: Path, model: Path) -> None:
        self.rows = rows
        self.overrides: dict[str, Any] = {}
        self._values = {
            **form.DEFAULTS,
            "base_model": str(model),
            "train_data": str(rows),
            "test_data": "",
            "model_name": "m",
            "experiment": "e",
        }

    def check(self, run_id: str) -> decide.Decision:
        """The first step of a run."""
        result = self.decided(run_id)
        action, reason, key, version = result[-4:]
        return decide.Decision(action, reason, key, version)

    def decided(self, run_id: str) -> tuple[Any, ...]:
        """All that the first step of a run gives."""
        return steps.check_retrain(
            values=self._values,
            method="lora",
            overrides=self.overrides,
            run_id=run_id,
            experiment="e",
        )

    def finish(self, run_id: str) -> None:
        """The last step of a run."""
        finish_run(run_id, "e")

    def entries(self) -> list[ledger.Entry]:
        return ledger.read(open_client(), "m")

    def parent(self, run_id: str) -> Any:
        client = open_client()
        experiment = client.get_experiment_by_name("e")
        assert experiment is not None
        query = f"tags.`kfp.run_id` = '{run_id}' and tags.`kfp.task` = 'pipeline'"
        return client.search_runs([experiment.experiment_id], query)[0]


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TUNELINE_MLFLOW_ARTIFACTS", (tmp_path / "artifacts").as_uri())
    return World(write_rows(tmp_path / "rows.jsonl", 30), tiny_model)


def test_new_work_is_done_and_the_same_work_is_not_done_again(world: World) -> None:
    first = world.check("a")
    assert (first.action, first.reason) == ("train", "m has not been retrained before")
    again = world.check("a")  # the step is retried
    assert again == first and len(world.entries()) == 1
    world.finish("a")
    second = world.check("b")
    assert second.action == "nothing" and second.key == first.key
    assert "did this work: nothing was registered" in second.reason
    assert world.parent("b").info.status == "FINISHED"  # it ends there
    assert len(world.entries()) == 1


def test_changed_data_recipe_or_image_is_new_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.check("a")
    world.finish("a")
    write_rows(world.rows, 40)
    changed = world.check("b")
    assert changed.action == "train"
    assert changed.reason == "the data changed (40 rows to train on, 30 before)"
    world.finish("b")
    world.overrides = {"training": {"seed": 7}}
    assert world.check("c").reason == "recipe, base model or image changed"
    world.finish("c")
    for number, name in enumerate(("TUNELINE_IMAGE", "TUNELINE_CPU_IMAGE")):
        monkeypatch.setenv(name, "tuneline@sha256:1")
        assert world.check(f"d{number}").action == "train"
        world.finish(f"d{number}")
    # where it is recorded and when it is due is no work
    world.overrides = {"training": {"seed": 7}, "retrain": {"min_new_rows": 5}}
    assert world.check("e").action == "nothing"
    keys = [entry.key for entry in world.entries()]
    assert len(set(keys)) == len(keys) == 5


def test_a_changed_file_of_the_evaluation_is_new_work(world: World, tmp_path: Path) -> None:
    texts, documents, task = (tmp_path / n for n in ("texts.txt", "documents.jsonl", "task.yaml"))
    texts.write_text("Rain fell.")
    documents.write_text('{"question": "1+1=", "answer": "2"}\n')
    task.write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: documents.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match}]\n"
    )
    world.overrides = {
        "evaluation": {"forgetting_sets": {"rain": str(texts)}, "tasks": [str(task)]}
    }
    keys = [world.check("a").key]
    for file in (texts, documents, task):
        file.write_text(file.read_text() + " ")
        keys.append(world.check(f"with {file.name}").key)
    assert keys[3] == keys[2]  # a blank in YAML says nothing else
    task.write_text(task.read_text().replace("question", "q"))
    keys.append(world.check("other").key)
    assert len(set(keys)) == 4


def test_a_run_leaves_work_to_another_one_that_is_at_it(world: World) -> None:
    world.check("a")
    other = world.check("b")
    assert other.action == "nothing" and "run a of" in other.reason
    assert "is at this work" in other.reason
    assert len(world.entries()) == 1


def test_work_of_a_run_that_failed_or_fell_silent_is_taken_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.check("a")
    client = open_client()
    client.set_terminated(world.parent("a").info.run_id, "FAILED")
    assert world.check("b").action == "nothing"  # KFP may try the step again
    monkeypatch.setattr(ledger, "_RETRY_SECONDS", -1)
    assert world.check("c").action == "train"
    assert world.check("d").action == "nothing"
    monkeypatch.setattr(ledger, "_LOST_SECONDS", -1)
    assert world.check("e").action == "train"


def test_a_local_run_that_was_killed_is_lost_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from tuneline.retrain.ledger import runner; print(runner())"],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    monkeypatch.setenv(ledger.RUNNER_VARIABLE, process.stdout.strip())
    assert world.check("a").action == "train"
    monkeypatch.setenv(ledger.RUNNER_VARIABLE, ledger.runner())
    assert world.check("b").action == "train"
    assert world.check("c").action == "nothing"  # the process of b is this one
    monkeypatch.setattr(ledger.socket, "gethostname", lambda: "elsewhere")
    assert world.check("d").action == "nothing"  # another machine can't tell: MLflow says it runs


def register_work(candidate: tuple[Path, Path], run_id: str, key: str) -> int:
    return register(*candidate, "m", run_id, Untracked(), retrain_key=key)


def test_what_was_registered_by_a_lost_run_is_promoted_and_not_made_again(
    world: World,
    make_candidate: Callable[..., tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = world.check("a").key
    version = register_work(make_candidate("lost"), "a", key)
    assert world.check("b").action == "nothing"
    monkeypatch.setattr(ledger, "_LOST_SECONDS", -1)
    decided = world.check("c")
    assert (decided.action, decided.version) == ("promote", version)
    assert f"m version {version} was made of exactly this" in decided.reason
    assert steps.promote({"model_name": "m"}, version, "c", "e") == "champion"
    # and once it was judged, nothing is done: a rollback is not undone by a schedule
    decided = world.check("d")
    assert (decided.action, decided.version) == ("nothing", version)
    assert "alias challenger, champion" in decided.reason


def test_two_runs_that_register_the_same_work_make_one_version(
    world: World, make_candidate: Callable[..., tuple[Path, Path]]
) -> None:
    key = world.check("a").key
    first = register_work(make_candidate("one"), "a", key)
    # another training of the same work has other bytes
    assert register_work(make_candidate("two", tuned=0.9), "b", key) == first
    assert register_work(make_candidate("three"), "c", "sha256:other") == first + 1
    client = open_client()
    assert client.get_model_version("m", str(first)).tags[tags.RETRAIN_KEY] == key


def test_changed_data_waits_for_a_trigger(world: World) -> None:
    world.overrides = {"retrain": {"min_new_rows": 10, "min_drift": 0.4}}
    assert world.check("a").action == "train"
    world.finish("a")
    write_rows(world.rows, 35)
    waiting = world.check("b")
    assert waiting.action == "nothing"
    assert "no trigger is met: new rows 5 of 10, drift 0." in waiting.reason
    write_rows(world.rows, 45)
    enough = world.check("c")
    assert enough.action == "train" and "new rows 15 of 10" in enough.reason
    world.finish("c")
    write_rows(world.rows, 45, word="an entirely other question, by far longer, about fruit")
    moved = world.check("d")
    assert moved.action == "train" and "drift 1.000 of 0.4" in moved.reason
    world.finish("d")
    write_rows(world.rows, 46, word="an entirely other question, by far longer, about fruit")
    world.overrides = {"retrain": {"max_champion_age_days": 7}}
    assert "champion's age none yet" in world.check("e").reason


def test_rows_that_replace_others_are_new_and_copies_are_not(world: World) -> None:
    world.overrides = {"retrain": {"min_new_rows": 10}}
    world.check("a")
    world.finish("a")
    text = world.rows.read_text()
    world.rows.write_text(text * 3)
    assert "no trigger is met: new rows 0 of 10" in world.check("b").reason
    write_rows(world.rows, 30, first=9)  # a window that slides
    assert "no trigger is met: new rows 9 of 10" in world.check("c").reason
    write_rows(world.rows, 30, first=10)
    slid = world.check("d")
    assert slid.action == "train" and "new rows 10 of 10" in slid.reason


def test_only_changed_data_waits_for_a_trigger(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggers = {"retrain": {"min_new_rows": 1000}}
    world.overrides = triggers
    world.check("a")
    world.finish("a")
    world.overrides = {**triggers, "training": {"seed": 7}}
    changed = world.check("b")
    assert (changed.action, changed.reason) == ("train", "recipe, base model or image changed")
    world.finish("b")
    monkeypatch.setenv("TUNELINE_IMAGE", "tuneline@sha256:2")
    assert world.check("c").action == "train"
    world.finish("c")
    write_rows(world.rows, 31)
    assert "no trigger is met" in world.check("d").reason
    monkeypatch.setenv("TUNELINE_IMAGE", "tuneline@sha256:3")
    assert world.check("e").reason == (
        "the data changed (31 rows to train on, 30 before); recipe, base model or image changed"
    )


@pytest.mark.usefixtures("world")
def test_files_that_come_after_the_decision_are_the_next_run_s(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bucket"
    folder.mkdir()
    write_rows(folder / "b.jsonl", 30)
    base, data, *_, expected, _, _, _, _ = World(folder, tiny_model).decided("a")
    write_rows(folder / "a.jsonl", 31)
    write_rows(folder / "c.jsonl", 32)
    output = tmp_path / "prepared"
    steps.prepare_data(base, data, str(output), "a", "e", expected=expected)
    manifest = json.loads((output / "manifest.json").read_text())
    assert list(manifest["inputs"]) == [str(folder / "b.jsonl")]
    assert f"came to {folder} after it was decided what to read" in capsys.readouterr().out
    shutil.rmtree(output)
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"of .*bucket no file is there any more"):
        steps.prepare_data(base, data, str(output), "a", "e", expected=expected)
    assert not output.exists()


def test_data_that_changes_after_the_decision_is_not_prepared(
    world: World, tmp_path: Path, tiny_model: Path
) -> None:
    base, data, *_, expected, _, _, _, _ = world.decided("a")
    output = tmp_path / "prepared"

    def prepare() -> None:
        steps.prepare_data(base, data, str(output), "a", "e", expected=expected)

    prepare()
    assert (output / "manifest.json").exists()
    shutil.rmtree(output)
    write_rows(world.rows, 31)
    with pytest.raises(DataError, match=r"the data \(.*rows.jsonl\) changed after check_retrain"):
        prepare()
    assert not output.exists()
    write_rows(world.rows, 30)
    expected["base_model"] = "sha256:another"
    with pytest.raises(DataError, match="the base model changed after check_retrain"):
        prepare()
    steps.prepare_data(base, data, str(output), "a", "e", expected={})  # of any other pipeline


def test_a_data_set_of_the_hub_is_pinned_where_the_decision_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import HfApi

    asked = []

    def dataset_info(self: Any, repository: str, revision: str | None = None) -> Any:
        asked.append((repository, revision))
        return SimpleNamespace(sha="b" * 40)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    moving = recipe.Source(path="hf://org/rows@main")
    fixed = recipe.Source(path=f"hf://org/rows@{'a' * 40}")
    assert pinned(moving).path == f"hf://org/rows@{'b' * 40}"
    assert pinned(fixed) == fixed and asked == [("org/rows", "main")]


class PluginRuns:
    """The runs that KFP's MLflow plugin makes for a retraining."""

    def __init__(self) -> None:
        self.client = open_client()
        self._experiment = self.client.create_experiment("kfp")
        self.root = self.make("")

    def make(self, parent: str) -> str:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        return self.client.create_run(self._experiment, tags=tags).info.run_id


def test_training_below_a_condition_of_kfps_plugin_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = PluginRuns()
    with monkeypatch.context() as environment:
        environment.setenv("MLFLOW_RUN_ID", plugin.make(plugin.root))
        assert world.check("a").action == "train"
    entry = world.entries()[0]
    later = decide.time.time() + 2 * ledger._LOST_SECONDS
    monkeypatch.setattr(ledger.time, "time", lambda: later)
    assert ledger.state_of(plugin.client, entry) == "dead"
    # the driver of the step made its run, below that of the condition, and its pod waits
    condition = plugin.make(plugin.root)
    plugin.client.set_terminated(condition, "FINISHED")
    step = plugin.make(condition)
    plugin.client.log_metric(step, "loss", 1.0, timestamp=int((later - 60) * 1000))
    plugin.client.set_terminated(step, "FAILED", end_time=1)  # the try before
    assert ledger.state_of(plugin.client, entry) == "alive"


def test_an_unchanged_base_model_is_not_read_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    monkeypatch.setattr(base_model, "_SETTLED_NANOSECONDS", -1)
    read: list[str] = []

    def counted(file: Path) -> str:
        read.append(file.name)
        return digest_of_file(file)

    monkeypatch.setattr(base_model, "digest_of_file", counted)
    first = base_model.content_key(str(folder))
    assert first == base_model.digest_of_model(folder) and "model.safetensors" in read
    read.clear()
    assert base_model.content_key(str(folder)) == first and read == []
    config = folder / "config.json"
    times = (config.stat().st_atime_ns, config.stat().st_mtime_ns)
    config.write_text(config.read_text().replace("}", " }", 1))
    os.utime(config, ns=times)  # as a copy that keeps times does
    assert base_model.content_key(str(folder)) != first and read == ["config.json"]
    # what the hub has is named by its commit, and not fetched
    hub = f"hf://org/name@{'a' * 40}"
    assert base_model.content_key(hub) == hub
    with pytest.raises(ModelError, match="is not pinned"):
        base_model.content_key("hf://org/name@main")


def test_an_old_champion_lets_a_small_change_train(
    world: World, make_candidate: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.overrides = {"retrain": {"max_champion_age_days": 7}}
    version = register_work(make_candidate("old"), "a", world.check("a").key)
    steps.promote({"model_name": "m"}, version, "a", "e")
    write_rows(world.rows, 31)
    assert "champion's age 0.0 of 7 days" in world.check("b").reason
    later = decide.time.time() + 8 * 86400
    monkeypatch.setattr(decide.time, "time", lambda: later)
    assert world.check("c").action == "train"


def test_a_step_without_mlflow_is_refused_and_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneline.errors import DataError, RegistryError

    world.rows.unlink()
    with pytest.raises(DataError, match="can't be read"):
        world.check("a")
    assert world.entries() == []
    assert world.parent("a").info.status == "FAILED"
    write_rows(world.rows, 5)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI"):
        world.check("b")


def profile(*sources: Path, **data: Any) -> Any:
    return profile_of(recipe.DataSection.model_validate({"train": list(map(str, sources)), **data}))


def test_a_profile_counts_all_rows_and_samples_by_content(tmp_path: Path) -> None:
    rows = BLOCK_ROWS * 2 + 7
    path = write_rows(tmp_path / "a.jsonl", rows)
    first = profile(path)
    assert first.rows == rows and sum(first.lengths) == 2000
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n\n")
    second = profile(backwards)
    assert (second.rows, second.words, second.lengths) == (first.rows, first.words, first.lengths)
    assert first.digests != second.digests and drift_between(first, second) == 0
    held_out = profile(path, test=[str(backwards)])
    assert held_out.rows == rows and set(held_out.digests) == {str(path), str(backwards)}


def test_a_sketch_of_more_rows_than_it_keeps_estimates_the_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import random

    monkeypatch.setattr(fingerprints, "MOST", 2**12)
    numbers = random.Random(5)
    rows = [numbers.getrandbits(32) for _ in range(60_000)]

    def taken(some: list[int]) -> fingerprints.Fingerprints:
        collector = fingerprints.Collector()
        for row in some:
            collector.add(row)
        found = collector.result()
        assert len(found.values) == 2**12
        again = fingerprints.Fingerprints.from_json(json.loads(json.dumps(found.as_json())))
        assert (again.values == found.values).all() and again.below == found.below
        return again

    before, now = taken(rows[:50_000]), taken(rows[10_000:])
    error = (10_000 * 60_000 / 2**12) ** 0.5  # one standard error, as the module says
    assert abs(fingerprints.rows_added(before, now) - 10_000) < 3 * error
    assert fingerprints.rows_added(now, now) == 0


def test_drift_is_small_between_samples_of_one_kind_and_large_between_kinds(tmp_path: Path) -> None:
    old = profile(write_rows(tmp_path / "a.jsonl", 9000))
    new = profile(write_rows(tmp_path / "b.jsonl", 9000, first=2000))
    other = profile(write_rows(tmp_path / "c.jsonl", 9000, word="what does the customer order"))
    assert drift_between(old, new) < 0.3 < 0.6 < drift_between(old, other) <= 1


def test_tables_have_a_profile_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), path)
    found = profile(path)
    assert found.rows == 2 and sum(found.words) == 4
