"""`toast-onnx presets`: the published schedules that `--ratios paper:MODEL@BUDGET` takes."""

from __future__ import annotations

import json
from typing import Any

import click

from toast_onnx.planning.presets import Preset, find_preset, list_presets
from toast_onnx.planning.ratios import format_ratios
from toast_onnx.report.tables import Side, Table
from toast_onnx_cli.commands import json_option, toast_command
from toast_onnx_cli.console import show_table

_NOTE = """\
Every schedule expects fine-tuning: the top-1 here is what the paper reports after it. Pruned by one of them and not
trained, a model answers hardly anything right: paper:deit_tiny@0.8 has 0.3 % of 300 ImageNet images, 0.7 % with
weights compensated by `prune --compensation ridge`. Train it with `toast-onnx finetune`; without training, widths that
`prune --macs` plans keep far more.

GMACs: the dense model; the schedule as the paper counts it (channels selected at run time, all of fc1's outputs
computed); the static graph that prune writes, where fc1 shrinks on both sides. Accuracy and speed-up are what the paper
reports after fine-tuning (ImageNet-1k; H100, batch 128)."""


@toast_command("presets", "presets", "presets paper:deit_small@2.7")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the paper's published schedules, or print the ratios file of one.

    NAME is a preset such as paper:deit_small@2.7. Its file can be edited and given to prune.
    """
    presets = (find_preset(name),) if name else list_presets()
    if as_json:
        click.echo(json.dumps({"presets": [_document(preset) for preset in presets]}, indent=2))
    elif name:
        preset = presets[0]
        comment = (
            f"{preset.name}: {preset.model} from {preset.dense_gmacs:.3f} to {preset.static_gmacs:.3f} GMACs\n"
            f"{preset.expects}"
        )
        click.echo(format_ratios(preset.ratios(), comment), nl=False)
    else:
        columns = ("preset", "model", "dense", "paper", "static", "dense top-1", "top-1", "speed-up")
        align: tuple[Side, ...] = ("left", "left", *("right",) * 6)
        show_table(Table(None, columns, [_row(p) for p in presets], align, spare=("model", "dense top-1", "speed-up")))
        click.echo(f"\n{_NOTE}")


def _row(preset: Preset) -> tuple[str, ...]:
    return (
        preset.name,
        preset.model,
        f"{preset.dense_gmacs:.3f}",
        f"{preset.gmacs:.3f}",
        f"{preset.static_gmacs:.3f}",
        f"{preset.dense_top1:.2f}",
        f"{preset.top1:.2f}",
        f"{preset.speedup:.2f}x",
    )


def _document(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "model": preset.model,
        "short": preset.short,
        "aliases": list(preset.aliases),
        "budget": preset.budget,
        "gmacs": {
            "dense": round(preset.dense_gmacs, 6),
            "paper": round(preset.gmacs, 6),
            "static": round(preset.static_gmacs, 6),
        },
        "reported": {"dense_top1": preset.dense_top1, "top1": preset.top1, "speedup": preset.speedup},
        "expects": preset.expects,
        "ratios": preset.ratios().to_document(),
    }
