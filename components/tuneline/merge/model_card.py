"""The README.md of what leaves: what it was made from, how, and what was shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tuneline import __version__
from tuneline.artifacts import Artifact
from tuneline.base_model import HUB_SCHEME, BaseModel

BASE_CARD: Final = "BASE_README.md"
_FROM_BASE: Final = ("license", "license_name", "license_link", "language")


def card(
    base: BaseModel,
    adapter: Artifact,
    facts: dict[str, Any],
    *,
    code: str,
    note: str = "",
    is_adapter: bool = False,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        base: what was tuned.
        adapter: what tuned it.
        facts: rows of the table, name to value.
        code: Python that loads it.
        note: a sentence in front of it.
        is_adapter: whether the base is needed to load it.
    """
    import yaml

    matter: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tuneline", adapter.manifest.config["method"]["name"]],
    }
    if base.reference.startswith(HUB_SCHEME):
        matter["base_model"] = base.name
    matter |= _license_of(base.path)
    method = ", ".join(f"{k} {v}" for k, v in adapter.manifest.config["method"].items())
    rows = {
        "base model": base.reference,
        "base model revision": base.revision,
        "base model digest": base.digest,
        "data digest": adapter.manifest.inputs.get("prepared_dataset", ""),
        "adapter digest": adapter.digest,
        "method": method,
        **facts,
        "made by": f"tuneline {__version__}",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value != "")
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front}---\n\n# {base.name}, fine-tuned\n\n"
        + (f"{note[:1].upper()}{note[1:]}.\n\n" if note else "")
        + f"```python\n{code}```\n\n| | |\n| --- | --- |\n{table}\n"
    )


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _license_of(base: Path) -> dict[str, Any]:
    import yaml

    try:
        text = (base / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        values = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in _FROM_BASE if key in values}
