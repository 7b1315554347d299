"""External data of any tensor of a model comes from the model's folder, whatever lies in the working directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

from tests.matching.tiny import TOKENS, WIDTH, block
from tests.pruning import UNEVEN, prune_file, run
from toast_onnx.errors import ModelError
from toast_onnx.external import all_tensors
from toast_onnx.model import file_hash, load_model, model_files, save_model

FLOAT = onnx.TensorProto.FLOAT
VALUES = np.linspace(1, 2, WIDTH, dtype=np.float32)
BEFORE = 64  # bytes in front of the values in the data file
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}

node = onnx.helper.make_node
info = onnx.helper.make_tensor_value_info


def outside(name: str, data_type: int = FLOAT, dims: tuple[int, ...] = (WIDTH,), **entries: str) -> onnx.TensorProto:
    """A tensor whose bytes lie in w.bin."""
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in ({"location": "w.bin", "offset": str(BEFORE)} | entries).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse() -> onnx.SparseTensorProto:
    """The values at every place, as a sparse tensor with its values outside."""
    indices = onnx.numpy_helper.from_array(np.arange(WIDTH, dtype=np.int64), "indices")
    return onnx.SparseTensorProto(values=outside("w"), indices=indices, dims=[WIDTH])


def constant(output: str = "w") -> onnx.NodeProto:
    return node("Constant", [], [output], value=outside("value"))


def initializer(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(outside("w"))


def sparse_initializer(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.append(sparse())


def constant_node(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, constant())


def sparse_constant_node(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, node("Constant", [], ["w"], sparse_value=sparse()))


def _branches(proto: onnx.ModelProto, condition: list[onnx.NodeProto], **inside: list[object]) -> None:
    """w comes out of an If, from a branch that holds the tensor."""

    def branch(name: str) -> onnx.GraphProto:
        tensor = f"{name}_w"
        nodes = [constant(f"{name}_v")] if "nodes" in inside else []
        held = [] if nodes else [outside(f"{name}_v")]
        nodes.append(node("Identity", [f"{name}_v"], [tensor]))
        return onnx.helper.make_graph(nodes, name, [], [info(tensor, FLOAT, [WIDTH])], held)

    made = [*condition, node("If", ["c"], ["w"], then_branch=branch("yes"), else_branch=branch("no"))]
    for k, each in enumerate(made):
        proto.graph.node.insert(k, each)


def _dynamic() -> list[onnx.NodeProto]:
    return [
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["c"], to=onnx.TensorProto.BOOL),
    ]


def _known() -> list[onnx.NodeProto]:
    return [node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.asarray(True)))]


def branch_initializer(proto: onnx.ModelProto) -> None:
    _branches(proto, _dynamic())


def branch_constant(proto: onnx.ModelProto) -> None:
    _branches(proto, _dynamic(), nodes=[])


def known_branch_initializer(proto: onnx.ModelProto) -> None:
    _branches(proto, _known())


def known_branch_constant(proto: onnx.ModelProto) -> None:
    _branches(proto, _known(), nodes=[])


def loop_body(proto: onnx.ModelProto) -> None:
    body = onnx.helper.make_graph(
        [constant("held"), node("Identity", ["on"], ["go"]), node("Identity", ["held"], ["new"])],
        "body",
        [info("k", onnx.TensorProto.INT64, []), info("on", onnx.TensorProto.BOOL, []), info("old", FLOAT, [WIDTH])],
        [info("go", onnx.TensorProto.BOOL, []), info("new", FLOAT, [WIDTH])],
    )
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.asarray(2, np.int64), "trips"),
            onnx.numpy_helper.from_array(np.zeros(WIDTH, np.float32), "zeros"),
        ]
    )
    proto.graph.node.insert(0, node("Loop", ["trips", "", "zeros"], ["w"], body=body))


def _function(proto: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
    proto.graph.node.insert(0, node("Held", [], ["w"], domain="local"))


def function_body(proto: onnx.ModelProto) -> None:
    opsets = [onnx.helper.make_opsetid("", 17)]
    _function(proto, onnx.helper.make_function("local", "Held", [], ["v"], [constant("v")], opsets))


def function_default(proto: onnx.ModelProto) -> None:
    inner = node("Constant", [], ["v"])
    inner.attribute.add(name="value", ref_attr_name="held", type=onnx.AttributeProto.TENSOR)
    default = onnx.helper.make_attribute("held", outside("value"))
    opsets = [onnx.helper.make_opsetid("", 17)]
    _function(
        proto,
        onnx.helper.make_function("local", "Held", [], ["v"], [inner], opsets, attribute_protos=[default]),
    )


SPARSE = [sparse_initializer, sparse_constant_node]
PLACES = [
    initializer,
    constant_node,
    branch_initializer,
    branch_constant,
    known_branch_initializer,
    known_branch_constant,
    loop_body,
    function_body,
    function_default,
]


def bent(folder: Path, place: Callable[[onnx.ModelProto], None]) -> Path:
    """A transformer block from x to y, beside it z = x * w with w in w.bin."""
    graph, y = block()
    path = graph.save(folder / "model.onnx", y)
    proto = onnx.load(path)
    proto.graph.node.append(node("Mul", ["x", "w"], ["z"]))
    proto.graph.output.append(info("z", FLOAT, ["batch", TOKENS, WIDTH]))
    place(proto)
    path.write_bytes(proto.SerializeToString())
    (folder / "w.bin").write_bytes(b"\7" * BEFORE + VALUES.tobytes())
    return path


@pytest.fixture
def decoy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with other values under the same name; the model's folder lies beside it."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "w.bin").write_bytes(b"\7" * BEFORE + (VALUES / 2).tobytes())
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(here)
    return tmp_path / "there"


@pytest.mark.parametrize("place", PLACES)
def test_weights_come_from_the_models_folder_wherever_they_stand(
    place: Callable[[onnx.ModelProto], None], decoy: Path
) -> None:
    path, out = bent(decoy, place), decoy / "new.onnx"
    _, pruned = prune_file(path, UNEVEN, out)
    assert pruned.weights
    y, z = run(out, FEEDS)
    assert y.shape == z.shape
    assert np.allclose(z, FEEDS["x"] * VALUES, atol=1e-6)


@pytest.mark.parametrize("place", SPARSE)
def test_sparse_weights_come_from_the_models_folder(place: Callable[[onnx.ModelProto], None], decoy: Path) -> None:
    """The checker takes no sparse operand at a standard operator, so that only loading can be seen."""
    model = load_model(bent(decoy, place))
    (values,) = (t for t in all_tensors(model.proto) if t.name == "w")
    assert np.array_equal(onnx.numpy_helper.to_array(values), VALUES)


@pytest.mark.parametrize("place", PLACES + SPARSE)
def test_files_and_hash_cover_weights_wherever_they_stand(
    place: Callable[[onnx.ModelProto], None], decoy: Path
) -> None:
    path = bent(decoy, place)
    assert model_files(path) == [path, decoy / "w.bin"]
    before = file_hash(path)
    (decoy / "w.bin").write_bytes(b"\7" * BEFORE + (VALUES / 3).tobytes())
    assert file_hash(path) != before
    (decoy / "w.bin").write_bytes(b"\7" * BEFORE + VALUES.tobytes()[:-1])
    with pytest.raises(ModelError, match=r"w\.bin' is too short"):
        load_model(path)
    (decoy / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin' is missing"):
        load_model(path)


def test_what_was_brought_inside_is_saved_inside(decoy: Path) -> None:
    save_model(load_model(bent(decoy, constant_node)), decoy / "new.onnx")
    assert model_files(decoy / "new.onnx") == [decoy / "new.onnx"]


def test_every_kind_of_attribute_is_walked() -> None:
    """Lists of tensors, of sparse tensors and of graphs stand in no standard operator, but a graph may hold them."""
    proto = onnx.ModelProto()
    held = proto.graph.node.add(op_type="Custom", domain="somebody").attribute.add
    held(name="tensors", type=onnx.AttributeProto.TENSORS).tensors.extend([outside("a"), outside("b")])
    held(name="sparse", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.append(sparse())
    graph = held(name="graphs", type=onnx.AttributeProto.GRAPHS).graphs.add()
    graph.node.add(op_type="Custom").attribute.add(name="t", type=onnx.AttributeProto.TENSOR).t.CopyFrom(outside("c"))
    training = proto.training_info.add()
    training.algorithm.initializer.append(outside("d"))
    training.initialization.sparse_initializer.append(sparse())
    assert [t.name for t in all_tensors(proto)] == ["a", "b", "w", "indices", "c", "w", "indices", "d"]


NO_NUMBERS = {
    "negative": "-4",
    "fraction": "64.0",
    "exponent": "1e2",
    "hexadecimal": "0x40",
    "text": "sixty-four",
    "nothing": "",
    "spaces": " 64",
    "underscore": "6_4",
    "other digits": "٦٤",
    "5000 digits": "4" * 5000,
}


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("number", NO_NUMBERS.values(), ids=list(NO_NUMBERS))
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_numbers_of_external_data_that_are_none(place: str, number: str, key: str, decoy: Path) -> None:
    def spoilt(proto: onnx.ModelProto) -> None:
        tensor = outside("w", **{key: number})
        if place == "initializer":
            proto.graph.initializer.append(tensor)
        else:
            proto.graph.node.insert(0, node("Constant", [], ["w"], value=tensor))

    path = bent(decoy, spoilt)
    for read in (load_model, model_files, file_hash):
        with pytest.raises(ModelError, match=f"the {key} .* no whole number of bytes") as caught:
            read(path)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"length": str(4 * WIDTH - 4)}, "takes 32 bytes by its type and shape"),
        ({"length": str(4 * WIDTH + 4)}, "takes 32 bytes by its type and shape"),
        ({"length": "0"}, "takes 32 bytes by its type and shape"),
        ({"offset": "9" * 18}, "too short"),
        ({"location": ""}, "not a regular file"),
        ({"location": "w\0.bin"}, "is missing"),
        ({"location": "w" * 5000}, "is missing"),
    ],
)
def test_references_that_do_not_fit(entries: dict[str, str], reason: str, decoy: Path) -> None:
    path = bent(decoy, lambda proto: proto.graph.initializer.append(outside("w", **entries)))
    with pytest.raises(ModelError, match=reason):
        load_model(path)


@pytest.mark.parametrize(
    ("data_type", "dims", "reason"),
    [
        (99, (WIDTH,), "unknown element type 99"),
        (onnx.TensorProto.STRING, (WIDTH,), "cannot lie in a file"),
        (FLOAT, (-1, -8), "negative extent"),
        (FLOAT, (2**62, 2**62), "too short"),
    ],
)
def test_types_and_shapes_that_do_not_fit(data_type: int, dims: tuple[int, ...], reason: str, decoy: Path) -> None:
    path = bent(decoy, lambda proto: proto.graph.initializer.append(outside("w", data_type, dims)))
    with pytest.raises(ModelError, match=reason):
        load_model(path)


def test_a_reference_that_names_its_data_twice(decoy: Path) -> None:
    def twice(proto: onnx.ModelProto) -> None:
        tensor = outside("w")
        tensor.external_data.add(key="location", value="other.bin")
        proto.graph.initializer.append(tensor)

    with pytest.raises(ModelError, match="twice"):
        load_model(bent(decoy, twice))


@pytest.mark.parametrize(("data_type", "bytes_"), [(onnx.TensorProto.INT4, 4), (onnx.TensorProto.BFLOAT16, 16)])
def test_sizes_of_packed_and_short_types(data_type: int, bytes_: int, decoy: Path) -> None:
    held = outside("w", data_type, length=str(bytes_))
    load_model(bent(decoy, lambda proto: proto.graph.initializer.append(held)))
