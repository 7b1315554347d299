"""What keeping the same dimensions on both sides of a pair is worth (figure 3 of ToaSt): python benchmarks/coupling.py

Queries with keys, and values with the output projection, are pruned in every head of DeiT-Tiny by the paper's `gm`
score, for every coupling, at one ratio after the other; block 0 stays dense, nothing is compensated or trained. In the
row `uncoupled` each of the four matrices keeps the dimensions that it would choose for itself. Those do not fit
together, so they cannot be packed into smaller matrices: their weights are set to zero in the dense graph, where a
product survives only if both sides kept it. `shared` says for how many of the kept dimensions they did.

Needs timm, safetensors and, in TOAST_DATA or --data, weights/deit_tiny_patch16_224.safetensors and data/ilsvrc_val_300.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deit import evaluation_images, export_deit, logits, parser_with_data
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.importance.attention import qk_scores, vo_scores
from toast_onnx.importance.selection import top_k
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.linear import bias, weights
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model, load_model, save_model
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.widths import paper_kept_head_dims
from toast_onnx.proof.twin import padded_twin
from toast_onnx.pruning import prune
from toast_onnx.rewriting.attention import head_weights
from toast_onnx.solving.weights import AttentionWeights, BlockWeights, HeadWeights, ProjWeights
from toast_onnx_calibration.agreement import divergences
from toast_onnx_cli.console import print_table

COUPLINGS = ("coupled", "q_only", "k_only", "proj_only", "average")
#: Which coupling reads one side alone: (queries, keys) and (values, output projection).
ALONE = ("q_only", "k_only")


def main() -> None:
    options = arguments()
    images, labels = evaluation_images(options.data / "data" / "ilsvrc_val_300", options.images)
    rows = json.loads(options.results.read_text()) if options.results and options.results.exists() else []
    done = {(r["coupling"], r["ratio"]) for r in rows if r["images"] == len(labels)}
    with tempfile.TemporaryDirectory(prefix="toast-coupling-") as name:
        folder = Path(name)
        dense = export_deit(options.data / "weights" / "deit_tiny_patch16_224.safetensors", folder / "dense.onnx")
        look = study(load_model(dense))
        wanted = logits(dense, images, options.threads)
        dense_top1 = float((wanted.argmax(axis=1) == labels).mean())
        for ratio, coupling in itertools.product(options.ratios, (*COUPLINGS, "uncoupled")):
            if (coupling, ratio) in done:
                continue
            path, shared = folder / "pruned.onnx", 1.0
            if coupling == "uncoupled":
                model, shared = uncoupled(look, ratio)
            else:
                model = coupled(look, ratio, coupling)
            save_model(model, path)
            found = logits(path, images, options.threads)
            row = {
                "coupling": coupling,
                "ratio": ratio,
                "images": len(labels),
                "top1": float((found.argmax(axis=1) == labels).mean()),
                "kl": float(divergences(wanted.astype(np.float64), found.astype(np.float64)).mean()),
                "shared": shared,
            }
            rows.append(row)
            if options.results is not None:
                options.results.write_text(json.dumps(rows, indent=1))
            print(f"{ratio}: {coupling}: {row['top1']:.1%}, KL {row['kl']:.3f}", file=sys.stderr, flush=True)
    rows = sorted((r for r in rows if r["images"] == len(labels)), key=lambda r: r["ratio"])
    document = {"model": "deit_tiny_patch16_224", "images": len(labels), "dense_top1": dense_top1, "rows": rows}
    if options.plot is not None:
        plot(document, options.plot)
    if options.json:
        print(json.dumps(document, indent=1))
        return
    cells = [
        [r["coupling"], f"{r['ratio']:g}", f"{r['top1']:.1%}", f"{r['kl']:.3f}", f"{r['shared']:.1%}"] for r in rows
    ]
    title = f"DeiT-Tiny, {len(labels)} images, dense {dense_top1:.1%}"
    print_table(("coupling", "removed", "top-1", "KL", "shared"), cells, title=title)


def arguments() -> argparse.Namespace:
    parser = parser_with_data(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[k / 10 for k in range(1, 10)])
    parser.add_argument("--images", type=int, help="evaluation images; all by default")
    parser.add_argument("--results", type=Path, help="JSON file of rows: what it holds is not measured again")
    parser.add_argument("--plot", type=Path, help="write the figure here (png, svg or pdf)")
    return parser.parse_args()


def coupled(look: Study, ratio: float, coupling: str) -> Model:
    """The model with both sides of a pair keeping the same dimensions, really smaller."""
    document = {
        "version": 1,
        "attention": {"qk": ratio, "vo": ratio, "select": "index", "score": "gm", "coupling": coupling},
        "blocks": {0: {"attention": {"qk": 0, "vo": 0}}},
        "rounding": "paper",
        "compensation": {"kind": "none"},
    }
    return prune(look, parse_ratios(document), SyntheticStatistics(look), check=False).model


def uncoupled(look: Study, ratio: float) -> tuple[Model, float]:
    """The dense graph without what each matrix would drop, and the share of kept dimensions that both sides kept."""
    found = {block.index: uncoupled_block(look, block, ratio) for block in look.match.blocks[1:]}
    model = padded_twin(look.view, look.facts, look.match.blocks, {i: new for i, (new, _) in found.items()})
    return model, float(np.mean([share for _, share in found.values()]))


def uncoupled_block(look: Study, block: Block, ratio: float) -> tuple[BlockWeights, float]:
    """Weights of one block, as the padded twin takes them: what is kept, and the places where it stays."""
    attention = block.attention
    assert attention is not None
    assert attention.q is not None
    assert attention.k is not None
    assert attention.v is not None
    assert attention.proj is not None
    q, k, v = (head_weights(look.view, look.facts, b) for b in (attention.q, attention.k, attention.v))
    linear = attention.proj.linear
    wo = weights(look.view, look.facts, linear)[attention.proj.layout.channels]  # (heads, d, out)
    bo = bias(look.view, look.facts, linear)
    kept = paper_kept_head_dims(attention.qk_dim, Decimal(str(ratio)))
    slots_q, slots_k = (top_k(qk_scores(q.weight, k.weight, "gm", side), kept) for side in ALONE)
    slots_v, slots_o = (top_k(vo_scores(v.weight, wo, "gm", side), kept) for side in ALONE)
    rows = np.take_along_axis(wo, slots_v[:, :, None], axis=1)
    rows = rows * both(slots_v, slots_o)[:, :, None]  # the projection's own zeros, in the places that V kept
    proj = ProjWeights(rows, np.zeros(linear.out_features, wo.dtype) if bo is None else bo)
    new = AttentionWeights(narrowed(q, slots_q), narrowed(k, slots_k), narrowed(v, slots_v), proj)
    share = (both(slots_q, slots_k).mean() + both(slots_v, slots_o).mean()) / 2
    return BlockWeights(attention=new), float(share)


def narrowed(old: HeadWeights, slots: np.ndarray) -> HeadWeights:
    """The dimensions (heads, kept) of a layer."""
    return HeadWeights(
        np.take_along_axis(old.weight, slots[None], axis=2), np.take_along_axis(old.bias, slots, axis=1), slots
    )


def both(slots: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(heads, kept) which of a head's dimensions are among the other side's."""
    return (slots[:, :, None] == others[:, None, :]).any(axis=2)


def plot(document: dict[str, Any], path: Path) -> None:
    """Top-1 and KL over the fraction removed, one curve a coupling."""
    from toast_onnx.report.drawing import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for coupling in (*COUPLINGS, "uncoupled"):
        rows = [r for r in document["rows"] if r["coupling"] == coupling]
        style = {"linestyle": "--", "color": "black"} if coupling == "uncoupled" else {}
        removed = [r["ratio"] for r in rows]
        left.plot(removed, [100 * r["top1"] for r in rows], marker="o", markersize=4, label=coupling, **style)
        right.plot(removed, [r["kl"] for r in rows], marker="o", markersize=4, **style)
    left.axhline(100 * document["dense_top1"], color="grey", linestyle=":", linewidth=1, label="dense")
    left.set_ylabel(f"top-1 (%), {document['images']} images")
    right.set_ylabel("KL from dense (nats)")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("fraction of every head's dimensions removed")
        axis.grid(alpha=0.3)
    left.legend()
    figure.suptitle("DeiT-Tiny, no training: one choice for both sides of a pair, or one each", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
