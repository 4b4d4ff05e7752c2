"""Object stores: `s3://bucket/prefix` for a base, an output, data and checkpoints.

Weights are read and written many times where they lie, so a model from a store is brought to disk
once, into the cache, and an artifact for one is finished on disk before it is sent. Objects become
visible one by one: a folder's marker (an artifact's manifest) is sent last, and only with it the
folder exists. A data file is brought to disk too, once for each state of its object.

Endpoint, region and credentials come from where every S3 client has them: `AWS_ENDPOINT_URL`,
`AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`, a pod's role.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tuneline.artifacts import MANIFEST, FileEntry, digest_of
from tuneline.errors import StorageError
from tuneline.progress import tick

SCHEME: Final = "s3://"
_SHA256: Final = "sha256"
"""Of the object, in its metadata: what a stopped upload has sent is known by it."""
_MAGIC: Final = "*?["
_WORTH_A_LINE_BYTES: Final = 10**7
_NOT_THERE: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_HURRY: Final = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
"""For what has to end within a grace period: a store that does not answer is known after 15 s."""


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it."""

    url: str
    size_bytes: int
    etag: str
    """Changes with the content."""


def is_remote(reference: str) -> bool:
    """Whether it names a place in an object store."""
    return reference.startswith(SCHEME)


class Folder:
    """The objects below a prefix, through one client.

    Every method raises StorageError if the store can't be reached or refuses.

    Args:
        url: `s3://bucket/prefix`.
        hurried: give up soon on a store that does not answer.
    """

    def __init__(self, url: str, *, hurried: bool = False) -> None:
        self.url = url
        self._bucket, self._prefix = _place(url)
        with _errors(url):
            self._client = _client(hurried=hurried)

    def entries(self, below: str = "") -> dict[str, dict[str, Any]]:
        """Name below the prefix -> `Size`, `ETag`, `LastModified`.

        Args:
            below: what the names begin with.
        """
        with _errors(self.url):
            found = _objects(self._client, self._bucket, self._prefix + below)
            return {entry["Key"].removeprefix(self._prefix): entry for entry in found}

    def read(self, name: str) -> bytes | None:
        """A small object, or None if it is not there."""
        with _errors(f"{self.url}/{name}"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
                return answer["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None

    def write(self, name: str, content: bytes) -> None:
        """A small object."""
        with _errors(f"{self.url}/{name}"):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=content)

    def fetch(self, name: str, target: Path) -> None:
        """Bring an object to disk."""
        with _errors(f"{self.url}/{name}"):
            self._client.download_file(self._bucket, self._prefix + name, str(target))

    def send(
        self,
        folder: Path,
        files: Mapping[str, FileEntry],
        below: str = "",
        there: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Send files; what an earlier try has sent is not sent again.

        Args:
            folder: that the files lie in.
            files: name -> size and digest.
            below: put before the names, such as `step-1/`.
            there: entries of the store by their whole name, None: asked for.
        """
        there = self.entries(below) if there is None else there
        for name, entry in files.items():
            key = f"{self._prefix}{below}{name}"
            with _errors(f"{self.url}/{below}{name}"):
                found = there.get(below + name)
                if found is not None and found["Size"] == entry.size_bytes:
                    sent = self._client.head_object(Bucket=self._bucket, Key=key)
                    if sent["Metadata"].get(_SHA256) == entry.sha256:
                        continue
                if entry.size_bytes >= _WORTH_A_LINE_BYTES:
                    tick(f"sending {name}, {entry.size_bytes / 1e9:.2f} GB")
                self._client.upload_file(
                    str(folder / name),
                    self._bucket,
                    key,
                    ExtraArgs={"Metadata": {_SHA256: entry.sha256}},
                )

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects in this order; what is not there is no fault."""
        with _errors(self.url):
            for name in names:
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def abort_uploads(self) -> None:
        """Give up what killed processes have begun to send: a store keeps the parts, unseen."""
        with _errors(self.url):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for upload in [u for page in pages for u in page.get("Uploads", ())]:
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )


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
    source = Folder(url)
    found = {
        name: entry
        for name, entry in source.entries().items()
        if any(fnmatch(name, pattern) for pattern in patterns) and is_plain(name)
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
        source.fetch(name, half)
        half.rename(target)
    aside.rename(folder)
    return folder


def find_objects(pattern: str) -> list[StoredObject]:
    """The object of that name, or all below it as a folder, or all that a glob matches; sorted.

    Args:
        pattern: `s3://bucket/key`, `s3://bucket/prefix`, or either with `*`, `?`, `[]` and `**`.

    Raises:
        StorageError: the store can't be reached or refuses, or the pattern is none.
    """
    bucket, _, key = pattern.removeprefix(SCHEME).partition("/")
    if not bucket or any(character in bucket for character in _MAGIC):
        raise StorageError(f"{pattern} is not of the form {SCHEME}bucket/key")
    with _errors(pattern):
        client = _client()
        if any(character in key for character in _MAGIC):
            matches = _glob(pattern, key).fullmatch
            fixed = re.split(r"[*?\[]", key, maxsplit=1)[0]
            found = [e for e in _objects(client, bucket, fixed) if matches(e["Key"])]
        else:
            found = _object_or_folder(client, bucket, key)
    return sorted(
        (
            StoredObject(f"{SCHEME}{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])
            for entry in found
            if not entry["Key"].endswith("/")  # what some tools make to show an empty folder
        ),
        key=lambda entry: entry.url,
    )


def _glob(pattern: str, key: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    try:
        return re.compile(glob_translate(key))
    except (ValueError, re.error) as error:
        raise StorageError(f"{pattern} is not a pattern: {error}") from error


def _object_or_folder(client: Any, bucket: str, key: str) -> list[dict[str, Any]]:
    from botocore.exceptions import ClientError

    refused: ClientError | None = None
    if key and not key.endswith("/"):
        try:
            answer = client.head_object(Bucket=bucket, Key=key)
            return [{"Key": key, "Size": answer["ContentLength"], "ETag": answer["ETag"]}]
        except ClientError as error:  # it says a number only: listing says why
            if error.response["Error"]["Code"] not in _NOT_THERE:
                refused = error
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    found = list(_objects(client, bucket, prefix))
    if refused is not None and not found:
        raise refused
    return found


def fetch_object(found: StoredObject, cache: Path, limit_bytes: int) -> Path:
    """Bring an object to disk, once for each state of it.

    Args:
        found: as `find_objects` gave it.
        cache: folder of such files, and of nothing else.
        limit_bytes: of the files in the cache together; those go first that were not used for
            longest. The one that is fetched may be larger.

    Raises:
        StorageError: the store can't be reached, the object was changed since it was found, or
            the disk is full.
    """
    target = cache / digest_of([found.url, found.size_bytes, found.etag]).removeprefix("sha256:")
    with contextlib.suppress(OSError):
        os.utime(target)  # what is used is not pruned
        if target.stat().st_size == found.size_bytes:
            return target
    bucket, _, key = found.url.removeprefix(SCHEME).partition("/")
    half = target.with_name(f"{target.name}.{os.getpid()}.half")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _prune(cache, limit_bytes - found.size_bytes)
        with _errors(found.url):
            client = _client()
            tick(f"fetching {found.url}, {found.size_bytes / 1e9:.2f} GB")
            client.download_file(bucket, key, str(half))
            if client.head_object(Bucket=bucket, Key=key)["ETag"] != found.etag:
                raise StorageError(f"{found.url} was changed while it was read: run it again")
        half.rename(target)
    except OSError as error:
        raise StorageError(
            f"{found.url} can't be brought to {cache} ({error.strerror or error}): free space, or "
            "name another place in TUNELINE_CACHE"
        ) from error
    finally:
        half.unlink(missing_ok=True)
    return target


def _prune(cache: Path, limit_bytes: int) -> None:
    entries = []
    for path in cache.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def check_free(url: str) -> None:
    """Refuse a place that holds an artifact already.

    Raises:
        StorageError: it does, or the store can't be reached.
    """
    if MANIFEST in Folder(url).entries():
        raise StorageError(
            f"{url} holds an artifact already, which is never overwritten: name another place"
        )


def send_artifact(folder: Path, url: str) -> None:
    """Send a sealed artifact, its manifest last; what an earlier try has sent is not sent again.

    Raises:
        StorageError: the store can't be reached, refuses, or holds something else there.
    """
    manifest = (folder / MANIFEST).read_bytes()
    files = {name: FileEntry(**entry) for name, entry in json.loads(manifest)["files"].items()}
    target = Folder(url)
    there = target.entries()
    known = files.keys()
    if MANIFEST in there and target.read(MANIFEST) == manifest:
        known |= {MANIFEST}  # an earlier try was done
    if strangers := sorted(there.keys() - known):
        raise StorageError(
            f"{url} holds {strangers[0]}, which is no part of this artifact: name an empty "
            "place, or remove what is there"
        )
    target.send(folder, files, there=there)
    target.write(MANIFEST, manifest)


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


def is_plain(name: str) -> bool:
    """Whether it stays below the folder that it is put in: a key may be any text."""
    return not any(part in ("", ".", "..") for part in name.split("/"))


def _objects(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def _client(*, hurried: bool = False) -> Any:
    # one is 0.1 s of CPU time, and a data set may have 10,000 objects
    said = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _client_of(said, hurried)


@lru_cache(maxsize=4)
def _client_of(environment: tuple[tuple[str, str], ...], hurried: bool) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    del environment  # boto3 reads it: another one is another client
    try:
        # not the default session, which keeps the credentials that it has read first
        return Session().client("s3", config=Config(**_HURRY) if hurried else None)
    except ValueError as error:  # an endpoint that is no URL
        raise StorageError(
            f"the object store can't be used ({error}): set AWS_ENDPOINT_URL to its URL"
        ) from error


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
