"""Where checkpoints lie: `TUNELINE_CHECKPOINTS`, a folder or `s3://bucket/prefix`.

A folder, a mounted volume for example, is used as it is. Checkpoints for an object store are
written below the cache first, and what else lies beside checkpoints stays there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tuneline import object_store
from tuneline.base_model import cache_dir
from tuneline.errors import StorageError

ROOT_VARIABLE: Final = "TUNELINE_CHECKPOINTS"
_STAGING: Final = "checkpoints-s3"


def remote_root() -> str | None:
    """The prefix in an object store, without a slash at its end; None: they stay on disk.

    Raises:
        StorageError: the variable names another kind of store.
    """
    configured = os.environ.get(ROOT_VARIABLE, "")
    if object_store.is_remote(configured) and configured.strip("/") != "s3:":
        return configured.rstrip("/")
    if "://" in configured:
        raise StorageError(
            f"{ROOT_VARIABLE} is {configured}: name a folder or {object_store.SCHEME}bucket/prefix"
        )
    return None


def local_root() -> Path | None:
    """The folder of that name, or the one that stands for the object store on this disk; None:
    the variable is not set."""
    if remote_root() is not None:
        return cache_dir() / _STAGING
    configured = os.environ.get(ROOT_VARIABLE)
    return Path(configured) if configured else None
