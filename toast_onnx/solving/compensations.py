"""The one table of compensations: what each leaves to the solvers, what it reads, and its sentence for the docs."""

from __future__ import annotations

from dataclasses import dataclass

from toast_onnx.errors import ConfigError
from toast_onnx.solving.linear_algebra import Compensation as Solved

__all__ = ["COMPENSATIONS", "CompensationEntry", "Solved", "compensation"]


@dataclass(frozen=True)
class CompensationEntry:
    """One way to make up for what was removed.

    Attributes:
        solved: the closed form it starts from.
        restores_mean: whether the mean of what is lost moves into a bias.
        meaning: its sentence for the docs.
    """

    solved: Solved
    restores_mean: bool
    meaning: str

    @property
    def needs_moments(self) -> bool:
        """Whether it reads moments of the activations."""
        return self.solved != "none"


COMPENSATIONS: dict[str, CompensationEntry] = {
    "none": CompensationEntry("none", False, "plain removal"),
    "bias": CompensationEntry("bias", True, "keeps the mean of the output"),
    "ridge": CompensationEntry("ridge", True, "solves for weights that predict what the removed ones gave"),
    "local": CompensationEntry("ridge", True, "trains every block on `--data` after `ridge`; needs PyTorch"),
}


def compensation(name: str) -> CompensationEntry:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in COMPENSATIONS:
        raise ConfigError(f"unknown compensation {name!r}; choose one of {', '.join(COMPENSATIONS)}")
    return COMPENSATIONS[name]
