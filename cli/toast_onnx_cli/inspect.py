"""`toast-onnx inspect`: the blocks of a model, what can be pruned and why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toast_onnx.matching.study import study
from toast_onnx.model import load_model
from toast_onnx.report.inspection import inspection
from toast_onnx_cli.console import format_count, print_json, print_table
from toast_onnx_cli.shapes import shape_option

COLUMNS = ("block", "name", "heads", "qk", "vo", "in", "width", "activation", "MACs", "params", "prunable", "tokens")
#: Parts as the table names them -> keys of the document.
ATTENTION = {"heads": "heads_prunable", "qk": "qk", "vo": "vo"}
FFN = {"fc1": "fc1", "fc2": "fc2"}


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@shape_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: Path, shapes: dict[str, tuple[int, ...]], as_json: bool) -> None:
    """Show the transformer blocks of MODEL: widths, MACs, what can be pruned and why not."""
    document = inspection(study(load_model(model), shapes))
    if as_json:
        print_json(document)
        return
    title = f"{document['model']}  opset {document['opset']}  {document['producer']}".rstrip()
    align = ("right", "left", *("right",) * 5, "left", "right", "right", "left", "left")
    print_table(COLUMNS, [_row(b) for b in document["blocks"]], title=title, align=align)  # type: ignore[arg-type]
    click.echo(
        f"{len(document['blocks'])} blocks, {format_count(document['macs'])} MACs at {_inputs(document)}, "
        f"{format_count(document['params'])} parameters"
    )
    for reason, blocks in _reasons(document["blocks"]).items():
        click.echo(f"not prunable: {reason} (block {', '.join(blocks)})")
    for reason, blocks in _token_reasons(document["blocks"]).items():
        click.echo(f"tokens not mergeable: {reason} (block {', '.join(blocks)})")
    for entry in document["declined"]:
        click.echo(f"declined: {entry['node']}: {entry['reason']}")


def _row(block: dict[str, Any]) -> list[str]:
    attention, ffn = block["attention"], block["ffn"]
    parts = [p for p in (attention, ffn) if p]
    prunable = [
        name
        for part, names in ((attention, ATTENTION), (ffn, FFN))
        if part
        for name, key in names.items()
        if part[key]["prunable"]
    ]
    return [
        str(block["index"]),
        block["name"],
        *([str(attention[k]) for k in ("heads", "qk_dim", "vo_dim")] if attention else ["-"] * 3),
        *([str(ffn["in_features"]), str(ffn["width"])] if ffn else ["-"] * 2),
        (ffn["activation"] + (", gated" if ffn["gated"] else "")) if ffn else "-",
        format_count(sum(p["macs"] for p in parts)),
        format_count(sum(p["params"] for p in parts)),
        " ".join(prunable) or "nothing",
        "mergeable" if block["tokens"]["mergeable"] else "-",
    ]


def _reasons(blocks: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Reasons with the blocks they hold for."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        for part, names in (("attention", ATTENTION), ("ffn", FFN)):
            for name, key in names.items() if block[part] else ():
                if not block[part][key]["prunable"]:
                    found.setdefault(f"{name}: {block[part][key]['reason']}", []).append(str(block["index"]))
    return found


def _token_reasons(blocks: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Reasons against merging tokens, with the blocks they hold for."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        if not block["tokens"]["mergeable"]:
            found.setdefault(block["tokens"]["reason"], []).append(str(block["index"]))
    return found


def _inputs(document: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in document["inputs"].items())
