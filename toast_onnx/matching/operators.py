"""The one table of operators: what each does to the axes of its operands. A new operator is one entry here.

Walkers that follow channels, heads or tokens ask for the operators of an effect and have one rule for each effect; what
else they know of an operator by name is where its axes are written.
"""

from __future__ import annotations

from enum import StrEnum


class Effect(StrEnum):
    """What an operator does to an axis."""

    PASSES = "leaves every element where it is and what it is, up to precision"
    KEEPS = "computes each element from those at the same place of its operands, which are broadcast"
    MOVES = "moves elements and computes nothing; its first input is the data (all inputs of Concat)"
    NORMS = "scales along trailing axes, which it mixes, and keeps every axis"
    ADDS_AND_NORMS = "adds two operands, then does the same"
    REDUCES = "sums, or takes the largest or a product, over axes that go or stay as 1"
    ATTENDS = "holds a whole attention: mixes queries with keys and values"


_TABLE = {
    Effect.PASSES: "Identity Cast Dropout",
    Effect.KEEPS: """
        Abs Add And BiasGelu CastLike Ceil Celu Clip Cos Div Elu Equal Erf Exp FastGelu Floor Gelu Greater
        GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or
        PRelu Pow QuickGelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh
        ThresholdedRelu Where
    """,
    Effect.MOVES: """
        Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Pad Reshape Reverse ReverseSequence Slice
        SpaceToDepth Split Squeeze Tile Transpose Unsqueeze
    """,
    Effect.NORMS: "LayerNormalization LpNormalization RMSNormalization SimplifiedLayerNormalization",
    Effect.ADDS_AND_NORMS: "SkipLayerNormalization SkipSimplifiedLayerNormalization",
    Effect.REDUCES: """
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare
    """,
    Effect.ATTENDS: "Attention GroupQueryAttention MultiHeadAttention",
}

#: Operator -> its effect.
OPERATORS = {name: effect for effect, names in _TABLE.items() for name in names.split()}


def operators(*effects: Effect) -> frozenset[str]:
    """The operators of some effects."""
    return frozenset(name for name, effect in OPERATORS.items() if effect in effects)


PASSING = operators(Effect.PASSES)
MOVEMENT = operators(Effect.MOVES)
ELEMENTWISE = operators(Effect.PASSES, Effect.KEEPS)
REDUCTIONS = operators(Effect.REDUCES)
ATTENTIONS = operators(Effect.ATTENDS)
