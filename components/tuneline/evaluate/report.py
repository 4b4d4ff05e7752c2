"""EvalReport as one self-contained HTML page: no request, no script, inline SVG.

KFP shows it in a sandboxed frame and MLflow in its artifact view; it also opens from disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 12, 30


def render_report(
    result: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, Any]],
    contract: Mapping[str, Any],
    config: Mapping[str, Any],
    base_model: Mapping[str, str],
) -> str:
    """The page; every value that comes from data is escaped."""
    from jinja2 import Environment

    template = files("tuneline.evaluate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        result=result,
        curves=loss_curves(history),
        splits=contract["splits"],
        contract=contract,
        config=config,
        base_model=base_model,
    )


def loss_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training and validation loss as SVG polylines with labelled ticks, log-free linear axes."""
    train = [(float(e["step"]), float(e["loss"])) for e in history if "loss" in e]
    validation = [(float(e["step"]), float(e["eval_loss"])) for e in history if "eval_loss" in e]
    points = train + validation
    last = max((x for x, _ in points), default=1.0)
    top = max((y for _, y in points), default=1.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    def line(series: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*p) for p in series))

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "train": line(train),
        "validation": line(validation),
        "validation_points": [place(*p) for p in validation],
        "last_validation": validation[-1][1] if validation else None,
        "last_train": train[-1][1] if train else None,
        "y_ticks": [(place(0, top * s)[1], f"{top * s:.2f}") for s in shares],
        "x_ticks": [(place(last * s, 0)[0], f"{last * s:.0f}") for s in shares],
    }
