"""Rows from a real object store: each format, folders, globs, and what is not there."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneline import object_store, steps
from tuneline.artifacts import load
from tuneline.data_prep import sources
from tuneline.data_prep.sources import read_blocks
from tuneline.errors import DataError, StorageError
from tuneline.recipe import Source

pytestmark = pytest.mark.slow
BUCKET = "rows"
LINE = b'{"prompt": "p", "completion": "c"}\n'


class Store:
    """What the tests put in, below a prefix of their own."""

    def __init__(self, client: Any, prefix: str, cache: Path) -> None:
        self.client = client
        self.prefix = prefix
        self.cache = cache / "data"
        self.fetched: list[str] = []
        self.digests: dict[str, str] = {}

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}", Body=content)

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{self.prefix}/{name}"

    def rows(self, name: str) -> dict[str, int]:
        """File -> rows of what a source names."""
        counts: dict[str, int] = {}
        self.digests = {}
        for block in read_blocks(Source(path=self.url(name)), self.digests):
            file = block.file.removeprefix(self.url(""))
            counts[file] = counts.get(file, 0) + block.payload.count(b"\n")
        return counts

    def kept(self) -> dict[str, int]:
        """The files in the cache and when they were brought."""
        return {path.name: path.stat().st_ctime_ns for path in self.cache.iterdir()}


@pytest.fixture
def store(
    store_client: Callable[[str], Any], tmp_path: Path, request: pytest.FixtureRequest
) -> Store:
    client = store_client(BUCKET)
    store = Store(client, re.sub(r"\W+", "-", request.node.name), tmp_path / "cache")
    store.put("a.jsonl", LINE * 3)
    store.put("b.jsonl.gz", gzip.compress(LINE * 4))
    store.put("deep/c.jsonl", LINE * 5)
    store.put("deep/er/d.csv", b"prompt,completion\np,c\n")
    store.put("README.md", b"no rows")
    store.put("a.jsonl.old/e.jsonl", LINE * 9)
    return store


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", {"a.jsonl": 3}),
        ("b.jsonl.gz", {"b.jsonl.gz": 4}),
        ("*.jsonl", {"a.jsonl": 3}),
        ("*.jsonl*", {"a.jsonl": 3, "b.jsonl.gz": 4}),
        ("[ab].jsonl*", {"a.jsonl": 3, "b.jsonl.gz": 4}),
        ("dee?/*", {"deep/c.jsonl": 5}),
        ("deep/**/*.*", {"deep/c.jsonl": 5, "deep/er/d.csv": 1}),
        ("deep", {"deep/c.jsonl": 5, "deep/er/d.csv": 1}),
        ("deep/", {"deep/c.jsonl": 5, "deep/er/d.csv": 1}),
    ],
)
def test_an_object_a_folder_and_a_glob_are_their_rows(
    store: Store, name: str, rows: dict[str, int]
) -> None:
    assert store.rows(name) == rows
    assert sorted(store.digests) == [store.url(file) for file in rows]


def test_a_whole_bucket_is_a_folder(store: Store) -> None:
    own = store.client
    own.create_bucket(Bucket="one-file")
    own.put_object(Bucket="one-file", Key="x.jsonl", Body=LINE)
    own.put_object(Bucket="one-file", Key="empty/", Body=b"")
    for path in ("s3://one-file", "s3://one-file/", "s3://one-file/*.jsonl"):
        assert [b.file for b in read_blocks(Source(path=path), {})] == ["s3://one-file/x.jsonl"]


def test_what_did_not_change_is_not_fetched_again_and_what_did_is(store: Store) -> None:
    assert store.rows("*.jsonl*") == {"a.jsonl": 3, "b.jsonl.gz": 4}
    before, digests = store.kept(), store.digests
    os.utime(next(store.cache.iterdir()))
    assert store.rows("*.jsonl*") == {"a.jsonl": 3, "b.jsonl.gz": 4}
    assert store.kept().keys() == before.keys() and store.digests == digests
    store.put("a.jsonl", LINE * 2 + LINE.replace(b"p", b"q"))  # as large as before
    assert store.rows("*.jsonl*") == {"a.jsonl": 3, "b.jsonl.gz": 4}
    changed = {name for name in digests if digests[name] != store.digests[name]}
    assert changed == {store.url("a.jsonl")}
    assert len(store.kept()) == 3 and before.keys() < store.kept().keys()


def test_an_object_that_changes_while_it_is_read_is_refused(store: Store) -> None:
    (found,) = object_store.find_objects(store.url("a.jsonl"))
    store.put("a.jsonl", LINE)
    with pytest.raises(StorageError, match="was changed while it was read: run it again"):
        object_store.fetch_object(found, store.cache, 10**9)
    assert list(store.cache.iterdir()) == []


def test_the_cache_holds_no_more_than_its_limit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_FETCHED_BYTES", 12 * len(LINE))
    store.put("many/0.jsonl", LINE * 5)
    store.put("many/1.jsonl", LINE * 6)
    store.put("many/2.jsonl", LINE * 4)
    store.put("many/3.jsonl", LINE * 20)
    assert store.rows("many") == {f"many/{n}.jsonl": k for n, k in enumerate((5, 6, 4, 20))}
    assert [path.stat().st_size for path in store.cache.iterdir()] == [20 * len(LINE)]
    assert store.rows("many/[012].jsonl") == {f"many/{n}.jsonl": k for n, k in enumerate((5, 6, 4))}
    sizes = sorted(path.stat().st_size // len(LINE) for path in store.cache.iterdir())
    assert sizes == [4, 6]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("c.jsonl", r"c\.jsonl can't be read \(no such object, none below it"),
        ("*.parquet", r"\*\.parquet can't be read \(no such object"),
        ("README.md", r"README\.md can't be read \(the name ends in none of"),
    ],
)
def test_what_is_not_there_is_one_sentence(store: Store, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        store.rows(name)


def test_a_folder_without_data_says_what_it_looks_for(store: Store) -> None:
    store.put("notes/x.txt", b"x")
    with pytest.raises(DataError, match=r"no object below it ends in \.jsonl, "):
        store.rows("notes")


def test_a_file_that_is_cut_short_is_named(store: Store) -> None:
    store.put("cut.jsonl.gz", gzip.compress(LINE * 1000)[:-10])
    with pytest.raises(DataError, match=r"data file s3://rows/.*cut\.jsonl\.gz is cut short"):
        store.rows("cut.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "wrong", "InvalidAccessKeyId"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "Could not connect to the endpoint URL"),
    ],
)
def test_a_store_that_refuses_is_one_error_with_exit_code_1(
    store: Store,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SystemExit) as ended:
        steps.guard(
            steps.prepare_data,
            base_model=str(tiny_model),
            data={"train": [store.url("a.jsonl")]},
            output=str(tmp_path / "out"),
        )
    assert ended.value.code == 1
    (sentence,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert store.url("a.jsonl") in sentence and said in sentence
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(StorageError, match=r"s3://no-bucket-of-rows/a\.jsonl: .*NoSuchBucket"):
        list(read_blocks(Source(path="s3://no-bucket-of-rows/a.jsonl"), {}))
    with pytest.raises(StorageError, match="is not of the form s3://bucket/key"):
        list(read_blocks(Source(path="s3:///a.jsonl"), {}))
    with pytest.raises(StorageError, match="is not a pattern"):
        store.rows("a**b/*.jsonl")


def test_data_is_prepared_from_a_store_and_its_digest_is_recorded(
    store: Store, tiny_model: Path, chats_file: Path, tmp_path: Path
) -> None:
    packed = gzip.compress(chats_file.read_bytes(), mtime=0)
    store.put("train.jsonl.gz", packed)
    data = {"train": [store.url("*.jsonl.gz").replace("*", "train")]}
    steps.prepare_data(str(tiny_model), data, str(tmp_path / "stored"))
    (local := tmp_path / "train.jsonl.gz").write_bytes(packed)
    steps.prepare_data(str(tiny_model), {"train": [str(local)]}, str(tmp_path / "local"))
    stored, plain = (load(tmp_path / name, "prepared_dataset") for name in ("stored", "local"))
    assert stored.manifest.inputs == {data["train"][0]: plain.manifest.inputs[str(local)]}
    shards = [name for name in plain.manifest.files if name.endswith(".arrow")]
    assert shards and all(stored.manifest.files[n] == plain.manifest.files[n] for n in shards)
    assert json.loads((stored.path / "contract.json").read_text())["rows_in"] == 240
