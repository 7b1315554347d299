"""Weights that lie in files: in files of their own beside a model, or left inside the model's own file."""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

import onnx
import onnx.external_data_helper as external
import onnx.helper

from toast_onnx.errors import ModelError

#: Weights inside a file of this size and above are left there. They are then referred to by the file's absolute path,
#: which no model that was read can contain.
LEAVE_INSIDE = 64_000_000


#: Where a number stands in an external reference: decimal digits, few enough for any file.
_NUMBER = re.compile(r"[0-9]{1,18}")
#: Values a byte of element types that are packed: UINT4, INT4, FLOAT4E2M1, UINT2, INT2.
_PACKED = {21: 2, 22: 2, 23: 2, 25: 4, 26: 4}


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds, the main graph's initializers first."""
    yield from proto.graph.initializer
    yield from inner_tensors(proto)


def inner_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor but the main graph's initializers: of attributes, subgraphs, functions, sparse and in lists."""
    yield from _of_sparse(proto.graph.sparse_initializer)
    yield from _of_nodes(proto.graph.node)
    for function in proto.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)
    for training in proto.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _of_sparse(graph.sparse_initializer)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield from _of_sparse([attribute.sparse_tensor])
        yield from _of_sparse(attribute.sparse_tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)


def _of_sparse(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in tensors:
        yield tensor.values
        yield tensor.indices


def check_files(proto: onnx.ModelProto, path: Path) -> None:
    """Make sure that a model's external data is there, wherever a tensor stands, and note in what state.

    References come out in full: with offset and length.

    Raises:
        ModelError: a file is missing, too short, no regular file or outside the model's folder, or a reference is no
            possible one.
    """
    states: dict[str, os.stat_result] = {}
    for tensor in all_tensors(proto):
        if not external.uses_external_data(tensor):
            continue
        location, offset, length = _reference(tensor, path)
        if location not in states:
            states[location] = _data_file(location, path)
        needed = offset + length
        if states[location].st_size < needed:
            raise ModelError(
                f"{path}: external data file '{location}' is too short for the weight '{tensor.name}' "
                f"({states[location].st_size} bytes of {needed}); copy it again"
            )
        _remember(tensor, states[location])


#: Whether links that lead out of a model's folder are followed; `--no-links` says no.
_links_followed: ContextVar[bool] = ContextVar("links_followed", default=True)


def set_links_followed(followed: bool) -> None:
    """Say whether a model, or its weights, may be a link that leads out of its folder: by default they may."""
    _links_followed.set(followed)


def links_followed() -> bool:
    """Whether they may."""
    return _links_followed.get()


def check_link(file: Path, path: Path) -> None:
    """Where links are not followed, make sure that a file of a model lies in the model's folder.

    Raises:
        ModelError: it is a link that leads out of it.
    """
    if not links_followed() and not file.resolve().is_relative_to(path.parent.resolve()):
        raise ModelError(
            f"{path}: '{os.path.relpath(file, path.parent)}' is a link to {file.resolve()}, outside its folder; leave "
            "out --no-links to follow it"
        )


def _data_file(location: str, path: Path) -> os.stat_result:
    """State of an external data file.

    Raises:
        ModelError: it is missing, no regular file, or outside the model's folder.
    """
    if os.path.isabs(location) or ".." in Path(location).parts:
        raise ModelError(
            f"{path}: its external data file '{location}' lies outside the model's folder; "
            "put the data beside the model and save it with a plain file name"
        )
    try:
        found = (path.parent / location).stat()
    except (OSError, ValueError) as e:  # a name with a null byte is a ValueError
        raise ModelError(f"{path}: external data file '{location}' is missing; put it beside the model") from e
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path}: external data file '{location}' is not a regular file; put the data itself there")
    check_link(path.parent / location, path)
    return found


def _reference(tensor: onnx.TensorProto, path: Path) -> tuple[str, int, int]:
    """Location, offset and length (bytes) of an external tensor; offset and length are noted where they were left out.

    Raises:
        ModelError: a number is no number, or the length is not what type and shape of the tensor take.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise ModelError(f"{path}: the weight '{tensor.name}' names its external data twice; export it again")
    for key in ("offset", "length"):
        value = entries.get(key, "0")
        if not isinstance(value, str) or _NUMBER.fullmatch(value) is None:
            raise ModelError(
                f"{path}: the weight '{tensor.name}' has the {key} {value[:20]!r} in its external data, which is no "
                "whole number of bytes from 0 on; export it again"
            )
    size = _tensor_size(tensor, path)
    length = int(entries.get("length", size))
    if length != size:
        raise ModelError(
            f"{path}: the weight '{tensor.name}' takes {size} bytes by its type and shape, but its external data says "
            f"{length}; export it again"
        )
    offset = int(entries.get("offset", 0))
    for key, number in (("offset", offset), ("length", length)):
        if key not in entries:
            tensor.external_data.add(key=key, value=str(number))
    return entries.get("location", ""), offset, length


def _tensor_size(tensor: onnx.TensorProto, path: Path) -> int:
    """Bytes of a tensor's raw form.

    Raises:
        ModelError: its type has none, or it has a negative extent.
    """
    if tensor.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise ModelError(f"{path}: the weight '{tensor.name}' has a type that cannot lie in a file; export it again")
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError) as e:
        raise ModelError(
            f"{path}: the weight '{tensor.name}' has the unknown element type {tensor.data_type}; export it again"
        ) from e
    if any(extent < 0 for extent in tensor.dims):
        raise ModelError(f"{path}: the weight '{tensor.name}' has a negative extent; export it again")
    return -(-math.prod(tensor.dims) * itemsize // _PACKED.get(tensor.data_type, 1))


def bring_in_all(proto: onnx.ModelProto, path: Path, limit: int) -> None:
    """Put every external tensor but the main graph's initializers inside, in place.

    What reads an attribute's tensor would look for the file in the working directory, and take another one found there.

    Args:
        proto: a model that `check_files` has passed.
        path: its file.
        limit: most bytes that may come in.

    Raises:
        ModelError: a file was replaced or cannot be read, or together they are too large.
    """
    outside = [tensor for tensor in inner_tensors(proto) if external.uses_external_data(tensor)]
    if sum(external.ExternalDataInfo(tensor).length or 0 for tensor in outside) > limit:
        raise ModelError(
            f"{path}: Constant nodes and subgraphs hold more than {limit} bytes of external data; turn them into "
            "initializers (onnxslim does) and save the model again"
        )
    for tensor in outside:
        try:
            bring_in(tensor, path.parent)
        except OSError as e:
            raise ModelError(f"{path}: cannot read the weight '{tensor.name}': {e}") from e


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
