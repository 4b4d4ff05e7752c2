"""METHODS as plain values: what `tuneline methods` prints and docs/methods.md repeats."""

from __future__ import annotations

from typing import Any, Final

from tuneline.finetune.methods import METHODS, Method

_SERVED_BY: Final = {
    "transformers": "any server of plain weights",
    "peft": "peft, on its base",
    "peft with tuneline": "peft with tuneline imported, on its base",
}


def overview() -> list[dict[str, Any]]:
    """Every method as JSON values: capabilities, learning rate, hyperparameters with defaults."""
    return [_describe(method) for method in METHODS]


def _describe(method: Method) -> dict[str, Any]:
    settings = method.config_class()
    return {
        "name": method.name,
        "title": method.title,
        "learning_rate": method.learning_rate,
        "base_in_4_bits": _four_bits(method),
        "merges": _merges(method),
        "merge_limits": method.config_class().merge_hindrance,
        "side_by_side": method.side_by_side,
        "identity_at_start": method.identity_at_start,
        "gradient_checkpointing": method.gradient_checkpointing,
        "stored_as": method.stored_as,
        "served_unmerged_by": _SERVED_BY[method.loader],
        "hyperparameters": {
            name: {
                "default": settings.model_dump(mode="json")[name],
                "meaning": " ".join((field.description or "").split()),
            }
            for name, field in method.config_class.model_fields.items()
            if name != "name"
        },
    }


def _four_bits(method: Method) -> str:
    if not method.works_on_4bit:
        return "no"
    if method.config_class().quantization is not None:
        return "always"
    return "on request" if "load_in_4bit" in method.config_class.model_fields else "as qlora"


def _merges(method: Method) -> str:
    if not method.mergeable:
        return "no"
    return "with limits" if method.config_class().merge_hindrance else "yes"


def table() -> list[list[str]]:
    """The capabilities as rows of short texts, the first one being the head."""
    head = ["method", "learning rate", "4-bit base", "merges", "side by side", "served unmerged by"]
    return [
        head,
        *(
            [
                row["name"],
                short(row["learning_rate"]),
                row["base_in_4_bits"],
                row["merges"],
                "yes" if row["side_by_side"] else "no",
                row["served_unmerged_by"],
            ]
            for row in overview()
        ),
    ]


def short(value: float) -> str:
    """`2e-4` for 0.0002."""
    return f"{value:.0e}".replace("e-0", "e-")
