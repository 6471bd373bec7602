"""Put the products of a run together into its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from llmprune.anatomy.types import Anatomy, MlpUnit, unit_key
from llmprune.checkpoint.verify import SparseCounts, Verified
from llmprune.common.distributed import count
from llmprune.common.versions import versions
from llmprune.cut.decision import Cut, kept_share
from llmprune.prune.records import LayerRecord
from llmprune.recipe.sparsity import Sparsity
from llmprune.results.formatting import plural
from llmprune.results.schema import LayerFigures, MatrixFigures, Provenance, SparsityFigures, VerificationFigures
from llmprune.score.scores import Scores


def layer_figures(
    anatomy: Anatomy,
    scores: Scores | None,
    *,
    cut: Cut,
    records: Mapping[int, LayerRecord],
    add_up: tuple[bool, bool] = (True, True),
) -> tuple[LayerFigures, ...]:
    """One row for every layer of the dense model. ``records``: what pass 2 did, by kept layer; ``add_up``: whether
    scores of neurons do, and those of heads.
    """
    return tuple(
        _layer(index, anatomy, scores=scores, cut=cut, record=records.get(index), add_up=add_up)
        for index in range(cut.num_layers)
    )


def _layer(
    index: int,
    anatomy: Anatomy,
    *,
    scores: Scores | None,
    cut: Cut,
    record: LayerRecord | None,
    add_up: tuple[bool, bool],
) -> LayerFigures:
    removed = index in cut.removed
    units, block = anatomy.units[index], anatomy.blocks[index]
    keep_E = cut.experts.get(unit_key(index, block.path)) if block else None
    attention = anatomy.attention[index]
    heads = unit_key(index, attention.path) if attention else ""
    keep_G = None if removed else cut.heads.get(heads)
    return LayerFigures(
        layer=index,
        importance=float(scores.layers[index]) if scores and scores.layers is not None else None,
        removed=removed,
        width=sum(unit.width * (unit.experts or 1) for unit in units) if units else None,
        kept=sum(_kept(index, unit, cut=cut, keep_E=keep_E) for unit in units) if units and not removed else None,
        experts_kept=None if keep_E is None or removed else tuple(keep_E.tolist()),
        kv_groups_kept=None if keep_G is None else tuple(keep_G.tolist()),
        kv_groups_share=None
        if keep_G is None or scores is None
        else kept_share(scores.heads[heads], keep_G, adds_up=add_up[1]),
        score_share=None
        if removed or scores is None
        else _score_share(index, anatomy, scores=scores, cut=cut, adds_up=add_up[0]),
        error_cut=record.error_cut if record else None,
        error_refit=record.error_refit if record else None,
        ridge=record.ridge if record else None,
        inherited=record.inherited if record else None,
        held_out=record.held_out if record else None,
        mixer_held_out=record.mixer_held_out if record else None,
        up_held_out=record.up_held_out if record else None,
        matrices=tuple(MatrixFigures(**asdict(one)) for one in record.matrices) if record else (),
    )


def _kept(index: int, unit: MlpUnit, *, cut: Cut, keep_E: Tensor | None) -> int:
    keep = cut.neurons.get(unit_key(index, unit.path))
    experts = 1 if unit.experts is None else unit.experts if keep_E is None else len(keep_E)
    return experts * (unit.width if keep is None else keep.shape[-1])


def _score_share(index: int, anatomy: Anatomy, *, scores: Scores, cut: Cut, adds_up: bool) -> float | None:
    """Mean over the layer's units that lost neurons."""
    keys = [unit_key(index, unit.path) for unit in anatomy.units[index]]
    shares = [kept_share(scores.neurons[key], cut.neurons[key], adds_up=adds_up) for key in keys if key in cut.neurons]
    return sum(shares) / len(shares) if shares else None


def unrouted(scores: Scores) -> list[str]:
    """A warning where experts got no calibration token."""
    without = {key: int((tokens_E == 0).sum()) for key, tokens_E in scores.routed.items()}
    if not any(without.values()):
        return []
    places = [key for key, count in without.items() if count]
    named = ", ".join([*places[:3], *(["…"] if len(places) > 3 else [])])
    experts = plural(sum(without.values()), "expert")
    return [
        f"{experts} in {plural(len(places), 'layer')} ({named}) got no calibration token: scored by the norm of what "
        "they write; more calibration text would reach them"
    ]


def sparsity_figures(
    sparsity: Sparsity | None, skipped: Sequence[str], *, counts: SparseCounts | None
) -> SparsityFigures | None:
    """What was counted in the saved file."""
    if sparsity is None or counts is None:
        return None
    return SparsityFigures(
        pattern=str(sparsity.parsed), method=sparsity.method.kind, skipped=tuple(skipped), **asdict(counts)
    )


def verification_figures(verified: Verified) -> VerificationFigures:
    """What the fresh process found, but for the sparse matrices, which have figures of their own."""
    return VerificationFigures(
        parameters=verified.parameters,
        largest_logit_difference=verified.largest_logit_difference,
        cached_generation_equal=verified.cached_generation_equal,
        positions=verified.positions,
    )


def provenance(
    model: str,
    revision: str | None,
    *,
    commit: str | None,
    calibration: tuple[str, int, int | None],
    datasets: dict[str, str],
    seed: int,
    trust_remote_code: bool,
    device: str,
) -> Provenance:
    """What the result came from. ``calibration``: fingerprint, number of tokens, crossings; ``datasets``: commits."""
    return Provenance(
        model=model,
        revision=revision,
        commit=commit,
        calibration_fingerprint=calibration[0],
        calibration_tokens=calibration[1],
        calibration_crossings=calibration[2],
        datasets=datasets,
        seed=seed,
        trust_remote_code=trust_remote_code,
        device=device,
        processes=count(),
        versions=versions(),
    )
