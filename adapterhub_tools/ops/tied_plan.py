"""What a merge does to tied embeddings: keep the tie where both sides stay equal, else write both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.model.plan import ByteRange, Term
from adapterhub_tools.model.protocols import OpenSource
from adapterhub_tools.ops.merge_parts import Change, Part
from adapterhub_tools.ops.tied import Tie
from adapterhub_tools.store.checkpoint import Checkpoint

_PIECE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """The outcome.

    Attributes:
        input_name: the embedding's tensor, or None where nothing is tied.
        output_name: the head's tensor, likewise.
        untied: True if the output has both and its config must say so.
        note: what was done, for the report; empty if nothing.
    """

    input_name: str | None = None
    output_name: str | None = None
    untied: bool = False
    note: str = ""


def settle_ties(
    parts: Sequence[Part],
    changes: dict[str, Change],
    base_range: Callable[[str], ByteRange],
    checkpoint: Checkpoint,
) -> Ties:
    """Decides about a tied pair and completes ``changes`` accordingly.

    * Nothing touches the pair: it stays as it is.
    * Only rows of the embedding are replaced (trainable tokens): PEFT shows them to both sides; the tie
    stays.
    * The adapter asks for tying (``ensure_weight_tying``) and changes one side: the change is the pair's.
    * The adapter makes the same change to both sides, value by value: the tie stays.
    * Otherwise both tensors are written, the unchanged one with the values of the shared tensor, and so are
    further tensors that the same config value ties.

    Raises:
        UnsupportedError: more than two tensors share the embedding, or a shared bias is changed in two ways.
        FormatError: the config says tied, but the base stores two tensors that differ.
    """
    tie = parts[0].fit.tie if parts else None
    if tie is None:
        return Ties()
    if tie.input_name not in changes and tie.output_name not in changes:
        _join_companions(tie, changes, parts)
        return Ties()
    _refuse_others(tie)
    if tie.output_stored:
        _refuse_two_values(tie, base_range, checkpoint)
    inner, outer = changes.get(tie.input_name), changes.get(tie.output_name)
    asks = all(part.opened.adapter.ties for part in parts if _touches(part, tie))
    if inner is None and outer is not None and asks and (outer.terms or outer.start is not None):
        inner, outer = outer, None
        changes[tie.input_name] = inner
        del changes[tie.output_name]
    if inner is not None and outer is None and (asks or (not inner.terms and inner.start is None)):
        _join_companions(tie, changes, parts)
        return _keep(tie, changes, inner, base_range, "the change is made to both")
    if inner is not None and outer is not None and _alike(inner, outer, parts):
        del changes[tie.output_name]
        _join_companions(tie, changes, parts)
        return _keep(tie, changes, inner, base_range, "the adapter changes both alike")
    if outer is None:
        outer = changes.setdefault(tie.output_name, Change())
    if outer.start is None:
        outer.start = base_range(tie.input_name)
    for missing, source in tie.companions:
        if missing not in changes:
            change = changes.get(source, Change())
            changes[missing] = Change(
                start=change.start or base_range(source), terms=list(change.terms), patch=change.patch
            )
    return Ties(
        input_name=tie.input_name,
        output_name=tie.output_name,
        untied=True,
        note=f"untied: {tie.input_name} and {tie.output_name} differ now; both are written",
    )


def _refuse_others(tie: Tie) -> None:
    if tie.others:
        raise UnsupportedError.of(
            "tied-unsupported",
            f"the adapter changes an embedding that this base shares with {', '.join(tie.others)}.",
            loc=tie.input_name,
            remedy="Untie the base: load it, clone the weight, save it with tie_word_embeddings=false.",
        )


def _refuse_two_values(tie: Tie, base_range: Callable[[str], ByteRange], checkpoint: Checkpoint) -> None:
    """Refuses a pair that is tied by the config and untied by its values; loaders disagree about it.

    transformers 4 takes the embedding for both, transformers 5 takes each tensor as it is stored
    (``PreTrainedModel.tie_weights``), so the adapter may have been trained on either model.
    """
    first, second = tie.input_name, tie.output_name
    opened = checkpoint.tensors
    with checkpoint.open(opened[first].file) as left, checkpoint.open(opened[second].file) as right:
        if _equal_ranges(left, base_range(first), right, base_range(second)):
            return
    raise FormatError.of(
        "tie",
        f"the config says that {second} is tied to {first}, but the two are stored with different values.",
        file=checkpoint.config_file or "",
        loc="tie_word_embeddings",
        remedy="Set it to false if both belong to the model (transformers 5 reads the base so), or remove "
        f"{second} if the model was trained with one (transformers 4).",
    )


def _join_companions(tie: Tie, changes: dict[str, Change], parts: Sequence[Part]) -> None:
    """Brings a change of a tensor that is not stored to the one that holds its values."""
    for missing, source in tie.companions:
        if missing not in changes:
            continue
        change = changes.pop(missing)
        if source in changes and not _alike(changes[source], change, parts):
            raise UnsupportedError.of(
                "tied-unsupported",
                f"the adapter changes it in another way than {missing}, but the base stores one for both.",
                loc=source,
                remedy="Untie the base: load it, clone the bias, save it with tie_word_embeddings=false.",
            )
        changes[source] = change


def _touches(part: Part, tie: Tie) -> bool:
    names = {place.base_tensor for place in part.fit.placements.values()}
    names |= {item.base_tensor for item in part.fit.full}
    return bool(names & {tie.input_name, tie.output_name})


def _keep(
    tie: Tie, changes: dict[str, Change], inner: Change, base_range: Callable[[str], ByteRange], why: str
) -> Ties:
    if tie.output_stored:
        start = inner.start or base_range(tie.input_name)
        terms = [
            replace(term, placement=replace(term.placement, base_tensor=tie.output_name))
            for term in inner.terms
        ]
        changes[tie.output_name] = Change(start=start, terms=terms, patch=inner.patch)
    return Ties(
        input_name=tie.input_name,
        output_name=tie.output_name if tie.output_stored else None,
        note=f"{tie.input_name} stays tied to {tie.output_name}: {why}",
    )


def _alike(inner: Change, outer: Change, parts: Sequence[Part]) -> bool:
    """Says whether two changes of a tied pair are the same, so that one tensor can hold the result."""
    sources = {part.uri: part for part in parts}
    if (inner.start is None) != (outer.start is None) or (inner.patch is None) != (outer.patch is None):
        return False
    if len(inner.terms) != len(outer.terms):
        return False
    pairs = []
    if inner.start is not None and outer.start is not None:
        pairs.append((inner.start, outer.start))
    if inner.patch is not None and outer.patch is not None:
        if inner.patch.rows != outer.patch.rows:
            return False
        pairs.append((inner.patch.source, outer.patch.source))
    return all(_equal_bytes(first, second, sources) for first, second in pairs) and all(
        _equal_terms(first, second, sources) for first, second in zip(inner.terms, outer.terms, strict=True)
    )


def _equal_bytes(first: ByteRange, second: ByteRange, sources: Mapping[str, Part]) -> bool:
    with sources[first.uri].open() as left, sources[second.uri].open() as right:
        return _equal_ranges(left, first, right, second)


def _equal_ranges(left: OpenSource, first: ByteRange, right: OpenSource, second: ByteRange) -> bool:
    if first.spec.shape != second.spec.shape or first.spec.dtype != second.spec.dtype:
        return False
    for at in range(0, first.spec.nbytes, _PIECE):
        size = min(_PIECE, first.spec.nbytes - at)
        if left.read(first.offset + at, size) != right.read(second.offset + at, size):
            return False
    return True


def _equal_terms(first: Term, second: Term, sources: Mapping[str, Part]) -> bool:
    """Says whether two terms add the same product: alike in method and scale, and in their factors.

    An embedding's factors are those of a linear layer transposed, A for Bᵀ and B for Aᵀ.
    """
    if first.method != second.method or {"A", "B"} != set(first.factors) or {"A", "B"} != set(second.factors):
        return False
    turned = (first.hparams["kind"] == "embedding") != (second.hparams["kind"] == "embedding")
    for name in {*first.hparams, *second.hparams} - {"kind", "fan_in_fan_out"}:
        if first.hparams.get(name) != second.hparams.get(name):
            return False
    partner = {"A": "B", "B": "A"} if turned else {"A": "A", "B": "B"}
    return all(
        _equal_factors(item, second.factors[partner[role]], turned, sources)
        for role, item in first.factors.items()
    )


def _equal_factors(first: ByteRange, second: ByteRange, turned: bool, sources: Mapping[str, Part]) -> bool:
    if not turned:
        return _equal_bytes(first, second, sources)
    if first.spec.shape != second.spec.shape[::-1] or first.spec.dtype != second.spec.dtype:
        return False
    from adapterhub_tools.engine.buffers import load_whole

    with sources[first.uri].open() as left, sources[second.uri].open() as right:
        return bool((load_whole(left, first) == load_whole(right, second).t()).all())
