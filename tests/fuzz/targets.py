"""What the program reads: for every kind of file a good one, how it is damaged, and what is then done with it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.fuzz import mutators
from tests.matching.tiny import TOKENS, WIDTH, block
from tests.pruning import look, run
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.deploy import load_deployment, plan_steps
from toast_onnx.deploy.state import read_record as read_deployment
from toast_onnx.engines import read_record
from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.model import save_model
from toast_onnx.planning.presets import read_ratios
from toast_onnx.pruning import prune
from toast_onnx.wellformed import blame_model, why_not_loaded
from toast_onnx_calibration.calibrating import calibrate
from toast_onnx_calibration.images import ReadReport, read_images
from toast_onnx_calibration.labels import open_labels
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.recipe_files import load_recipe
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import open_source
from toast_onnx_calibration.statistics import CalibratedStatistics

RATIOS = {"version": 1, "align": 1, "attention": {"qk": 0.5, "vo": [0.5]}, "ffn": {"fc2": 0.5}, "blocks": {"0": {}}}
FEEDS = {"x": np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}
INPUTS = [ModelInput("x", ("batch", TOKENS, WIDTH), np.dtype(np.float32))]


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        name: of the file.
        good: its bytes.
        damage: what may be done to them.
        use: what the program does with the file; a `ToastError` refuses it.
    """

    name: str
    good: bytes
    damage: Sequence[mutators.Mutator]
    use: Callable[[Path], object]


def targets(folder: Path) -> list[Target]:
    """All kinds; good files that others are used with lie in the folder."""
    graph, y = block()
    model = graph.save(folder / "good.onnx", y)
    ratios = folder / "good.yaml"
    ratios.write_text(json.dumps(RATIOS))
    study = look(model)
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((64, TOKENS, WIDTH)).astype(np.float32))
    calibrate(study, folder / "x.npy", folder / "good.npz", everything(study))

    def pruned(path: Path, statistics: Path | None = None) -> None:
        with blame_model(path):
            dense = look(path)
            found = SyntheticStatistics(dense) if statistics is None else CalibratedStatistics(dense, statistics)
            out = path.with_name("out.onnx")
            save_model(prune(dense, read_ratios(str(ratios)), found, seed=0).model, out)
            if why_not_loaded(out) is None:
                run(out, FEEDS)

    def steps(path: Path) -> None:
        plan_steps(load_deployment(path), path)

    def described(path: Path) -> None:
        image = Image.fromarray(np.zeros((16, 24, 3), np.uint8))
        load_recipe(path).recipe.apply(image)

    def read(path: Path) -> None:
        list(read_images(path.parent, [path.name], Recipe(resize=32, crop=16), ReadReport(), 1))

    text = (*mutators.BYTES, *[mutators.document] * 5)
    image, data = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)).save(image, "PNG")
    np.savez(data, x=FEEDS["x"], labels=np.arange(2))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 2}
    processor |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0.004}
    deployment = {"version": 1, "model": "good.onnx", "prune": {"ratios": "good.yaml"}, "compare": {"data": "x.npy"}}
    entry = {"status": "done", "command": ["toast-onnx"], "inputs": {}, "versions": {}, "outputs": {"o": "1"}}
    sidecar = {
        "model": "good.onnx",
        "backend": "tensorrt",
        "profile": {"x": {k: [1, 2] for k in ("min", "opt", "max")}},
    }
    record = {"format": "toast-onnx/deploy/1", "steps": {"prune": entry}}

    def sidecar_of(path: Path) -> None:
        if read_record(path.with_suffix("")) is None:
            raise ConfigError("passed over")

    def written(document: object) -> bytes:
        return json.dumps(document).encode()

    packed = (*mutators.BYTES, mutators.arrays)
    measured = (folder / "good.npz").read_bytes()
    recipe = {"resize": 20, "crop": [16, 16], "mean": [0.5] * 3, "std": 0.5}
    return [
        Target("m.onnx", model.read_bytes(), (*mutators.BYTES, *[mutators.graph] * 6), pruned),
        Target("s.npz", measured, (*packed, *[mutators.arrays] * 3), lambda p: pruned(model, p)),
        Target("r.yaml", written(RATIOS), text, lambda p: read_ratios(str(p))),
        Target("d.yaml", written(deployment), text, steps),
        Target("preprocessor_config.json", written(processor), text, described),
        Target("recipe.yaml", written(recipe), text, described),
        Target("deploy.json", written(record), text, read_deployment),
        Target("e.engine.json", written(sidecar), text, sidecar_of),
        Target("i.png", image.getvalue(), mutators.BYTES, read),
        Target("d.npz", data.getvalue(), packed, lambda p: list(open_source(str(p), INPUTS, None))),
        Target("l.npz", data.getvalue(), packed, lambda p: open_labels(p, "images")),
    ]


def damaged(target: Target, seed: int) -> bytes:
    """The target's file, damaged as the seed says."""
    rng = random.Random(f"{target.name} {seed}")
    return rng.choice(target.damage)(target.good, rng)


def outcome(target: Target, folder: Path, seed: int) -> str:
    """`refused`, `taken`, or what went wrong."""
    path = folder / target.name
    path.write_bytes(damaged(target, seed))
    try:
        target.use(path)
    except ToastError as e:
        return "refused" if "\n" not in str(e).strip() and len(str(e)) < 4000 else f"a long refusal: {str(e)[:80]}"
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
    return "taken"
