"""What every command is made with: its examples, and one order for the options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from toast_onnx.providers import PROVIDERS

#: Options of several commands, in the order in which each of them lists those that it has: what goes, what is read,
#: what is written, how samples are prepared, where things run, what is shown.
SHARED = (
    "--ratios", "--macs", "--params", "--latency",
    "--teacher", "--data", "--labels", "--settings", "--statistics", "--sensitivity", "--costs", "--output-name",
    "--output", "--report", "--plot",
    "--compensation", "--align-heads", "--align-width", "--parts", "--target", "--split-shared",
    "--preprocess", "--max-pixels", "--samples", "--views", "--tokens", "--class-weight",
    "--backend", "--precision", "--runtime", "--provider", "--batch", "--warmup", "--rounds", "--threads", "--ray",
    "--trtexec", "--memory", "--solve-on", "--hold-back", "--seed", "--shape",
    "--sort", "--csv", "--no-images", "--dry-run", "--script", "--no-links", "--overwrite", "--quiet", "--json",
)  # fmt: skip

#: Under which the click context keeps whether `--quiet` was given.
QUIET = "toast_onnx_cli.quiet"


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, listed in this order."""

    def add(function: Any) -> Any:
        for option in reversed(each):
            function = option(function)
        return function

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
preprocess_option = click.option(
    "--preprocess", metavar="RECIPE", help="imagenet, imagenet-inception, clip, dinov2, mae, none, or a file."
)
provider_option = click.option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime runs the model.",
)


def _be_quiet(context: click.Context, _param: click.Parameter, value: bool) -> None:
    context.meta[QUIET] = context.meta.get(QUIET, False) or value


def _quiet_option() -> click.Option:
    """`-q` behind the command's name, where people write it, as before it."""
    text = "Neither progress nor notes; errors and results alone."
    return click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_be_quiet, help=text)


class ToastCommand(click.Command):
    """A command whose help ends with examples, and whose shared options stand in the common order.

    Attributes:
        examples: command lines without the program's name.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(_quiet_option())
        self.examples = tuple(examples)
        self.params = _ordered(self.params)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, each with its continuation lines."""
        if not self.examples:
            return
        with formatter.section("Examples" if len(self.examples) > 1 else "Example"):
            for example in self.examples:
                for line in folded(f"toast-onnx {example}", formatter.width - formatter.current_indent):
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def toast_command(name: str, *examples: str) -> Callable[[Callable[..., Any]], ToastCommand]:
    """Decorator that makes a function the command of that name.

    Args:
        name: of the command.
        examples: command lines without the program's name; `tests/cli/test_examples.py` runs each of them.
    """
    return click.command(name, cls=ToastCommand, examples=examples)


def folded(line: str, width: int) -> list[str]:
    """A command line as a shell reads it over several lines, cut in front of options where it is too long.

    Args:
        line: the command line.
        width: characters of a line.
    """
    pieces: list[str] = []
    for word in line.split():
        if pieces and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = pieces[:1]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) <= width - 2:
            lines[-1] += f" {piece}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {piece}")
    return lines


def _ordered(parameters: Sequence[click.Parameter]) -> list[click.Parameter]:
    """The shared options in their common order, at the places of shared ones; the others stay where they are."""
    places = [i for i, p in enumerate(parameters) if p.opts[-1] in SHARED]
    shared = sorted((parameters[i] for i in places), key=lambda p: SHARED.index(p.opts[-1]))
    ordered = list(parameters)
    for place, parameter in zip(places, shared, strict=True):
        ordered[place] = parameter
    return ordered
