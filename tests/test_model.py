"""Loading and saving: errors that name the file, external data, atomic writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning import run
from toast_onnx import model as room
from toast_onnx.errors import ModelError
from toast_onnx.external import follow_links
from toast_onnx.files import write_bytes
from toast_onnx.model import (
    Model,
    file_hash,
    load_model,
    model_files,
    save_model,
    scratch_folder,
    staged_model,
    stored_bytes,
)
from toast_onnx_calibration.sessions import make_session, model_session

SHAPE = (40, 30)


def tiny(seed: int = 0) -> onnx.ModelProto:
    """y = x @ w + b with a symbolic batch and metadata."""
    random = np.random.default_rng(seed)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["p"]), onnx.helper.make_node("Add", ["p", "b"], ["y"])],
        "tiny",
        [info("x", onnx.TensorProto.FLOAT, ["batch", SHAPE[0]])],
        [info("y", onnx.TensorProto.FLOAT, ["batch", SHAPE[1]])],
        [
            onnx.numpy_helper.from_array(random.standard_normal(SHAPE).astype(np.float32), "w"),
            onnx.numpy_helper.from_array(random.standard_normal(SHAPE[1]).astype(np.float32), "b"),
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    proto.metadata_props.add(key="author", value="somebody")
    return proto


def saved(folder: Path, *, external: bool = False) -> Path:
    """The tiny model as a file, its large weight in `weights.bin` where asked for."""
    path = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 1024} if external else {}
    onnx.save(tiny(), path, **options)  # type: ignore[arg-type]
    return path


FEEDS = {"x": np.ones((2, SHAPE[0]), np.float32)}


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_an_error_that_names_the_file(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    whole = tiny()
    del whole.metadata_props[:]  # what is lost behind the graph and its opset cannot be told from what never was
    data = whole.SerializeToString()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load_model(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_model_error_and_nothing_else(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("noise") / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load_model(path)


@pytest.mark.parametrize("external", [False, True])
def test_saving_what_was_loaded_changes_no_output(external: bool, tmp_path: Path) -> None:
    path, out = saved(tmp_path, external=external), tmp_path / "new.onnx"
    model = load_model(path)
    assert model.has_external_data is external
    save_model(model, out)
    assert np.array_equal(run(out, FEEDS)[0], run(path, FEEDS)[0])
    assert (tmp_path / "new.onnx.data").exists() is external
    assert onnx.load(out, load_external_data=False).metadata_props == tiny().metadata_props


@pytest.mark.parametrize("external", [False, True])
def test_replaced_arrays_are_what_is_written(external: bool, tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, external=external))
    weight = np.full(SHAPE, 0.5, np.float32)
    model.arrays["w"] = weight
    save_model(model, tmp_path / "new.onnx")
    (found,) = (t for t in onnx.load(tmp_path / "new.onnx").graph.initializer if t.name == "w")
    assert np.array_equal(onnx.numpy_helper.to_array(found), weight)
    assert run(tmp_path / "new.onnx", FEEDS)[0].shape == (2, SHAPE[1])


def test_external_weights_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, external=True))
    (tensor,) = (t for t in model.proto.graph.initializer if t.name == "w")
    assert not tensor.raw_data
    assert np.array_equal(model.array(tensor), onnx.numpy_helper.to_array(tiny().graph.initializer[0]))


def test_weights_beyond_protobufs_limit_go_to_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "INLINE_LIMIT", 1000)
    save_model(load_model(saved(tmp_path)), tmp_path / "new.onnx")
    assert [f.name for f in model_files(tmp_path / "new.onnx")] == ["new.onnx", "new.onnx.data"]
    assert np.array_equal(run(tmp_path / "new.onnx", FEEDS)[0], run(tmp_path / "model.onnx", FEEDS)[0])


def test_hash_and_size_cover_the_data_file(tmp_path: Path) -> None:
    path = saved(tmp_path, external=True)
    before, size = file_hash(path), stored_bytes(path)
    assert size == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    with (tmp_path / "weights.bin").open("r+b") as stream:
        stream.write(b"\x01\x02\x03\x04")
    assert file_hash(path) != before
    assert stored_bytes(path) == size


def test_a_draft_that_is_not_wanted_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "new.onnx").write_text("older")
    model = load_model(saved(tmp_path))

    def fail() -> None:
        with staged_model(model, tmp_path / "new.onnx") as staged:
            assert onnx.load(staged.draft).graph.name == "tiny"
            assert (tmp_path / "new.onnx").read_text() == "older"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "new.onnx").read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "new.onnx"]


def test_what_the_checker_refuses_is_not_written(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path))
    model.proto.graph.node[1].input[0] = "nobody_makes_this"
    with pytest.raises(ModelError, match="checker refuses"):
        save_model(model, tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()


def test_weights_of_another_shape_than_the_graph_takes_are_not_written(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path))
    model.arrays["w"] = np.zeros((SHAPE[0] + 1, SHAPE[1]), np.float32)
    with pytest.raises(ModelError, match="checker refuses"):
        save_model(model, tmp_path / "new.onnx")


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_disk_full_at_any_time(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(saved(tmp_path))
    (tmp_path / "new.onnx").write_text("older")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(ModelError, match="the disk is full"):
        save_model(model, tmp_path / "new.onnx")
    with pytest.raises(ModelError, match="the disk is full"):
        write_bytes(tmp_path / "report.json", b"{}")
    monkeypatch.undo()
    assert (tmp_path / "new.onnx").read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "new.onnx"]


def test_temporary_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="TMPDIR"), scratch_folder("toast-"):
        pass


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    """Older dynamo exports keep modules as functions; matching sees one flat graph."""
    proto = tiny()
    opsets = [onnx.helper.make_opsetid("", 17)]
    inner = onnx.helper.make_node("Add", ["a", "c"], ["d"])
    proto.functions.append(onnx.helper.make_function("local", "Bias", ["a", "c"], ["d"], [inner], opsets))
    proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
    proto.graph.node[1].CopyFrom(onnx.helper.make_node("Bias", ["p", "b"], ["y"], domain="local"))
    onnx.save(proto, tmp_path / "model.onnx")
    model = load_model(tmp_path / "model.onnx")
    assert [n.op_type for n in model.proto.graph.node] == ["MatMul", "Add"]
    assert not model.proto.functions


def test_defaults_of_local_functions_hold_where_a_call_says_nothing(tmp_path: Path) -> None:
    """The first call has its own slope, the second one that of the function and not that of the operator."""
    node = onnx.helper.make_node
    inner = node("LeakyRelu", ["a"], ["b"])
    inner.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    default = onnx.helper.make_attribute("slope", 0.5)
    opsets = [onnx.helper.make_opsetid("", 17)]
    function = onnx.helper.make_function("local", "Bend", ["a"], ["b"], [inner], opsets, attribute_protos=[default])
    info = onnx.helper.make_tensor_value_info
    calls = [node("Bend", ["x"], ["m"], domain="local", slope=0.25), node("Bend", ["m"], ["y"], domain="local")]
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(calls, "calls", [info("x", floats, [1])], [info("y", floats, [1])])
    opsets = [*opsets, onnx.helper.make_opsetid("local", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function]), tmp_path / "m")
    save_model(load_model(tmp_path / "m"), tmp_path / "new.onnx")
    assert run(tmp_path / "new.onnx", {"x": np.asarray([-8.0], np.float32)})[0].tolist() == [-1.0]


def test_functions_that_call_one_another_in_a_circle(tmp_path: Path) -> None:
    proto = tiny()
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("local", 1)]
    for name, other in (("F", "G"), ("G", "F")):
        inner = onnx.helper.make_node(other, ["a"], ["b"], domain="local")
        proto.functions.append(onnx.helper.make_function("local", name, ["a"], ["b"], [inner], opsets))
    proto.opset_import.append(opsets[1])
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("F", ["x"], ["p"], domain="local"))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="cannot be inlined"):
        load_model(tmp_path / "model.onnx")


def test_nodes_are_sorted_and_a_circle_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    proto = onnx.load(path)
    names = [node.output[0] for node in proto.graph.node]
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, path)
    assert [node.output[0] for node in load_model(path).proto.graph.node] == names
    last = proto.graph.node[-1]
    last.input[0] = proto.graph.node[0].output[0]
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="cycle"):
        load_model(path)


def test_a_weight_that_is_shorter_than_its_shape_says_which(tmp_path: Path) -> None:
    proto = tiny()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-8]
    model = Model(proto, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="'w'"):
        model.array(proto.graph.initializer[0])


@pytest.mark.parametrize("location", ["../weights.bin", "/weights.bin"])
def test_data_outside_the_models_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = saved(tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(proto, tmp_path / "inner" / "model.onnx")
    with pytest.raises(ModelError, match="outside the model's folder"):
        load_model(tmp_path / "inner" / "model.onnx")


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_weights_behind_links_as_download_caches_keep_them(link: Callable[..., None], tmp_path: Path) -> None:
    store, view = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    view.mkdir()
    path = saved(store, external=True)
    for name in ("model.onnx", "weights.bin"):
        (store / name).rename(store / f"blob-{name}")
        link(store / f"blob-{name}", view / name)
    path = view / "model.onnx"
    model = load_model(path)
    assert all(np.array_equal(model.array(t), onnx.numpy_helper.to_array(e)) for t, e in weights(model))
    save_model(model, tmp_path / "new.onnx")
    expected = FEEDS["x"] @ model_array(tiny(), "w") + model_array(tiny(), "b")
    assert np.allclose(run(tmp_path / "new.onnx", FEEDS)[0], expected, atol=1e-5)

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    folder = follow_links(proto, model.base_dir)
    session = make_session(proto.SerializeToString(), threads=1, external_data=folder)
    assert np.allclose(session.run(None, FEEDS)[0], expected, atol=1e-5)


def weights(model: Model) -> list[tuple[onnx.TensorProto, onnx.TensorProto]]:
    return list(zip(model.proto.graph.initializer, tiny().graph.initializer, strict=True))


def model_array(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def test_weights_of_a_large_file_stay_in_it_and_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    monkeypatch.setattr(room, "LEAVE_INSIDE", 1)
    model = load_model(path)
    assert not model.proto.graph.initializer[0].raw_data
    assert not model.has_external_data
    assert all(np.array_equal(model.array(t), onnx.numpy_helper.to_array(e)) for t, e in weights(model))
    save_model(model, tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx.data").exists()
    assert onnx.load(tmp_path / "new.onnx").graph == tiny().graph
    session = model_session(model, threads=1)
    assert np.allclose(session.run(None, FEEDS)[0], run(path, FEEDS)[0], atol=1e-6)


@pytest.mark.parametrize("external", [False, True])
def test_a_file_that_changed_after_loading_is_not_read_from(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes at the old place would be a wrong graph that looks right."""
    monkeypatch.setattr(room, "LEAVE_INSIDE", 1)
    model = load_model(saved(tmp_path, external=external))
    proto = tiny()
    proto.producer_name = "x" * 4000
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros(SHAPE, np.float32), "w"))
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 1024} if external else {}
    (tmp_path / "weights.bin").unlink(missing_ok=True)
    onnx.save(proto, tmp_path / "model.onnx", **options)
    with pytest.raises(ModelError, match="changed after the model was loaded"):
        save_model(model, tmp_path / "new.onnx")
    assert not (tmp_path / "new.onnx").exists()
    with pytest.raises(ModelError, match="changed after the model was loaded"):
        model_session(model, threads=1)
