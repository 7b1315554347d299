"""`--solve-on`, of every command that solves for new weights."""

from __future__ import annotations

import click

from toast_onnx.importance.arithmetic import SOLVERS, set_solver


def _set(context: click.Context, _param: click.Parameter, name: str) -> None:
    if not context.resilient_parsing:  # of a shell that completes a line
        set_solver(name)


solve_on_option = click.option(
    "--solve-on",
    type=click.Choice(list(SOLVERS)),
    default="cpu",
    show_default=True,
    callback=_set,
    expose_value=False,
    help="Where selection and new weights are worked out; `cuda` needs PyTorch and a GPU.",
)
