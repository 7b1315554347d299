"""How long trials take: what one costs whatever it runs on, and what it runs, learned from those that were done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean

from toast_onnx.matching.study import Study
from toast_onnx.planning.macs import node_macs


@dataclass(frozen=True)
class Spent:
    """What one piece of work took.

    Attributes:
        kind: of work: how long its weights take to make, and its graph to open, hangs on it.
        cost: share of the dense model's multiply-accumulates that it ran.
        making: seconds outside of the runtime.
        running: seconds in it.
    """

    kind: str
    cost: float
    making: float
    running: float


@dataclass
class Forecast:
    """Learns how long pieces of work take, and says so of those to come.

    Attributes:
        spent: what was done.
    """

    spent: list[Spent] = field(default_factory=list)

    def seconds(self, ahead: Iterable[tuple[str, float]], longer: float = 1.0, workers: int = 1) -> float | None:
        """Seconds that pieces of work will take; None before the first was done.

        Args:
            ahead: kind and cost of each.
            longer: how much more samples they run on than those that were done.
            workers: that do them side by side.
        """
        if not self.spent:
            return None
        rate = sum(s.running for s in self.spent) / max(sum(s.cost for s in self.spent), 1e-9)
        made: dict[str, list[float]] = {}
        for each in self.spent:
            made.setdefault(each.kind, []).append(each.making)
        usual = mean(s.making for s in self.spent)
        making = {kind: mean(seconds) for kind, seconds in made.items()}
        return sum(making.get(kind, usual) + longer * rate * cost for kind, cost in ahead) / workers


def cost_behind(study: Study) -> Callable[[str | None], float]:
    """Share of the multiply-accumulates of a model that its nodes behind a tensor do; all where there is no tensor."""
    counts = [node_macs(study.view, study.counted, i) for i in range(len(study.view.nodes))]
    total = max(sum(counts), 1)

    def behind(tensor: str | None) -> float:
        first = 0 if tensor is None else study.view.producer.get(tensor, -1) + 1
        return sum(counts[first:]) / total

    return behind
