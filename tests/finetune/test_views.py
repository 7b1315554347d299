"""Views of samples against what algebra says of a linear model, and against the PyTorch module of an exported one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests import zoo
from tests.calibration.tiny import colour_model
from tests.finetune.graphs import FLOAT
from toast_onnx.finetune.views import STEP, STEPS, Views, class_of
from toast_onnx.model import load_model

Exported = Callable[[zoo.Case], Path]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_pixels_of_a_class_grow_and_all_others_fall(tmp_path: Path, batch: int | None, dtype: int) -> None:
    model = load_model(colour_model(tmp_path / "m.onnx", "batch" if batch is None else batch, dtype=dtype))
    type_ = helper.tensor_dtype_to_np_dtype(dtype)
    sample = np.random.default_rng(0).normal(3, 2, (1, 3, 8, 8)).astype(type_)
    found = Views([model], ["scores"], seed=4).of({"pixels": sample}, 5, 3, batch)["pixels"]
    assert found.dtype == type_
    assert found.shape == (3, 3, 8, 8)
    for view, turn in zip(found, (15, 16, 17), strict=True):
        signs = np.where(np.arange(3) == class_of(turn, 3, 4), 1, -1)[:, None, None]
        wide = sample[0].astype(np.float64)
        expected = np.clip(wide + STEPS * STEP * wide.std() * signs, wide.min(), wide.max())
        np.testing.assert_allclose(view, expected, rtol=2e-3 if dtype == TensorProto.FLOAT16 else 1e-5, atol=1e-5)


def test_every_class_has_its_turn_once_a_round() -> None:
    rounds = [[class_of(turn, 7, 3) for turn in range(7 * k, 7 * k + 7)] for k in range(3)]
    assert all(sorted(each) == list(range(7)) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 3
    assert rounds[0] != [class_of(turn, 7, 4) for turn in range(7)]


@pytest.mark.parametrize("case", [zoo.Case("timm-vit"), zoo.Case("timm-swin", "dynamo-20")], ids=lambda c: c.id)
def test_the_module_finds_the_class_likelier_in_a_view(exported: Exported, case: zoo.Case) -> None:
    path = exported(case)
    name, images = next(iter(zoo.inputs(path, 4).items()))
    model = load_model(path)
    views = Views([model], [model.proto.graph.output[0].name])
    module = zoo.build(case.family).module.eval()
    with torch.no_grad():
        for number, image in enumerate(images):
            made = views.of({name: image[None]}, number, 4, None)[name]
            before, after = (module(torch.from_numpy(x)).log_softmax(-1) for x in (image[None], made))
            for k, row in enumerate(after):
                chosen = class_of(4 * number + k, after.shape[1], 0)
                assert row[chosen] > before[0, chosen]
            assert np.abs(made - image).max() <= STEPS * STEP * image.std() * (1 + 1e-5)


def test_views_of_a_sample_do_not_depend_on_the_others(exported: Exported) -> None:
    path = exported(zoo.Case("timm-vit"))
    name, images = next(iter(zoo.inputs(path, 3).items()))
    model = load_model(path)
    outputs = [model.proto.graph.output[0].name]
    together = Views([model], outputs)
    found = [together.of({name: image[None]}, k, 2, None)[name] for k, image in enumerate(images)]
    np.testing.assert_array_equal(Views([model], outputs).of({name: images[2:]}, 2, 2, None)[name], found[2])


def test_the_other_inputs_stay_as_they_are(tmp_path: Path) -> None:
    """A mask of another number for each of six rows of pixels, larger than the image."""
    nodes = [
        helper.make_node("ReduceMean", ["mask"], ["kept"], axes=[1, 3], keepdims=1),
        helper.make_node("Mul", ["pixels", "kept"], ["seen"]),
        helper.make_node("Flatten", ["seen"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    shapes = {"mask": ["batch", 1, 6, 100], "pixels": ["batch", 3, 6, 2]}
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("scores", FLOAT, ["batch", 4])]
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(36, 4)).astype(np.float32), "weight")
    path = tmp_path / "m.onnx"
    graph = helper.make_graph(nodes, "masked", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    mask, pixels = np.random.default_rng(1).normal(size=600), np.arange(36)
    sample = {"mask": mask.reshape(1, 1, 6, 100).astype(np.float32), "pixels": pixels.reshape(1, 3, 6, 2)}
    sample["pixels"] = sample["pixels"].astype(np.float32)
    found = Views([load_model(path)], ["scores"]).of(sample, 0, 3, None)
    np.testing.assert_array_equal(found["mask"], np.repeat(sample["mask"], 3, axis=0))
    assert not np.array_equal(found["pixels"][0], sample["pixels"][0])


def test_a_class_without_a_gradient_leaves_the_sample(tmp_path: Path) -> None:
    path = colour_model(tmp_path / "m.onnx")
    model = load_model(path)
    model.arrays["weight"] = np.zeros((3, 3), np.float32)
    sample = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    found = Views([model], ["scores"]).of({"pixels": sample}, 0, 2, None)["pixels"]
    np.testing.assert_array_equal(found, np.repeat(sample, 2, axis=0))


def test_views_for_two_models_follow_both(tmp_path: Path) -> None:
    """Scores of one are the channels' means, of the other sums of these: the steps by hand, in float64."""
    models = [load_model(colour_model(tmp_path / f"{k}.onnx")) for k in range(2)]
    weight = np.array([[2, 0.5, 0], [-3, 1, 0.2], [0.1, -1, 1]], np.float32)  # (channels, classes)
    models[1].arrays["weight"] = weight
    samples = np.random.default_rng(0).normal(3, 2, (3, 3, 8, 8)).astype(np.float32)
    found = Views(models, ["scores"]).towards({"pixels": samples}, [0, 1, 2])["pixels"]
    different = 0
    for sample, view, turn in zip(samples, found, range(3), strict=True):
        expected = {}
        for both in (True, False):
            now = sample.astype(np.float64)
            low, high, step = now.min(), now.max(), STEP * now.std()
            for _ in range(STEPS):
                slope = np.zeros(3)
                for w in (np.eye(3), weight.astype(np.float64))[: 2 if both else 1]:
                    scores = now.mean(axis=(1, 2)) @ w
                    p = np.exp(scores - scores.max())
                    slope += w[:, class_of(turn, 3, 0)] - w @ (p / p.sum())
                now = np.clip(now + step * np.sign(slope)[:, None, None], low, high)
            expected[both] = now
        np.testing.assert_allclose(view, expected[True], atol=1e-5)
        different += not np.allclose(expected[True], expected[False])
    assert different


def test_each_of_a_batch_is_changed_within_its_own_range(tmp_path: Path) -> None:
    model = load_model(colour_model(tmp_path / "m.onnx"))
    rng = np.random.default_rng(0)
    samples = np.stack([rng.normal(k, k + 1, (3, 8, 8)) for k in range(3)]).astype(np.float32)
    views = Views([model], ["scores"])
    found = views.towards({"pixels": samples}, [5, 6, 7])["pixels"]
    for k in range(3):
        alone = views.towards({"pixels": samples[k : k + 1]}, [5 + k])["pixels"]
        np.testing.assert_allclose(found[k], alone[0], atol=1e-6)
