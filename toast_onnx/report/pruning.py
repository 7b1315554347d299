"""The document beside a pruned model: everything needed to audit and to reproduce the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import onnx

from toast_onnx import __version__
from toast_onnx.errors import ModelError
from toast_onnx.files import files_read, sha256_of
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.study import Study, study
from toast_onnx.model import file_hash, links_out, load_model, model_files, staged_model, stored_bytes
from toast_onnx.ort import ort
from toast_onnx.planning.macs import (
    attention_macs,
    ffn_macs,
    graph_macs,
    graph_params,
    linear_params,
)
from toast_onnx.pruning import Pruned
from toast_onnx.report.inspection import declined
from toast_onnx.report.tables import Side, Table, format_count
from toast_onnx.selection.plan import Selection
from toast_onnx.solving.weights import BlockWeights, HeadWeights
from toast_onnx.wellformed import why_not_loaded


def pruning_report(pruned: Pruned, dense: Study, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The report of a run, after the model was written to `out`.

    Args:
        pruned: the result.
        dense: study of the dense model.
        out: the written model.
        options: the options of the run.

    Returns:
        A document of plain data: models with hashes and sizes, MACs and parameters before and after, every block's
        settings, widths and kept indices (or `basis`), the twin's result, versions.
    """
    after = study(load_model(out), dense.counted_shapes)
    matched = {b.index: b for b in after.match.blocks}
    local = {"local": [result.to_document() for result in pruned.local]} if pruned.local else {}
    return {
        "format": "toast-onnx/prune/1",
        "dense": _identity(dense.view.model.path) | _costs(dense),
        "pruned": _identity(out) | _costs(after),
        "inputs": {name: list(shape) for name, shape in dense.counted_shapes.items()},
        "blocks": [_block(pruned, dense, b, after, matched.get(b.index)) for b in dense.match.blocks],
        "declined": declined(dense),
        "statistics": pruned.statistics,
        "twin": None if pruned.twin is None else pruned.twin.to_document(),
        "notes": [*dense.notes, *pruned.notes],
        "no_norm_in_front": list(pruned.unfounded),
        "tokens": _merging(pruned),
        "options": options,
        "versions": {
            "toast-onnx": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": ort.__version__,
            "numpy": numpy.__version__,
        },
    } | local


def save_with_report(
    pruned: Pruned,
    dense: Study,
    source: dict[str, Any],
    options: dict[str, Any],
    out: Path,
    report: Path | None,
    *,
    check: bool = True,
    more: Callable[[Path], Mapping[str, Any]] = lambda _: {},
) -> dict[str, Any]:
    """Write a pruned model and its report; a model never appears without its report.

    Args:
        pruned: the result.
        dense: study of the dense model.
        source: where the statistics came from.
        options: the options of the run.
        out: the model's file.
        report: the report's file; None writes the model alone, for a caller that shows the report.
        check: have ONNX Runtime load the model before it is kept.
        more: called with the written model before it has its name; gives what else the report holds.

    Returns:
        The report.

    Raises:
        ModelError: one of them cannot be written, or ONNX Runtime does not load the model.
    """
    with staged_model(pruned.model, out, report) as staged:
        if check and (reason := why_not_loaded(staged.draft)) is not None:
            raise ModelError(f"{out} was not written: {reason}; export {dense.source.path} again")
        document = pruning_report(pruned, dense, staged.draft, options) | {"statistics": source}
        document["dense"]["files"] = [
            {"file": file.name, "sha256": sha256_of([file]), "bytes": file.stat().st_size}
            for file in model_files(dense.source.path)
        ]
        document |= more(staged.draft)
        document["read"] = files_read()
        if links := links_out(dense.source.path):
            document["dense"]["links"] = {name: str(behind) for name, behind in links.items()}
        staged.beside = json_bytes(document)
    return document


def pruning_table(document: dict[str, Any]) -> Table:
    """Widths and multiply-accumulates of every block before and after, and the totals below."""
    sizes = {"heads": "heads", "qk_dim": "qk", "vo_dim": "vo", "in_features": "in", "width": "width"}
    rows = []
    for block in document["blocks"]:
        before, after = block["before"], block["after"] or {}
        cells = [_change(str(before.get(key, "-")), str(after.get(key, "-"))) for key in sizes]
        totals = (s.get("attention_macs", 0) + s.get("ffn_macs", 0) for s in (before, after))
        rows.append([str(block["index"]), block["name"], *cells, _change(*map(format_count, totals))])
    dense, small, twin = document["dense"], document["pruned"], document["twin"]
    proof = "not checked" if twin is None else f"twin agrees to {twin['worst']:.1e} of scale"
    lines = (
        f"MACs {format_count(dense['macs'])} -> {format_count(small['macs'])}, "
        f"parameters {format_count(dense['params'])} -> {format_count(small['params'])}; {proof}",
    )
    sides: list[Side] = ["right", "left", *(["right"] * 6)]  # type: ignore[list-item]
    return Table(document["dense"]["file"], ("block", "name", *sizes.values(), "MACs"), rows, sides, lines)


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def json_bytes(document: dict[str, Any]) -> bytes:
    """A report as it is written."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _identity(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": file_hash(path), "bytes": stored_bytes(path)}


def _costs(found: Study) -> dict[str, Any]:
    return {"macs": graph_macs(found.view, found.counted), "params": graph_params(found.view)}


def _block(pruned: Pruned, dense: Study, block: Block, after: Study, smaller: Block | None) -> dict[str, Any]:
    settings = pruned.ratios[block.index]
    weights = pruned.weights.get(block.index)
    chosen = {
        "qk": str(settings.qk),
        "vo": str(settings.vo),
        "heads": str(settings.heads),
        "fc1": str(settings.fc1),
        "fc2": str(settings.fc2),
        "select": settings.select,
        "score": settings.score,
        "coupling": settings.coupling,
        "ffn_score": "activation" if settings.mode == "runtime" else settings.ffn_score,
        "mode": settings.mode,
        "defaults": sorted(settings.defaults),
    }
    return {
        "index": block.index,
        "name": block.name,
        "settings": chosen,
        "before": _sizes(dense, block),
        "after": None if smaller is None else _sizes(after, smaller),
        "kept": _kept(block, weights) | {s.part: _selected(s) for s in pruned.selections if s.block == block.index},
        "notes": _notes(block, weights, settings.select),
        "predicted_errors": dict(pruned.errors.get(block.index, {})),
    }


def _merging(pruned: Pruned) -> dict[str, Any] | None:
    """What became of the tokens; None where they were left alone."""
    if not pruned.merges:
        return None
    return {
        "merges": [
            {
                "block": m.block,
                "before": m.counts.count,
                "after": m.counts.left,
                "how": "merged" if m.matched is not None else "unread tokens dropped",
                "metric": None if m.features is None else m.features.metric.name,
            }
            for m in pruned.merges
        ],
        "twin": None if pruned.merging is None else pruned.merging.to_document(),
    }


def _notes(block: Block, weights: BlockWeights | None, select: str) -> list[str]:
    """Where a block was pruned in another form than was asked for."""
    attention, new = block.attention, None if weights is None else weights.attention
    if attention is None or new is None or select == "index":
        return []
    notes: list[str] = []
    if new.v is not None and attention.side is not None:
        notes.append("vo: dimensions are kept by index, not a basis, because the values are also convolved one by one")
    if new.q is None or not attention.regions:
        return notes
    if attention.norms:
        what = "pairs of dimensions" if attention.pairs is not None else "dimensions"
        return [
            *notes,
            f"qk: the same {what} are kept in every head, because a norm over each head acts on them; its length "
            "follows from those that stay, which the predicted error leaves out",
        ]
    why = "rotary embedding" if attention.pairs is not None else "a table along the dimensions"
    what = "pairs of dimensions" if attention.pairs is not None else "dimensions"
    return [*notes, f"qk: the same {what} are kept in every head, not a basis, because {why} acts on them"]


def _sizes(found: Study, block: Block) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    if block.attention is not None:
        sizes |= {
            "heads": block.attention.num_heads,
            "qk_dim": block.attention.qk_dim,
            "vo_dim": block.attention.vo_dim,
            "attention_macs": attention_macs(found.view, found.counted, block.attention),
            "attention_params": linear_params(block.attention.linears),
        }
    if block.ffn is not None:
        sizes |= {
            "in_features": block.ffn.in_features,
            "width": block.ffn.width,
            "ffn_macs": ffn_macs(found.view, found.counted, block.ffn),
            "ffn_params": linear_params(block.ffn.linears),
        }
    return sizes


def _kept(block: Block, weights: BlockWeights | None) -> dict[str, Any]:
    """Kept indices of each static part: a list (a list for each head that stays), "basis", or None where all stay."""
    kept: dict[str, Any] = {"heads": None, "qk": None, "vo": None, "fc1": None, "fc2": None}
    if weights is None:
        return kept
    if block.attention is not None and weights.attention is not None:
        v = weights.attention.v
        kept["heads"] = None if v is None or v.heads is None else v.heads.tolist()
        kept["qk"] = _dimensions(weights.attention.q, block.attention.qk_dim)
        kept["vo"] = _dimensions(v, block.attention.vo_dim)
    if weights.ffn is not None:
        kept["fc1"] = None if weights.ffn.inputs is None else weights.ffn.inputs.tolist()
        kept["fc2"] = None if weights.ffn.units is None else weights.ffn.units.tolist()
    return kept


def _selected(selection: Selection) -> dict[str, Any]:
    """What a graph chooses for every batch, and from which tokens."""
    tokens = None if selection.tokens is None else selection.tokens.tolist()
    chosen = {"runtime": selection.kept, "tokens": tokens}
    return chosen | ({"residual": selection.residual} if selection.part == "fc1" else {})


def _dimensions(part: HeadWeights | None, dense: int) -> list[list[int]] | str | None:
    if part is None or part.kept == dense:
        return None
    return "basis" if part.is_basis else part.slots.tolist()
