"""What fine-tuning recovers on CIFAR-10: a small ViT is trained, pruned to half its MACs, and fine-tuned.

    python benchmarks/finetune_cifar10.py --data cifar10_small.npz --out build/cifar10

The archive holds `train_images` (N, 32, 32, 3) uint8, `train_labels`, `test_images`, `test_labels`. Two prunings are
compared: the default (subspaces, second order, compensated), and the paper's plain removal (columns by `gm`,
channels by their weights, nothing compensated). Accuracy is measured by `toast-onnx eval` on the test images, which no
step trains or selects on. Recovered is (fine-tuned - pruned) / (dense - pruned).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.installed import toast_onnx

RECIPE = {"mean": 0.5, "std": 0.25}
#: A little more than half of the hidden units, so that with patch embedding and head less than half the MACs are left.
HALF: dict[str, Any] = {"version": 1, "attention": {"qk": 0.5, "vo": 0.5}, "ffn": {"fc2": 0.53}}
PLAIN = HALF | {
    "attention": HALF["attention"] | {"select": "index", "score": "gm"},
    "ffn": HALF["ffn"] | {"score": "l2"},
    "compensation": {"kind": "none"},
}


class Block(nn.Module):
    """A pre-norm transformer block on (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """Patches of 4x4 pixels, mean over tokens, ten classes: 14 M MACs at the defaults."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> nn.Module:
    """AdamW with one cosine, random shifts of 4 pixels and mirroring."""
    torch.manual_seed(seed)
    model = SmallViT()
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - RECIPE["mean"]) / RECIPE["std"]
    targets, steps = torch.from_numpy(labels).long(), epochs * len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(pixels), (128,))
        x = nn.functional.pad(pixels[rows], (4, 4, 4, 4), mode="reflect")
        top, left = torch.randint(9, (2,)).tolist()
        x = x[:, :, top : top + 32, left : left + 32]
        x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x, x.flip(-1))
        loss = nn.functional.cross_entropy(model(x), targets[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training: step {step} of {steps}, loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


def export(model: nn.Module, path: Path) -> None:
    """To ONNX, opset 18, dynamic batch."""
    torch.onnx.export(
        model, (torch.zeros(2, 3, 32, 32),), path, input_names=["pixels"], output_names=["logits"], opset_version=18,
        dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
    )  # fmt: skip


def main() -> None:
    """Trains (once), prunes, fine-tunes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="archive with the images")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and reports")
    parser.add_argument("--train-epochs", type=int, default=10, help="of the dense model")
    parser.add_argument("--steps", type=int, default=800, help="of fine-tuning, 64 images each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with np.load(options.data) as archive:
        np.savez(out / "train.npz", images=archive["train_images"], labels=archive["train_labels"])
        np.savez(out / "test.npz", images=archive["test_images"], labels=archive["test_labels"])
        dense = out / "dense.onnx"
        if not dense.exists():
            export(train(archive["train_images"], archive["train_labels"], options.train_epochs, options.seed), dense)
    (out / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def top1(model: Path) -> float:
        found = toast_onnx("eval", model, "--data", out / "test.npz", "--preprocess", out / "recipe.yaml", "--json")
        return float(json.loads(found)["accuracy"]["top1"]["accuracy"])

    start = top1(dense)
    rows = []
    for name, ratios in (("plain removal", PLAIN), ("compensated", HALF)):
        stem = name.split()[0]
        pruned, tuned = out / f"{stem}.onnx", out / f"{stem}.finetuned.onnx"
        (out / f"{stem}.yaml").write_text(yaml.safe_dump(ratios))
        report = json.loads(toast_onnx("prune", dense, "--ratios", out / f"{stem}.yaml", "-o", pruned, "--json"))
        began = time.monotonic()
        toast_onnx(
            "finetune", pruned, "--teacher", dense, "--data", out / "train.npz", "--labels", out / "train.npz",
            "--preprocess", out / "recipe.yaml", "--steps", str(options.steps), "--batch", "64", "--lr", "1e-3",
            "--ema", "0.99", "--smoothing", "0.1", "--evaluate-every", "100", "--holdout", "0.05",
            "--seed", str(options.seed), "-o", tuned,
        )  # fmt: skip
        minutes = (time.monotonic() - began) / 60
        before, after = top1(pruned), top1(tuned)
        macs = report["pruned"]["macs"] / report["dense"]["macs"]
        rows.append((name, macs, before, after, (after - before) / (start - before), minutes))
    print(f"dense: top-1 {start:.1%} on {len(np.load(out / 'test.npz')['labels'])} test images\n")
    print("| pruning | MACs left | pruned | fine-tuned | recovered | minutes |\n|---|---|---|---|---|---|")
    for name, macs, before, after, recovered, minutes in rows:
        print(f"| {name} | {macs:.1%} | {before:.1%} | {after:.1%} | {recovered:.0%} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
