"""Where a base model comes from: `demo`, a local folder, `hf://org/name@commit`, `s3://bucket/prefix`.

Whatever the source, the result is a local folder of safetensors weights and an identity that goes
into every manifest: for a hub model the pinned commit, for a folder the SHA-256 of what decides
its output. Pickle weights are refused.

A model that brings its own Python code is refused too, unless the reference pins that code:
`FOLDER#code=sha256:...` says that somebody has read exactly these files. The pin is a part of the
reference, so it stands in the recipe and travels to every step; the error of an unpinned model
names the digest to write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneline import object_store
from tuneline.artifacts import MANIFEST, digest_of, digest_of_file
from tuneline.errors import ModelError

DEMO = "demo"
HUB_SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FROM_HUB = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*")
_FROM_STORE = (*_FROM_HUB, "*.md", "*.py")
CODE_PIN = "#code="
_SMALL = (".json", ".jinja", ".model", ".txt", ".md", ".py", "")
"""Suffixes of what travels with weights. Weights in any other format would travel along without
the tuning."""
_SETTLED_NANOSECONDS = 2 * 10**9
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
    code: str = ""
    """SHA-256 over the model's own Python files, pinned by the reference; empty for none."""

    @property
    def trusts_code(self) -> bool:
        """Whether the model's own Python code is pinned, and therefore run."""
        return bool(self.code)

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


def resolve(reference: str, *, digest: str | None = None) -> BaseModel:
    """Find a base model and bring it to local disk.

    Args:
        reference: `demo`, a local folder, `hf://org/name@revision`, or `s3://bucket/prefix`.
        digest: for a caller that compares it with `digest_of_model` itself, beside other work;
            None: computed here.

    Raises:
        ModelError: it does not exist, its revision is not pinned, it has no safetensors weights, or
            it has code of its own that is not pinned, or not the pinned one.
    """
    reference, _, code = reference.partition(CODE_PIN)
    if reference == DEMO:
        from tuneline.demo.model import converted_model

        path, revision = converted_model(cache_dir()), ""
    elif reference.startswith(HUB_SCHEME):
        path, revision = _from_hub(reference, with_code=bool(code))
    elif object_store.is_remote(reference):
        path, revision = object_store.fetch_folder(reference, cache_dir() / "s3", _FROM_STORE), ""
    else:
        path, revision = Path(reference).expanduser(), ""
        if not path.is_dir():
            raise ModelError(
                f"base model '{reference}' is no folder: give a local folder, "
                f"{HUB_SCHEME}org/name@revision, {object_store.SCHEME}bucket/prefix, or {DEMO}"
            )
    check_folder(path, reference)
    _check_code(path, reference, code)
    if is_local(reference):
        reference = path.resolve().name
    return BaseModel(path, reference, revision, digest or digest_of_model(path, code), code)


def content_key(reference: str) -> str:
    """What decides a base model's output, without reading all of it whenever it is asked for.

    A hub model's reference names a commit, and is its own key: nothing is fetched. For any other
    it is the digest, for which a file is read again only after its size, times or inode changed.

    Raises:
        ModelError: as `resolve`.
    """
    plain, _, code = reference.partition(CODE_PIN)
    if plain.startswith(HUB_SCHEME):
        _pinned(plain)
        return reference
    found = resolve(reference, digest="not read")
    place = cache_dir() / "digests" / digest_of(str(found.path.resolve())).removeprefix("sha256:")
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    notes: dict[str, list[Any]] = {}

    def digest(file: Path) -> str:
        stat = file.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        *seen, value = known.get(file.name, [None])
        if seen != mark:
            value = digest_of_file(file)
        # a file of just now can change once more without another time
        if time.time_ns() - stat.st_ctime_ns > _SETTLED_NANOSECONDS:
            notes[file.name] = [*mark, value]
        return str(value)

    key = digest_of_model(found.path, code, digest)
    if notes != known:
        _note(place, json.dumps(notes))
    return key


def is_local(reference: str) -> bool:
    """Whether it names a folder of this machine."""
    return not (
        reference == DEMO or reference.startswith(HUB_SCHEME) or object_store.is_remote(reference)
    )


def remember(base: BaseModel) -> None:
    """Note in the cache where a base lies, for what names it by its digest only.

    A manifest does not say where a folder lies; a package that stands on one is found again with
    this note, on a machine that has the same cache. A cache that can't be written is no fault.
    """
    _note(_place(base.digest), str(base.path.resolve()) + "\n")


def _note(place: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f"{place.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.rename(place)


def resolve_again(identity: Mapping[str, str]) -> BaseModel:
    """The base that a manifest names, by its reference or where this cache has it noted.

    Args:
        identity: as `BaseModel.identity` gave it.

    Raises:
        ModelError: it is not to be found, or is another than it was.
    """
    reference, code = identity["reference"], identity.get("code", "")
    if is_local(reference):
        try:
            folder = _place(identity["digest"]).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ModelError(
                f"base model '{reference}' ({identity['digest'][:19]}) is a local folder that "
                "this machine's cache has no note of: name its folder as base_model"
            ) from error
        reference = folder
    found = resolve(f"{reference}{CODE_PIN}{code}" if code else reference)
    if found.digest != identity["digest"]:
        raise ModelError(
            f"base model '{reference}' has digest {found.digest[:19]}, not "
            f"{identity['digest'][:19]}: its files have changed; name the former ones as base_model"
        )
    return found


def _place(digest: str) -> Path:
    return cache_dir() / "places" / digest.removeprefix("sha256:")


def _check_code(path: Path, reference: str, pinned: str) -> None:
    named = _auto_maps(path)
    if not named and not pinned:
        return
    if not named:
        raise ModelError(
            f"base model '{reference}' has no code of its own (no auto_map in its JSON files): "
            f"remove {CODE_PIN}{pinned} from the reference"
        )
    if elsewhere := [name for name in named if "--" in name]:
        raise ModelError(
            f"base model '{reference}' takes its code from another repository ({elsewhere[0]}), "
            "which no pin of this one covers: copy the code into the model's folder"
        )
    found = digest_of_code(path)
    if not pinned:
        raise ModelError(
            f"base model '{reference}' brings its own Python code (auto_map names {named[0]}), "
            f"which is not run unless it is pinned: read its *.py files, then name it as "
            f"'{reference}{CODE_PIN}{found}'"
        )
    if pinned != found:
        raise ModelError(
            f"base model '{reference}': its Python code has digest {found}, not the pinned "
            f"{pinned}: read what changed before you pin it again"
        )


def _auto_maps(path: Path) -> list[str]:
    # of the model, the tokenizer and whatever else transformers reads one from
    named = []
    for file in sorted(path.glob("*.json")):
        if file.name.endswith(".index.json") or file.name == "tokenizer.json":
            continue  # weights and vocabulary: many MB, and no place for code
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file} is malformed JSON ({error}): copy the model again") from error
        auto_map = values.get("auto_map") if isinstance(values, dict) else None
        if isinstance(auto_map, dict):
            named += [str(value) for value in auto_map.values()]
        elif auto_map:
            named.append(str(auto_map))
    return named


def digest_of_code(path: Path) -> str:
    """SHA-256 over the names and digests of all Python files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        digest.update(f"{file.relative_to(path).as_posix()} {digest_of_file(file)}\n".encode())
    return "sha256:" + digest.hexdigest()


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
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"base model '{reference}' has no tokenizer: tokenizer.json is needed")


def digest_of_folder(path: Path, digest_of_one: Callable[[Path], str] = digest_of_file) -> str:
    """SHA-256 over the names and digests of configuration, weights and tokenizer files.

    Reads every byte once, about a second per GB.

    Args:
        path: the folder.
        digest_of_one: of a file, for a caller that knows some.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name} {digest_of_one(file)}\n".encode())
    return "sha256:" + digest.hexdigest()


def digest_of_model(
    path: Path, code: str = "", digest_of_one: Callable[[Path], str] = digest_of_file
) -> str:
    """The digest of a base model: of its folder, and of the code that is pinned with it."""
    folder = digest_of_folder(path, digest_of_one)
    return digest_of([folder, code]) if code else folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: those of the index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


def stored_dtype(folder: Path) -> str:
    """The coarsest floating-point dtype among the stored weights.

    Raises:
        ModelError: there is none of BF16, F16 and F32.
    """
    found: set[str] = set()
    for path in weight_files(folder):
        with path.open("rb") as reader:
            header = json.loads(reader.read(int.from_bytes(reader.read(8), "little")))
        found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    for code, name in (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")):
        if code in found:
            return name
    raise ModelError(
        f"{folder}: weights of dtype {', '.join(sorted(found))} can't be used; allowed are BF16, "
        "F16 and F32"
    )


def copy_small_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat template, code and licence; no weights, no index of them.

    What is in `target` already stays.
    """
    for file in source.rglob("*"):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        nested = len(name.parts) > 1 and file.suffix != ".py"
        if hidden or nested or not file.is_file() or file.suffix not in _SMALL:
            continue
        if file.name.endswith(".index.json") or file.name == MANIFEST:
            continue
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)


def _pinned(reference: str) -> tuple[str, str]:
    """Repository and commit of a hub model."""
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
    return repository, revision


def _from_hub(reference: str, *, with_code: bool) -> tuple[Path, str]:
    repository, revision = _pinned(reference)
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
            allow_patterns=[*_FROM_HUB, *(["*.py"] if with_code else [])],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"base model '{reference}' is neither in the cache nor to be had from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return Path(path), revision
