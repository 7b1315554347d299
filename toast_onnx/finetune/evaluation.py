"""How good the weights are on held-out samples: the loss on the outputs alone, and what people ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from toast_onnx.finetune.module import GraphModule
from toast_onnx.finetune.objective import Targets, loss_parts
from toast_onnx.finetune.samples import Batch
from toast_onnx.finetune.settings import Settings


def evaluate(
    student: GraphModule,
    teacher: GraphModule | None,
    targets: Targets,
    batches: Iterable[Batch],
    settings: Settings,
    device: Any,
) -> dict[str, float]:
    """Mean losses over held-out batches, in float32 and without augmentation.

    Returns:
        `loss`: what decides which weights are kept, the outputs' distance to the teacher plus the labels' cross-entropy
        by their weights (the stream is a means, not an end); its parts `outputs` and `labels`; `agreement`, the share
        of samples with the teacher's first class, and `top1`, where there are classes and labels.
    """
    plain = Settings(steps=1, temperature=1.0, stream=0.0, outputs=settings.outputs, labels=settings.labels)
    sums: dict[str, float] = {}
    seen = 0
    keep = targets.names if targets.scores is None else (*targets.names, targets.scores)
    with torch.inference_mode():
        for batch in batches:
            feeds = {name: torch.from_numpy(value).to(device) for name, value in batch.feeds.items()}
            n = batch.valid
            ours = {k: v[:n] for k, v in student(**feeds, keep=keep).items()}
            theirs = None if teacher is None else {k: v[:n] for k, v in teacher(**feeds, keep=targets.names).items()}
            labels = None if batch.labels is None else torch.from_numpy(batch.labels[:n]).to(device)
            found = {k: v.item() for k, v in loss_parts(targets, ours, theirs, labels, plain).items()}
            if theirs is not None and targets.classifiers:
                name = targets.classifiers[0]
                found["agreement"] = (ours[name].argmax(-1) == theirs[name].argmax(-1)).float().mean().item()
            if labels is not None and targets.scores is not None:
                found["top1"] = (ours[targets.scores].argmax(-1) == labels).float().mean().item()
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + value * n
            seen += n
    means = {key: value / max(seen, 1) for key, value in sums.items()}
    # Training on the stream alone is meant for the outputs, too.
    weights = {"outputs": settings.outputs or settings.stream, "labels": settings.labels}
    loss = sum(weight * means[key] for key, weight in weights.items() if key in means)
    return {"loss": loss} | means
