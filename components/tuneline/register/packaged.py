"""A packaged model as an MLflow model: base by reference, adapter and loader.

MLflow's `transformers` and `peft` flavors would take the base into the version. Here
`python_function` loads it through the package's own loader, which refuses another base.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tuneline.artifacts import Artifact
from tuneline.errors import ArtifactError, RegistryError

if TYPE_CHECKING:
    from mlflow.models import Model

LOADER_MODULE: Final = "tuneline.merge.package"


def add_flavors(model: Artifact, folder: Path, mlmodel: Model) -> None:
    """Describe `model/` of the version.

    Args:
        model: of kind `packaged_model`.
        folder: of the version; nothing is needed there beside `model/`.
        mlmodel: to add to.
    """
    del model, folder
    mlmodel.add_flavor(
        "python_function",
        loader_module=LOADER_MODULE,
        data="model",
        python_version=platform.python_version(),
        env={"virtualenv": "python_env.yaml"},
    )


def requirements(model: Artifact) -> dict[str, str]:
    """Package to its version, as the loader names them."""
    packages: dict[str, str] = model.read_json("loader.json")["packages"]
    return packages | {"tuneline": model.manifest.tuneline_version}


def check_loads(folder: Path) -> None:
    """Load the package on its base and run one token through it.

    Raises:
        ModelError: its base is not to be found on this machine, or is another.
        RegistryError: it is damaged, or its logits are not finite.
    """
    import torch

    from tuneline.merge.package import load_packaged

    try:
        loaded, _ = load_packaged(folder)
    except ArtifactError as error:
        raise RegistryError(str(error)) from error
    with torch.inference_mode():
        token = torch.tensor([[0]], device=next(loaded.parameters()).device)
        logits = loaded(input_ids=token).logits
    if not bool(logits.isfinite().all()):
        raise RegistryError("its logits are not finite")
