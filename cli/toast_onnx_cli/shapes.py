"""The `--shape` option: concrete sizes for symbolic axes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click


def parse_shapes(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Turn `input=1x3x224x224` arguments into shapes by input name."""
    shapes = {}
    for value in values:
        name, _, sizes = value.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise click.BadParameter(f"'{value}' is not of the form input=1x3x224x224")
        shapes[name] = tuple(int(s) for s in sizes.split("x"))
    return shapes


def shape_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds `--shape` as the parameter `shapes`."""
    return click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=parse_shapes,
        metavar="NAME=AxBx...",
        help="Concrete shape of an input with symbolic axes, as in input=1x3x224x224; may be repeated.",
    )(function)
