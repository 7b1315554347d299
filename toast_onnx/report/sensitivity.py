"""The sensitivity figure: damage over the fraction removed, one curve a block, one panel a part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.files import drafts, place
from toast_onnx.report.drawing import require_matplotlib

#: Panels from left to right; the three of the feed-forward network are those of the paper's figure 5.
PANELS = {
    "tokens": "tokens",
    "fc1": "fc1 (inputs)",
    "fc2": "fc2 (hidden units)",
    "fc1+fc2": "fc1 and fc2",
    "heads": "whole heads",
    "qk": "queries and keys",
    "vo": "values and projection",
}


def plot_sensitivity(document: Mapping[str, Any], path: Path) -> None:
    """Draw the results of `toast-onnx sensitivity`: top-1 where labels were given, as the paper does, else the damage.

    Args:
        document: of the results file.
        path: image to write, its format by the ending (png, svg, pdf).

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError: there are no trials, or the ending is no image format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    series, measure = curves(document)
    parts = [part for part in PANELS if part in series]
    if not parts:
        raise ConfigError("there is nothing to plot: no trial was measured")
    figure = Figure(figsize=(4.2 * len(parts), 3.8), layout="constrained")
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"{path}: no image format by that ending; use .png, .svg or .pdf")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    blocks = sorted({block for panel in series.values() for block in panel})
    from matplotlib import colormaps

    shade = colormaps["viridis"]
    for axis, part in zip(axes, parts, strict=True):
        for block, points in sorted(series[part].items()):
            colour = shade(blocks.index(block) / max(len(blocks) - 1, 1))
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=f"block {block}")
        if measure == "top1" and document.get("dense_top1") is not None:
            axis.axhline(document["dense_top1"], color="grey", linestyle=":", linewidth=1)
        axis.set(title=PANELS[part], xlabel="fraction removed")
        axis.grid(alpha=0.3)
    if measure != "top1":
        axes[0].set_yscale("log")
    axes[0].set_ylabel({"top1": "top-1", "kl": "KL from dense (nats)"}.get(measure, "relative error"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with drafts(path) as folder:
        draft = folder / path.name
        figure.savefig(draft, dpi=150)
        place(draft, path)


def curves(document: Mapping[str, Any]) -> tuple[dict[str, dict[int, list[tuple[float, float]]]], str]:
    """Points (fraction removed, value) by part and block, and the measure they show."""
    trials = document["trials"]
    measure = "top1" if trials and all("top1" in t["damage"] for t in trials) else document["metric"]
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for trial in sorted(trials, key=lambda t: t["ratio"]):
        point = (float(trial["ratio"]), float(trial["damage"][measure]))
        found.setdefault(trial["part"], {}).setdefault(int(trial["block"]), []).append(point)
    return found, measure
