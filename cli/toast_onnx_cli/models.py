"""How a command takes a model: a file, or a name on the hub; and where its results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toast_onnx_cli.console import is_quiet

#: Under which the click context keeps what models of the hub are called.
_FETCHED = "toast_onnx_cli.fetched"


class ModelType(click.Path):
    """A model's file; `hf:ORG/NAME[:FILE.onnx]` is fetched into the hub's cache."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The file.

        Raises:
            ToastError: its children say why a name leads to none.
        """
        if not isinstance(value, str) or not value.startswith("hf:") or (ctx is not None and ctx.resilient_parsing):
            return super().convert(value, param, ctx)
        from toast_onnx import hub

        name = hub.parse(value)
        assert name is not None
        if is_quiet():
            hub.be_quiet()
        path = hub.fetch(name)
        if ctx is not None:
            ctx.meta.setdefault(_FETCHED, {})[path] = name.stem
        return path


MODEL = ModelType()
#: Any other file or folder.
FILE = click.Path(path_type=Path)


def beside(model: Path, suffix: str) -> Path:
    """Where a result goes unless it is said: beside the model under its name; here for a model of the hub.

    Args:
        model: the file.
        suffix: instead of the model's own, such as `.pruned.onnx`.
    """
    context = click.get_current_context(silent=True)
    fetched = context.meta.get(_FETCHED, {}) if context is not None else {}
    return Path(f"{fetched[model]}{suffix}") if model in fetched else model.with_name(f"{model.stem}{suffix}")
