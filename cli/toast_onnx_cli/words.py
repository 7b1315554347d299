"""The words a command was given: what a report holds so that the run can be repeated."""

from __future__ import annotations

import click
from click.core import ParameterSource

#: Under which the click context keeps them.
WORDS = "toast_onnx_cli.words"


def given_words() -> list[str]:
    """The words behind `toast-onnx`, with what came from `TOAST_*` variables as options; empty outside a command."""
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    words = list(context.meta.get(WORDS, ()))
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.ENVIRONMENT:
            continue
        flag = isinstance(parameter, click.Option) and parameter.is_flag
        if not flag:
            words += [parameter.opts[-1], str(parameter.resolve_envvar_value(context))]
        elif context.params.get(name):
            words.append(parameter.opts[-1])
    return words
