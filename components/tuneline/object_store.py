"""Models in an object store: `s3://bucket/prefix` as the folder of a base, and as an output.

Weights are read and written many times where they lie, so a model from a store is brought to disk
once, into the cache, and an artifact for one is finished on disk before it is sent. Objects become
visible one by one: an artifact's manifest is sent last, and only with it the artifact exists.

Endpoint, region and credentials come from where every S3 client has them: `AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_ACCESS_KEY_ID`, a pod's role.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from tuneline.artifacts import MANIFEST, FileEntry, digest_of
from tuneline.errors import StorageError
from tuneline.progress import tick

SCHEME: Final = "s3://"
_SHA256: Final = "sha256"
"""Of the object, in its metadata: what a stopped upload has sent is known by it."""


def is_remote(reference: str) -> bool:
    """Whether it names a place in an object store."""
    return reference.startswith(SCHEME)


def fetch_folder(url: str, cache: Path, patterns: Sequence[str]) -> Path:
    """Bring the objects below a prefix to disk, once for each state of the store.

    Args:
        url: `s3://bucket/prefix`.
        cache: below which the folder is made.
        patterns: of the names that are wanted; one without a slash is for the folder itself.

    Returns:
        The folder. A download that was stopped goes on after its last whole file.

    Raises:
        StorageError: the store can't be reached, or has nothing there.
    """
    bucket, prefix = _place(url)
    with _errors(url):
        client = _client()
        found = {
            name: entry
            for name, entry in _objects(client, bucket, prefix)
            if any(fnmatch(name, pattern) for pattern in patterns) and _is_plain(name)
        }
        if not found:
            raise StorageError(f"{url} has no model: give the prefix that config.json lies below")
        state = {name: [entry["Size"], entry["ETag"]] for name, entry in sorted(found.items())}
        folder = cache / digest_of([url, state]).removeprefix("sha256:")[:24]
        if folder.is_dir():
            return folder
        aside = folder.with_name(f"{folder.name}.partial")
        aside.mkdir(parents=True, exist_ok=True)
        for name, entry in found.items():
            target = aside / name
            if target.is_file() and target.stat().st_size == entry["Size"]:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            tick(f"fetching {name}, {entry['Size'] / 1e9:.2f} GB")
            half = target.with_name(f"{target.name}.half")
            client.download_file(bucket, f"{prefix}{name}", str(half))
            half.rename(target)
    aside.rename(folder)
    return folder


def check_free(url: str) -> None:
    """Refuse a place that holds an artifact already.

    Raises:
        StorageError: it does, or the store can't be reached.
    """
    bucket, prefix = _place(url)
    with _errors(url):
        if any(name == MANIFEST for name, _ in _objects(_client(), bucket, prefix)):
            raise StorageError(
                f"{url} holds an artifact already, which is never overwritten: name another place"
            )


def send_artifact(folder: Path, url: str) -> None:
    """Send a sealed artifact, its manifest last; what an earlier try has sent is not sent again.

    Raises:
        StorageError: the store can't be reached, refuses, or holds something else there.
    """
    bucket, prefix = _place(url)
    files = {
        name: FileEntry(**entry)
        for name, entry in json.loads((folder / MANIFEST).read_text("utf-8"))["files"].items()
    }
    with _errors(url):
        client = _client()
        there = dict(_objects(client, bucket, prefix))
        if strangers := sorted(there.keys() - files.keys()):
            raise StorageError(
                f"{url} holds {strangers[0]}, which is no part of this artifact: name an empty "
                "place, or remove what is there"
            )
        for name, entry in files.items():
            key = f"{prefix}{name}"
            if name in there and there[name]["Size"] == entry.size_bytes:
                sent = client.head_object(Bucket=bucket, Key=key)
                if sent["Metadata"].get(_SHA256) == entry.sha256:
                    continue
            tick(f"sending {name}, {entry.size_bytes / 1e9:.2f} GB")
            client.upload_file(
                str(folder / name), bucket, key, ExtraArgs={"Metadata": {_SHA256: entry.sha256}}
            )
        client.upload_file(str(folder / MANIFEST), bucket, f"{prefix}{MANIFEST}")


def by_way_of(url: str, cache: Path, key: str, write: Callable[[Path], None]) -> None:
    """Let `write` make an artifact on disk, send it, and remove it from disk.

    A try that was stopped while it sent does not write again.

    Args:
        url: `s3://bucket/prefix` of the artifact.
        cache: below which it is written; needs the artifact's size.
        key: digest of what is made; what a try for another key has left is not sent.
        write: makes the artifact in the folder that it is given.

    Raises:
        StorageError: the place is taken, or the store can't be reached or refuses.
    """
    check_free(url)
    folder = cache / digest_of([url, key]).removeprefix("sha256:")[:24]
    if not (folder / MANIFEST).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(folder)
    send_artifact(folder, url)
    shutil.rmtree(folder)


def _place(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    prefix = prefix.strip("/")
    if not bucket or not prefix:
        raise StorageError(f"{url} is not of the form {SCHEME}bucket/prefix")
    return bucket, f"{prefix}/"


def _is_plain(name: str) -> bool:
    # a key may be any text, and becomes a path
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _objects(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            yield entry["Key"].removeprefix(prefix), entry


def _client() -> Any:
    import boto3

    return boto3.client("s3")


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        import boto3.exceptions as boto
        import botocore.exceptions as botocore
    except ImportError as error:
        raise StorageError(f"{SCHEME} needs boto3: pip install 'tuneline[s3]'") from error
    try:
        yield
    except (botocore.BotoCoreError, botocore.ClientError, boto.Boto3Error) as error:
        raise StorageError(f"{url}: {error}") from error
