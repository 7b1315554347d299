"""What the program reads: for every kind of file a good one, how it is damaged, and what is then done with it."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import convert_model_to_external_data
from PIL import Image

from tests.fuzz import mutators
from tests.matching.tiny import TOKENS, WIDTH, block
from tests.pruning import UNEVEN, look, run
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.deploy.config import load_deployment
from toast_onnx.deploy.state import read_record as read_deployment
from toast_onnx.deploy.steps import plan_steps
from toast_onnx.engines.record import read_record
from toast_onnx.errors import ConfigError, ToastError
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash, save_model
from toast_onnx.planning.cost_table import FORMAT, read_table
from toast_onnx.planning.presets import read_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx.report.pruning import json_bytes, pruning_report
from toast_onnx.runtime import random_inputs
from toast_onnx.wellformed import blame_model, why_not_loaded
from toast_onnx_calibration.calibrating import calibrate
from toast_onnx_calibration.images import ReadReport, read_images
from toast_onnx_calibration.labels import labels_from_csv, open_labels
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.recipe_files import load_recipe
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sensitivity_results import read_results
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import open_source
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_cli.report import command as page

RATIOS = {"version": 1, "align": 1, "attention": {"qk": 0.5, "vo": [0.5]}, "ffn": {"fc2": 0.5}, "blocks": {"0": {}}}
FEEDS = {"x": np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)}
NAMES = ["a.png", "b.png"]
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


def targets(folder: Path, exports: Path | None = None) -> list[Target]:
    """All kinds.

    Args:
        folder: where good files lie that others are used with.
        exports: folder of models that exporters wrote; each is a kind of its own.
    """
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

    def external(path: Path) -> None:
        (folder / "w.bin").write_bytes(bytes(4096))
        pruned(path)

    def exported(path: Path) -> None:
        with blame_model(path):
            dense = look(path)
            found = prune(dense, parse_ratios(UNEVEN), SyntheticStatistics(dense), seed=0, skip_unprunable=True)
            out = path.with_name("out.onnx")
            save_model(found.model, out)
        same_form(path, out, dense.counted_shapes)

    def shown(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            page.main([str(path), "-o", str(path.with_suffix(".html"))], standalone_mode=False)

    def samples(path: Path) -> None:
        list(open_source(str(path), INPUTS, None))

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

    weights_outside = onnx.load(str(model))
    convert_model_to_external_data(weights_outside, location="w.bin", size_threshold=100)
    for tensor in weights_outside.graph.initializer:
        if tensor.HasField("raw_data") and tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("raw_data")
    document = json_bytes(reported(study, ratios, folder / "page"))
    times = {"blocks": [0], "part": "fc2", "dense": 16, "milliseconds": {"8": 1.5}}
    costs = {"format": FORMAT, "model": "good.onnx", "model_sha256": file_hash(model), "runtime": {"program": "x"}}
    costs |= {"batch": 1, "dense_milliseconds": 2.0, "parts": [times]}
    trial = {"block": 0, "part": "fc2", "kept": {"fc2": 8}, "ratio": 0.5, "damage": {"kl": 0.1}}
    trials = {"format": "toast-onnx/sensitivity/1", "metric": "kl", "dense_top1": None, "trials": [trial]}
    real = [] if exports is None else sorted(exports.glob("*.onnx"))
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
        Target("d.npz", data.getvalue(), packed, samples),
        Target("l.npz", data.getvalue(), packed, lambda p: open_labels(p, "images")),
        Target(
            "l.csv", b"file,label\na.png,0\nb.png,1\n", mutators.BYTES, lambda p: labels_from_csv(p, ["a.png", "b.png"])
        ),
        Target("d.npy", (folder / "x.npy").read_bytes(), mutators.BYTES, samples),
        Target("x.onnx", weights_outside.SerializeToString(), (mutators.flip, *[mutators.references] * 4), external),
        Target("costs.json", written(costs), text, lambda p: read_table(p, study, file_hash(model))),
        Target("sensitivity.json", written(trials), text, read_results),
        Target("page/m.json", document, text, shown),
        *(Target(p.name, p.read_bytes(), (mutators.flip, *[mutators.graph] * 9), exported) for p in real),
    ]


def reported(study: Study, ratios: Path, folder: Path) -> dict[str, Any]:
    """The report of a good run, its model written beside."""
    found = prune(study, read_ratios(str(ratios)), SyntheticStatistics(study), seed=0)
    folder.mkdir(exist_ok=True)
    save_model(found.model, folder / "m.pruned.onnx")
    return pruning_report(found, study, folder / "m.pruned.onnx", {}) | {"statistics": {"source": "made up"}}


def same_form(dense: Path, pruned: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Run both models on the same inputs: the pruned one gives outputs of the same shapes and types."""
    if why_not_loaded(dense) is not None or why_not_loaded(pruned) is not None:
        return
    feeds = random_inputs(onnx.load(str(dense)), dict(shapes), 0)
    try:
        expected = run(dense, feeds)
    except Exception:  # a damaged graph may load and yet not run
        return
    forms = [[(a.shape, a.dtype) for a in outputs] for outputs in (expected, run(pruned, feeds))]
    if forms[0] != forms[1]:
        raise AssertionError(f"different outputs: {forms}")


def damaged(target: Target, seed: int) -> bytes:
    """The target's file, damaged as the seed says."""
    rng = random.Random(f"{target.name} {seed}")
    return rng.choice(target.damage)(target.good, rng)


def outcome(target: Target, folder: Path, content: bytes) -> str:
    """What becomes of a file with this content: `refused`, `taken`, or what went wrong."""
    path = folder / target.name
    path.write_bytes(content)
    try:
        target.use(path)
    except ToastError as e:
        return "refused" if "\n" not in str(e).strip() and len(str(e)) < 4000 else f"a long refusal: {str(e)[:80]}"
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
    return "taken"
