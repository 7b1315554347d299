"""Why a part of a graph is left as it is: a kind from one table, the text that is shown, and what is at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

_SHAPE = "give the inputs' shapes with `--shape`"
_SIMPLIFY = "simplify the export (`onnxsim`, `onnxslim`) and look again; report the model if the reason stays"
_REST = "nothing: this part keeps its width, the others can be pruned"
_FIXED = "export with a fixed image size, or with a fixed batch"
_DIMENSIONS = "remove dimensions (`qk`, `vo`) in place of heads"
_LATER = "merge behind the blocks after it"
_WIDTHS = "prune widths; the tokens stay"


class Kind(StrEnum):
    """Every kind of reason. Its value stands in the document of `inspect --json`.

    Attributes:
        meaning: what it says of the graph.
        remedy: what a user can do.
    """

    meaning: str
    remedy: str

    def __new__(cls, value: str, meaning: str, remedy: str) -> Kind:
        """A row of the table."""
        made = str.__new__(cls, value)
        made._value_, made.meaning, made.remedy = value, meaning, remedy
        return made

    def says(self, text: str, *, node: str | None = None, part: str | None = None, **values: object) -> Reason:
        """A reason of this kind.

        Args:
            text: what is shown, with the other arguments' names in braces where they stand.
            node: label of the node at fault.
            part: what is looked at, as texts call it: Q, K, V, a layer, a tensor's role.
            values: names of tensors, extents and counts at fault.
        """
        return Reason(self, text.format(node=node, part=part, **values), node, part, values)

    def decline(self, text: str, *, node: str | None = None, part: str | None = None, **values: object) -> Decline:
        """The same as an exception."""
        return Decline(self.says(text, node=node, part=part, **values))

    # what is known of the graph
    SHAPE = "unknown-shape", "the shape of a tensor cannot be inferred", _SHAPE
    CONTENTS = "depends-on-contents", "a shape, axis or index is computed from what the input holds", _SIMPLIFY
    UNEVALUATED = "not-computable", "a node cannot be run at the shapes that are looked at", _SHAPE
    BODY = (
        "control-flow",
        "products, attention or tokens lie inside the body of a loop or a condition",
        "export the model without the condition or loop",
    )
    QUANTIZED = (
        "quantized",
        "weights are quantized, or nodes compute on quantized numbers",
        "prune the float model first, then quantize",
    )
    STORED = (
        "stored-smaller",
        "weights are stored in fewer bits than they compute with",
        "prune the model in the precision it computes with, then store it smaller",
    )
    OPSET = (
        "old-opset",
        "the graph's opset lacks operators that merging is written with",
        "export with a newer opset, or convert the graph with `onnx.version_converter`",
    )

    # between layers and an attention
    NO_ATTENTION = (
        "no-attention",
        "a Softmax, or products without one, are no attention as it is known here: another axis, linear attention",
        "nothing where it is none; else export with the framework's plain attention (`attn_implementation`)",
    )
    FUSED = (
        "fused-node",
        "one node holds the attention, with packed operands, a bias or a rotary embedding",
        "export again, or take the graph from before ONNX Runtime's optimizer",
    )
    CACHE = (
        "cache",
        "an attention keeps keys and values for a next call",
        "export without the cache (`use_cache=False`)",
    )
    CONSTANT = "learned-queries", "queries or tokens are constants of the graph: no layer makes them", _REST
    NO_LAYER = "no-layer", "a tensor does not come from one linear layer, or does not go to one", _REST
    COMPUTED = "computed-on", "something that is not understood computes between a layer and the attention", _REST
    READ = "read-elsewhere", "something besides the attention or the network reads what would shrink", _REST
    OUTPUT = (
        "graph-output",
        "what would shrink is also an output of the graph",
        "export without this output (`output_hidden_states=False`, `output_attentions=False`)",
    )
    SCALE = "scale", "a factor on the way is not one number: it changes with the input, or among parts", _FIXED
    UNFOLLOWED = "not-followed", "channels cannot be followed from one layer to the next", _SIMPLIFY
    LAYOUT = "irregular-layout", "channels, heads and positions do not arrive in a regular order", _SIMPLIFY
    DYNAMIC = "dynamic-layout", "extents that only run time knows lie together with channels, heads or tokens", _FIXED
    PACKED = "packed-layer", "a layer also makes channels that are not understood and cannot be carried along", _REST
    DIMENSIONS = (
        "mixed-dimensions",
        "dimensions of a head meet each other, in more than pairs, or are told apart",
        _REST,
    )
    NORM = "head-norm", "what queries or keys pass through is no norm over the dimensions of a head", _REST
    HALF_NORM = (
        "head-norm-precision",
        "a norm of queries or keys does not compute in float32",
        "prune the float32 model, then convert it",
    )
    NUMBERS = "head-numbers", "layers of one attention have different numbers of heads or dimensions", _REST
    GROUPED = "grouped-queries", "several heads of queries share keys or values", _DIMENSIONS
    CONVOLVED = "convolved-values", "the values are also convolved beside the attention", _DIMENSIONS
    ONE_HEAD = "single-head", "the attention has one head", _DIMENSIONS
    MEET = "heads-meet", "heads are summed, reordered or joined before the output projection", _DIMENSIONS
    UNKNOWN = (
        "unknown-operator",
        "an operator is not known to keep heads or tokens apart",
        "report the model if it does",
    )

    # feed-forward networks
    NO_RESIDUAL = "no-residual", "the output of layers joins no residual stream", "nothing: it is a head, no block"
    JOINED = "joined-hidden", "hidden channels are joined with what the network's entrance does not make", _REST
    HIDDEN_MIXED = "mixed-hidden", "hidden channels do not arrive at the second layer each for itself", _REST
    HIDDEN_NORM = "hidden-norm", "a norm runs over all hidden channels in front of a convolution", _REST
    CONVOLUTION = "convolution", "the first layer is a convolution: its inputs are not selected", _REST
    SHARED = (
        "shared-weights",
        "places that share weights cannot have one choice",
        "give every place a copy of its own with `--split-shared`",
    )

    # tokens
    NO_PART = "nothing-to-merge-behind", "a block has no attention, or nothing is added to its output", _LATER
    WINDOWS = "windows", "tokens lie on a grid, or only some of them are read: windows, pooling", _WIDTHS
    AMONG = "learned-among-others", "learned tokens stand among those of the image", _WIDTHS
    FEW = "too-few-tokens", "there are no two tokens to merge", "export with a larger image"
    PLACES = "tokens-of-two-places", "tokens of different places in the network meet", _LATER
    PER_TOKEN = "entry-per-token", "a table, mask or bias has an entry for every token, or tokens are indices", _WIDTHS
    ACROSS = "acts-across-tokens", "a node acts on several tokens at a time, not by attention or a mean", _LATER
    CAUSAL = "causal", "what a token sees depends on its place", _WIDTHS
    BATCH = "regrouped-batch", "the items of the batch are regrouped with the tokens", "export with a batch of one"
    ALL = "needs-all-tokens", "something in front of the block needs every token", _LATER


@dataclass(frozen=True)
class Reason:
    """Why a part is left as it is. As text it is what is shown.

    Attributes:
        kind: its kind.
        text: one line.
        node: label of the node at fault; None where it is none.
        part: what was looked at: Q, K, V, a layer, a tensor's role; None where the text names none.
        values: name -> what else is at fault: tensors, extents, counts.
        first: the reason that stands without what was tried to get around it; None where nothing was.
    """

    kind: Kind
    text: str
    node: str | None = None
    part: str | None = None
    values: Mapping[str, object] = field(default_factory=dict, hash=False)
    first: Reason | None = None

    def __str__(self) -> str:
        return self.text

    def within(self, text: str, part: str | None = None) -> Reason:
        """The same inside a longer text, in which `{}` is where it stands."""
        return replace(self, text=text.format(self, part=part), part=part)

    def then(self, other: Reason) -> Reason:
        """The other one, behind this: what was tried to get around this failed, too."""
        return replace(other, text=f"{self}; {other}", first=self)


class Decline(Exception):
    """A part of the graph is not what it would have to be."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason
