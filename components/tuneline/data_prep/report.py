"""The data contract as one self-contained HTML page: no request, no script, inline SVG.

KFP shows it in a sandboxed frame and MLflow in its artifact view; it also opens from disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

_WIDTH, _HEIGHT = 640, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 30
_COLOURS: Final = {"train": "#2b62c4", "validation": "#c2570c", "test": "#12743a"}


def render_contract(contract: Mapping[str, Any]) -> str:
    """The page; every value that comes from data is escaped."""
    from jinja2 import Environment

    template = files("tuneline.data_prep").joinpath("contract.html.jinja")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"] = _share
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        contract=contract, chart=length_chart(contract["lengths"])
    )


def _share(value: float) -> str:
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"


def length_chart(lengths: Mapping[str, Any]) -> dict[str, Any]:
    """Stacked bars of the row lengths, with labelled ticks."""
    edges: list[int] = lengths["edges"]
    counts: Mapping[str, list[int]] = lengths["counts"]
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    highest = max(totals, default=0) or 1
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(totals), 1)
    height = _HEIGHT - _TOP - _BOTTOM
    bars = []
    for position in range(len(totals)):
        base = float(_HEIGHT - _BOTTOM)
        for split, column in counts.items():
            tall = column[position] / highest * height
            if tall:
                base -= tall
                bars.append(
                    {
                        "x": _LEFT + position * width + 1,
                        "y": base,
                        "width": max(width - 2, 1),
                        "height": tall,
                        "colour": _COLOURS[split],
                        "title": f"{edges[position]} to {edges[position + 1]} tokens: "
                        f"{column[position]} rows of {split}",
                    }
                )
    shares = (0.0, 0.5, 1.0)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "bars": bars,
        "colours": _COLOURS,
        "y_ticks": [(_HEIGHT - _BOTTOM - s * height, f"{s * highest:.0f}") for s in shares],
        "x_ticks": [
            (_LEFT + s * (_WIDTH - _LEFT - _RIGHT), edges[round(s * (len(edges) - 1))])
            for s in (0.0, 0.25, 0.5, 0.75, 1.0)
        ],
    }
