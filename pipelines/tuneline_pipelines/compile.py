"""Pipelines as packages that the KFP API server takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tuneline.errors import UsageError

if TYPE_CHECKING:
    from kfp.dsl.base_component import BaseComponent

    from tuneline.pools import Pools


@dataclass(frozen=True)
class Compiled:
    """A compiled pipeline."""

    name: str
    heading: str
    """What a person reads at the top of the file."""
    documents: list[Any]
    """The pipeline spec and the platform spec."""

    @property
    def text(self) -> str:
        """Of the file."""
        return f"{self.heading}\n{yaml.safe_dump_all(self.documents, sort_keys=True)}"


def compile_pipelines(
    out: Path, pools: Pools | None = None, *, release: bool = False
) -> list[Path]:
    """Write one YAML package per method, `retrain`, `compare` and `promote`.

    Args:
        out: folder.
        pools: whose names the run forms offer; None: those of `tuneline.pools.read`.
        release: whether a package must name its images by digest.

    Raises:
        UsageError: the folder can't be written, or a package would break a rule of
            `tuneline lint`; nothing is written then.
    """
    from tuneline import form
    from tuneline import pools as node_pools
    from tuneline.finetune.methods import METHODS
    from tuneline_pipelines import compare, finetune, lint, promote, resources, retrain

    pools = pools or node_pools.read()
    place, default = resources.on_cluster(pools.largest_shm), pools.names[0]
    built: list[tuple[BaseComponent, dict[str, list[str]]]] = [
        (
            finetune.build(place, method, default_pool=default),
            form.literals_of((method,), pools.names),
        )
        for method in METHODS
    ]
    shared = form.literals_of((), pools.names)
    built += [
        (retrain.build(place, default_pool=default), shared),
        (compare.build(place, parallelism=0, default_pool=default), shared),
        (promote.build(place), shared),
    ]
    packages = [package_of(pipeline, choices) for pipeline, choices in built]
    faults = [
        f"{package.name}: {found}"
        for package in packages
        for found in lint.check(package.documents, release=release)
    ]
    if faults:
        raise UsageError("\n".join(["no package is written:", *(f"- {fault}" for fault in faults)]))
    return _write(packages, out)


def package_of(pipeline: BaseComponent, choices: Mapping[str, Sequence[str]]) -> Compiled:
    """Compile one pipeline.

    Args:
        pipeline: to compile.
        choices: parameter -> the values that the run form offers for it.
    """
    import tempfile

    from kfp.compiler import Compiler

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "package.yaml"
        Compiler().compile(pipeline, str(path))
        text = path.read_text(encoding="utf-8")
    documents = list(yaml.safe_load_all(text))
    # The SDK has no type for a choice. The API server and the form read it from here.
    inputs = documents[0]["root"]["inputDefinitions"]["parameters"]
    for name, values in choices.items():
        if name in inputs:
            inputs[name]["literals"] = list(values)
    heading = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return Compiled(pipeline.name, heading, documents)


def _write(packages: Sequence[Compiled], out: Path) -> list[Path]:
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for package in packages:
            aside = out / f"{package.name}.partial.yaml"
            aside.write_text(package.text, encoding="utf-8")
            written.append(aside.rename(out / f"{package.name}.yaml"))
    except OSError as error:
        raise UsageError(
            f"{out} can't be written ({error.strerror}): name another folder with --out"
        ) from error
    return written
