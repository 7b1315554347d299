"""Weights that lie in files: in files of their own beside a model, or left inside the model's own file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import onnx
import onnx.external_data_helper as external

from toast_onnx.errors import ModelError

#: Weights inside a file of this size and above are left there. They are then referred to by the file's absolute path,
#: which no model that was read can contain.
LEAVE_INSIDE = 64_000_000


def check_files(proto: onnx.ModelProto, path: Path) -> None:
    """Make sure that a model's external data is there, and note in what state.

    Raises:
        ModelError: a file is missing, too short, or outside the model's folder.
    """
    for tensor in proto.graph.initializer:
        if not external.uses_external_data(tensor):
            continue
        info = external.ExternalDataInfo(tensor)
        file = path.parent / info.location
        if os.path.isabs(info.location) or ".." in Path(info.location).parts:
            raise ModelError(
                f"{path}: its external data file '{info.location}' lies outside the model's folder; "
                "put the data beside the model and save it with a plain file name"
            )
        if not file.is_file():
            raise ModelError(f"{path}: external data file '{info.location}' is missing; put it beside the model")
        needed = (info.offset or 0) + (info.length or 0)
        if file.stat().st_size < needed:
            raise ModelError(
                f"{path}: external data file '{info.location}' is too short for the weight '{tensor.name}' "
                f"({file.stat().st_size} bytes of {needed}); copy it again"
            )
        _remember(tensor, file.stat())


def leave_inside(graph: onnx.GraphProto, path: Path) -> None:
    """Replace weights by references to where their bytes lie in the model's file."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 0
        for tensor in graph.initializer:
            data = tensor.raw_data
            if len(data) < 1024 or external.uses_external_data(tensor):
                continue
            found = content.find(data, start)  # they lie there in this order
            if found >= 0:
                external.set_external_data(tensor, str(path.resolve()), found, len(data))
                _remember(tensor, os.fstat(stream.fileno()))
                tensor.ClearField("raw_data")
                start = found + len(data)


def is_inside(tensor: onnx.TensorProto) -> bool:
    """Whether an external initializer refers to a place inside its model's own file (see `LEAVE_INSIDE`)."""
    return os.path.isabs(external.ExternalDataInfo(tensor).location)


def bring_in(tensor: onnx.TensorProto, base_dir: Path) -> None:
    """Put an external tensor's bytes inside, in place.

    onnx's own reader refuses symbolic and hard links, which is how download caches and stores keep large files.

    Raises:
        ModelError: the file was written or replaced since the model was loaded.
        OSError: it cannot be read.
    """
    info = external.ExternalDataInfo(tensor)
    with (base_dir / info.location).open("rb") as stream:
        _check_unchanged(tensor, os.fstat(stream.fileno()))
        stream.seek(info.offset or 0)
        data = stream.read(-1 if info.length is None else info.length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


def follow_links(proto: onnx.ModelProto, base_dir: Path) -> Path | None:
    """Point external references (in place) at the files behind symbolic links, which ONNX Runtime may refuse to follow.

    Args:
        proto: a model whose references are relative to `base_dir`.
        base_dir: that folder.

    Returns:
        The folder that references are relative to from now on; None where there are none.

    Raises:
        ModelError: a file was written or replaced since the model was loaded.
    """
    tensors = [t for t in proto.graph.initializer if external.uses_external_data(t)]
    files = {name: (base_dir / name).resolve() for name in {external.ExternalDataInfo(t).location for t in tensors}}
    if not files:
        return None
    folder = os.path.commonpath([file.parent for file in files.values()])
    states = {name: file.stat() for name, file in files.items()}
    for tensor in tensors:
        _check_unchanged(tensor, states[external.ExternalDataInfo(tensor).location])
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(files[entry.value], folder)
    return Path(folder)


def _state(stat: os.stat_result) -> str:
    """What changes when a file is written again or replaced."""
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _remember(tensor: onnx.TensorProto, stat: os.stat_result) -> None:
    """Note the state of the file an external tensor lies in, in the entry that ONNX has for such a purpose."""
    for entry in [e for e in tensor.external_data if e.key == "checksum"]:
        tensor.external_data.remove(entry)
    tensor.external_data.add(key="checksum", value=_state(stat))


def _check_unchanged(tensor: onnx.TensorProto, stat: os.stat_result) -> None:
    """Other bytes at the same place would make a wrong graph that looks right.

    Raises:
        ModelError: the file was written or replaced since the model was loaded.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("checksum", _state(stat)) != _state(stat):
        raise ModelError(
            f"the file '{entries['location']}' that holds the weight '{tensor.name}' changed after the model was "
            "loaded; load it again"
        )
