"""Folders and object stores that a run writes to, tried by writing.

Permission bits say little about a mounted volume: a file is written, synchronized, renamed, read
and removed, which is what checkpoints and artifacts need. It is as large as a block that a nearly
full volume no longer has.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tuneline import object_store
from tuneline.base_model import cache_dir
from tuneline.checkpoints_root import ROOT_VARIABLE, local_root, remote_root
from tuneline.errors import TunelineError
from tuneline_pipelines.doctor.finding import Finding, error, ok, warning

CACHE_VARIABLE: Final = "TUNELINE_CACHE"
_PROBE_BYTES: Final = 2**20
_LEAST_FREE_BYTES: Final = 2 * 10**9
"""What the demo needs, twice."""
_LEAST_FREE_TEMPORARY_BYTES: Final = 10**8
_LEAST_SHM_BYTES: Final = 10**9
"""Docker gives 64 MB, which NCCL and worker processes outgrow."""
_SHM: Final = Path("/dev/shm")


def cache() -> Iterator[Finding]:
    """Base models and fetched data."""
    yield folder(CACHE_VARIABLE, cache_dir(), f"set {CACHE_VARIABLE} to a folder that can")


def checkpoints(*, offline: bool = False) -> Iterator[Finding]:
    """Where a stopped training goes on from.

    Args:
        offline: look at nothing on other machines.
    """
    if (url := remote_root()) is not None:
        if offline:
            yield ok(ROOT_VARIABLE, f"{url}, not tried")
        else:
            yield store(ROOT_VARIABLE, url)
        staging = local_root()
        assert staging is not None  # of an object store there is one always
        yield folder(f"{ROOT_VARIABLE} (here)", staging, f"set {CACHE_VARIABLE} to a larger disk")
    elif (place := local_root()) is not None:
        yield folder(ROOT_VARIABLE, place, f"set {ROOT_VARIABLE} to a folder that can")
    else:
        yield ok(ROOT_VARIABLE, "not set: a local run keeps them in its work folder")


def work_folder(path: Path, *, needed: bool) -> Iterator[Finding]:
    """Where a local run keeps everything.

    Args:
        path: of the folder.
        needed: whether there will be a local run; the pods of a cluster have none.
    """
    found = folder("work folder", path.absolute(), "name another with --workdir")
    if found.level == "error" and not needed:
        found = warning(found.name, found.value, f"{found.advice}; only local runs need it")
    yield found


def temporary() -> Iterator[Finding]:
    """`/tmp`, which also must be there where the root file system is read-only, and /dev/shm."""
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as fault:
        yield error("temporary files", str(fault), "mount an empty volume at /tmp, or set TMPDIR")
    else:
        yield folder(
            "temporary files",
            place,
            "mount an empty volume there, or set TMPDIR",
            least_free_bytes=_LEAST_FREE_TEMPORARY_BYTES,
        )
    if not _SHM.is_dir():
        return
    status = os.statvfs(_SHM)
    size = status.f_blocks * status.f_frsize
    text = f"{_amount(size)}, {_amount(status.f_bavail * status.f_frsize)} free"
    if size < _LEAST_SHM_BYTES:
        yield warning(
            "/dev/shm",
            text,
            "too small for several accelerators: docker run --shm-size, or a pool's shm",
        )
    else:
        yield ok("/dev/shm", text)


def folder(
    name: str, path: Path, otherwise: str, *, least_free_bytes: int = _LEAST_FREE_BYTES
) -> Finding:
    """Write into a folder, or where it would be made.

    Args:
        name: of the finding.
        path: of the folder.
        otherwise: what to do if it can't be used.
        least_free_bytes: below which there is a warning.
    """
    # a link that leads nowhere, or a file on the way, can't be made into a folder
    place = path
    while not place.exists() and not place.is_symlink() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "a link to nothing" if place.is_symlink() else "no folder"
        return error(name, f"{place} is {what}", f"remove it, or {otherwise}")
    try:
        _write(place)
        status = os.statvfs(place)
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            return error(name, f"{place} is full ({fault.strerror})", f"free space, or {otherwise}")
        return error(name, f"{place} can't be written ({fault.strerror or fault})", otherwise)
    free = status.f_bavail * status.f_frsize
    text = f"{path}{'' if place == path else ' (made when needed)'}, {_amount(free)} free"
    if free < least_free_bytes:
        return warning(name, text, f"free space, or {otherwise}")
    return ok(name, text)


def _write(place: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".tuneline-doctor-", dir=place)
    written, renamed = Path(name), Path(f"{name}.renamed")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(_PROBE_BYTES))  # some file systems compress
            file.flush()
            os.fsync(file.fileno())  # NFS says only here that it is full
        written.rename(renamed)
        if renamed.stat().st_size != _PROBE_BYTES:
            raise OSError(errno.EIO, "what was written is not there")
    finally:
        for path in (written, renamed):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def store(name: str, url: str) -> Finding:
    """Write an object below a prefix, read it, and remove it.

    Args:
        name: of the finding.
        url: `s3://bucket/prefix`.
    """
    probe, content = f".tuneline-doctor-{this_machine()}", os.urandom(32)
    try:
        place = object_store.Folder(url, hurried=True)
        place.entries(probe)  # a bucket that is not there is made by writing to it in some stores
        place.write(probe, content)
        read = place.read(probe)
        place.remove([probe])
    except TunelineError as fault:
        return error(name, str(fault), _advice_of(fault))
    if read != content:
        return error(name, f"{url} does not give back what was written", "look at the store")
    return ok(name, f"{url} takes, gives and removes an object")


def this_machine() -> str:
    """Of this host's name, for the name of a probe: where it can't be removed, the next one
    replaces it."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def _advice_of(fault: TunelineError) -> str:
    cause = fault.__cause__
    if cause is None or isinstance(cause, ImportError):
        return ""  # the sentence says it all
    from botocore.exceptions import (
        ClientError,
        EndpointConnectionError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
    )

    if isinstance(cause, (NoCredentialsError, PartialCredentialsError)):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role"
    if isinstance(cause, NoRegionError):
        return "set AWS_DEFAULT_REGION"
    if isinstance(cause, EndpointConnectionError):
        return "check AWS_ENDPOINT_URL"
    if isinstance(cause, ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        if code in ("NoSuchBucket", "404"):
            return "make the bucket, or name another"
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            return "the credentials are not valid there: check AWS_ACCESS_KEY_ID and its secret"
        if code in ("AccessDenied", "403"):
            return "these credentials need s3:GetObject, PutObject, DeleteObject and ListBucket"
    return ""


def _amount(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
