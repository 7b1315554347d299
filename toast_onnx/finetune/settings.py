"""How to train: every number that decides the result, in one immutable record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from toast_onnx.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of one fine-tuning run; two runs with equal settings and data end in the same weights.

    Attributes:
        steps: optimizer steps.
        batch: samples a step and process, before accumulation.
        accumulate: batches whose gradients are summed for one optimizer step.
        rate: peak learning rate of AdamW.
        decay: decoupled weight decay of tensors with two axes and more (Loshchilov and Hutter 2019).
        warmup: fraction of the steps in which the rate rises linearly; then it falls along a cosine.
        clip: largest norm of the gradient; 0 does not clip.
        average: decay of the exponential moving average of the weights that is evaluated and kept; 0: none.
        temperature: of the softmax in the distillation of classifiers (Hinton et al. 2015).
        outputs: weight of the distillation loss on the outputs.
        stream: weight of the loss on the residual stream at block ends.
        labels: weight of the cross-entropy with labels, where there are some.
        local: whether every block learns on its own to end where the dense one's does, from the input that the blocks
            before it give: no gradient crosses a block end.
        mixup: parameter of the Beta distribution that blends pairs of images; 0: none. With a teacher this is function
            matching (Beyer et al. 2022): the blend is one more image to agree on.
        smoothing: label smoothing.
        evaluate: steps between two evaluations on held-out samples.
        patience: evaluations without improvement after which training stops; 0 never stops early.
        amp: `off`, `bf16` or `fp16`: autocast's type.
        recompute: gradient checkpointing at block ends: less memory, a third more work.
        freeze: patterns (`fnmatch`) of parameter names that stay as they are.
        seed: of order, augmentation and blending.
    """

    steps: int
    batch: int = 32
    accumulate: int = 1
    rate: float = 1e-4
    decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    average: float = 0.0
    temperature: float = 1.0
    outputs: float = 1.0
    stream: float = 1.0
    labels: float = 1.0
    local: bool = False
    mixup: float = 0.0
    smoothing: float = 0.0
    evaluate: int = 50
    patience: int = 10
    amp: str = "off"
    recompute: bool = False
    freeze: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "evaluate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("decay", "clip", "outputs", "stream", "labels", "mixup", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")
        for name in ("rate", "temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, it is {getattr(self, name)}")
        for name in ("warmup", "average", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in 0 .. 1, it is {getattr(self, name)}")
        if self.amp not in ("off", "bf16", "fp16"):
            raise ConfigError(f"amp is off, bf16 or fp16, not {self.amp}")

    def to_document(self) -> dict[str, Any]:
        """Plain data for reports and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
