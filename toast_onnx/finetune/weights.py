"""Which float constants of a graph are weights, and which are numbers of its formulas."""

from __future__ import annotations

import numpy as np

from toast_onnx.finetune.plan import Plan, Step
from toast_onnx.matching.operators import Trait, having

#: Added to scores, anything below this closes a token off.
_MASKED = -80.0


def find_weights(plan: Plan) -> list[str]:
    """Names of the float constants that can be trained: those that a gradient reaches and that are no plain numbers.

    Left alone are: what is read as sizes (a number that an exporter shares between a formula and a range of positions
    is one, too), stored statistics (BatchNorm's mean and variance), single numbers in elementwise formulas unless they
    are the bias of a one-channel layer, attention masks (only 0 and below -80), and tables that end in a comparison
    (the window numbers that Swin makes its masks from).
    """
    reached = _reached(plan)
    users: dict[str, list[tuple[int, Step]]] = {}
    for name, slot, step in plan.readers():
        users.setdefault(name, []).append((slot, step))
    compared = _compared(plan)
    made_by = {name: step for step in plan.steps for name in step.node.outputs}
    return [
        name
        for name, value in plan.constants.items()
        if name in reached
        and value.dtype.kind == "f"
        and value.size
        and not _is_mask(value)
        and name not in compared
        and not any(_reads_on_host(step, slot) for slot, step in users.get(name, []))
        and not (value.size == 1 and all(_is_formula(name, step, made_by) for _, step in users.get(name, [])))
    ]


def _reached(plan: Plan) -> set[str]:
    """Tensors from which a float output can be reached backwards along inputs that carry gradients."""
    reached = set(plan.outputs)
    for step in reversed(plan.steps):
        if step.host or not reached.intersection(step.node.outputs):
            continue
        blocked = step.operator.blocked if step.operator is not None else (0,)
        reached.update(name for slot, name in enumerate(step.node.inputs) if name and slot not in blocked)
        for value in step.node.attributes.values():
            if isinstance(value, Plan):
                reached |= _reached(value)
    return reached


def _compared(plan: Plan) -> set[str]:
    """Constants, and tensors made of constants alone, that end in a comparison."""
    known = set(plan.constants) | plan.host
    for step in plan.steps:
        if all(name in known for name in step.node.inputs if name):
            known.update(step.node.outputs)
    found = {name for name, _, step in plan.readers() if step.node.op in having(Trait.COMPARES) and name in known}
    for step in reversed(plan.steps):
        if found.intersection(step.node.outputs):
            found.update(name for name in step.node.inputs if name in known)
    return found


def _is_mask(value: np.ndarray) -> bool:
    return bool(value.size > 1 and (value <= _MASKED).any() and ((value == 0) | (value <= _MASKED)).all())


def _reads_on_host(step: Step, slot: int) -> bool:
    return step.host or (step.operator is not None and slot in step.operator.host)


def _is_formula(name: str, step: Step, made_by: dict[str, Step]) -> bool:
    """Whether a step uses a single number as such (in GELU, as a scale), and not as a layer's bias of one channel."""
    if step.node.op not in having(Trait.NUMBERS):
        return False
    others = [made_by.get(other) for other in step.node.inputs if other != name]
    return not (step.node.op == "Add" and any(o is not None and o.node.op == "MatMul" for o in others))
