"""Where results may be written: never over something that the same command reads, nor over one another.

An earlier result is overwritten only where `--overwrite` says so.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import click

from toast_onnx.errors import ModelError
from toast_onnx.model import model_files
from toast_onnx_cli.commands import json_option, options
from toast_onnx_cli.links import links_option

_OVERWRITE = "toast_onnx_cli.overwrite"


def _keep(context: click.Context, _param: click.Parameter, value: bool) -> None:
    context.meta[_OVERWRITE] = value


#: Of every command that writes results; `check_destinations` asks for it.
overwrite_option = click.option(
    "--overwrite", is_flag=True, expose_value=False, callback=_keep, help="Write over results that are there already."
)
#: Of every command that reads a model and writes results, which `--json` tells of.
result_options = options(links_option, overwrite_option, json_option)


def is_overwriting() -> bool:
    """Whether earlier results are to be replaced."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_OVERWRITE, False))


def read_files(model: Path) -> list[Path]:
    """The files of a model, its external weights too; only the named file where it is no model."""
    try:
        return model_files(model)
    except ModelError:  # what loads it says so, too
        return [model]


def check_destinations(
    inputs: Sequence[Path | str | None], outputs: Mapping[str, Path | None], added_to: Collection[str] = ()
) -> None:
    """Refuse to overwrite an input or an earlier result, before any work is done.

    Args:
        inputs: what must stay, the model first; None, and text that names no file (a preset, `module:function`), is
            passed over.
        outputs: option -> file it names, None where it was not given.
        added_to: options whose file a command reads and adds to, or writes anew from the same sources.

    Raises:
        ModelError: an output is an input or another output, is there already, is no regular file, or lies in a folder
            that does not exist or cannot be written to.
    """
    sources = [Path(source) for source in inputs if source is not None]
    given = {option: path for option, path in outputs.items() if path is not None}
    written: dict[Path, str] = {}
    for option, path in given.items():
        for source in sources:
            if path.exists() and source.exists() and path.samefile(source):
                same = "the input" if source == sources[0] else f"the input file {source}"
                raise ModelError(f"the output {path} is {same}; choose another name with {option}")
        _check_place(path, option)
        other = written.setdefault(path.resolve(), option)
        if other != option:
            raise ModelError(f"{other} and {option} would both be {path}; choose another name with {option}")
    for option, path in given.items():
        if path.exists() and option not in added_to and not is_overwriting():
            name = option.partition(" ")[0]
            raise ModelError(f"{path} exists already; give --overwrite to replace it, or another name with {name}")


def _check_place(path: Path, option: str) -> None:
    if path.exists() and not path.is_file():
        raise ModelError(f"the output {path} exists and is not a regular file; choose another name with {option}")
    if not path.parent.is_dir():
        raise ModelError(f"the folder {path.parent} does not exist; make it or choose another place with {option}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ModelError(f"the folder {path.parent} cannot be written to; choose another place with {option}")
