"""What a version says of itself in MLflow, all of it derived from its files.

`describe` is run when a version is registered, and again before it is promoted: a tag that says
something else than the files is noticed.
"""

from __future__ import annotations

from typing import Any, Final

from tuneline.artifacts import Artifact, digest_of
from tuneline.tracking import mlflow_key

TAG: Final = "tuneline."
RUN_ID: Final = f"{TAG}run_id"
STEP: Final = f"{TAG}step"
IMAGE: Final = f"{TAG}image"
PACKAGE_DIGEST: Final = f"{TAG}package_digest"
APPROVAL_REQUIRED: Final = f"{TAG}approval_required"
APPROVAL: Final = f"{TAG}approval"
"""For a person who looks at the version in MLflow; the history decides."""
COPIED_FROM: Final = f"{TAG}copied_from"
RETRAIN_KEY: Final = f"{TAG}retrain_key"
"""The content key of the retraining that made a version."""
MODEL_DIGEST: Final = f"{TAG}model_digest"
ADAPTER_DIGEST: Final = f"{TAG}adapter_digest"
REPORT_DIGEST: Final = f"{TAG}report_digest"
EVAL_SET_DIGEST: Final = f"{TAG}eval_set_digest"
GATE: Final = f"{TAG}gate"
PASSED: Final = "passed"
GATE_REASONS: Final = f"{TAG}gate_reasons"
METRIC: Final = f"{TAG}metric"
HIGHER_IS_BETTER: Final = f"{TAG}higher_is_better"
COMPARED_WITH: Final = f"{TAG}compared_with"
COMPARED_DIGEST: Final = f"{TAG}compared_digest"
CHAMPION_RULE: Final = f"{TAG}gate_champion"
"""The gate's setting `champion`: whether a comparison with the champion is needed at all."""
_VALUE_LENGTH: Final = 5000
"""MySQL and PostgreSQL take more, MLflow before 3.0 did not."""


def of_score(model: str, metric: str) -> str:
    """The tag that holds the score of `base` or `tuned` in a metric of any name."""
    return mlflow_key(f"{TAG}{model}_{metric}")


def describe(model: Artifact, evaluation: Artifact) -> dict[str, str]:
    """Tags of a version, from its model and its report."""
    result: dict[str, Any] = evaluation.read_json("report.json")
    base = model.manifest.base_model
    champion = result["champion"] or {}
    if not champion.get("compared"):
        champion = {}
    metric = result["metric"]
    values = {
        MODEL_DIGEST: model.digest,
        ADAPTER_DIGEST: model.manifest.inputs["adapter"],
        REPORT_DIGEST: evaluation.digest,
        EVAL_SET_DIGEST: result["eval_set_digest"],
        f"{TAG}train_data_digest": evaluation.manifest.inputs["prepared_dataset"],
        f"{TAG}recipe_digest": digest_of(
            {"training": model.manifest.config, "evaluation": evaluation.manifest.config}
        ),
        f"{TAG}base_model": base["reference"],
        f"{TAG}base_model_revision": base["revision"],
        f"{TAG}base_model_digest": base["digest"],
        f"{TAG}method": model.manifest.config["method"]["name"],
        f"{TAG}form": model.manifest.kind.removesuffix("_model"),
        f"{TAG}tuneline_version": model.manifest.tuneline_version,
        GATE: PASSED if result["verdict"]["passed"] else "refused",
        GATE_REASONS: "; ".join(result["verdict"]["reasons"]),
        CHAMPION_RULE: result["verdict"]["champion"],
        METRIC: metric,
        HIGHER_IS_BETTER: "true" if result["higher_is_better"] else "false",
        f"{TAG}test_rows": str(result["rows"]),
        **{
            of_score(which, name): f"{block[which]['score']:.4f}"
            for name, block in result["metrics"].items()
            for which in ("base", "tuned")
            if block[which]["score"] is not None
        },
        COMPARED_WITH: (
            f"{champion['name']} version {champion['version']}" if champion else "its base only"
        ),
        COMPARED_DIGEST: champion.get("digest", ""),
    }
    if model.manifest.kind == "merged_model":
        proof = model.read_json("proof.json")
        values[f"{TAG}merge_max_logit_diff"] = f"{proof['max_logit_diff']:.2e}"
        values[f"{TAG}merge_mean_kl"] = f"{proof['mean_kl']:.2e}"
        values[f"{TAG}merge_top1_agreement"] = f"{proof['top1_agreement']:.4f}"
    return {key: value[:_VALUE_LENGTH] for key, value in values.items()}
