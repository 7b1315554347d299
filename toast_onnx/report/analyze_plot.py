"""The redundancy figure: nearly dead channels, R^2 and effective rank over the blocks, one panel each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.files import drafts, place
from toast_onnx.report.drawing import require_matplotlib

#: Key of a layer, label of the axis, factor; from left to right as in the paper's figure 4.
PANELS = (
    ("dead", "nearly dead channels (%)", 100.0),
    ("r2_mean", "R² from the other channels", 1.0),
    ("rank_share", "effective rank (% of the width)", 100.0),
)
LAYERS = {"fc1": ("fc1 inputs", "o"), "fc2": ("fc2 inputs (hidden units)", "s")}


def plot_analysis(document: Mapping[str, Any], path: Path) -> None:
    """Draw the results of `toast-onnx analyze`.

    Args:
        document: as `toast_onnx.report.analysis.analysis` returns it.
        path: image to write, its format by the ending (png, svg, pdf).

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError: no layer was measured, or the ending is no image format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: no image format by that ending; use .png, .svg or .pdf")
    if not any("width" in block[layer] for block in document["blocks"] for layer in LAYERS):
        raise ConfigError("there is nothing to plot: no feed-forward layer was measured")
    for axes, (key, label, factor) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for layer, (name, marker) in LAYERS.items():
            points = [(b["index"], b[layer].get(key)) for b in document["blocks"]]
            known = [(index, factor * value) for index, value in points if value is not None]
            axes.plot(*zip(*known, strict=True) if known else ([], []), marker=marker, label=name)
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.05 * factor if key != "dead" else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(document["model"], fontsize=10)
    with drafts(path) as folder:
        draft = folder / path.name
        figure.savefig(draft, dpi=150)
        place(draft, path)
