"""Pipelines as packages that the KFP API server takes."""

from __future__ import annotations

from pathlib import Path

from tuneline.errors import UsageError


def compile_pipelines(out: Path) -> list[Path]:
    """Write one YAML package per method.

    Raises:
        UsageError: the folder can't be written.
    """
    from kfp.compiler import Compiler

    from tuneline.finetune.methods import METHODS
    from tuneline_pipelines import finetune, resources

    written = []
    for pipeline in (finetune.build(resources.on_cluster, method) for method in METHODS):
        path = out / f"{pipeline.name}.yaml"
        aside = out / f"{pipeline.name}.partial.yaml"
        try:
            out.mkdir(parents=True, exist_ok=True)
            Compiler().compile(pipeline, str(aside))
            aside.rename(path)
        except OSError as error:
            raise UsageError(
                f"{out} can't be written ({error.strerror}): name another folder with --out"
            ) from error
        written.append(path)
    return written
