"""Measured gradients against the exact Fisher information of the PyTorch module the graph was exported from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import zoo
from tests.calibration.test_statistics import measure
from tests.pruning import look, prune_file
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.finetune import fisher
from toast_onnx.importance.moments import Moments
from toast_onnx.matching.linear import weights
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_calibration.needs import GRADIENT, everything, needed
from toast_onnx_calibration.store import merge_statistics, open_statistics

Exported = Callable[[zoo.Case], Path]
FAMILY = "timm-vit"
DRAWS = 25


def exact(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of every block sum over samples, tokens and classes y of p_y g g^T at fc2's output, token 0 counted 20 times."""
    subject = zoo.build(FAMILY)
    module, seen = subject.module.double(), {}
    exits = [f.exit.data_ptr() for f in zoo.ffns(module)]
    for part in module.modules():
        if isinstance(part, torch.nn.Linear) and part.weight.data_ptr() in exits:
            part.register_forward_hook(lambda m, _, out: seen.__setitem__(exits.index(m.weight.data_ptr()), out))
    logs = module(*(torch.from_numpy(feeds[n]).double() for n in subject.inputs)).log_softmax(-1)
    found = [np.zeros((t.shape[-1],) * 2) for _, t in sorted(seen.items())]
    for y in range(logs.shape[1]):
        gradients = torch.autograd.grad(logs[:, y].sum(), [seen[k] for k in sorted(seen)], retain_graph=True)
        for k, g in enumerate(gradients):
            weights = torch.ones(g.shape[:2], dtype=torch.float64)
            weights[:, 0] = 20
            weights *= logs[:, y].exp().detach()[:, None]
            found[k] += torch.einsum("bt,btc,btd->cd", weights, g, g).numpy()
    return found


def test_metric_is_the_fisher_information_of_the_module(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "DRAWS", DRAWS)
    path = exported(zoo.Case(FAMILY))
    study, feeds = look(path), zoo.inputs(path, 3)
    found = measure(study, feeds, tmp_path / "s.npz", frozenset({"hidden", GRADIENT}))
    tokens = study.facts.shape(study.match.blocks[0].ffn.fc2.output)[1]  # type: ignore[union-attr, index]
    for index, expected in enumerate(exact(feeds)):
        metric = found.metric(index)
        assert found.file.count(f"{index}.{GRADIENT}") == DRAWS * 3 * (19 + tokens)
        scale = expected / (3 * (19 + tokens))
        assert np.linalg.norm(metric - scale) < 0.4 * np.linalg.norm(scale)  # so many draws are as near as that
    merge_statistics([tmp_path / "s.npz"], tmp_path / "merged.npz")
    assert open_statistics(tmp_path / "merged.npz").header.parts["0"] == [GRADIENT, "hidden"]


def test_units_that_the_answers_read_stay(exported: Exported) -> None:
    """Where units are independent, each costs its variance times its row's square in the metric."""
    study = look(exported(zoo.Case(FAMILY)))
    ratios = parse_ratios({"version": 1, "ffn": {"fc2": 0.5, "score": "fisher"}, "align": 1})
    assert needed(study, ratios)[0] == {"hidden", GRADIENT}
    rng = np.random.default_rng(0)
    factors = {
        block.index: rng.normal(size=(block.ffn.fc2.out_features, 2)) for block in study.match.blocks if block.ffn
    }

    class Measured(SyntheticStatistics):
        def hidden(self, block: int) -> Moments:
            ffn = study.match.blocks[block].ffn
            assert ffn is not None
            return Moments.known(np.zeros(ffn.width), np.diag(np.linspace(1, 2, ffn.width)))

        def metric(self, block: int) -> np.ndarray:
            return np.asarray(3 * factors[block] @ factors[block].T)

    pruned = prune(study, ratios, Measured(study), check=False)
    assert len(pruned.weights) == len(factors)
    for index, new in pruned.weights.items():
        ffn, factor = study.match.blocks[index].ffn, factors[index]
        assert ffn is not None
        assert new.ffn is not None
        assert new.ffn.units is not None
        w2 = weights(study.view, study.facts, ffn.fc2).astype(np.float64)
        even = np.square(factor).sum() / len(factor)  # the metric's mean eigenvalue
        seen = np.square(w2 @ factor).sum(axis=1) / even + 0.1 * np.square(w2).sum(axis=1)
        costs = np.linspace(1, 2, ffn.width) * seen
        assert new.ffn.units.tolist() == np.sort(np.argsort(costs)[-new.ffn.units.size :]).tolist()


def test_made_up_tokens_have_no_answers(exported: Exported) -> None:
    with pytest.raises(ConfigError, match=r"'fisher' .* needs samples: give --data, or choose second-order"):
        prune_file(exported(zoo.Case(FAMILY)), {"version": 1, "ffn": {"fc2": 0.5, "score": "fisher"}})


def test_missing_torch_is_told_before_the_work(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    study = look(exported(zoo.Case(FAMILY)))
    assert GRADIENT in everything(study, {"hidden", GRADIENT})[0]
    with pytest.raises(BackendError, match=r"'fisher' needs PyTorch: .*, or choose second-order"):
        measure(study, zoo.inputs(study.view.model.path, 2), tmp_path / "s.npz", frozenset({"hidden", GRADIENT}))
