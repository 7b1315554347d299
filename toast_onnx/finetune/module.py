"""A torch module that executes an ONNX graph; its weights are parameters under readable names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toast_onnx.errors import ModelError
from toast_onnx.finetune.host import HOST, Array, as_array
from toast_onnx.finetune.ops.registry import Unsupported
from toast_onnx.finetune.plan import Plan, Step

Env = dict[str, Any]

#: Prefix of a cut tensor with its gradient, in the environment of a run.
_WHOLE = "whole:"

#: Sets of input shapes whose shape arithmetic is remembered.
_REMEMBERED = 8


class GraphModule(nn.Module):
    """Executes a plan. Made by `toast_onnx.finetune.to_torch`.

    Call it with the graph's inputs, in order or by name; it returns its output, or a tuple of them.

    Attributes:
        plan: the graph.
        initializers: parameter name -> the graph's tensor name.
        boundaries: tensors at which gradient checkpointing cuts the graph; none: everything is kept for backward.
        cuts: tensors behind which no gradient flows back: their readers see them as given, and a loss on the tensor
            itself (asked for with `keep`) still reaches what made it.
    """

    def __init__(self, plan: Plan, names: Mapping[str, str]) -> None:
        """Take the weights of a plan as parameters; they leave its constants.

        Args:
            plan: the graph.
            names: tensor name -> dotted parameter name.
        """
        super().__init__()
        self.plan = plan
        self.initializers: dict[str, str] = {}
        self.boundaries: tuple[str, ...] = ()
        self.cuts: frozenset[str] = frozenset()
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._remembered: dict[Any, Env] = {}
        self._constants = {name: value for name, value in _all_constants(plan).items() if name not in names}
        for tensor, name in names.items():
            value = torch.from_numpy(np.array(plan.constants[tensor]))
            owner, leaf, path = self._owner(name)
            owner.register_parameter(leaf, nn.Parameter(value))
            self._places[tensor] = (owner, leaf)
            self.initializers[path] = tensor
            del plan.constants[tensor]  # the parameter is its only copy now
        read = {
            n for n, slot, s in plan.readers() if not s.host and (s.operator is None or slot not in s.operator.host)
        }
        for k, (tensor, constant) in enumerate(self._constants.items()):
            if tensor in read or tensor in plan.outputs:  # what is only read on the host stays numpy
                leaf = f"constant_{k}"
                self.register_buffer(leaf, torch.from_numpy(np.array(constant)), persistent=False)
                self._places[tensor] = (self, leaf)

    def _owner(self, name: str) -> tuple[nn.Module, str, str]:
        """The (new) submodule that holds a dotted name, the leaf, and the name as it came out."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        taken: list[str] = []
        for part in path:
            if part not in owner._modules:
                part = part if not hasattr(owner, part) else f"{part}_"
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
            taken.append(part)
        while hasattr(owner, leaf):
            leaf = f"{leaf}_"
        return owner, leaf, ".".join([*taken, leaf])

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in the order of `forward`'s arguments."""
        return self.plan.inputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in the order they are returned."""
        return self.plan.outputs

    def forward(self, *inputs: Tensor, keep: Sequence[str] = (), **named: Tensor) -> Any:
        """Run the graph.

        Args:
            inputs: the graph's inputs, in order.
            keep: tensors inside the graph to return, too.
            named: the graph's inputs by name.

        Returns:
            The output, or a tuple of the outputs in the graph's order. With `keep` a dict by tensor name that holds the
            outputs and the tensors asked for.

        Raises:
            ModelError: an input is missing or unknown, or the graph uses a form of an operator that is not covered.
        """
        env: Env = dict(zip(self.plan.inputs, inputs, strict=False)) | named
        if len(inputs) > len(self.plan.inputs) or set(env) != set(self.plan.inputs):
            raise ModelError(f"the graph's inputs are {', '.join(self.plan.inputs)}; got {', '.join(env) or 'none'}")
        remembered = self._recall(env)
        wanted = tuple(dict.fromkeys((*self.plan.outputs, *keep)))
        if self.boundaries and torch.is_grad_enabled():
            env = self._run_in_parts(env, remembered, wanted)
        else:
            self._execute(self.plan, env, remembered, frozenset(wanted))
        outputs = {
            name: self._tensor(_WHOLE + name if _WHOLE + name in env else name, env, remembered) for name in wanted
        }
        if keep:
            return outputs
        return outputs[wanted[0]] if len(wanted) == 1 else tuple(outputs[name] for name in self.plan.outputs)

    def _recall(self, env: Env) -> Env:
        """Values of shape arithmetic from an earlier run at these shapes on this device (filled while running)."""
        shapes = tuple((tuple(env[name].shape), env[name].device) for name in self.plan.inputs)
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            return {}  # sizes may be symbolic
        if shapes not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[shapes] = {}
        return self._remembered[shapes]

    def _run_in_parts(self, env: Env, remembered: Env, wanted: tuple[str, ...]) -> Env:
        """Like `_execute`, with what lies between boundaries computed again in the backward pass."""
        steps, parts = self.plan.steps, []
        start = 0
        for i, step in enumerate(steps):
            if set(step.node.outputs) & set(self.boundaries):
                parts.append(steps[start : i + 1])
                start = i + 1
        parts.append(steps[start:])
        later = set(wanted)
        needed: list[set[str]] = []
        for part in reversed(parts):
            needed.append(set(later))
            later |= {name for name, _, _ in Plan((), (), part, {}).readers()}
        for part, keep in zip(parts, reversed(needed), strict=True):
            plan = Plan(self.plan.inputs, self.plan.outputs, part, self.plan.constants, self.plan.host)

            def run(given: Env, plan: Plan = plan, keep: frozenset[str] = frozenset(keep)) -> Env:
                inner = dict(given)
                self._execute(plan, inner, remembered, keep)
                return {name: value for name, value in inner.items() if name in keep or name.startswith(_WHOLE)}

            env = checkpoint(run, env, use_reentrant=False, preserve_rng_state=False)
        return env

    def _execute(self, plan: Plan, env: Env, remembered: Env, keep: frozenset[str]) -> None:
        for step in plan.steps:
            if step.host:
                self._host_step(step, env, remembered)
            elif step.node.op == "If":
                self._branch(step, env, remembered)
            else:
                self._step(step, env, remembered)
            for name in step.last:
                if name not in keep:
                    env.pop(name, None)

    def _host_step(self, step: Step, env: Env, remembered: Env) -> None:
        node = step.node
        if node.outputs[0] in remembered:
            return
        if node.op in ("Shape", "Size"):
            tensor = self._value(node.inputs[0], env, remembered)
            extents = list(tensor.shape)
            if node.op == "Size":
                value: Array = np.asarray(np.prod(as_array(extents)))
            else:
                value = as_array(extents[node.get("start", 0) : node.get("end", len(extents))])
        else:
            inputs = [None if not name else self._array(name, remembered) for name in node.inputs]
            value = HOST[node.op](node, *inputs)
        remembered[node.outputs[0]] = np.asarray(value)

    def _step(self, step: Step, env: Env, remembered: Env) -> None:
        node, operator = step.node, step.operator
        assert operator is not None
        inputs = [
            None
            if not name
            else self._value(name, env, remembered)
            if slot in operator.host
            else self._tensor(name, env, remembered)
            for slot, name in enumerate(node.inputs)
        ]
        try:
            result = operator.function(node, *inputs)
        except (Unsupported, NotImplementedError) as e:  # PyTorch raises the second where it lacks a kernel
            raise ModelError(
                f"the node '{node.label}' cannot run in PyTorch: {e}; export the model in another way"
            ) from e
        results = result if isinstance(result, tuple | list) else (result,)
        for name, value in zip(node.outputs, results, strict=False):
            if name in self.cuts and torch.is_grad_enabled():
                env[_WHOLE + name] = value
                value = value.detach()
            if name:
                env[name] = value

    def _branch(self, step: Step, env: Env, remembered: Env) -> None:
        """`If`: the branch sees the outer tensors; its host values depend on the same shapes."""
        condition = self._value(step.node.inputs[0], env, remembered)
        chosen: Plan = step.node.get("then_branch" if bool(condition) else "else_branch")
        inner = dict(env)
        self._execute(chosen, inner, remembered, frozenset(chosen.outputs))
        for outer, name in zip(step.node.outputs, chosen.outputs, strict=True):
            env[outer] = self._tensor(name, inner, remembered)

    def _array(self, name: str, remembered: Env) -> Array:
        found = remembered.get(name)
        return self._constants[name] if found is None else found

    def _value(self, name: str, env: Env, remembered: Env) -> Any:
        """A tensor, or a numpy array where it is known on the host."""
        if name in env:
            return env[name]
        if name in remembered:
            return remembered[name]
        return self._constants[name] if name in self._constants else getattr(*self._places[name])

    def _tensor(self, name: str, env: Env, remembered: Env) -> Tensor:
        """A tensor; host values are moved to where the inputs are."""
        if name in env:
            found: Tensor = env[name]
            return found
        if name in self._places:
            parameter: Tensor = getattr(*self._places[name])
            return parameter
        key = f"tensor of {name}"
        if key not in remembered:
            array = self._array(name, remembered)
            plain = (
                array.astype(np.int64) if array.dtype == object else np.ascontiguousarray(array).reshape(array.shape)
            )
            # It is used again: made while inference mode is on, autograd would refuse it later.
            with torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext():
                remembered[key] = torch.from_numpy(plain.copy()).to(self._device(env))
        moved: Tensor = remembered[key]
        return moved

    def _device(self, env: Env) -> torch.device:
        return next((v.device for v in env.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _all_constants(plan: Plan) -> dict[str, Array]:
    """Constants of a plan and of its branches."""
    found = dict(plan.constants)
    for step in plan.steps:
        for value in step.node.attributes.values():
            if isinstance(value, Plan):
                found |= _all_constants(value)
    return found
