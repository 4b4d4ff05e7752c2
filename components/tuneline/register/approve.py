"""A person's approval of a version, kept in the history with what exactly was approved."""

from __future__ import annotations

from tuneline.errors import RegistryError
from tuneline.progress import report
from tuneline.register import history, tags
from tuneline.register.champion import find_version
from tuneline.register.history import Entry
from tuneline.register.verify import label
from tuneline.tracking import mlflow_errors, open_client


def approve(model_name: str, version: int, *, by: str, reason: str) -> Entry:
    """Approve a version for promotion; once for the same files and report.

    The approval names the digests of model and report, and the run that made them: it is void for
    anything else that might be put under this number.

    Raises:
        RegistryError: no such version, one that its gate refused, or one without a verdict.
    """
    client = open_client()
    with mlflow_errors(f"approving {model_name} version {version}"):
        found = find_version(client, model_name, version)
        if found.tags.get(tags.GATE) != tags.PASSED:
            verdict = found.tags.get(tags.GATE_REASONS) or "it has no verdict"
            raise RegistryError(f"{label(found)} can't be approved: {verdict}")
        digests = (found.tags[tags.MODEL_DIGEST], found.tags[tags.REPORT_DIGEST])
        seen = history.read(client, model_name)
        written = seen.approval(version, *digests)
        if written is None or (written.by, written.reason) != (by, reason):
            entry = Entry(
                "approve",
                version,
                by,
                reason,
                run_id=found.tags.get(tags.RUN_ID, ""),
                model_digest=digests[0],
                report_digest=digests[1],
            )
            _, written = history.append(client, seen, entry)
        client.set_model_version_tag(
            model_name, str(version), tags.APPROVAL, f"approved by {by}: {reason}"
        )
    report(f"{label(found)} is approved by {by}")
    return written
