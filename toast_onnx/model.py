"""Loading and saving ONNX models: lazy weights, external data, atomic writes, errors that name the file.

A `Model` keeps the protobuf without its external data, and without the weights inside a large file; weights are read
one at a time when asked for, so that a 2.5 GB model costs its graph and not its weights. Saving is whole or not at all
(`toast_onnx.files`).
"""

from __future__ import annotations

import contextlib
import heapq
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.external_data_helper as external
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
from google.protobuf.message import DecodeError, Message

from toast_onnx.errors import ModelError
from toast_onnx.external import (
    LEAVE_INSIDE,
    all_tensors,
    bring_in,
    bring_in_all,
    check_files,
    check_link,
    is_inside,
    leave_inside,
    links_followed,
)
from toast_onnx.files import (
    check_place,
    drafts,
    exchange,
    regular_file,
    settle,
    sha256_of,
    through_name,
    write_beside,
    write_synced,
)
from toast_onnx.wellformed import check_graph

#: Protobuf cannot serialise more than 2 GiB; above this, weights go to a file beside the graph.
INLINE_LIMIT = 1_900_000_000
#: Offset alignment of large tensors in a data file: lets runtimes map them into memory.
ALIGNMENT = 4096


@dataclass
class Model:
    """An ONNX model whose external weights stay on disk until they are read.

    Attributes:
        proto: the model; external initializers are references into files under `base_dir`, or into its own file.
        path: the file it came from.
        arrays: values that replace initializers of the same name (not yet part of `proto`'s bytes).
    """

    proto: onnx.ModelProto
    path: Path
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def base_dir(self) -> Path:
        """Folder that external data is relative to."""
        return self.path.parent

    @property
    def opset(self) -> int:
        """Version of the default ONNX operator set."""
        return opset_of(self.proto)

    @property
    def has_external_data(self) -> bool:
        """Whether any initializer lies in a file of its own."""
        return any(external.uses_external_data(t) and not is_inside(t) for t in self.proto.graph.initializer)

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """Value of an initializer; read from disk when it is external.

        Raises:
            ModelError: the data file is missing or short.
        """
        if tensor.name in self.arrays:
            return self.arrays[tensor.name]
        try:
            if not external.uses_external_data(tensor):
                return onnx.numpy_helper.to_array(tensor)
            whole = onnx.TensorProto()
            whole.CopyFrom(tensor)
            bring_in(whole, self.base_dir)
            return onnx.numpy_helper.to_array(whole)
        except (OSError, ValueError) as e:
            raise ModelError(f"{self.path}: cannot read the weight '{tensor.name}': {e}") from e

    def inline(self, tensor: onnx.TensorProto) -> None:
        """Put an external initializer's value inside, in place: that in `arrays`, or its bytes from the file.

        Raises:
            ModelError: the data file is missing or short.
        """
        if tensor.name in self.arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        elif external.uses_external_data(tensor):
            try:
                bring_in(tensor, self.base_dir)
            except OSError as e:
                raise ModelError(f"{self.path}: cannot read the weight '{tensor.name}': {e}") from e


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the default operator set a model imports (1 when it names none)."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file: external weights stay on disk, local functions are inlined, weights are no inputs.

    Raises:
        ModelError: the file is missing, not ONNX, truncated, empty, or its external data is missing or short.
    """
    path = Path(path)
    proto = read_graph(path)
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"{path} holds no ONNX graph; export or copy it again")
    check_files(proto, path)
    bring_in_all(proto, path, INLINE_LIMIT)
    if proto.functions:
        proto = _inline_functions(proto, path)
    check_graph(proto, path)
    if not sort_nodes(proto.graph):  # some converters append nodes at the end
        raise ModelError(f"{path}: the graph has a cycle; export it again")
    _fix_weights(proto)
    if path.stat().st_size >= LEAVE_INSIDE:
        leave_inside(proto.graph, path)
        emptied, proto = proto, onnx.ModelProto()
        proto.CopyFrom(emptied)  # a message keeps the memory of fields that were cleared as long as it lives
    return Model(proto, path)


def _fix_weights(proto: onnx.ModelProto) -> None:
    """Take the weights out of a graph's inputs, where all are among them (in place).

    Before IR version 4 they had to be, and exporters have an option for it. Whoever feeds one has the old weight, which
    fits no pruned graph. Single initializers among the inputs are defaults of theirs, and stay.
    """
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if weights and len(inputs) + len(weights) == len(graph.input):
        del graph.input[:]
        graph.input.extend(inputs)
        proto.ir_version = max(proto.ir_version, 4)


def read_graph(path: Path) -> onnx.ModelProto:
    """The protobuf of an ONNX file as it stands there, external data left outside.

    Raises:
        ModelError: the file is missing, no regular file, too large, not ONNX or truncated.
    """
    if regular_file(path, ModelError, "give the path of an .onnx file", remember=False).st_size >= 2**31:
        raise ModelError(f"{path} is larger than 2 GiB, which no ONNX file can be; put its weights into external data")
    check_link(path, path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    except DecodeError as e:
        raise ModelError(f"{path} is not an ONNX file or is truncated; export or copy it again") from e
    if not _is_text(proto):
        raise ModelError(f"{path} holds a name that is not text in UTF-8; export or copy it again")
    return proto


def _inline_functions(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """A model whose local functions are replaced by their bodies.

    Raises:
        ModelError: functions call one another in a circle, or are no functions.
    """
    # The inliner passes over defaults: a call without an attribute would get the operator's own default, another value.
    defaults = {(f.domain, f.name): f.attribute_proto for f in proto.functions if f.attribute_proto}
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in all_nodes(nodes):
            present = {a.name for a in node.attribute}
            missing = (a for a in defaults.get((node.domain, node.op_type), ()) if a.name not in present)
            node.attribute.extend(missing)
    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as e:  # onnx raises errors of several kinds, some of them from C++
        reason = str(e).strip().splitlines()[0]
        raise ModelError(f"{path}: its local functions cannot be inlined: {reason}; export it again") from e


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those inside their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def _is_text(message: Message) -> bool:
    """Whether every string of a message and of those inside is one; protobuf hands out others as bytes."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_STRING:
            if isinstance(value, bytes) or (not isinstance(value, str) and any(isinstance(v, bytes) for v in value)):
                return False
        elif kind.type == kind.TYPE_MESSAGE:
            inner = (value,) if isinstance(value, Message) else value
            if not all(_is_text(m) for m in inner):
                return False
    return True


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[int]:
    """Positions of nodes, each after those it reads from, the first of those that are free to go first.

    Nodes in a circle, and those after it, are left out.
    """
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waits = [{maker[name] for name in reads(node) if name in maker} for node in nodes]
    readers: dict[int, list[int]] = defaultdict(list)
    for i, needed in enumerate(waits):
        for j in needed:
            readers[j].append(i)
    ready = [i for i, needed in enumerate(waits) if not needed]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            waits[reader].discard(i)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    return order


def sort_nodes(graph: onnx.GraphProto) -> bool:
    """Put nodes into topological order, keeping theirs where it is one; False where the graph has a cycle."""
    order = in_order(graph.node)
    if len(order) != len(graph.node):
        return False
    if order != sorted(order):
        nodes = [graph.node[i] for i in order]
        del graph.node[:]
        graph.node.extend(nodes)
    return True


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors a node reads, those read inside its subgraphs included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from reads(inner)
            yield from (output.name for output in graph.output)


def stub(name: str, value: np.ndarray) -> onnx.TensorProto:
    """An initializer without its data, for a value that is kept in `Model.arrays`."""
    return onnx.TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape)


def model_files(path: Path) -> list[Path]:
    """The files a model consists of: its graph file, then its external data files in the order of their names.

    Raises:
        ModelError: as for `read_graph` and `check_files`.
    """
    state = regular_file(path, ModelError, "give the path of an .onnx file", remember=False)
    check_link(path, path)
    proto = onnx.ModelProto()
    proto.CopyFrom(_outside(path, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)))
    check_files(proto, path)
    names = {external.ExternalDataInfo(t).location for t in all_tensors(proto) if external.uses_external_data(t)}
    return [path, *(path.parent / name for name in sorted(names))]


@lru_cache(maxsize=8)
def _outside(path: Path, _state: tuple[int, ...]) -> onnx.ModelProto:
    """The tensors of a graph file whose values lie outside of it; in that state it is read once."""
    found = onnx.ModelProto()
    found.graph.initializer.extend(t for t in all_tensors(read_graph(path)) if external.uses_external_data(t))
    return found


def links_out(path: Path) -> dict[str, Path]:
    """Files of a model that are links to somewhere outside its folder, as download caches have them: name -> file.

    Raises:
        ModelError: as for `model_files`.
    """
    folder = path.parent.resolve()
    behind = {str(file.relative_to(path.parent)): file.resolve() for file in model_files(path)}
    return {name: file for name, file in behind.items() if not file.is_relative_to(folder)}


def refuse_links(path: Path) -> None:
    """Where links are not followed, make sure of a model that a runtime opens by itself: an ONNX file or another.

    Raises:
        ModelError: one of its files is a link that leads out of its folder; as for `model_files`.
    """
    if not links_followed():
        model_files(path) if path.suffix == ".onnx" else check_link(path, path)


def file_hash(path: Path) -> str:
    """SHA-256 of a model: its graph file, then its external data files in the order of their names."""
    return sha256_of(model_files(path))


def stored_bytes(path: Path) -> int:
    """Size in bytes of a model on disk, external data included."""
    return sum(file.stat().st_size for file in model_files(path))


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Give a folder for working files in the system's temporary place; it is removed at the end.

    Raises:
        ModelError: writing there failed.
    """
    try:
        # Where files that a session has mapped cannot be deleted (Windows), they are left behind.
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as e:
        raise ModelError(
            f"working files cannot be written to the temporary folder: {e.strerror or e}; "
            "free space there or set TMPDIR to another folder"
        ) from e


def save_model(model: Model, path: str | os.PathLike[str], *, check: bool = True) -> None:
    """Write a model atomically; weights go to `<path>.data` when they were external or are too large to inline.

    Args:
        model: the model; `model.arrays` replaces initializers of the same name.
        path: target file.
        check: run `onnx.checker` with full shape inference on what was written, before it gets its name.

    Raises:
        ModelError: the target cannot be written, or the checker refuses the result.
    """
    with staged_model(model, path, check=check):
        pass


@dataclass
class Staged:
    """A model that was written but does not have its name yet.

    Attributes:
        draft: its graph file.
        beside: bytes of the file that takes its place together with the model; None where there is none.
    """

    draft: Path
    beside: bytes | None = None


@contextlib.contextmanager
def staged_model(
    model: Model, path: str | os.PathLike[str], beside: Path | None = None, *, check: bool = True
) -> Iterator[Staged]:
    """As `save_model`, but give the written draft first: it gets its name at the end, unless an exception comes up.

    Args:
        model: as for `save_model`.
        path: as for `save_model`.
        beside: file that belongs to the model (its report) and is exchanged together with it.
        check: as for `save_model`.

    Raises:
        ModelError: as for `save_model`.
    """
    path = Path(path)
    if beside is not None:
        check_place(beside)
    with drafts(path) as folder:
        settle(path, beside)
        staged = Staged(write_draft(model, folder, path.name))
        if check:
            _check(staged.draft, path)
        yield staged
        if (folder / f"{path.name}.data").exists():
            name, through = through_name(folder)
            write_synced(through, _with_weights_in(staged.draft, name))
        if beside is not None and staged.beside is not None:
            write_beside(folder, beside, staged.beside)
        exchange(folder, path, beside)


def _with_weights_in(graph: Path, name: str) -> bytes:
    """Bytes of a written graph with its weights in a file of another name."""
    proto = onnx.load(str(graph), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return proto.SerializeToString(deterministic=True)


def write_draft(model: Model, folder: Path, name: str, *, outside: bool = False) -> Path:
    """Write `name` (and `name.data` where weights go outside) into `folder`; no atomicity, no check.

    Args:
        model: the model.
        folder: where to write.
        name: of the graph's file.
        outside: put weights into the data file even where they lie inside and are small enough to stay there.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    total = sum(_tensor_bytes(model, t) for t in proto.graph.initializer)
    if outside or model.has_external_data or total >= INLINE_LIMIT:
        _stream_weights(model, proto, folder / f"{name}.data")
    else:
        for tensor in proto.graph.initializer:
            model.inline(tensor)
    write_synced(folder / name, proto.SerializeToString(deterministic=True))
    return folder / name


def _tensor_bytes(model: Model, tensor: onnx.TensorProto) -> int:
    if tensor.name in model.arrays:
        return model.arrays[tensor.name].nbytes
    if external.uses_external_data(tensor):
        return int(external.ExternalDataInfo(tensor).length or 0)
    return int(tensor.ByteSize())


def _stream_weights(model: Model, proto: onnx.ModelProto, data_path: Path) -> None:
    """Move weights of 1 KiB and more into `data_path`, one at a time, and point `proto`'s initializers there."""
    with data_path.open("wb") as stream:
        for tensor in proto.graph.initializer:
            if _tensor_bytes(model, tensor) < 1024 and not external.uses_external_data(tensor):
                model.inline(tensor)
                continue
            moved = onnx.numpy_helper.from_array(model.array(tensor), tensor.name)
            stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
            offset, length = stream.tell(), len(moved.raw_data)
            if not length:
                tensor.CopyFrom(moved)  # strings have no raw form
                continue
            stream.write(moved.raw_data)
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=moved.data_type, dims=moved.dims))
            tensor.raw_data = b" "  # set_external_data asks for raw data to replace
            external.set_external_data(tensor, data_path.name, offset, length)
            tensor.ClearField("raw_data")
        stream.flush()
        os.fsync(stream.fileno())


def _check(draft: Path, path: Path) -> None:
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ModelError(f"{path} was not written: the checker refuses the new graph: {str(e).strip()}") from e
