"""The container images that components run in: the one place that names them.

A folder of `images/` for each. At compile time the lock file that `TUNELINE_IMAGES` names gives
their digests, as `make push-images` writes it; a release pins digests, since KFP's cache key holds
the reference and a tag that moves would give stale hits. `TUNELINE_IMAGE` is one image for all
steps, whatever else is set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import yaml

from tuneline import __version__
from tuneline.errors import UsageError

LOCK_VARIABLE: Final = "TUNELINE_IMAGES"
CPU_IMAGE_VARIABLE: Final = "TUNELINE_CPU_IMAGE"
NAMES: Final = ("cpu", "gpu")


def reference(name: str) -> str:
    """Of the image of a name.

    Raises:
        UsageError: the lock file can't be read, or has no line for it.
    """
    if one := os.environ.get("TUNELINE_IMAGE"):
        return one
    if not (lock := os.environ.get(LOCK_VARIABLE)):
        return f"tuneline-{name}:{__version__}-python3.11"
    try:
        locked = yaml.safe_load(Path(lock).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the images file {lock} can't be read: {error}") from error
    found = locked.get(name) if isinstance(locked, dict) else None
    if not isinstance(found, str) or not found:
        raise UsageError(
            f"the images file {lock} has no reference for '{name}': a line each for "
            f"{', '.join(NAMES)}, as in `cpu: registry.example.org/tuneline-cpu@sha256:...`; "
            "`make push-images` writes it"
        )
    return found


CPU: Final[str] = reference("cpu")
"""Of steps without an accelerator."""
GPU: Final[str] = reference("gpu")
"""Of training and evaluation. All pods of a compiled pipeline have it in `TUNELINE_IMAGE`, and the
other one in `TUNELINE_CPU_IMAGE`: both are a part of what identifies a training."""
