"""Exports by the real exporters, kept between sessions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.aftermaths import AFTERMATHS
from tests.zoo.building import build
from tests.zoo.described import Case, Subject, Unavailable
from tests.zoo.failures import why_not
from tests.zoo.libraries import Outputs


@functools.cache
def cache_folder() -> Path:
    """Where exports are kept between sessions: named by the zoo's text and by the versions of all that takes part."""
    packages = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.name not in ("failures.py", "feeds.py"):  # they change no export
            digest.update(source.read_bytes())
    for package in packages:
        try:
            digest.update(f"{package}={importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = Path(tempfile.gettempdir()) / f"toast-onnx-zoo-{os.getuid()}-{digest.hexdigest()[:12]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def export(case: Case, path: Path | None = None, *, module: nn.Module | None = None) -> Path:
    """Export a case, or take it from the cache, and return the file's path.

    Args:
        case: What to export.
        path: Where to write; by default a file in the cache, made once.
        module: A changed module of the same family to export instead; needs a path.

    Raises:
        Unavailable: The library cannot export this case, or something it needs is not here.
    """
    if (reason := why_not(case)) is not None:
        raise Unavailable(reason)
    if module is not None and path is None:
        raise ValueError("a changed module needs a path of its own: the cache holds the family's own modules")
    target = path or cache_folder() / (case.id.replace("/", "_") + ".onnx")
    if path is None and target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        if case.after and module is None:
            AFTERMATHS[case.after](export(dataclasses.replace(case, after="")), part)
        elif case.after:
            raise ValueError("export the changed module first, then apply AFTERMATHS to its file")
        else:
            subject = build(case.family, planted=case.planted)
            _export(case, subject, module or subject.module, part)
        for file in sorted(Path(folder).iterdir()):  # two sessions may make the same case at once
            os.replace(file, target.parent / file.name)
    return target


def export_module(subject: Subject, path: Path) -> Path:
    """Export a module that is no family of the zoo, by TorchScript 17 with a dynamic batch."""
    _export(Case("", "torchscript-17"), subject, subject.module, path)
    return path


def _export(case: Case, subject: Subject, module: nn.Module, path: Path) -> None:
    exporter, _, opset = case.exporter.partition("-")
    axes: dict[str, dict[int, str]] = {name: {} for name in subject.inputs}
    examples = tuple(subject.inputs.values())
    if case.batch == "dynamic":
        axes = {name: {0: "batch"} for name in subject.inputs}
        for name, axis, symbol in subject.symbolic:
            axes[name][axis] = symbol
        examples = tuple(torch.cat([t, t.flip(-1)]) for t in examples)  # torch.export takes a size of 1 for a constant
    options: dict[str, Any] = {"input_names": list(subject.inputs), "output_names": list(subject.outputs)}
    if exporter == "torchscript":
        batches = {name: {0: "batch"} for name in subject.outputs if case.batch == "dynamic"}
        options |= {"dynamo": False, "dynamic_axes": axes | batches}
    else:
        options |= {"dynamo": True, "external_data": False, "verbose": False}
        if case.batch == "dynamic":
            dims = {symbol: torch.export.Dim(symbol) for spec in axes.values() for symbol in spec.values()}
            shapes = tuple({axis: dims[symbol] for axis, symbol in spec.items()} for spec in axes.values())
            options["dynamic_shapes"] = (shapes,) if isinstance(module, Outputs) else shapes  # Outputs takes *tensors
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, examples, path, opset_version=int(opset), **options)
