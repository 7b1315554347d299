"""Where results may be written: never over something that the same command reads, nor over one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from toast_onnx.errors import ModelError
from toast_onnx.model import model_files


def read_files(model: Path) -> list[Path]:
    """The files of a model, its external weights too; only the named file where it is no model."""
    try:
        return model_files(model)
    except ModelError:  # what loads it says so, too
        return [model]


def check_destinations(inputs: Sequence[Path | str | None], outputs: Mapping[str, Path | None]) -> None:
    """Refuse to overwrite an input, before any work is done.

    Args:
        inputs: what must stay, the model first; None, and text that names no file (a preset, `module:function`), is
            passed over.
        outputs: option -> file it names, None where it was not given.

    Raises:
        ModelError: an output is an input or another output, is no regular file, or lies in a folder that does not
            exist.
    """
    sources = [Path(source) for source in inputs if source is not None]
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        for source in sources:
            if path.exists() and source.exists() and path.samefile(source):
                same = "the input" if source == sources[0] else f"the input file {source}"
                raise ModelError(f"the output {path} is {same}; choose another name with {option}")
        if path.exists() and not path.is_file():
            raise ModelError(f"the output {path} exists and is not a regular file; choose another name with {option}")
        if not path.parent.is_dir():
            raise ModelError(f"the folder {path.parent} does not exist; make it or choose another place with {option}")
        other = written.setdefault(path.resolve(), option)
        if other != option:
            raise ModelError(f"{other} and {option} would both be {path}; choose another name with {option}")
