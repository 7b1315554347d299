"""Training on a small residual network: it learns, keeps the best, resumes bit for bit, and stops when it must."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.finetune.graphs import residual_mlp
from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.finetune import to_torch
from toast_onnx.finetune.module import GraphModule
from toast_onnx.finetune.objective import Targets
from toast_onnx.finetune.parallel import Processes
from toast_onnx.finetune.settings import Settings
from toast_onnx.finetune.trainer import Outcome, Run, train

TARGETS = Targets(("logits",), (), ("r0", "r1"), None)
LABELLED = dataclasses.replace(TARGETS, scores="logits")
SETTINGS = Settings(steps=40, batch=16, rate=1e-2, evaluate=10, patience=0)


class Points:
    """Random inputs, a little noise as augmentation."""

    def __init__(self, count: int = 96, labelled: bool = False) -> None:
        rng = np.random.default_rng(5)
        self.x = rng.standard_normal((count, 8)).astype(np.float32)
        self.labels = rng.integers(0, 4, count) if labelled else None

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        noise = 0 if rng is None else 0.05 * rng.standard_normal(8).astype(np.float32)
        return {"x": self.x[index] + noise}

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])


def make_run(checkpoint: Path | None = None, *, labelled: bool = False, teacher: bool = True, **changes: Any) -> Run:
    """A student that starts elsewhere than its teacher."""
    samples = Points(labelled=labelled)
    return Run(
        student=to_torch(residual_mlp(seed=1)),
        teacher=to_torch(residual_mlp(seed=0)) if teacher else None,
        targets=LABELLED if labelled else TARGETS,
        samples=samples,
        train=np.arange(80),
        held=np.arange(80, 96),
        fixed=False,
        group=Processes(0, 1, torch.device("cpu")),
        checkpoint=checkpoint,
        identity={"run": "test"},
        **changes,
    )


def weights(module: GraphModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def held_out_kl(run: Run) -> float:
    """Computed here, from the modules' outputs alone."""
    x = torch.from_numpy(run.samples.x[run.held])
    with torch.no_grad():
        student, teacher = run.student(x).double().log_softmax(-1), run.teacher(x).double().log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def test_distillation_lowers_the_held_out_loss_and_reports_it_rightly() -> None:
    run = make_run()
    before = held_out_kl(run)
    outcome = train(run, SETTINGS)
    assert outcome.start["outputs"] == pytest.approx(before, rel=1e-4)
    assert outcome.best["outputs"] == pytest.approx(held_out_kl(run), rel=1e-4)
    assert outcome.best["outputs"] < 0.5 * before
    assert outcome.steps == 40
    assert [e["step"] for e in outcome.history] == [0, 10, 20, 30, 40]
    assert outcome.images_per_second > 0
    assert all(not p.requires_grad for p in run.teacher.parameters())


def test_two_runs_are_equal_and_another_seed_is_not() -> None:
    runs = [make_run(), make_run(), make_run()]
    for run, seed in zip(runs, (0, 0, 1), strict=True):
        train(run, dataclasses.replace(SETTINGS, seed=seed))
    assert_equal(weights(runs[0].student), weights(runs[1].student))
    assert not torch.equal(weights(runs[0].student)["head"], weights(runs[2].student)["head"])


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("stopped_at", [13, 20, 31])
def test_a_stopped_and_resumed_run_ends_in_the_same_weights(tmp_path: Path, stopped_at: int, average: float) -> None:
    settings = dataclasses.replace(SETTINGS, average=average, accumulate=2, batch=8, mixup=0.4)
    whole = make_run()
    expected = train(whole, settings)
    first = make_run(tmp_path / "c")
    done = 0

    def count(steps: int, note: str) -> None:
        nonlocal done
        done = steps

    stopped = train(first, settings, should_stop=lambda: done >= stopped_at, progress=count)
    assert (stopped.reason, stopped.steps) == ("interrupted", stopped_at)
    second = make_run(tmp_path / "c")
    outcome = train(second, settings, resume=True)
    assert_equal(weights(second.student), weights(whole.student))
    assert outcome.history == expected.history
    assert (outcome.best_step, outcome.best, outcome.start) == (expected.best_step, expected.best, expected.start)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path / "c"), dataclasses.replace(SETTINGS, steps=10))
    with pytest.raises(ConfigError, match="another run"):
        train(dataclasses.replace(make_run(tmp_path / "c"), identity={"run": "other"}), SETTINGS, resume=True)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04truncated"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ModelError, match="start without --resume"):
        train(make_run(tmp_path / "c"), SETTINGS, resume=True)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        train(make_run(tmp_path / "c"), SETTINGS, resume=True)


def test_overfitting_is_noticed_and_better_weights_are_kept() -> None:
    """Random labels on the training points: what is learned there is worse on the held-out ones than the start."""
    run = make_run(labelled=True, teacher=False)
    run.samples.labels[80:] = run.student(torch.from_numpy(run.samples.x[80:])).argmax(-1).numpy()
    start = weights(run.student)
    outcome = train(run, dataclasses.replace(SETTINGS, steps=400, rate=3e-2, patience=3))
    assert outcome.reason == "stopped early"
    assert outcome.best_step == 0
    assert outcome.steps == 30
    assert outcome.history[-1]["loss"] > outcome.best["loss"]
    assert_equal(weights(run.student), start)


def test_the_best_evaluation_wins_over_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    seen: list[dict[str, torch.Tensor]] = []

    def scripted(student: GraphModule, *rest: Any) -> dict[str, float]:
        seen.append(weights(student))
        return {"loss": next(losses)}

    monkeypatch.setattr("toast_onnx.finetune.trainer.evaluate", scripted)
    run = make_run()
    outcome = train(run, SETTINGS)
    assert outcome.best_step == 10
    assert_equal(weights(run.student), seen[1])


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_best() -> None:
    run = make_run()
    start = weights(run.student)
    outcome = train(run, dataclasses.replace(SETTINGS, rate=1e20, clip=0.0))
    assert outcome.reason == "diverged"
    assert "lower --lr" in outcome.message
    assert_equal(weights(run.student), start)


def test_outputs_that_are_nan_before_training_are_an_error() -> None:
    run = make_run()
    with torch.no_grad():
        run.student.get_parameter("head").fill_(float("nan"))
    with pytest.raises(ModelError, match="before any training"):
        train(run, SETTINGS)


def test_frozen_weights_stay() -> None:
    run = make_run()
    before = weights(run.student)
    train(run, dataclasses.replace(SETTINGS, freeze=("blocks.0.*",)))
    after = weights(run.student)
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if n.startswith("blocks.0.")}


@pytest.mark.parametrize(("pattern", "message"), [("nothing.*", "fits no weight"), ("*", "no weight to train")])
def test_impossible_freezing_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(make_run(), dataclasses.replace(SETTINGS, freeze=(pattern,)))


def _trained(**changes: Any) -> dict[str, torch.Tensor]:
    run = make_run()
    train(run, dataclasses.replace(SETTINGS, steps=5, evaluate=5, stream=0.0, **changes))
    return weights(run.student)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Up to rounding: gradients of the mean over 16 are means of those over 4 times 4."""
    whole, parts = _trained(batch=16), _trained(batch=4, accumulate=4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_recomputation_changes_nothing() -> None:
    plain, again = _trained(), _trained(recompute=True)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_the_average_follows_the_weights_with_the_stated_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decay of min(d, (1 + n) / (10 + n)); evaluated is the average, trained are the weights."""
    evaluated: list[torch.Tensor] = []
    stepped: list[torch.Tensor] = []
    run = make_run()

    def spy(student: GraphModule, *rest: Any) -> dict[str, float]:
        evaluated.append(student.get_parameter("head").detach().clone())
        return {"loss": -float(len(evaluated))}

    def after_step(steps: int, note: str) -> None:
        stepped.append(run.student.get_parameter("head").detach().clone())

    monkeypatch.setattr("toast_onnx.finetune.trainer.evaluate", spy)
    train(run, dataclasses.replace(SETTINGS, steps=3, evaluate=1, average=0.2), progress=after_step)
    average = evaluated[0].double()
    for n, now in enumerate(stepped, start=1):
        decay = min(0.2, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * now.double()
        torch.testing.assert_close(evaluated[n].double(), average, rtol=1e-5, atol=1e-6)
    assert torch.equal(run.student.get_parameter("head"), evaluated[-1])


def test_bf16_on_the_cpu_learns_too() -> None:
    run = make_run()
    outcome = train(run, dataclasses.replace(SETTINGS, amp="bf16"))
    assert outcome.best["outputs"] < 0.7 * outcome.start["outputs"]
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}


def test_labels_alone_train_too() -> None:
    run = make_run(labelled=True, teacher=False)
    run.samples.labels = (run.samples.x[:, 0] > 0).astype(np.int64)
    outcome: Outcome = train(run, dataclasses.replace(SETTINGS, steps=80, smoothing=0.05, mixup=0.2))
    assert outcome.best["top1"] > max(0.8, outcome.start["top1"])
    assert "outputs" not in outcome.best


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"rate": 0.0}, {"warmup": 1.0}, {"amp": "int8"}, {"temperature": -1.0}, {"mixup": -0.1}]
)
def test_impossible_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        dataclasses.replace(SETTINGS, **wrong)


def test_biases_and_gains_are_not_decayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all losses weighted zero AdamW only decays: weight <- (1 - rate * decay) weight."""
    losses = iter([1.0, 0.0])
    monkeypatch.setattr("toast_onnx.finetune.trainer.evaluate", lambda *rest: {"loss": next(losses)})
    run = make_run()
    before = weights(run.student)
    train(
        run, dataclasses.replace(SETTINGS, steps=1, evaluate=1, decay=0.1, outputs=0.0, stream=0.0, rate=0.5, warmup=0)
    )
    for name, now in weights(run.student).items():
        factor = 1 if now.ndim == 1 else 1 - 0.5 * 0.1
        torch.testing.assert_close(now, factor * before[name])


def test_local_training_keeps_gradients_within_blocks() -> None:
    """A loss at the second block's end moves the second block alone, as in a copy that starts from detached inputs."""
    run = make_run()
    module, x = run.student, torch.from_numpy(run.samples.x[:4])
    module.cuts = frozenset({"r0"})
    kept = module(x, keep=["r0", "r1"])
    kept["r1"].square().sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters()}
    assert {n for n, g in gradients.items() if g is not None} == {n for n in gradients if n.startswith("blocks.1.")}
    w1, b1, w2, b2 = (module.get_parameter(f"blocks.1.{n}").detach().requires_grad_() for n in ("w1", "b1", "w2", "b2"))
    start = kept["r0"].detach()
    (start + torch.relu(start @ w1 + b1) @ w2 + b2).square().sum().backward()
    for name, want in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        torch.testing.assert_close(gradients[f"blocks.1.{name}"], want.grad)
    module.zero_grad()
    module(x, keep=["r0"])["r0"].square().sum().backward()
    assert module.get_parameter("blocks.0.w1").grad.abs().max() > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_local_training_learns_without_looking_at_outputs(recompute: bool) -> None:
    """A student whose head is its teacher's: matching block ends brings the outputs together."""
    run = make_run()
    with torch.no_grad():
        run.student.get_parameter("head").copy_(run.teacher.get_parameter("head"))
    head = run.student.get_parameter("head").detach().clone()
    outcome = train(
        run, dataclasses.replace(SETTINGS, local=True, outputs=0.0, decay=0.0, steps=80, recompute=recompute)
    )
    assert outcome.best["outputs"] < 0.5 * outcome.start["outputs"]
    assert torch.equal(run.student.get_parameter("head"), head)
    assert run.student.cuts == frozenset()


def test_local_training_needs_block_ends() -> None:
    run = dataclasses.replace(make_run(), targets=Targets(("logits",), (), (), None))
    with pytest.raises(ConfigError, match="block ends"):
        train(run, dataclasses.replace(SETTINGS, local=True))
