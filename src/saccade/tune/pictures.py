"""Real attention of some heads beside the pattern chosen for them, small enough for a page."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from saccade.models.tasks import last_hidden_states
from saccade.ops import attend, block_attend
from saccade.plug import Observation, Recipe, watch
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import BlockLayout, Geometry
from saccade.types.layout_plot import coverage

CELLS = 64
"""Cells a side of a picture."""


def pick_heads(recipe: Recipe, count: int = 6) -> list[tuple[str, int, Candidate]]:
    """Heads to draw: one per mechanism and setting in use first, spread over the layers."""
    found: dict[str, tuple[str, int, Candidate]] = {}
    for name, layer in recipe.layers.items():
        for choice in layer.prefill:
            if choice.mechanism != DENSE:
                candidate = Candidate.of(choice)
                head = 0 if choice.heads == "all" else choice.heads[0]
                found.setdefault(candidate.key, (name, head, candidate))
    return list(found.values())[:count]


def draw_examples(
    model: Any, ids: Tensor, picks: list[tuple[str, int, Candidate]], exact: Recipe
) -> list[dict[str, Any]]:
    """For each pick, `[CELLS, CELLS]` log attention and share of computed pairs, and the attention mass these hold."""
    examples: list[dict[str, Any]] = []

    def observe(seen: Observation) -> None:
        for name, head, candidate in picks:
            if name == seen.layer:
                example = _example(seen, name, head, candidate)
                examples.extend([] if example is None else [example])

    if picks:
        with torch.no_grad(), watch(model, observe, exact):
            last_hidden_states(model, ids)
    return examples


def _example(seen: Observation, name: str, head: int, candidate: Candidate) -> dict[str, Any] | None:
    """One picture; None for a choice that is not made of blocks."""
    shared = seen.q.shape[1] // seen.k.shape[1]
    q, k, v = seen.q[:, head, None], seen.k[:, head // shared, None], seen.v[:, head // shared, None]
    layout = candidate.build().pattern(*candidate.round(q, k), Geometry(causal=True))
    if not isinstance(layout, BlockLayout):
        return None
    scale = q.shape[3] ** -0.5 if seen.scale is None else seen.scale
    kept = cast("Tensor", block_attend(q, k, v, layout, scale=scale, return_lse=True).lse)
    whole = cast("Tensor", attend(q, k, v, causal=True, scale=scale, return_lse=True).lse)
    return {
        "layer": name,
        "head": head,
        "label": candidate.label,
        "density": layout.density(causal=True),
        "mass": float((kept - whole).exp().mean()),
        "attention": attention_map(q[0, 0], k[0, 0], scale).tolist(),
        "pattern": [[round(x, 3) for x in row] for row in coverage(layout, 0, 0, CELLS).tolist()],
    }


def attention_map(q: Tensor, k: Tensor, scale: float, cells: int = CELLS) -> Tensor:
    """log10 of the causal attention of one head, q and k `[N, D]`, summed over cells: `[cells, cells]`, fp32."""
    tokens = k.shape[0]
    places = torch.arange(tokens, device=k.device)
    columns = torch.nn.functional.one_hot(places * cells // tokens, cells).float()
    total = torch.zeros(cells, cells, device=k.device)
    for chunk in places.split(512):
        scores = (q[chunk].float() @ k.float().T) * scale
        weights = scores.masked_fill(places > chunk[:, None], -torch.inf).softmax(-1)
        total.index_add_(0, chunk * cells // tokens, weights @ columns)
    rows = torch.bincount(places * cells // tokens, minlength=cells)
    return (total / rows[:, None]).clamp(min=1e-6).log10().mul(100).round().div(100).cpu()
