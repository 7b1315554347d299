"""`--no-links`, of every command that reads a model."""

from __future__ import annotations

import click


def _set(_ctx: click.Context, _param: click.Parameter, refused: bool) -> None:
    from toast_onnx.external import set_links_followed

    set_links_followed(not refused)


links_option = click.option(
    "--no-links",
    is_flag=True,
    callback=_set,
    expose_value=False,
    help="Refuse a model whose files are links out of its folder.",
)
