"""Pipelines as packages that the KFP API server takes."""

from __future__ import annotations

from pathlib import Path

from tuneline.errors import UsageError


def compile_pipelines(out: Path) -> list[Path]:
    """Write one YAML package per method, `promote` and `compare`.

    Raises:
        UsageError: the folder can't be written.
    """
    from kfp.compiler import Compiler

    from tuneline.finetune.methods import METHODS
    from tuneline_pipelines import compare, finetune, promote, resources

    written = []
    pipelines = [finetune.build(resources.on_cluster, method) for method in METHODS]
    pipelines += [
        promote.build(resources.on_cluster),
        compare.build(resources.on_cluster, parallelism=0),
    ]
    for pipeline in pipelines:
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
