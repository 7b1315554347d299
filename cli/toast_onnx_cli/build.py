"""`toast-onnx build`: a TensorRT engine, ONNX Runtime's optimized model or a 16-bit graph, from an ONNX file."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ConfigError
from toast_onnx_cli.commands import json_option, preprocess_option, toast_command
from toast_onnx_cli.console import Advance, format_bytes, print_json, print_table, progress, say_note
from toast_onnx_cli.destinations import check_destinations, overwrite_option, read_files
from toast_onnx_cli.links import links_option
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.shapes import shapes_option

if TYPE_CHECKING:
    from toast_onnx.engines.build import BuildRequest
    from toast_onnx.engines.engine import UnsupportedGraphError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def size(text: str) -> int:
    """Bytes from `512M` and the like; K, M and G are powers of 1024.

    Raises:
        click.BadParameter: the text is no size.
    """
    plain = text.strip().lower().removesuffix("ib").removesuffix("b")
    digits = plain.rstrip("kmg")
    if not digits.isdecimal() or plain[len(digits) :] not in _UNITS:
        raise click.BadParameter(f"{text!r} is not a size such as 512M or 4G")
    return int(digits) * _UNITS[plain[len(digits) :]]


@toast_command(
    "build",
    "build model.pruned.onnx -o model.engine --precision fp16",
    "build model.pruned.onnx --format onnx --precision fp16",
)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=FILE, help="File to write; MODEL's name with .engine, .ort or .fp16.onnx.")
@click.option(
    "--format", "form", type=click.Choice(["engine", "ort", "onnx", "ep-context"]), default="engine", show_default=True
)
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--data", metavar="DATA", help="With --precision fp16: samples on which to look for values above 65504.")
@preprocess_option
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="How many of them to draw.")
@click.option("--fp16-io", is_flag=True, help="float16 inputs and outputs too, with --precision fp16.")
@click.option("--batch", help="MIN:OPT:MAX of an open first dimension, or one number; 1:8:32 where none is given.")
@shapes_option("--min-shapes", help_text="Smallest shape of an input, as in input=1x3x224x224; may be repeated.")
@shapes_option("--opt-shapes", help_text="Shape to tune an input for.")
@shapes_option("--max-shapes", help_text="Largest shape of an input.")
@click.option("--workspace", type=size, help="Scratch memory that kernels may use, such as 512M or 4G.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 builds fast, 5 searches longest.")
@click.option("--timing-cache", type=FILE, help="File of kernel timings, read and extended.")
@click.option("--compute-capability", multiple=True, metavar="SM", help="Architecture to build for (tensorrt-rtx).")
@click.option("--hardware-compatible", is_flag=True, help="One engine for Ampere and everything newer (tensorrt).")
@click.option("--version-compatible", is_flag=True, help="An engine that later releases load (tensorrt).")
@click.option("--ort-level", type=click.Choice(["basic", "extended", "all"]), default="extended", show_default=True)
@click.option(
    "--uneven-heads",
    type=click.Choice(["auto", "pad", "write-out"]),
    default="auto",
    show_default=True,
    help="Attention with more dimensions in Q/K than in V, or fewer: pad with zeros, or build from parts.",
)
@click.option("--baseline", type=FILE, help="The dense model's engine; warns where pruning unfused.")
@click.option("--triton", type=FILE, metavar="DIR", help="Add the result to a Triton repository.")
@click.option(
    "--polygraphy", type=FILE, metavar="FILE", help="Write a script by which Polygraphy compares the engine with MODEL."
)
@overwrite_option
@click.option("--verbose", is_flag=True, help="Show all that TensorRT logs.")
@links_option
@json_option
def command(
    model: Path,
    output: Path | None,
    form: str,
    backend: str,
    precision: str,
    data: str | None,
    preprocess: str | None,
    samples: int,
    fp16_io: bool,
    batch: str | None,
    min_shapes: dict[str, tuple[int, ...]],
    opt_shapes: dict[str, tuple[int, ...]],
    max_shapes: dict[str, tuple[int, ...]],
    workspace: int | None,
    optimization_level: int | None,
    timing_cache: Path | None,
    compute_capability: tuple[str, ...],
    hardware_compatible: bool,
    version_compatible: bool,
    ort_level: str,
    uneven_heads: str,
    baseline: Path | None,
    triton: Path | None,
    polygraphy: Path | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Build an engine from MODEL, with a JSON beside it that says how it was made.

    Precision is put into the graph's types, as TensorRT 11 wants it; normalisations and Softmax stay in float32. The
    tensorrt-rtx backend builds without a GPU. With --format ort the result is a model for ONNX Runtime instead, with
    --format ep-context such a model with the engine inside, with --format onnx the graph in 16 bits as an engine would
    be built from it.
    """
    from toast_onnx.engines.backend import EngineOptions, parse_compute_capabilities
    from toast_onnx.engines.build import BuildRequest, model_hash
    from toast_onnx.engines.convert import convert_file
    from toast_onnx.engines.epcontext import build_ep_context
    from toast_onnx.engines.ortmodel import build_ort
    from toast_onnx.engines.profiles import parse_batch

    if verbose:
        logging.getLogger("toast_onnx.engines").setLevel(logging.DEBUG)
    suffix = {"onnx": f".{precision}.onnx", "ep-context": ".context.onnx"}.get(form, f".{form}")
    target = output or beside(model, suffix)
    outputs = {"--timing-cache": timing_cache, "-o": target, "--polygraphy": polygraphy}
    check_destinations([*read_files(model), data, preprocess], outputs, ["--timing-cache"])
    if polygraphy is not None and form != "engine":
        raise click.UsageError("--polygraphy goes with --format engine")
    if triton is not None:
        as_it_is = form == "onnx" and precision == "fp32"
        _check_triton(triton, model if as_it_is else target, form, backend)
        if as_it_is:
            record: dict[str, Any] = {"model": str(model), "model_sha256": model_hash(model)}
            config = _add_to_repository(triton, model, model, record)
            print_json(record | {"triton": config}) if as_json else click.echo(f"Triton: {config}")
            return
    if data is not None and (precision != "fp16" or form not in ("engine", "onnx")):
        raise click.UsageError("--data goes with --precision fp16 and --format engine or onnx")
    large = () if data is None else _too_large(model, data, preprocess, samples)
    if form == "ort":
        record = build_ort(model, target, precision=precision, fp16_io=fp16_io, level=ort_level)
    elif form == "onnx":
        record = convert_file(model, target, precision=precision, fp16_io=fp16_io, large=large)
    elif form == "ep-context":
        record = build_ep_context(
            model,
            target,
            backend=backend,
            precision=precision,
            fp16_io=fp16_io,
            batch=None if batch is None else parse_batch(batch),
            shapes=(min_shapes, opt_shapes, max_shapes),
        )
    else:
        request = BuildRequest(
            backend=backend,
            precision=precision,
            fp16_io=fp16_io,
            batch=None if batch is None else parse_batch(batch),
            min_shapes=min_shapes,
            opt_shapes=opt_shapes,
            max_shapes=max_shapes,
            uneven_heads=uneven_heads,
            baseline=baseline,
            large=large,
            options=EngineOptions(
                workspace=workspace,
                optimization_level=optimization_level,
                timing_cache=timing_cache,
                compute_capabilities=parse_compute_capabilities(compute_capability),
                hardware_compatible=hardware_compatible,
                version_compatible=version_compatible,
            ),
        )
        record = _build_shown(model, target, request)
    _hand_on(record, model, target, triton, polygraphy)
    if as_json:
        print_json(record)
    else:
        print_table(["file", str(target)], _rows(record), align=["left", "left"])


def _hand_on(record: dict[str, Any], model: Path, target: Path, triton: Path | None, polygraphy: Path | None) -> None:
    """Tell the notes of a build, and write what other programs take its result with."""
    for note in record["notes"]:
        say_note(note)
    if triton is not None:
        say_note(f"for Triton: {_add_to_repository(triton, target, model, record)}")
    if polygraphy is not None:
        _write_script(polygraphy, target, model, record)
        say_note(f"for Polygraphy: {polygraphy}")


def _build_shown(model: Path, target: Path, request: BuildRequest) -> dict[str, Any]:
    """Build an engine; its phases are shown, and so is what its parser does not take."""
    from toast_onnx.engines.build import build
    from toast_onnx.engines.engine import UnsupportedGraphError

    with ExitStack() as stack:
        try:
            return build(model, target, request, _Phases(stack))
        except UnsupportedGraphError as error:
            stack.close()
            _show_problems(error)
            raise


def _too_large(model: Path, data: str, preprocess: str | None, samples: int) -> tuple[str, ...]:
    """Tensors that come near what float16 holds, named in a note."""
    from toast_onnx.engines.precision import FLOAT16_MAX, HEADROOM
    from toast_onnx_calibration.magnitudes import largest_magnitudes

    found = largest_magnitudes(model, data, preprocess=preprocess, samples=samples, note=say_note)
    large = sorted((n for n, size in found.items() if size > FLOAT16_MAX / HEADROOM), key=lambda n: -found[n])
    if large:
        named = ", ".join(f"{n} ({found[n]:.3g})" for n in large[:5]) + (", ..." if len(large) > 5 else "")
        say_note(f"{len(large)} tensors come near float16's largest number, 65504, and stay in float32: {named}")
    else:
        name, size = max(found.items(), key=lambda item: item[1], default=("", 0.0))
        say_note(f"nothing comes near float16's largest number, 65504: the largest magnitude is {size:.3g} ({name})")
    return tuple(large)


def _check_triton(folder: Path, target: Path, form: str, backend: str) -> None:
    """Refuse, before anything is built, what Triton does not serve and what is in its repository already."""
    from toast_onnx.engines.backends import choose
    from toast_onnx.engines.triton import repository_files

    if form not in ("engine", "onnx"):
        raise click.UsageError("--triton goes with --format engine or onnx")
    if form == "engine" and choose(backend).name != "tensorrt":
        raise ConfigError(
            "Triton serves engines of tensorrt, not of tensorrt_rtx: use --backend tensorrt, or --format onnx"
        )
    config, model = repository_files(folder, target)
    check_destinations([], {f"--triton {p.name}": p for p in (config, model) if p.parent.is_dir()})


def _add_to_repository(folder: Path, target: Path, model: Path, record: dict[str, Any]) -> str:
    """The configuration's file, written with its model."""
    from toast_onnx.engines.profiles import ShapeRange
    from toast_onnx.engines.triton import write_repository
    from toast_onnx.model import load_model

    served = target if target.suffix == ".onnx" else model
    profile = {
        name: ShapeRange(**{kind: tuple(size) for kind, size in shapes.items()})
        for name, shapes in record.get("profile", {}).items()
    }
    return str(write_repository(folder, target, load_model(served).proto, profile))


def _write_script(script: Path, engine: Path, model: Path, record: dict[str, Any]) -> None:
    from toast_onnx.engines.polygraphy import comparison_script
    from toast_onnx.files import write_bytes
    from toast_onnx.model import load_model

    text = comparison_script(script, engine, model, load_model(model).proto, record)
    write_bytes(script, text.encode())


class _Phases:
    """Shows a build's phases: the outermost as the bar, the innermost as the note beside it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._advance: Advance | None = None
        self._shown = 0

    def __call__(self, phase: str, parent: str | None, done: int, total: int) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(progress("building", total))
        if parent is None:
            self._advance(done - self._shown)
            self._shown = done
        elif done == 0:
            self._advance(0, phase.lower())


def _show_problems(error: UnsupportedGraphError) -> None:
    """One line a node on stderr: its name, its operator, the reason."""
    width = max(len(p.node) for p in error.problems)
    op_width = max(len(p.op) for p in error.problems)
    for problem in error.problems:
        click.echo(f"{problem.node:{width}}  {problem.op:{op_width}}  {problem.reason}", err=True)


def _rows(record: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["size", f"{format_bytes(record['engine_bytes'])} (model {format_bytes(record['model_bytes'])})"],
        ["built by", f"{record['backend']} {record['backend_version']} in {record['build_seconds']:.1f} s"],
        ["precision", record["precision"]],
    ]
    for name, shapes in record.get("profile", {}).items():
        rows.append([f"input {name}", " .. ".join("x".join(map(str, shapes[kind])) for kind in ("min", "opt", "max"))])
    attention = record.get("attention")
    if attention is not None and attention["fused"] is not None:
        rows.append(["attention", f"{attention['fused']} of {attention['found']} in one fused kernel"])
    if record.get("compute_capabilities"):
        rows.append(["compute capabilities", ", ".join(f"SM{c}" for c in record["compute_capabilities"])])
    return rows
