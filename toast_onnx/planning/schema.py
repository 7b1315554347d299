"""The keys of a ratios file, their defaults and what may stand there.

A ratio is the fraction removed, an exact decimal in [0, 1). Settings remember whether they were given: `Ratios.given`
tells a choice of the user from a default, so that a run without data can choose otherwise and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from toast_onnx.importance.scores import ATTENTION_SCORES, FFN_SCORES, attention_score
from toast_onnx.planning.settings import Section, exact_decimal, invalid, names_code, shown
from toast_onnx.planning.widths import Rounding
from toast_onnx.solving.compensations import COMPENSATIONS
from toast_onnx.tokens.metrics import AUTO, METRICS

Select = Literal["subspace", "index"]
Coupling = Literal["coupled", "q_only", "k_only", "proj_only", "average"]
Mode = Literal["static", "runtime"]
Residual = Literal["masked", "kept"]

if TYPE_CHECKING:  # a type checker reads no tables
    AttentionScore = str
    FfnScore = str
    CompensationKind = str
else:
    AttentionScore = Literal[tuple(ATTENTION_SCORES)]
    FfnScore = Literal[tuple(FFN_SCORES)]
    CompensationKind = Literal[tuple(COMPENSATIONS)]


def _ratio(value: object) -> Decimal:
    ratio = exact_decimal(value)
    if ratio.is_nan():
        raise invalid("is NaN; a ratio is the fraction removed, from 0 up to but not including 1")
    if not 0 <= ratio < 1:
        percent = f"; for {ratio:f} % write {ratio / 100:f}" if 1 < ratio < 100 else ""
        raise invalid(f"is {ratio}; a ratio is the fraction removed, from 0 up to but not including 1{percent}")
    return ratio


def _version(value: object) -> int:
    if type(value) is not int or value != 1:
        raise invalid(f"is {shown(value)}; this release reads version 1, so write `version: 1`")
    return value


def _per_block(value: object) -> Decimal | tuple[Decimal, ...]:
    if not isinstance(value, (list, tuple)):
        return _ratio(value)
    if not value:
        raise invalid("is an empty list; give one number, or one entry for each block")
    entries = []
    for index, entry in enumerate(value):
        try:
            entries.append(_ratio(entry))
        except ValueError as e:
            raise invalid(str(e), suffix=f"[{index}]") from e
    return tuple(entries)


def _metric(value: object) -> str:
    if not isinstance(value, str) or value not in (AUTO, *METRICS):
        raise invalid(f"is {shown(value)}; choose one of: {', '.join((AUTO, *METRICS))}")
    return value


def _one_block(value: object) -> Decimal:
    if isinstance(value, (list, tuple)):
        raise invalid("is a list; an override speaks of single blocks, so give one number")
    return _ratio(value)


def _ridge(value: object) -> Decimal | Literal["auto"]:
    if value == "auto":
        return "auto"
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    if not number or not (strength := exact_decimal(value)).is_finite() or strength < 0:
        raise invalid(f"is {shown(value)}; give auto, or a strength of at least 0")
    return strength


def _tokens(value: object) -> Decimal | Literal["all"]:
    if value == "all":
        return "all"
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    if not number or (fraction := exact_decimal(value)).is_nan() or not 0 < fraction <= 1:
        raise invalid(f"is {shown(value)}; give all, or the fraction of tokens to sample, above 0 and at most 1")
    return fraction


def _sampled(value: object) -> Decimal | Literal["auto", "all"]:
    return "auto" if value == "auto" else _tokens(value)


Ratio = Annotated[Decimal, PlainValidator(_one_block)]
PerBlock = Annotated[Decimal | tuple[Decimal, ...], PlainValidator(_per_block)]
ZERO = Decimal(0)


def check_attention(select: Select, score: AttentionScore, coupling: Coupling) -> None:
    """Raises a `ValueError` whose text continues a sentence where three attention settings contradict each other."""
    if select == "subspace" and score != "energy":
        raise invalid(f"has score: {score} with select: subspace, which ranks no dimensions; write select: index")
    if coupling != "coupled" and not attention_score(score).couples:
        coupled = ", ".join(name for name, entry in ATTENTION_SCORES.items() if entry.couples)
        raise invalid(f"has coupling: {coupling} with score: {score}; couplings belong to the scores {coupled}")


def _imply_index(data: Any) -> Any:
    """A score that ranks single dimensions asks for `select: index` where no selection is named."""
    if isinstance(data, dict) and "select" not in data and isinstance(score := data.get("score"), str):
        entry = ATTENTION_SCORES.get(score)  # an unknown one is refused by its own field
        return {**data, "select": "index"} if entry is not None and entry.implies_index else data
    return data


class Attention(Section):
    """What to remove from every attention core, and how to choose it.

    Attributes:
        qk: Fraction of Q and K dimensions removed from every head; one number or one entry a block.
        vo: The same for V with the output projection.
        heads: Fraction of whole heads removed; qk and vo apply to those that stay.
        select: `subspace` keeps a basis, `index` keeps original dimensions.
        score: How `index` ranks dimensions.
        coupling: Which weights the scores gm, l1 and l2 read.
        tie: Keep the same width in Q/K and V/Proj, the wider of the two, for kernels that have one head size.
    """

    qk: PerBlock = ZERO
    vo: PerBlock = ZERO
    heads: PerBlock = ZERO
    select: Select = "subspace"
    score: AttentionScore = "energy"
    coupling: Coupling = "coupled"
    tie: bool = False

    _implied = model_validator(mode="before")(_imply_index)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_attention(self.select, self.score, self.coupling)
        return self


class Ffn(Section):
    """What to remove from every feed-forward network, and how to choose it.

    Attributes:
        fc1: Fraction of fc1's inputs removed; one number or one entry a block.
        fc2: Fraction of fc2's inputs (the hidden units) removed.
        score: How channels are ranked.
        mode: `static` shrinks the weights; `runtime` selects for each batch, as the paper does.
        residual: Under `runtime`, what becomes of the channels that fc1 drops: `kept` leaves the residual stream and
            the norm alone; `masked` zeroes them in the stream, too, as the paper's release does.
        tokens: Under `runtime`, the tokens a score is taken from: `all`, a fraction, or `auto` for the paper's 2 % with
            a class token and 20 % without.
    """

    fc1: PerBlock = ZERO
    fc2: PerBlock = ZERO
    score: FfnScore = "second-order"
    mode: Mode = "static"
    residual: Residual = "kept"
    tokens: Annotated[Decimal | Literal["auto", "all"], PlainValidator(_sampled)] = "auto"


class AttentionOverride(Section):
    """The attention settings of some blocks; None leaves what holds for all."""

    qk: Ratio | None = None
    vo: Ratio | None = None
    heads: Ratio | None = None
    select: Select | None = None
    score: AttentionScore | None = None
    coupling: Coupling | None = None

    _implied = model_validator(mode="before")(_imply_index)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.select is not None and self.score is not None:
            check_attention(self.select, self.score, "coupled")
        return self


class FfnOverride(Section):
    """The FFN settings of some blocks; None leaves what holds for all."""

    fc1: Ratio | None = None
    fc2: Ratio | None = None
    score: FfnScore | None = None
    mode: Mode | None = None


class TokensOverride(Section):
    """The share of the tokens that goes behind some blocks' attentions; None leaves what holds for all."""

    merge: Ratio | None = None


class BlockOverride(Section):
    """Settings for the blocks that `block` addresses: a block number, or a pattern over block and node names."""

    hidden_keys = ("block",)

    block: int | str
    attention: AttentionOverride = AttentionOverride()
    ffn: FfnOverride = FfnOverride()
    tokens: TokensOverride = TokensOverride()


class Align(Section):
    """The multiples that kept head dimensions and FFN widths are rounded to."""

    head_dim: Annotated[int, Field(ge=1)] = 8
    width: Annotated[int, Field(ge=1)] = 8


class Compensation(Section):
    """How the surviving weights make up for what was removed.

    Attributes:
        kind: A key of `toast_onnx.solving.compensations.COMPENSATIONS`.
        statistics: Take them all from the dense model (`one-shot`) or from the compressed prefix (`sequential`).
        ridge: Strength of the regularization, or `auto`.
        steps: Of training a block where `kind` is `local`, eight samples each.
        views: Of each sample that does not judge, made with the dense and the pruned model and trained on, too, where
            `kind` is `local`.
    """

    kind: CompensationKind = "ridge"
    statistics: Literal["one-shot", "sequential"] = "one-shot"
    ridge: Annotated[Decimal | Literal["auto"], PlainValidator(_ridge)] = "auto"
    steps: Annotated[int, Field(ge=1)] = 100
    views: Annotated[int, Field(ge=0)] = 0


def _no_code(value: str) -> str:
    if names_code(value):
        raise invalid(
            f"is {shown(value)}, Python code; a file may not name code, since reading it would run it: give --data on "
            "the command line, or write ./ in front of a file of that name"
        )
    return value


class Tokens(Section):
    """Token merging: alike tokens become one behind an attention, and everything behind computes on fewer.

    Attributes:
        merge: Share of the tokens that enter the network which goes behind every block that can merge, or one entry a
            block; at most half of what is left goes at once.
        metric: What tokens are compared by; `auto` takes the best that the model's attentions have the parts for.
        unread: Drop tokens in the last block that nothing reads behind it; that changes no output.
    """

    merge: PerBlock = ZERO
    metric: Annotated[str, PlainValidator(_metric)] = AUTO
    unread: bool = True


class Calibration(Section):
    """Where calibration samples come from; the command line's options override each of these.

    Attributes:
        data: A folder or file, relative to the working directory, never code; None when the run has no data.
        samples: How many samples to read at most.
        preprocess: A named preprocessing or a recipe file.
        tokens: `all`, or the fraction of tokens to sample.
        views: Views of each sample in which the model sees other classes; statistics are measured on these, too.
        seed: Seed of every draw.
    """

    data: Annotated[str, Field(min_length=1), AfterValidator(_no_code)] | None = None
    samples: Annotated[int, Field(ge=1)] = 256
    preprocess: Annotated[str, Field(min_length=1)] = "imagenet"
    tokens: Annotated[Decimal | Literal["all"], PlainValidator(_tokens)] = "all"
    views: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0


def _align(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"head_dim": value, "width": value}
    if not isinstance(value, (Mapping, Align)):
        raise invalid(f"is {shown(value)}; give one whole number, or {{head_dim: 8, width: 8}}")
    return value


def _overrides(value: object) -> object:
    """Turns the file's mapping of block to settings into a tuple; a key of digits alone is a block number."""
    if not isinstance(value, Mapping):
        if isinstance(value, (list, tuple)) and all(isinstance(entry, BlockOverride) for entry in value):
            return tuple(value)
        raise invalid("must map block numbers or node-name patterns to settings, for example `0: {attention: {qk: 0}}`")
    overrides: dict[int | str, object] = {}
    for key, settings in value.items():
        block = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if isinstance(block, int) and block < 0:
            raise invalid(f"names block {block}; blocks count from 0")
        if block == "":
            raise invalid("has an empty pattern; give a block number or a pattern such as '*/layer.3/*'")
        if block in overrides:
            raise invalid(f"names block {block} twice; keep one")
        if isinstance(settings, Mapping) and "block" in settings:
            raise invalid("has the unknown key 'block'. Known keys: attention, ffn, tokens", suffix=f"[{key!r}]")
        overrides[block] = {**settings, "block": block} if isinstance(settings, Mapping) else settings
    return tuple(overrides.values())


class Ratios(Section):
    """One ratios file. Immutable; compares by its resolved settings.

    Attributes:
        version: Version of the format.
        blocks: Overrides in file order; later ones win.
        rounding: `nearest` rounds to the nearest multiple of `align`; `paper` uses the paper's floating-point floor and
            no alignment, so that a published schedule written to a file still keeps the published counts.
    """

    version: Annotated[int, PlainValidator(_version)] = 1
    attention: Attention = Attention()
    ffn: Ffn = Ffn()
    tokens: Tokens = Tokens()
    blocks: Annotated[tuple[BlockOverride, ...], BeforeValidator(_overrides)] = ()
    align: Annotated[Align, BeforeValidator(_align)] = Align()
    rounding: Rounding = "nearest"
    compensation: Compensation = Compensation()
    calibration: Calibration = Calibration()

    @model_validator(mode="before")
    @classmethod
    def _paper_alignment(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("rounding") == "paper" and "align" not in data:
            return {**data, "align": 1}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rounding == "paper" and (self.align.head_dim, self.align.width) != (1, 1):
            raise invalid("has rounding: paper with an align other than 1; remove one of the two")
        return self

    @property
    def merges_tokens(self) -> bool:
        """Whether any tokens are merged."""
        merge = self.tokens.merge
        everywhere = any(merge) if isinstance(merge, tuple) else bool(merge)
        return everywhere or any(override.tokens.merge for override in self.blocks)

    def given(self, key: str) -> bool:
        """Returns whether a setting such as `attention.score` was given rather than defaulted, overrides aside."""
        section: Section = self
        *parents, name = key.split(".")
        for parent in parents:
            if parent not in section.model_fields_set:
                return False
            section = getattr(section, parent)
        return name in section.model_fields_set

    def to_document(self) -> dict[str, Any]:
        """Returns all settings, defaults included, as plain JSON-able values; block numbers become strings."""
        document: dict[str, Any] = _as_json(plain(self, given_only=False))
        return document


def plain(section: Section, *, given_only: bool) -> dict[Any, Any]:
    """Returns a section as dicts, lists, strings and exact decimals, in the shape of the file.

    Args:
        section: The settings.
        given_only: Leave out defaults. Overrides never hold any.
    """
    result: dict[Any, Any] = {}
    for name in section.key_names():
        value = getattr(section, name)
        if value is None or (given_only and name not in section.model_fields_set):
            continue
        if name == "blocks":
            result[name] = {override.block: plain(override, given_only=True) for override in value}
        elif isinstance(value, Section):
            result[name] = plain(value, given_only=given_only)
        else:
            result[name] = list(value) if isinstance(value, tuple) else value
    return result


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
