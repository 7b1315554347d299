"""What a case, a module and its parts are, and the register of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

EXPORTERS = ("torchscript-14", "torchscript-17", "dynamo-18", "dynamo-20", "dynamo-23")
BATCHES = ("static", "dynamic")


class Unavailable(Exception):
    """A case that cannot exist here; the message says why: missing package or data, or the library's own error."""


@dataclass(frozen=True)
class Case:
    """One export: ``family`` x ``exporter`` x ``batch``.

    Attributes:
        planted: Dead dimensions are planted in the module first.
        after: What is done to the file afterwards, a name in `AFTERMATHS`, or nothing.
    """

    family: str
    exporter: str = "torchscript-17"
    batch: str = "dynamic"
    planted: bool = False
    after: str = ""

    @property
    def id(self) -> str:
        """Readable name, such as ``timm-vit/dynamo-20/dynamic``; also the test id."""
        extra = ["planted"] * self.planted + [self.after] * bool(self.after)
        return "/".join([self.family, self.exporter, self.batch, *extra])


@dataclass(frozen=True)
class Subject:
    """A module in eval mode, example inputs by ONNX input name (batch first), and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...] = ("output",)
    symbolic: tuple[tuple[str, int, str], ...] = ()  # (input, axis, name): symbolic when the batch is dynamic


@dataclass(frozen=True)
class Attention:
    """Views into one attention module: rows of ``q``, ``k``, ``v`` and columns of ``proj`` are (head, dim)."""

    name: str
    heads: int
    head_dim: int
    q: tuple[Tensor, ...]  # weight (H*d, C) and, where there is one, bias (H*d,)
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    proj: Tensor  # (C_out, H*d)


@dataclass(frozen=True)
class Ffn:
    """Views into one feed-forward network. The rows of ``entries`` and the columns of ``exit`` are hidden units."""

    name: str
    in_features: int
    width: int
    gated: bool
    entries: tuple[Tensor, ...]  # weights (width, C) and biases (width,); a gated form has two of each
    exit: Tensor  # (C, width)


@dataclass(frozen=True)
class AttentionShape:
    """Heads, dimensions of a head, and features of the tensor that Q reads."""

    heads: int
    head_dim: int
    width: int


@dataclass(frozen=True)
class FfnShape:
    """Input features, hidden units, and whether two entries are multiplied."""

    in_features: int
    width: int
    gated: bool = False


@dataclass(frozen=True)
class Expected:
    """What a family holds, in the module's order."""

    attentions: tuple[AttentionShape, ...]
    ffns: tuple[FfnShape, ...]


FAMILIES: dict[str, Callable[[], Subject]] = {}
STAGE: dict[str, int] = {}
Builder = Callable[[], Subject]


def family(name: str, stage: int = 1) -> Callable[[Builder], Builder]:
    """Register a builder under a family's name."""

    def register(builder: Builder) -> Builder:
        FAMILIES[name], STAGE[name] = builder, stage
        return builder

    return register
