"""Data behind one interface: folders, .npy, .npz, callables."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.calibration.tiny import colour_folder, noise
from toast_onnx.errors import ConfigError, DataError
from toast_onnx_calibration.recipes import NAMED, Recipe, adapt
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Source, is_callable, open_source

FLOAT = np.dtype(np.float32)
PIXELS = [ModelInput("pixels", ("batch", 3, 8, 8), FLOAT)]
TWO = [ModelInput("ids", ("batch", 4), np.dtype(np.int64)), ModelInput("mask", ("batch", 4), FLOAT)]


def everything(source: Source) -> dict[str, np.ndarray]:
    chunks = list(source)
    return {name: np.concatenate([c.arrays[name] for c in chunks]) for name in chunks[0].arrays}


def rows(source: Source) -> list[str]:
    return [row for chunk in source for row in chunk.rows]


def test_folders_by_name_seed_and_selection(tmp_path: Path) -> None:
    root = colour_folder(tmp_path / "c")
    source = open_source(root, PIXELS, NAMED["imagenet"])
    assert (source.count, len(rows(source))) == (12, 12)
    assert rows(source)[:2] == ["blue/0.png", "blue/1.png"]
    assert source.recipe == adapt(NAMED["imagenet"], PIXELS[0].shape)
    assert source.report is not None
    assert source.report.read == 12
    few = open_source(root, PIXELS, NAMED["none"], samples=5, seed=3)
    assert rows(few) == rows(few) == rows(open_source(root, PIXELS, NAMED["none"], samples=5, seed=3))
    assert rows(few) != rows(open_source(root, PIXELS, NAMED["none"], samples=5, seed=4))
    assert rows(open_source(root, PIXELS, NAMED["none"], only={"red/2.png"})) == ["red/2.png"]
    with pytest.raises(DataError, match="none of its images has a label"):
        open_source(root, PIXELS, NAMED["none"], only=set())


def test_fingerprints_follow_the_data(tmp_path: Path) -> None:
    root = colour_folder(tmp_path / "c")
    before = open_source(root, PIXELS, NAMED["none"]).fingerprint
    assert before == open_source(root, PIXELS, NAMED["clip"]).fingerprint
    assert before != open_source(root, PIXELS, NAMED["none"], samples=11).fingerprint
    noise(40, 40).save(root / "red" / "0.png")
    assert before != open_source(root, PIXELS, NAMED["none"]).fingerprint

    values = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", pixels=values)
    from_npy, from_npz = (open_source(tmp_path / f"a.{kind}", PIXELS, None).fingerprint for kind in ("npy", "npz"))
    assert from_npy == from_npz
    values[5, 0, 0, 0] += 1
    np.save(tmp_path / "a.npy", values)
    assert open_source(tmp_path / "a.npy", PIXELS, None).fingerprint != from_npy


def test_float_arrays_are_ready_tensors(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(37, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    source = open_source(tmp_path / "a.npy", PIXELS, NAMED["imagenet"])
    np.testing.assert_array_equal(everything(source)["pixels"], values)
    assert source.recipe is None
    few = open_source(tmp_path / "a.npy", PIXELS, None, samples=9, seed=1)
    np.testing.assert_array_equal(everything(few)["pixels"], values[[int(r) for r in rows(few)]])


@pytest.mark.parametrize("form", ["nhwc", "nchw", "gray"])
def test_uint8_images_go_through_the_recipe(form: str, tmp_path: Path) -> None:
    images = np.stack([np.asarray(noise(11, 13, i)) for i in range(3)])
    stored = {"nhwc": images, "nchw": images.transpose(0, 3, 1, 2), "gray": images[..., 0]}[form]
    np.savez(tmp_path / "a.npz", images=stored, labels=[0, 1, 2])
    source = open_source(tmp_path / "a.npz", PIXELS, NAMED["imagenet"])
    recipe = adapt(NAMED["imagenet"], PIXELS[0].shape)
    originals = images[..., 0] if form == "gray" else images
    expected = np.stack([recipe.apply(Image.fromarray(i)) for i in originals])
    np.testing.assert_array_equal(everything(source)["pixels"], expected)
    assert source.recipe == recipe
    with pytest.raises(ConfigError, match="give a recipe"):
        open_source(tmp_path / "a.npz", PIXELS, None)


def test_a_model_of_raw_pixels_gets_them_untouched(tmp_path: Path) -> None:
    raw = [ModelInput("pixels", ("batch", 8, 8, 3), np.dtype(np.uint8))]
    images = np.stack([np.asarray(noise(8, 8, i)) for i in range(3)])
    np.savez(tmp_path / "a.npz", images=images)
    source = open_source(tmp_path / "a.npz", raw, None)
    np.testing.assert_array_equal(everything(source)["pixels"], images)
    colour_folder(tmp_path / "c")
    folder = open_source(tmp_path / "c", raw, Recipe(scale=1.0, dtype="uint8"))
    assert everything(folder)["pixels"].shape == (12, 8, 8, 3)


def test_several_inputs(tmp_path: Path) -> None:
    ids, mask = np.arange(20).reshape(5, 4), np.ones((5, 4), np.float32)
    np.savez(tmp_path / "ok.npz", ids=ids, mask=mask, labels=np.zeros(5))
    np.testing.assert_array_equal(everything(open_source(tmp_path / "ok.npz", TWO, None))["ids"], ids)
    cases = {
        "missing": ({"ids": ids}, "no array for the model's input 'mask' (it has 'ids')"),
        "extra": ({"ids": ids, "mask": mask, "types": ids}, "'types', but the model's inputs are 'ids', 'mask'"),
        "lengths": ({"ids": ids, "mask": mask[:4]}, "different numbers of samples: ids 5, mask 4"),
        "scalar": ({"ids": ids, "mask": np.float32(1)}, "a single number for 'mask'"),
        "empty": ({"ids": ids[:0], "mask": mask[:0]}, "no samples"),
    }
    for name, (arrays, words) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError) as caught:
            open_source(tmp_path / f"{name}.npz", TWO, None)
        assert words in str(caught.value)
    np.save(tmp_path / "one.npy", ids)
    with pytest.raises(DataError, match="one array, but the model has 2 inputs"):
        open_source(tmp_path / "one.npy", TWO, None)
    colour_folder(tmp_path / "c")
    with pytest.raises(DataError, match=r"images feed one input, but the model has 'ids', 'mask': .*npz"):
        open_source(tmp_path / "c", TWO, NAMED["none"])


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.path), "w"))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    np.savez(tmp_path / "objects.npz", pixels=np.array([Trap(proof)], dtype=object))
    np.save(tmp_path / "objects.npy", np.array([Trap(proof)], dtype=object))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap(proof)))
    proof.unlink(missing_ok=True)
    for name in ("objects.npz", "objects.npy", "plain.npz"):
        with pytest.raises(DataError, match="pickle"):
            open_source(tmp_path / name, PIXELS, None)
    assert not proof.exists()


def test_damaged_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3, 8, 8))
    np.savez_compressed(tmp_path / "whole.npz", pixels=values)
    np.save(tmp_path / "whole.npy", values)
    for kind in ("npz", "npy"):
        data = (tmp_path / f"whole.{kind}").read_bytes()
        for name, cut in (("half", data[: len(data) // 2]), ("empty", b""), ("text", b"hello")):
            path = tmp_path / f"{name}.{kind}"
            path.write_bytes(cut)
            with pytest.raises(DataError, match=path.name) as caught:
                open_source(path, PIXELS, None)
            assert "\n" not in str(caught.value)
    flipped = bytearray((tmp_path / "whole.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(DataError, match="damaged"):
        open_source(tmp_path / "flipped.npz", PIXELS, None)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, as a user would have it."""
    (tmp_path / "my_loader.py").write_text(
        textwrap.dedent(
            """
            import numpy as np

            def ready():
                for i in range(4):
                    yield np.full((3, 3, 8, 8), i, np.float32)

            def pairs():
                return [{"ids": np.zeros((2, 4), np.int64), "mask": np.ones((2, 4), np.float32)}]

            def raw():
                yield np.full((2, 9, 9, 3), 255, np.uint8)

            def breaks():
                yield np.zeros((1, 3, 8, 8), np.float32)
                raise KeyError("image")

            def nothing():
                return []

            value = 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    return "my_loader"


def test_callables(module: str) -> None:
    source = open_source(f"{module}:ready", PIXELS, None)
    assert source.count is None
    assert len(rows(source)) == 12
    assert rows(source)[-1] == "11"
    fresh = open_source(f"{module}:ready", PIXELS, None)
    assert fresh.fingerprint == source.fingerprint
    first = open_source(f"{module}:ready", PIXELS, None, samples=5)
    assert everything(first)["pixels"][:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert first.fingerprint != source.fingerprint
    assert everything(open_source(f"{module}:pairs", TWO, None))["mask"].sum() == 8
    images = open_source(f"{module}:raw", PIXELS, NAMED["none"])
    np.testing.assert_array_equal(everything(images)["pixels"], np.ones((2, 3, 8, 8)))
    assert images.recipe is not None


def test_callables_that_fail(module: str) -> None:
    for name, words in (
        ("breaks", "my_loader:breaks failed with KeyError: 'image'"),
        ("nothing", "my_loader:nothing yielded no samples"),
        ("pairs", "yielded no array for the model's input 'pixels'"),
    ):
        with pytest.raises(DataError) as caught:
            list(open_source(f"{module}:{name}", PIXELS, None))
        assert words in str(caught.value)
    for spec, words in (
        ("my_loader:absent", "the module 'my_loader' has no 'absent'"),
        ("my_loader:value", "is not a function"),
        ("no_such_module:f", "cannot import 'no_such_module': ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError) as error:
            open_source(spec, PIXELS, None)
        assert words in str(error.value)


def test_a_callable_is_told_from_a_path(tmp_path: Path) -> None:
    assert is_callable("package.module:function")
    assert not is_callable("C:\\images")
    assert not is_callable("images/train")
    assert not is_callable(tmp_path)
