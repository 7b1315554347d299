"""`--preprocess` and `--max-pixels`, of every command that reads images."""

from __future__ import annotations

import click

from toast_onnx_cli.commands import options, preprocess_option


def _set(_ctx: click.Context, _param: click.Parameter, value: int | None) -> None:
    from toast_onnx_calibration.recipes import MAX_PIXELS, set_max_pixels

    set_max_pixels(value or MAX_PIXELS)


max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    callback=_set,
    expose_value=False,
    help="Skip images that are, or would be resized to, more pixels; 64000000 by default.",
)
#: How images are read.
image_options = options(preprocess_option, max_pixels_option)
