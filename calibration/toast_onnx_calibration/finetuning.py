"""Fine-tuning from files to files: models and data in, training, the model and its report out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper

from toast_onnx.errors import ConfigError
from toast_onnx.files import files_read
from toast_onnx.finetune.settings import Settings
from toast_onnx.matching.class_token import class_token
from toast_onnx.matching.study import Study, study
from toast_onnx.model import Model, file_hash, load_model, staged_model
from toast_onnx.proof.inputs import twin_inputs
from toast_onnx.report.pruning import json_bytes
from toast_onnx.require import require_torch, with_gradients
from toast_onnx_calibration.augment import augmentation
from toast_onnx_calibration.feeds import batch_size
from toast_onnx_calibration.labels import Labels, open_labels
from toast_onnx_calibration.prepared import SHOWN, Note, Values, seen_text, silent
from toast_onnx_calibration.recipe_files import check_fit, recipe_for
from toast_onnx_calibration.samples import NumberedSamples, open_samples
from toast_onnx_calibration.sessions import held_inputs, make_session, model_inputs

if TYPE_CHECKING:
    from toast_onnx.finetune.trainer import Outcome


@dataclass(frozen=True)
class Job:
    """What to fine-tune, on what, and where the results go.

    Attributes:
        pruned: the model to train.
        teacher: the model it was pruned from; None trains on labels alone.
        data: as for `sources.open_source`.
        out: the model to write.
        report: its JSON report; None keeps it out of files.
        labels: as for `labels.open_labels`; None trains without.
        settings: how to train; `steps` is replaced where `epochs` is given.
        epochs: passes over the training samples.
        evaluate: steps between evaluations; None takes a twentieth of all steps.
        distil: `auto`, `kl` or `mse`.
        class_token: how often the class token counts in the stream, where the outputs are shown to read nothing else.
        augment: name of the augmentation.
        mirror: whether to mirror images; None as the augmentation has it.
        preprocess: recipe's name or file.
        samples: how many to draw from the data.
        holdout: fraction kept for evaluation.
        shapes: concrete input shapes, for symbolic axes behind the batch.
        device: `cpu`, `cuda`, `cuda:N`; None takes a GPU where there is one.
        checkpoint: where checkpoints go.
        resume: go on from that checkpoint.
        torch_export: also write through `torch.onnx.export`.
        save_module: also write the module's state dict.
    """

    pruned: Path
    teacher: Path | None
    data: str
    out: Path
    report: Path | None
    settings: Settings
    labels: str | None = None
    epochs: float | None = None
    evaluate: int | None = None
    distil: str = "auto"
    class_token: float = 1.0
    augment: str = "light"
    mirror: bool | None = None
    preprocess: str | None = None
    samples: int | None = None
    holdout: float = 0.15
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    device: str | None = None
    checkpoint: Path | None = None
    resume: bool = False
    torch_export: Path | None = None
    save_module: Path | None = None


@dataclass(frozen=True)
class Finetuned:
    """The result; `document` is None in processes that write nothing.

    Attributes:
        outcome: how training went.
        document: the report, None in a process that is not the first.
        notes: what the user should know.
        settings: the settings with the steps that were planned.
    """

    outcome: Outcome
    document: dict[str, Any] | None
    notes: tuple[str, ...]
    settings: Settings


@dataclass(frozen=True)
class _Data:
    samples: NumberedSamples
    train: np.ndarray[Any, Any]
    held: np.ndarray[Any, Any]
    labels: Labels | None
    batch: int
    fixed: bool
    notes: tuple[str, ...]


@with_gradients
def finetune(
    job: Job,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    note: Note = silent,
) -> Finetuned:
    """Fine-tune a pruned model and write it, its report and what else was asked for.

    Args:
        job: what to do.
        should_stop: asked after every step; True ends training with the best weights so far.
        progress: called after every step with the steps done, all steps and a note.
        note: told what the user should know of the samples before the training begins.

    Raises:
        ToastError: its children say what is wrong with a model, the data or an option.
    """
    require_torch()
    from toast_onnx.finetune.convert import to_torch
    from toast_onnx.finetune.objective import choose_targets
    from toast_onnx.finetune.parallel import processes
    from toast_onnx.finetune.trainer import Run, train

    if job.teacher is None and job.labels is None:
        raise ConfigError("nothing to learn from: give --teacher (the model it was pruned from), --labels, or both")
    model = load_model(job.pruned)
    pruned = study(model, job.shapes)
    dense = None if job.teacher is None else study(load_model(job.teacher), job.shapes)
    data = _open_data(job, pruned)
    for text in data.notes:
        note(text)
    targets = choose_targets(pruned, dense, job.distil, data.labels is not None)
    if class_token(pruned.view, pruned.facts) is not None:
        targets = replace(targets, class_token=job.class_token)
    with processes(job.device) as group:
        settings = _settings(job, data, group.count)
        identity = _identity(job, settings, data, group.count)
        student = to_torch(model)
        teacher = None if dense is None else to_torch(dense.view.model)
        run = Run(
            student, teacher, targets, data.samples, data.train, data.held, data.fixed, group, job.checkpoint, identity
        )
        outcome = train(
            run,
            settings,
            resume=job.resume,
            should_stop=should_stop,
            progress=lambda done, note: progress(done, settings.steps, note) if group.first else None,
        )
        document = None
        if group.first:
            facts = {
                "teacher": None if job.teacher is None else {"file": job.teacher.name, "sha256": identity["teacher"]},
                "settings": settings.to_document(),
                "compared": {
                    "classifiers": list(targets.classifiers),
                    "others": list(targets.others),
                    "stream": list(targets.stream),
                    "class_token": targets.class_token,
                },
                "data": data.samples.description,
                "fingerprint": identity["data"],
                "samples": {"train": len(data.train), "held_out": len(data.held)},
                "augmentation": augmentation(job.augment, job.mirror).describe(),
                "device": _device_name(group.device),
                "processes": group.count,
                "read": files_read(),
            }
            document = _write(job, model, pruned, student, outcome, facts)
    return Finetuned(outcome, document, data.notes, settings)


def _open_data(job: Job, pruned: Study) -> _Data:
    from toast_onnx.finetune.samples import hold_out

    session = make_session(job.pruned, threads=1)
    inputs = held_inputs(pruned, model_inputs(session))
    labels = open_labels(job.labels, job.data) if job.labels is not None else None
    shape = inputs[0].shape if len(inputs) == 1 else None
    choice = recipe_for(job.pruned, job.preprocess, shape, session.get_modelmeta().custom_metadata_map)
    change = augmentation(job.augment, job.mirror)
    samples = open_samples(
        job.data, inputs, choice.recipe, change=change, labels=labels, samples=job.samples, seed=job.settings.seed
    )
    if samples.recipe and shape is not None:
        check_fit(choice, shape)
    train, held = hold_out(len(samples), job.holdout, job.settings.seed)
    batch = batch_size(inputs, min(job.settings.batch, len(train)))
    fixed = any(isinstance(i.shape[0], int) for i in inputs)
    notes = list(choice.notes) if samples.recipe else []
    if choice.guessed and samples.recipe:
        shown = [samples.read(row, None)[inputs[0].name] for row in train[:SHOWN]]
        notes.append(seen_text(Values.of(shown), choice))
    if not samples.recipe and job.augment != "none":
        notes.append("the samples are ready tensors, so they are not augmented")
    notes += labels.notes if labels else ()
    return _Data(samples, train, held, labels, batch, fixed, tuple(notes))


def _settings(job: Job, data: _Data, processes: int) -> Settings:
    """The settings with the batch the model accepts, the steps of the epochs, and a period of evaluation."""
    each = data.batch * job.settings.accumulate * processes
    steps = job.settings.steps if job.epochs is None else max(1, math.ceil(job.epochs * len(data.train) / each))
    evaluate = job.evaluate or max(1, steps // 20)
    return replace(job.settings, batch=data.batch, steps=steps, evaluate=min(evaluate, steps))


def _identity(job: Job, settings: Settings, data: _Data, processes: int) -> dict[str, Any]:
    """What a checkpoint's run and this one must have in common."""
    return {
        "pruned": file_hash(job.pruned),
        "teacher": None if job.teacher is None else file_hash(job.teacher),
        "data": data.samples.fingerprint,
        "labels": None if data.labels is None else data.labels.description,
        "distil": job.distil,
        "class token": job.class_token,
        "augment": augmentation(job.augment, job.mirror).describe(),
        "holdout": job.holdout,
        "processes": processes,
    } | {f"setting {key}": value for key, value in settings.to_document().items()}


def _write(
    job: Job, model: Model, pruned: Study, student: Any, outcome: Outcome, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the model, the extras and the report; the best weights are in the student."""
    from toast_onnx.finetune.convert import to_onnx
    from toast_onnx.finetune.proof import TOLERANCE, compare_with_module
    from toast_onnx.finetune.report import updated_report

    trained = to_onnx(student, model)
    feeds = twin_inputs(pruned)
    worst = compare_with_module(trained, student, feeds)
    facts |= {
        "proof": {"worst": worst, "tolerance": TOLERANCE, "batches": [len(next(iter(f.values()))) for f in feeds]}
    }
    if job.save_module is not None:
        _save_state(student, job.save_module)
        facts["module"] = job.save_module.name
    if job.torch_export is not None:
        from toast_onnx.finetune.export import torch_export

        example = {name: array.astype(_numpy_kind(model, name)) for name, array in feeds[-1].items()}
        torch_export(student, job.torch_export, example, opset=model.opset, dynamic_batch=pruned.dynamic_batch)
        facts["torch_export"] = job.torch_export.name
    with staged_model(trained, job.out, job.report) as staged:
        document = updated_report(job.pruned, staged.draft, outcome, facts)
        before = document.get("read", [])  # by the prune whose report this goes on from
        document["read"] = [*before, *(file for file in files_read() if file not in before)]
        staged.beside = json_bytes(document)
    if outcome.reason in ("finished", "stopped early") and job.checkpoint is not None:
        job.checkpoint.unlink(missing_ok=True)
    return document


def _numpy_kind(model: Model, name: str) -> np.dtype[Any]:
    """Element type of a graph's input."""
    value = next(i for i in model.proto.graph.input if i.name == name)
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _save_state(student: Any, path: Path) -> None:
    torch = require_torch()
    from toast_onnx.files import drafts, place

    with drafts(path) as folder:
        torch.save({n: p.detach().cpu() for n, p in student.state_dict().items()}, folder / path.name)
        place(folder / path.name, path)


def _device_name(device: Any) -> str:
    torch = require_torch()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
