"""Where a base model comes from: `demo`, a local folder, or `hf://org/name@revision`.

Whatever the source, the result is a local folder of safetensors weights and an identity that goes
into every manifest: for a hub model the pinned commit, for a folder the SHA-256 of what decides
its output. Pickle weights and remote code are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tuneline.artifacts import digest_of_file
from tuneline.errors import ModelError

DEMO = "demo"
HUB_SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class BaseModel:
    """A base model on local disk."""

    path: Path
    reference: str
    """As the recipe names it; for a local folder its name, without where it lies."""
    revision: str
    """Commit of a hub model, empty for others."""
    digest: str
    """SHA-256 over configuration, weights and tokenizer: what decides the model's output."""

    @property
    def name(self) -> str:
        """`org/name` of a hub model, the reference itself for others."""
        if self.reference.startswith(HUB_SCHEME):
            return self.reference.removeprefix(HUB_SCHEME).partition("@")[0]
        return self.reference

    def identity(self) -> dict[str, str]:
        """For a manifest; says nothing of where the folder lies."""
        fields = asdict(self)
        fields.pop("path")
        return fields


def cache_dir() -> Path:
    """`TUNELINE_CACHE`, by default `tuneline` under the user's cache folder."""
    if configured := os.environ.get("TUNELINE_CACHE"):
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneline"
    except RuntimeError as error:
        raise ModelError("no home folder for the model cache: set TUNELINE_CACHE") from error


def resolve(reference: str) -> BaseModel:
    """Find a base model and bring it to local disk.

    Raises:
        ModelError: it does not exist, its revision is not pinned, or it has no safetensors weights.
    """
    if reference == DEMO:
        from tuneline.demo.model import converted_model

        path, revision = converted_model(cache_dir()), ""
    elif reference.startswith(HUB_SCHEME):
        path, revision = _from_hub(reference)
    else:
        path, revision = Path(reference).expanduser(), ""
        if not path.is_dir():
            raise ModelError(
                f"base model '{reference}' is no folder: give a local folder, "
                f"{HUB_SCHEME}org/name@revision, or {DEMO}"
            )
    check_folder(path, reference)
    if reference != DEMO and not revision:
        reference = path.resolve().name
    return BaseModel(path, reference, revision, digest_of_folder(path))


def check_folder(path: Path, reference: str) -> None:
    """Refuse a folder that transformers could not load safely.

    Raises:
        ModelError: no config.json, no tokenizer, or no safetensors weights.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"base model '{reference}' has no config.json: a transformers model folder is needed"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"base model '{reference}': config.json can't be read: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelError(
            f"base model '{reference}': config.json names no architectures: the folder that "
            "transformers' save_pretrained writes is needed"
        )
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / name).is_file() for name in names):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        found = f" (found {', '.join(pickles)}, which can run code when loaded)" if pickles else ""
        raise ModelError(
            f"base model '{reference}' has no model.safetensors or index{found}: convert it with "
            "transformers' save_pretrained on a machine that you trust it on"
        )
    if "auto_map" in config:
        raise ModelError(
            f"base model '{reference}' brings its own Python code (auto_map in config.json), "
            "which tuneline does not run"
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"base model '{reference}' has no tokenizer: tokenizer.json is needed")


def digest_of_folder(path: Path) -> str:
    """SHA-256 over the names and digests of configuration, weights and tokenizer files.

    Reads every byte once, about a second per GB.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name} {digest_of_file(file)}\n".encode())
    return "sha256:" + digest.hexdigest()


def _from_hub(reference: str) -> tuple[Path, str]:
    repository, _, revision = reference.removeprefix(HUB_SCHEME).partition("@")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository):
        raise ModelError(
            f"base model '{reference}' is not of the form {HUB_SCHEME}org/name@revision"
        )
    if not _COMMIT.fullmatch(revision):
        raise ModelError(
            f"base model '{reference}': revision '{revision}' is not pinned: give the full "
            "40-digit commit, since a branch or tag can move between two steps of a run"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        path = snapshot_download(
            repository,
            revision=revision,
            cache_dir=os.environ.get("HF_HUB_CACHE") or cache_dir() / "hub",
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"base model '{reference}' is neither in the cache nor to be had from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return Path(path), revision
