"""`prune --replay`: the run of a report once more, held against what the report says."""

from __future__ import annotations

from pathlib import Path

import click

from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.model import file_hash
from toast_onnx.planning.strict_json import read_json
from toast_onnx_cli.destinations import check_destinations, is_overwriting

_MOST_BYTES = 64 << 20


def replay(report: Path, output: Path | None, command: click.Command) -> None:
    """Repeat a run from the command in its report, and make sure that the same bytes come out.

    Args:
        report: what `prune` wrote beside its model.
        output: where the model goes this time; None puts it beside the report.
        command: `prune`.

    Raises:
        ConfigError: the report holds no command, or one that names Python code.
        ModelError: the model is another one now, or the result is.
    """
    document = read_json(report, limit=_MOST_BYTES)
    found = document if isinstance(document, dict) else {}
    words, dense, pruned = (found.get(key) for key in ("command", "dense", "pruned"))
    if not (isinstance(words, list) and "prune" in words and isinstance(dense, dict) and isinstance(pruned, dict)):
        raise ConfigError(f"{report} names no command of prune to repeat; give the JSON that prune wrote")
    out = output or report.with_name(f"{report.stem}.again.onnx")
    check_destinations([report], {"-o": out})
    again = [str(w) for w in words[words.index("prune") + 1 :] if w != "--overwrite"]
    again += ["-o", str(out), "--report", str(out.with_suffix(".json"))] + ["--overwrite"] * is_overwriting()
    parent = click.get_current_context().parent
    with command.make_context("prune", again, parent=parent) as context:
        given = context.params
        _check_given(report, given, str(dense.get("sha256")))
        command.invoke(context)
    if file_hash(out) != pruned.get("sha256"):
        raise ModelError(
            f"{out} is not what {report} tells of: other samples, versions ({_versions(found)} then), threads or "
            "timing make other bytes; `prune --ratios` with the file beside the model keeps the widths at least"
        )
    click.echo(f"the same bytes as {report} tells of (sha256 {str(pruned['sha256'])[:12]})")


def _check_given(report: Path, given: dict[str, object], sha256: str) -> None:
    """Refuse a run that cannot be the same one, or that would run code that a file names."""
    from toast_onnx_calibration.sources import is_callable

    data, model = given.get("data"), given["model"]
    if data is not None and is_callable(str(data)):
        raise ConfigError(f"{report} reads samples from Python code, {data}; run its command yourself if you trust it")
    if given.get("ratios") == "-":
        raise ConfigError(f"{report}: its ratios came from stdin; give them again with --ratios")
    if not isinstance(model, Path) or given.get("repeated") is not None:
        raise ConfigError(f"{report} names no command of prune to repeat; give the JSON that prune wrote")
    if file_hash(model) != sha256:
        raise ModelError(f"{model} is not the model that {report} was made from; run this where the first run was made")


def _versions(document: dict[str, object]) -> str:
    versions = document.get("versions")
    named = versions if isinstance(versions, dict) else {}
    return ", ".join(f"{name} {version}" for name, version in named.items())
