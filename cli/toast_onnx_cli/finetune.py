"""`toast-onnx finetune`: a pruned model learns from the dense one; its weights go back into the same graph."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toast_onnx.errors import ModelError
from toast_onnx_cli.calibration_options import DATA_HELP, LABELS_HELP, sample_progress
from toast_onnx_cli.commands import options, toast_command
from toast_onnx_cli.console import print_json, say_note
from toast_onnx_cli.destinations import check_destinations, read_files, result_options
from toast_onnx_cli.models import FILE, MODEL, beside
from toast_onnx_cli.numbers import FiniteRange
from toast_onnx_cli.pixels import image_options
from toast_onnx_cli.shapes import shape_option
from toast_onnx_cli.streams import as_file

if TYPE_CHECKING:
    from toast_onnx_calibration.finetuning import Finetuned, Job

EXIT_INTERRUPTED = 130
#: What is not said on the command line. Without labels the model is matched to its teacher as a function, on images
#: that never repeat (Beyer et al. 2022): a few hundred are soon known by heart. docs/finetune.md has the figures.
WITH_LABELS = {"augment": "light", "output_weight": 1.0, "mixup": 0.0, "ema": 0.0}
WITHOUT_LABELS = {"augment": "strong", "output_weight": 0.3, "mixup": 1.0, "ema": 0.95}


def _two_defaults(option: str, text: str) -> str:
    return f"{text} Default: {WITHOUT_LABELS[option]}; with labels {WITH_LABELS[option]}."


_data_options = options(
    click.option("--teacher", type=MODEL, help="The dense model that PRUNED was pruned from."),
    click.option("--data", required=True, metavar="DATA", help=DATA_HELP),
    click.option("--labels", metavar="LABELS", help=LABELS_HELP),
    image_options,
    click.option("--samples", type=click.IntRange(2), help="Draw so many samples instead of taking all."),
    click.option(
        "--holdout",
        type=FiniteRange(0, 0.9, min_open=True),
        default=0.15,
        show_default=True,
        help="Fraction of the samples that is only evaluated on.",
    ),
    click.option(
        "--augment", type=click.Choice(["none", "light", "strong"]), help=_two_defaults("augment", "Random changes.")
    ),
    click.option("--mirror/--no-mirror", default=None, help="Mirror images; off for text and digits."),
)
_output_options = options(
    click.option("-o", "--output", type=FILE, help="Trained model; default PRUNED.finetuned.onnx."),
    click.option("--report", type=FILE, help="JSON; default beside the trained model, - for standard output."),
    click.option("--checkpoint", type=FILE, help="Checkpoints; default beside the trained model, gone at the end."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint."),
    click.option("--torch-export", type=FILE, metavar="FILE", help="Also write through torch.onnx.export."),
    click.option("--save-module", type=FILE, metavar="FILE", help="Also write the weights as a state dict."),
)
_loss_options = options(
    click.option(
        "--distil",
        type=click.Choice(["auto", "kl", "mse"]),
        default="auto",
        show_default=True,
        help="Loss on outputs: KL for class scores, relative squared error otherwise.",
    ),
    click.option(
        "--temperature",
        type=FiniteRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="Of the KL divergence.",
    ),
    click.option(
        "--output-weight",
        type=FiniteRange(0),
        help=_two_defaults("output_weight", "Of the distance of the outputs."),
    ),
    click.option("--stream-weight", type=FiniteRange(0), default=1.0, show_default=True, help="At block ends."),
    click.option(
        "--class-weight",
        type=FiniteRange(0, min_open=True),
        default=1.0,
        show_default=True,
        help="Of the class token in the stream, where outputs read nothing else.",
    ),
    click.option("--local", is_flag=True, help="Each block learns on its own: no gradient crosses a block end."),
    click.option("--label-weight", type=FiniteRange(0), default=1.0, show_default=True, help="Of the cross-entropy."),
    click.option("--mixup", type=FiniteRange(0), help=_two_defaults("mixup", "Blend pairs: Beta(a, a).")),
    click.option("--smoothing", type=FiniteRange(0, 1, max_open=True), default=0.0, help="Of labels."),
)
_training_options = options(
    click.option("--epochs", type=FiniteRange(0, min_open=True), help="Passes over the data; 10 by default."),
    click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of --epochs."),
    click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Samples a process and step."),
    click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches a step."),
    click.option(
        "--lr",
        type=FiniteRange(0, min_open=True),
        default=1e-4,
        show_default=True,
        help="Peak learning rate of AdamW.",
    ),
    click.option("--weight-decay", type=FiniteRange(0), default=0.01, show_default=True, help="Of matrices."),
    click.option(
        "--warmup",
        type=FiniteRange(0, 1, max_open=True),
        default=0.1,
        show_default=True,
        help="Fraction of the steps.",
    ),
    click.option("--clip", type=FiniteRange(0), default=1.0, show_default=True, help="Gradient norm; 0: off."),
    click.option(
        "--ema", type=FiniteRange(0, 1, max_open=True), help=_two_defaults("ema", "Decay of averaged weights.")
    ),
    click.option("--freeze", multiple=True, metavar="PATTERN", help="Weights that stay, as in 'patch_embed.*'."),
    click.option("--recompute", is_flag=True, help="Gradient checkpointing: less memory, more time."),
    click.option("--evaluate-every", type=click.IntRange(1), help="Steps; a twentieth of all by default."),
    click.option(
        "--patience", type=click.IntRange(0), default=10, show_default=True, help="Evaluations; 0: never stop."
    ),
    click.option(
        "--amp",
        type=click.Choice(["auto", "off", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="Mixed precision; auto: bf16 on a GPU that has it.",
    ),
    click.option("--device", metavar="cpu|cuda|cuda:N", help="A GPU where there is one, by default."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads of PyTorch."),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of order, augmentation and blending."
    ),
)


@toast_command("finetune", "finetune model.pruned.onnx --teacher model.onnx --data images/ --epochs 2")
@click.argument("pruned", type=MODEL)
@_data_options
@_output_options
@_loss_options
@_training_options
@shape_option
@result_options
def command(
    pruned: Path,
    shapes: dict[str, tuple[int, ...]],
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train PRUNED to imitate the dense model, and write its weights back into the same graph.

    No labels and no original code are needed: --teacher is the dense ONNX file, --data a folder of images. A part of
    the data is held out; the weights that are best on it are written, the start's where no training beat them. Several
    GPUs: torchrun --nproc-per-node N --no-python toast-onnx finetune ...
    """
    if given["epochs"] is not None and given["steps"] is not None:
        raise click.UsageError("--epochs and --steps exclude each other")
    for option, value in (WITH_LABELS if given["labels"] else WITHOUT_LABELS).items():
        given[option] = value if given[option] is None else given[option]
    from toast_onnx.require import require_torch

    torch = require_torch()
    if threads is not None:
        torch.set_num_threads(threads)
    from toast_onnx_calibration.finetuning import Job, finetune

    out: Path = given["output"] or beside(pruned, ".finetuned.onnx")
    job = Job(
        pruned=pruned,
        teacher=given["teacher"],
        data=given["data"],
        out=out,
        report=as_file(given["report"] or out.with_suffix(".json")),
        settings=_settings(given, torch),
        labels=given["labels"],
        epochs=None if given["steps"] else given["epochs"] or 10.0,
        evaluate=given["evaluate_every"],
        distil=given["distil"],
        class_token=given["class_weight"],
        augment=given["augment"],
        mirror=given["mirror"],
        preprocess=given["preprocess"],
        samples=given["samples"],
        holdout=given["holdout"],
        shapes=shapes,
        device=given["device"],
        checkpoint=given["checkpoint"] or out.with_suffix(".checkpoint"),
        resume=given["resume"],
        torch_export=given["torch_export"],
        save_module=given["save_module"],
    )
    _check_destinations(job)
    with _stop_on_signals() as should_stop, sample_progress("fine-tuning") as show:
        result = finetune(job, should_stop=should_stop, progress=show, note=say_note)
    if result.document is None:
        return  # another process tells
    for note in result.notes:
        say_note(note)
    print_json(result.document) if as_json or job.report is None else click.echo(summary(result, job.out, job.report))
    if result.outcome.reason == "diverged":
        raise ModelError(
            f"{result.outcome.message}; {out} holds the best weights before that (step {result.outcome.best_step})"
        )
    if result.outcome.reason == "interrupted":
        click.echo(f"Interrupted after {result.outcome.steps} steps; the same command with --resume goes on.", err=True)
        click.get_current_context().exit(EXIT_INTERRUPTED)


def _check_destinations(job: Job) -> None:
    models = [file for model in (job.pruned, job.teacher) if model is not None for file in read_files(model)]
    outputs = {
        "-o": job.out,
        "--report": job.report,
        "--checkpoint": job.checkpoint,
        "--torch-export": job.torch_export,
        "--save-module": job.save_module,
    }
    # what is gone on with was written by the run that stopped
    gone_on = list(outputs) if job.resume else ["--checkpoint"]
    check_destinations([*models, job.data, job.labels, job.preprocess], outputs, gone_on)


def _settings(given: dict[str, Any], torch: Any) -> Any:
    from toast_onnx.finetune.settings import Settings

    cuda = torch.cuda.is_available() and not str(given["device"] or "cuda").startswith("cpu")
    automatic = "bf16" if cuda and torch.cuda.is_bf16_supported() else "off"
    return Settings(
        steps=given["steps"] or 1,
        batch=given["batch"],
        accumulate=given["accumulate"],
        rate=given["lr"],
        decay=given["weight_decay"],
        warmup=given["warmup"],
        clip=given["clip"],
        average=given["ema"],
        temperature=given["temperature"],
        outputs=given["output_weight"],
        stream=given["stream_weight"],
        labels=given["label_weight"],
        local=given["local"],
        mixup=given["mixup"],
        smoothing=given["smoothing"],
        patience=given["patience"],
        amp=automatic if given["amp"] == "auto" else given["amp"],
        recompute=given["recompute"],
        freeze=given["freeze"],
        seed=given["seed"],
    )


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks training to end after the present step; the second ends the program."""
    asked = False

    def ask(number: int, _frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[signal.Signals(number)])
        click.echo("\nStopping after this step; once more to quit at once.", err=True)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def summary(result: Finetuned, out: Path, report: Path) -> str:
    """A few lines on what happened."""
    outcome = result.outcome
    start, best = outcome.start, outcome.best
    lines = []
    for key, name in (("outputs", "distance to the teacher"), ("labels", "cross-entropy")):
        if key in best:
            lines.append(f"held-out {name}: {start[key]:.4f} -> {best[key]:.4f}")
    for key, name in (("agreement", "agreement with the teacher"), ("top1", "top-1")):
        if key in best:
            lines.append(f"held-out {name}: {start[key]:.1%} -> {best[key]:.1%}")
    last = outcome.history[-1]
    if outcome.best_step == 0:
        lines.append(
            "no training beat the start on held-out samples, so the weights are unchanged: lower --lr, give more data"
        )
    elif last["step"] > outcome.best_step and last["loss"] > best["loss"]:
        lines.append(
            f"best at step {outcome.best_step} of {outcome.steps}; later the held-out loss rose to {last['loss']:.4f} "
            "(overfitting), so those weights are kept"
        )
    how = "" if outcome.reason == "finished" else f", {outcome.reason}"
    lines.append(
        f"{outcome.steps} of {result.settings.steps} steps{how}, {outcome.images_per_second:.1f} images/s; "
        f"kept: step {outcome.best_step}"
    )
    return "\n".join([f"{out}: trained weights in the same graph", *lines, f"report: {report}"])
