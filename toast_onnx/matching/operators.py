"""The one table of operators: what each does to the axes of its operands. A new operator is one entry here.

Walkers that follow channels, heads or tokens ask for the operators of an effect and have one rule for each effect; what
else they know of an operator by name is where its axes are written. A trait says what an effect leaves open: which
of its operators a walker can do more with.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache


class Effect(StrEnum):
    """What an operator does to an axis."""

    PASSES = "leaves every element where it is and what it is, up to precision"
    KEEPS = "computes each element from those at the same place of its operands, which are broadcast"
    RESHAPES = "gives the elements of its first input other axes, and leaves their order"
    MOVES = "moves, picks or repeats elements of its first input and computes nothing"
    JOINS = "puts elements beside those of its first input (all inputs of Concat are data), and computes nothing"
    NORMS = "scales along trailing axes, which it mixes, and keeps every axis"
    ADDS_AND_NORMS = "adds two operands, then does the same"
    NORMS_IMAGES = "scales channels on axis 1, each alone or in groups, over the axes behind them"
    NORMS_CHANNELS = "scales each channel on axis 1 by numbers that were stored"
    SHARES = "makes what lies along an axis shares of one, or their logarithms"
    SUMS = "sums, of whatever power, over axes that go or stay as 1"
    REDUCES = "takes the largest, the smallest or the product over axes that go or stay as 1"
    POOLS = "takes the mean or the largest of neighbouring places of an image, each channel for itself"
    CONTRACTS = "sums products of two operands over axes of both"
    ATTENDS = "holds a whole attention: mixes queries with keys and values"
    MEASURES = "tells extents, whatever the elements are"
    DRAWS = "draws random numbers"
    FOREIGN = "of ONNX Runtime's own: computes what is told by its name alone, or not followed"
    QUANTIZES = "quantizes, dequantizes, or computes on quantized numbers"


_TABLE = {
    Effect.PASSES: "Identity Cast Dropout",
    Effect.KEEPS: """
        Abs Add And BiasGelu CastLike Ceil Celu Clip Cos Div Elu Equal Erf Exp FastGelu Floor Gelu Greater
        GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or
        PRelu Pow QuickGelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh
        ThresholdedRelu Where
    """,
    Effect.RESHAPES: "Flatten Reshape Squeeze Unsqueeze",
    Effect.MOVES: """
        DepthToSpace Expand Gather GatherElements GatherND Reverse ReverseSequence Slice SpaceToDepth Split Tile
        Transpose
    """,
    Effect.JOINS: "Concat Pad",
    Effect.NORMS: "LayerNormalization LpNormalization RMSNormalization SimplifiedLayerNormalization",
    Effect.ADDS_AND_NORMS: "SkipLayerNormalization SkipSimplifiedLayerNormalization",
    Effect.NORMS_IMAGES: "GroupNormalization InstanceNormalization MeanVarianceNormalization",
    Effect.NORMS_CHANNELS: "BatchNormalization",
    Effect.SHARES: "LogSoftmax Softmax",
    Effect.SUMS: "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceSum ReduceSumSquare",
    Effect.REDUCES: "ReduceMax ReduceMin ReduceProd",
    Effect.POOLS: "AveragePool GlobalAveragePool GlobalMaxPool MaxPool",
    Effect.CONTRACTS: "Conv Einsum FusedMatMul Gemm MatMul",
    Effect.ATTENDS: "Attention GroupQueryAttention MultiHeadAttention",
    Effect.MEASURES: "Shape Size",
    Effect.DRAWS: "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
    Effect.FOREIGN: "BiasAdd BiasDropout BiasSoftmax RotaryEmbedding Trilu",
    Effect.QUANTIZES: """
        ConvInteger DequantizeLinear DynamicQuantizeLinear DynamicQuantizeMatMul MatMulBnb4 MatMulInteger
        MatMulIntegerToFloat MatMulNBits QAttention QGemm QLinearAdd QLinearConv QLinearMatMul QLinearMul
        QLinearSoftmax QOrderedAttention QOrderedMatMul QuantizeLinear
    """,
}

#: Operator -> its effect.
OPERATORS = {name: effect for effect, names in _TABLE.items() for name in names.split()}


class Trait(StrEnum):
    """What some operators of an effect can do and others cannot."""

    LINEAR = "is linear in each operand while the others stay"
    SCALES = "treats a sum of its first operand as it treats the addends, so that probabilities may pass"
    CUTS = "can be cut to some of the channels that it moves"
    RESPELLS = "can be given other numbers of tokens than it was written for"
    MASKS = "makes masks, scales and caps of scores, each of them alone"
    TAKES_LARGEST = "can take the largest of several tokens, each dimension for itself"
    GUARDS = "can keep a length away from zero"
    SQUASHES = "brings an output to a size or a range of its own, as embeddings have"
    COMPARES = "tells which of two numbers is larger, or whether they are the same"
    NUMBERS = "takes single numbers as part of a formula; elsewhere (a slope of PRelu) they are weights"
    LIKE_FIRST = "of ONNX Runtime's own: what it makes has the shape of its first input"
    ROUNDS = "makes quantized numbers of single ones, or single ones of those"


_TRAITS = {
    Trait.LINEAR: "Add Div Mul Neg Sub",
    Trait.SCALES: "Cast CastLike Div Dropout Identity IsNaN Mul Where",
    Trait.CUTS: "Concat Expand Flatten Gather GatherND Reshape Slice Split Squeeze Tile Transpose Unsqueeze",
    Trait.RESPELLS: "Concat Expand Flatten Gather Reshape Slice Split Squeeze Transpose Unsqueeze",
    Trait.MASKS: "Add And Cast Clip Div Dropout Identity IsInf IsNaN Max Min Mul Not Or Sub Tanh Where",
    Trait.TAKES_LARGEST: "MaxPool ReduceMax",
    Trait.GUARDS: "Add Clip Max",
    Trait.SQUASHES: "Div LayerNormalization LpNormalization Sigmoid Tanh",
    Trait.COMPARES: "Equal Greater GreaterOrEqual Less LessOrEqual",
    Trait.NUMBERS: "Add Clip Div Expand Identity Max Min Mod Mul Pow Sub Where",
    Trait.LIKE_FIRST: "BiasAdd BiasDropout BiasGelu BiasSoftmax FastGelu Gelu QuickGelu RotaryEmbedding Trilu",
    Trait.ROUNDS: "DequantizeLinear QuantizeLinear",
}


@cache
def operators(*effects: Effect) -> frozenset[str]:
    """The operators of some effects."""
    return frozenset(name for name, effect in OPERATORS.items() if effect in effects)


@cache
def having(trait: Trait) -> frozenset[str]:
    """The operators that have a trait."""
    return frozenset(_TRAITS[trait].split())


#: Attention in one node that a term may be added to the scores of, and which of its inputs that is.
SCORE_TERMS = {"Attention": 3, "MultiHeadAttention": 5}
#: Operators that choose among numbers, and which of their outputs holds the positions of those chosen.
POSITIONS = {"ArgMax": 0, "ArgMin": 0, "NonMaxSuppression": 0, "TopK": 1}

PASSING = operators(Effect.PASSES)
RESHAPING = operators(Effect.RESHAPES)
MOVEMENT = operators(Effect.RESHAPES, Effect.MOVES, Effect.JOINS)
ELEMENTWISE = operators(Effect.PASSES, Effect.KEEPS)
REDUCTIONS = operators(Effect.SUMS, Effect.REDUCES)
NORMS = operators(Effect.NORMS, Effect.ADDS_AND_NORMS)
CONTRACTIONS = operators(Effect.CONTRACTS)
ATTENTIONS = operators(Effect.ATTENDS)
MEASURING = operators(Effect.MEASURES)
QUANTIZED = operators(Effect.QUANTIZES)
