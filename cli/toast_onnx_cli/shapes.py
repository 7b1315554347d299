"""Shapes on the command line, spelled `NAME=AxBxC` everywhere; trtexec's `NAME:AxBxC` is understood, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click


def parse_shapes(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Turn `input=1x3x224x224` arguments into shapes by input name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (part for text in values for part in text.split(",") if part):
        # names such as `input:0` are legal, so the last separator counts
        found = re.fullmatch(r"(.+)[=:]([1-9]\d*(?:x[1-9]\d*)*)", value, re.IGNORECASE)
        if found is None:
            raise click.BadParameter(f"'{value}' is not of the form input=1x3x224x224")
        if found[1] in shapes:
            raise click.BadParameter(f"the shape of '{found[1]}' is given twice; keep one")
        shapes[found[1]] = tuple(int(s) for s in found[2].lower().split("x"))
    return shapes


def shapes_option(*names: str, help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds an option of shapes under other names than `--shape`."""
    return click.option(*names, multiple=True, callback=parse_shapes, metavar="NAME=AxBx...", help=help_text)


def shape_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds `--shape` as the parameter `shapes`."""
    add = shapes_option(
        "--shape",
        "shapes",
        help_text="Concrete shape of an input with symbolic axes, as in input=1x3x224x224; may be repeated.",
    )
    return add(function)
