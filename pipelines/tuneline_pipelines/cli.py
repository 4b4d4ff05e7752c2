"""The command `tuneline`: a whole recipe, or one step on plain folders.

Exit codes: 0 done (also when the gate refused the promotion), 1 failed for a stated reason,
2 wrong usage or recipe, 130 interrupted, 143 stopped by SIGTERM.

Only the standard library is imported here; each command imports what it needs, so that help and
completion answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneline import __version__
from tuneline.errors import EXIT_FAILED, EXIT_TERMINATED, Terminated, TunelineError, UsageError
from tuneline.progress import complain, minutes
from tuneline.termination import raise_on_sigterm
from tuneline_pipelines import cluster_cli, doctor_cli, methods_cli, registry_cli

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    raise_on_sigterm()
    try:
        return options.command(options)
    except TunelineError as error:
        complain(str(error))
        return error.exit_code
    except MemoryError:
        complain("out of memory")
        return EXIT_FAILED
    except OSError as error:  # disk full, no permission, a file that went away
        complain(str(error))
        return EXIT_FAILED
    except Terminated as stopped:
        complain(f"stopped by SIGTERM; {stopped or 'run the command again'}")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        complain("interrupted; run the command again")
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuneline",
        description="Fine-tune causal language models as a declarative workflow, on Kubeflow "
        "Pipelines or on this machine.",
    )
    parser.add_argument("--version", action="version", version=f"tuneline {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_retrain(commands)
    _add_prepare(commands)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_merge(commands)
    registry_cli.add_commands(commands)
    methods_cli.add_commands(commands)
    cluster_cli.add_commands(commands)
    doctor_cli.add_commands(commands)
    _add_fetch_model(commands)
    _add_compile(commands)
    _add_lint(commands)
    _add_schema(commands)
    return parser


_BASE_MODEL = {
    "required": True,
    "metavar": "M",
    "help": "`demo`, a local model folder, hf://org/name@commit, or s3://bucket/prefix",
}
_OUTPUT = {"required": True, "type": Path, "metavar": "DIR", "help": "new folder to write"}


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run a recipe on this machine, data to promotion")
    run.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    _add_set(run, "section.key=value")
    run.add_argument(
        "--workdir", type=Path, metavar="DIR", help="work folder (default: tuneline-runs/NAME)"
    )
    run.add_argument(
        "--image",
        metavar="NAME",
        help="run each step in a container of this image, read-only and without a network",
    )
    run.add_argument("--quiet", action="store_true", help="print the final table only")
    run.set_defaults(command=_run)


def _add_set(parser: argparse.ArgumentParser, form: str) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar=form,
        help="override one setting; may be given several times",
    )


def _run(options: argparse.Namespace) -> int:
    if options.image:
        os.environ["TUNELINE_IMAGE"] = options.image  # before a component reads it
    from tuneline import recipe

    resolved = recipe.read(options.recipe, options.overrides)
    from tuneline_pipelines.local import run_recipe

    workdir = options.workdir or Path("tuneline-runs") / options.recipe.stem
    summary = run_recipe(resolved, workdir, contained=bool(options.image), quiet=options.quiet)
    print(final_table(summary))
    return 0


def _add_retrain(commands: Any) -> None:
    retrain = commands.add_parser(
        "retrain", help="run a recipe on this machine if anything changed since it last was"
    )
    retrain.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    _add_set(retrain, "section.key=value")
    retrain.add_argument(
        "--workdir", type=Path, metavar="DIR", help="work folder (default: tuneline-runs/NAME)"
    )
    retrain.add_argument("--quiet", action="store_true", help="print the outcome only")
    retrain.set_defaults(command=_retrain)


def _retrain(options: argparse.Namespace) -> int:
    from tuneline import recipe

    resolved = recipe.read(options.recipe, options.overrides)
    from tuneline_pipelines.local import run_retrain

    workdir = options.workdir or Path("tuneline-runs") / options.recipe.stem
    outcome = run_retrain(resolved, workdir, quiet=options.quiet)
    version = outcome["version"]
    did = {"train": "trained", "promote": "promoted what was made", "nothing": "nothing"}
    rows = [
        ("did", did[outcome["action"]]),
        ("why", outcome["reason"]),
        ("version", f"{outcome['model_name']} version {version}" if version else "none"),
        *[("gate", f"{outcome['gate']}, alias {', '.join(outcome['aliases']) or 'none'}")
          for _ in range("gate" in outcome)],
        ("time", f"{minutes(outcome['wall_seconds'])} min"),
    ]  # fmt: skip
    print("\n".join(["", "-" * 78, *(f"{name:<14}{value}" for name, value in rows), "-" * 78]))
    return 0


def final_table(summary: dict[str, Any]) -> str:
    """What a person reads at the end of a run."""
    low, high = summary["tuned_interval"]
    base, tuned = (summary[f"{which}_{summary['metric']}"] for which in ("base", "tuned"))
    if summary["registered_version"]:
        version = f"{summary['model_name']} version {summary['registered_version']}"
    else:
        version = "not registered (gate.refused: skip)"
    refused = "; ".join(summary["gate"]["reasons"])
    rows = [
        ("base score", f"{base:.3f}   ({summary['metric']}, {summary['test_rows']} test rows)"),
        ("tuned score", f"{tuned:.3f}   "
                        f"(95 % interval {low:.3f} to {high:.3f})"),
        ("registered", f"{version}, alias {summary['alias']}" if summary["alias"]
                       else f"{version}, not promoted: {refused}"),
        ("merge proof", f"largest logit difference {summary['merge_max_logit_diff']:.1e}, top-1 "
                        f"agreement {summary['merge_top1_agreement']:.4f}")
        if summary["form"] == "merged" else ("packaged", summary["not_merged"]),
        ("time, memory", f"{minutes(summary['wall_seconds'])} min, peak "
                         f"{summary['peak_memory_bytes'] / 1e9:.1f} GB"),
        ("report", summary["report_html"]),
        ("adapter", summary["adapter_dir"]),
        ("merged model", summary["merged_dir"]) if summary["form"] == "merged"
        else ("package", summary["packaged_dir"]),
        ("MLflow UI", f"{shlex.quote(sys.executable)} -m mlflow ui --backend-store-uri "
                      f"{shlex.quote(summary['tracking_uri'])}"
                      if summary["tracking_uri"].startswith("sqlite:") else "on your server"),
    ]  # fmt: skip
    lines = ["", "-" * 78, *(f"{name:<14}{value}" for name, value in rows)]
    for number, sample in enumerate(summary["samples"], 1):
        lines += [
            "",
            f"sample {number}",
            *_quoted("question", sample["question"]),
            *_quoted("base", sample["base"]),
            *_quoted("tuned", sample["tuned"]),
            *([] if sample["tuned_exact_match"] == 1 else _quoted("wanted", sample["reference"])),
        ]
    return "\n".join([*lines, "-" * 78])


def _quoted(label: str, text: str) -> list[str]:
    flat = " ".join(text.split()) or "(nothing)"
    return [f"  {label:<10}{textwrap.shorten(flat, 110, placeholder=' ...')}"]


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser("prepare", help="raw rows -> PreparedDataset")
    prepare.add_argument("--base-model", **_BASE_MODEL)
    prepare.add_argument(
        "--data", required=True, nargs="+", metavar="SOURCE",
        help="file, folder or glob of jsonl, json, parquet or csv; hf://org/name, s3://, gs://",
    )  # fmt: skip
    prepare.add_argument("--test", nargs="*", default=[], metavar="SOURCE", help="own test files")
    _add_set(prepare, "key=value")
    prepare.add_argument("--output", **_OUTPUT)
    prepare.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from tuneline import steps

    data = _section("data", options.overrides, {"train": options.data, "test": options.test})
    steps.prepare_data(options.base_model, data, str(options.output))
    return 0


def _add_finetune(commands: Any) -> None:
    finetune = commands.add_parser("finetune", help="PreparedDataset -> Adapter")
    finetune.add_argument("--base-model", **_BASE_MODEL)
    finetune.add_argument("--data", required=True, metavar="DIR", help="a PreparedDataset")
    finetune.add_argument("--method", required=True, metavar="NAME", help="for example lora")
    _add_set(finetune, "key=value")
    finetune.add_argument("--output", **_OUTPUT)
    finetune.set_defaults(command=_finetune)


def _finetune(options: argparse.Namespace) -> int:
    from tuneline import recipe, steps

    training_keys = recipe.TrainingSection.model_fields
    training: list[str] = []
    method: list[str] = []
    for override in options.overrides:
        key = override.partition("=")[0].strip()
        (training if key in training_keys else method).append(override)
    steps.finetune(
        options.base_model,
        options.data,
        _section("method", method, {"name": options.method}),
        _section("training", training, {}),
        str(options.output),
    )
    return 0


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="Adapter + PreparedDataset -> EvalReport")
    evaluate.add_argument("--base-model", **_BASE_MODEL)
    evaluate.add_argument("--adapter", required=True, metavar="DIR", help="an Adapter")
    evaluate.add_argument("--data", required=True, metavar="DIR", help="a PreparedDataset")
    _add_set(evaluate, "key=value")
    evaluate.add_argument("--output", **_OUTPUT)
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from tuneline import recipe, steps

    gate_keys = recipe.GateSection.model_fields
    gate = [o for o in options.overrides if o.partition("=")[0].strip() in gate_keys]
    evaluation = [o for o in options.overrides if o not in gate]
    steps.evaluate(
        options.base_model,
        options.adapter,
        options.data,
        _section("evaluation", evaluation, {}),
        _section("gate", gate, {}),
        str(options.output),
    )
    return 0


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser("merge", help="base + Adapter -> MergedModel")
    merge.add_argument("--base-model", **_BASE_MODEL)
    merge.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="DIR",
        help="an Adapter; several LoRA adapters are combined (--set combine, weights, density)",
    )
    merge.add_argument("--data", metavar="DIR", help="its PreparedDataset, for the proof")
    merge.add_argument("--report", metavar="DIR", help="its EvalReport, for the model card")
    _add_set(merge, "key=value")
    merge.add_argument(
        "--output", required=True, metavar="DIR", help="new folder to write, or s3://bucket/prefix"
    )
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    from tuneline import steps

    export = _section("export", options.overrides, {})
    first, *others = options.adapter
    steps.merge(
        options.base_model,
        first,
        export,
        options.output,
        also=others,
        dataset=options.data or "",
        eval_report=options.report or "",
    )
    return 0


def _add_fetch_model(commands: Any) -> None:
    fetch = commands.add_parser("fetch-model", help="bring a base model into the cache")
    fetch.add_argument("base_model", metavar="M", help=_BASE_MODEL["help"])
    fetch.set_defaults(command=_fetch_model)


def _fetch_model(options: argparse.Namespace) -> int:
    from tuneline import base_model

    found = base_model.resolve(options.base_model)
    print(f"{found.path}\n{found.digest}")
    return 0


def _add_compile(commands: Any) -> None:
    compile_ = commands.add_parser("compile", help="write the pipelines as KFP packages")
    compile_.add_argument("--out", type=Path, default=Path("build"), metavar="DIR")
    compile_.add_argument(
        "--pools",
        type=Path,
        metavar="FILE",
        help="pools.yaml whose pools the run forms offer (default: TUNELINE_POOLS, or built in)",
    )
    cluster_cli.add_images(compile_)
    cluster_cli.add_release(compile_)
    compile_.set_defaults(command=_compile)


def _compile(options: argparse.Namespace) -> int:
    cluster_cli.use_images(options)
    from tuneline import pools
    from tuneline_pipelines.compile import compile_pipelines

    for path in compile_pipelines(options.out, pools.read(options.pools), release=options.release):
        print(path)
    return 0


def _add_lint(commands: Any) -> None:
    lint = commands.add_parser(
        "lint", help="find what KFP accepts and then does wrong, in any compiled pipeline"
    )
    lint.add_argument("packages", nargs="+", type=Path, metavar="SPEC.yaml")
    lint.add_argument("--release", action="store_true", help="images must be named by digest too")
    lint.set_defaults(command=_lint)


def _lint(options: argparse.Namespace) -> int:
    from tuneline_pipelines import lint

    found = 0
    for path in options.packages:
        findings = lint.check(lint.read(path), release=options.release)
        found += len(findings)
        for finding in findings:
            print(f"{path}: {finding}")
    if found:
        print(f"{found} finding{'s' if found > 1 else ''}")
        return EXIT_FAILED
    print(f"{len(options.packages)} package{'s' if len(options.packages) > 1 else ''}, no finding")
    return 0


def _add_schema(commands: Any) -> None:
    schema = commands.add_parser("schema", help="print the JSON schema of a recipe")
    schema.set_defaults(command=_schema)


def _schema(options: argparse.Namespace) -> int:
    del options
    from tuneline import recipe

    print(json.dumps(recipe.json_schema(), indent=2))
    return 0


def _section(name: str, overrides: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    from tuneline import recipe

    for override in overrides:
        if "=" not in override:
            raise UsageError(f"--set '{override}' is not of the form key=value")
    return recipe.apply_overrides({name: values}, [f"{name}.{o}" for o in overrides])[name]


if __name__ == "__main__":
    sys.exit(main())
