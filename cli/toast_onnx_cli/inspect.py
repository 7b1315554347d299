"""`toast-onnx inspect`: the blocks of a model, what can be pruned and why not."""

from __future__ import annotations

from pathlib import Path

import click

from toast_onnx.matching.study import study
from toast_onnx.model import file_hash, load_model
from toast_onnx.report.inspection import inspection, inspection_table
from toast_onnx_cli.console import print_json, show_table
from toast_onnx_cli.links import links_option
from toast_onnx_cli.shapes import shape_option


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@shape_option
@links_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: Path, shapes: dict[str, tuple[int, ...]], as_json: bool) -> None:
    """Show the transformer blocks of MODEL: widths, MACs, what can be pruned and why not."""
    document = inspection(study(load_model(model), shapes))
    if as_json:
        print_json({**document, "model_sha256": file_hash(model)})
        return
    show_table(inspection_table(document))
