# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour in pictures
#
# A small Vision Transformer for handwritten digits is looked at, planned for a budget, pruned, and held against what it was.
# `tour.ipynb` is made from `tour.py`; both run in this folder, on one CPU core in about a minute:
#
#     pip install 'toast-onnx[report]' jupytext nbconvert ipykernel
#     jupytext --to ipynb --execute tour.py

# %%
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import toast_onnx as toast
from toast_onnx_calibration import calibrate, compare, evaluate, look, plan

MODEL, TEST, CALIBRATION = "digits_vit.onnx", "digits_test.npz", "digits_calibration.npz"
OUT = Path(mkdtemp(prefix="tour-"))

# %% [markdown]
# ## Load
#
# A loaded model shows its blocks, what they cost, and what of each can be pruned.

# %%
model = toast.load(MODEL)
dense = model.report()
model

# %% [markdown]
# ## Look
#
# What the first layer sees: the samples after preprocessing, and the range of their values. This model normalizes its own input, so its
# recipe is `none`. A wrong recipe costs more than any pruning, and shows here first.

# %%
seen = look(MODEL, CALIBRATION, preprocess="none", samples=8)
print("\n".join(seen.lines))
seen.sheet()

# %% [markdown]
# ## Plan
#
# Three tenths of the multiply-accumulates, spread over heads, widths and tokens of all blocks so that the answers change least. No labels
# are read.

# %%
found = plan(model, CALIBRATION, macs=0.3, preprocess="none", samples=32)
found

# %% [markdown]
# ## Prune
#
# What stays is solved for again, so that it makes up for what went. The result is proven before anything is written: the dense graph with
# the new weights padded back by zeros has to agree with the smaller graph.

# %%
statistics = calibrate(model, CALIBRATION, preprocess="none")
small = toast.prune(model, found, statistics)
small.save(OUT / "small.onnx")
print(
    f"{small.macs / dense['macs']:.3f} of the multiply-accumulates; the twin agrees to {small.twin.worst:.1e} of scale"
)

# %%
blocks = toast.load(OUT / "small.onnx").report()["blocks"]
figure, panels = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
for panel, (part, key, name) in zip(
    panels,
    [("attention", "qk_dim", "query and key dimensions of a head"), ("ffn", "width", "hidden units")],
    strict=True,
):
    places = range(len(blocks))
    panel.bar(places, [b[part][key] for b in dense["blocks"]], color="#d0d7de", label="dense")
    panel.bar(places, [b[part][key] for b in blocks], color="#1f6feb", label="pruned")
    panel.set(title=name, xlabel="block", xticks=[*places])
figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

# %% [markdown]
# ## Compare
#
# How often both models answer alike, and where in the network they part.

# %%
comparison = compare(MODEL, OUT / "small.onnx", TEST, preprocess="none", rounds=0)
print(comparison.verdict)
comparison

# %% [markdown]
# ## What each size costs
#
# The same fraction removed everywhere, for several fractions, beside the plan. The dashed line is the dense model; labels are read here
# for the first time. Digits are easy: half of the cost goes for nothing. On photographs the two ways part sooner, as README shows.


# %%
def right(path: str | Path) -> float:
    """Per cent of the test images that a model names rightly."""
    accuracy = evaluate(path, TEST, TEST, preprocess="none").accuracy
    return 100 * accuracy.top1 / accuracy.samples


points = {}
for part in (0.25, 0.5, 0.625, 0.75, 0.875):
    each = toast.prune(model, {"version": 1, "attention": {"qk": part, "vo": part}, "ffn": {"fc2": part}}, statistics)
    each.save(OUT / f"{part}.onnx")
    points[each.macs / dense["macs"]] = right(OUT / f"{part}.onnx")

# %%
figure, panel = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
panel.plot([*points], [*points.values()], "o-", color="#57606a", label="the same everywhere")
panel.plot(small.macs / dense["macs"], right(OUT / "small.onnx"), "*", markersize=14, color="#1f6feb", label="planned")
panel.axhline(right(MODEL), color="#57606a", linestyle="--", linewidth=1)
panel.set(xlabel="multiply-accumulates left", ylabel="top-1 on 1000 test images, %")
panel.grid(alpha=0.3)
panel.legend(frameon=False)
