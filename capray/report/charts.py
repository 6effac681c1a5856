"""Charts as SVG to stand in a page: no background, grey lines and labels that read on light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

_GREY = "#808080"
_COLOURS = ("#4a90d9", "#d9822b", "#3aa76d", "#b05cc6")


def bars(places: Sequence[float], heights: Sequence[float], width: float, x_label: str) -> str:
    """A histogram: bars of ``width`` that begin at ``places``."""
    drawing, axes = _canvas(x_label, "images")
    axes.bar(places, heights, width=width, align="edge", color=_COLOURS[0], edgecolor="none")
    return _svg(drawing)


def lines(curves: Mapping[str, Sequence[float]], x: Sequence[float], x_label: str, y_label: str = "") -> str:
    """A line for each of ``curves`` over ``x``."""
    drawing, axes = _canvas(x_label, y_label)
    for (name, y), colour in zip(curves.items(), _COLOURS, strict=False):
        axes.plot(x, y, color=colour, label=name, marker="." if len(x) < 40 else None)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_GREY)
    return _svg(drawing)


def _canvas(x_label: str, y_label: str):
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5, 2.6), layout="constrained")
    axes = drawing.subplots()
    axes.set_xlabel(x_label, color=_GREY)
    axes.set_ylabel(y_label, color=_GREY)
    axes.tick_params(colors=_GREY, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    return drawing, axes


def _svg(drawing) -> str:
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    return text[text.index("<svg") :]
