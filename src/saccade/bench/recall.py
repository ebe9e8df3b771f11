"""Do trainable selectors train? A recall task, with the mechanism's own choice and with as many random blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import get
from saccade.mechanisms.where.routing_attention import RoutingAttention
from saccade.ops import block_attend
from saccade.types import BlockLayout, Geometry, Pattern

NAME, LABELS, WIDTH, HELD_OUT = 24, 4, 32, 64
"""Channels of a name, labels, channels of the model, sequences it is judged on."""

COMMITMENT = 1e-4
"""Weight of the distance of tokens from their centroids, the authors' of Routing Transformers."""


@dataclass(frozen=True)
class Case:
    """A mechanism on the task.

    Args:
        settings: Of the mechanism.
        block: Tokens of the blocks it chooses from.
        choice: Of a layer, what says which blocks `[B, G, N, blocks]` are read, or which tokens a cluster takes.
    """

    settings: Mapping[str, Any]
    block: int = 4
    choice: str = "_choose"


CASES: dict[str, Case] = {
    "asa": Case({"shares": (0.25, 0.25, 0.25, 0.25), "samples": 8, "block": 8}, block=8),
    "biformer": Case({"windows": 16, "topk": 2, "block": 4}),
    "infllm_v2": Case({
        "block": 4, "kernel": 4, "stride": 4, "topk": 3, "init_blocks": 0, "local_blocks": 0, "dense_below": 0,
        "tile": 4,
    }),
    "llsa": Case({"block": 4, "topk": 3, "levels": 2, "enrich": False}),
    "moba": Case({"chunk": 4, "topk": 3, "tile": 4}),
    "nsa": Case({
        "dim": WIDTH, "heads": 1, "kernel": 4, "stride": 4, "block": 4, "topk": 3, "init_blocks": 0, "local_blocks": 1,
        "window": 4,
    }),
    "routing_attention": Case({
        "dim": WIDTH, "heads": 1, "local_heads": 0, "clusters": 8, "window": 8, "decay": 0.99, "scale": WIDTH**-0.5,
    }, choice="_members"),
    "ssa": Case({"dim": WIDTH, "heads": 1, "block": 4, "topk": 3}),
    "vmoba": Case({"chunks": ((4,),), "topk": 3, "scope": "query", "block": 4}),
}  # fmt: skip
"""Mechanisms that choose by content and are made to be trained, with settings that read a few of the task's blocks."""


@dataclass(frozen=True)
class Outcome:
    """How well a model does after training, 1 at best.

    Args:
        name: Mechanism.
        chosen: With its own choice.
        drawn: The same model trained with as much that is random.
        density: Share of what there is that its choice reads; None for layers that do not tell.
    """

    name: str
    chosen: float
    drawn: float
    density: float | None

    @property
    def margin(self) -> float:
        """What the choice is worth."""
        return self.chosen - self.drawn

    def to_json(self) -> dict[str, Any]:
        """Its fields and the margin."""
        return asdict(self) | {"margin": self.margin}


def recall(name: str, steps: int = 400, pairs: int = 32, batch: int = 32, seed: int = 0) -> Outcome:
    """Train one layer of a mechanism of `CASES` to recall, and the same with random blocks.

    A sequence has `pairs` tokens, each with a name and a label, and as many that have a name and ask for its label;
    the askers of one block ask for names of one block, so that few blocks are enough if they are the right ones.

    Args:
        name: Mechanism.
        steps: Of the optimizer.
        pairs: Names and labels in a sequence.
        batch: Sequences in a step.
        seed: Of everything that is drawn.

    Returns:
        Accuracies on new sequences, and the density of the trained choice.

    Raises:
        ValueError: If the mechanism is not one of `CASES`.
    """
    if name not in CASES:
        raise ValueError(f"name={name!r}: expected one of {sorted(CASES)}")
    block, models = CASES[name].block, []
    names = torch.randn(pairs, NAME, generator=torch.Generator().manual_seed(seed)) * 2 / NAME**0.5
    held_out = sequences(names, HELD_OUT, block, torch.Generator().manual_seed(seed + 1))
    with torch.random.fork_rng(devices=[]):
        for drawn in (False, True):
            torch.manual_seed(seed)
            model = Recaller(name, drawn=drawn, seed=seed)
            generator = torch.Generator().manual_seed(seed + 2)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(steps):
                x, labels = sequences(names, batch, block, generator)
                loss = nn.functional.cross_entropy(model(x)[:, pairs:].flatten(0, 1), labels.flatten()) + model.added
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            models.append(model.eval())
    with torch.no_grad():
        chosen, drawn_at = (float((m(held_out[0])[:, pairs:].argmax(-1) == held_out[1]).float().mean()) for m in models)
        return Outcome(name, chosen, drawn_at, models[0].density(held_out[0]))


def sequences(names: Tensor, count: int, block: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences `[count, 2 pairs, NAME + LABELS + 1]` of names `[pairs, NAME]`, and the answers `[count, pairs]`."""
    pairs = len(names)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    labels = torch.randint(LABELS, (count, pairs), generator=generator)
    blocks = torch.rand(count, pairs // block, generator=generator).argsort(1)
    inside = torch.rand(count, pairs // block, block, generator=generator).argsort(2)
    asked = (blocks[..., None] * block + inside).flatten(1)
    x = torch.zeros(count, 2 * pairs, NAME + LABELS + 1)
    x[:, :pairs, :NAME], x[:, pairs:, :NAME] = names[order], names[order.gather(1, asked)]
    x[:, :pairs, NAME:-1] = nn.functional.one_hot(labels, LABELS).float()
    x[:, pairs:, -1] = 1.0
    return x, labels.gather(1, asked)


class Recaller(nn.Module):
    """One layer of attention between two linear maps.

    Args:
        name: Mechanism of `CASES`.
        drawn: Replace the blocks that it chooses by as many random ones; a query's own block stays, if it was chosen.
        seed: Of these.
    """

    def __init__(self, name: str, *, drawn: bool, seed: int) -> None:
        super().__init__()
        card, case = get(name), CASES[name]
        mechanism: Any = card.build(**case.settings)
        self.mechanism, self.block, self.drawn = mechanism, case.block, drawn
        self.causal = Pattern.CAUSAL_SELF in card.patterns
        self.random = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(NAME + LABELS + 1, WIDTH), nn.Linear(WIDTH, LABELS)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.added: Tensor | float = 0.0
        self.tokens = 0
        if drawn and isinstance(mechanism, nn.Module):
            choose: Any = getattr(mechanism, case.choice)
            draw = self._draw if case.choice == "_choose" else self._draw_members
            setattr(mechanism, case.choice, lambda *given: draw(choose(*given)))

    def forward(self, x: Tensor) -> Tensor:
        """Sequences to scores of their labels, `[B, N, LABELS]`."""
        hidden, self.tokens = self.first(x), x.shape[1]
        if isinstance(self.mechanism, RoutingAttention):
            out, distance = self.mechanism.with_loss(hidden)
            self.added = COMMITMENT * distance
            return self.last(hidden + out)
        if isinstance(self.mechanism, nn.Module):
            return self.last(hidden + self.mechanism(hidden))
        q, k, v = self.qkv(hidden)[:, None].chunk(3, -1)
        attention: Callable[..., Any] = partial(self.mechanism, geometry=Geometry(causal=self.causal))
        if self.drawn:
            chosen = self._chosen(q, k).unflatten(3, (-1, self.block)).any(-1)
            kept = self._draw(chosen).repeat_interleave(self.block, 3)
            layout = BlockLayout.from_dense(kept.tril() if self.causal else kept, self.block)
            attention = partial(block_attend, layout=layout)
        return self.last(hidden + self.projection(attention(q, k, v)[:, 0]))

    def density(self, x: Tensor) -> float | None:
        """Share of all pairs that the choice for these sequences computes."""
        if isinstance(self.mechanism, nn.Module):
            return None
        q, k, _ = self.qkv(self.first(x))[:, None].chunk(3, -1)
        return float(self._chosen(q, k).float().mean())

    def _chosen(self, q: Tensor, k: Tensor) -> Tensor:
        """The pairs that are chosen, bool `[B, 1, N, N]`."""
        pattern = self.mechanism.pattern(q.detach(), k.detach(), Geometry(causal=self.causal))
        return pattern.to_dense().expand(len(q), 1, -1, -1)

    def _draw(self, chosen: Tensor) -> Tensor:
        """As many blocks as are `chosen`, bool `[B, H, N, blocks]`, drawn for every block of queries."""
        tokens, blocks = chosen.shape[2:]
        block, own = torch.arange(blocks), (torch.arange(tokens) // self.block)[:, None]
        draw = torch.rand(*chosen.shape[:2], -(-tokens // self.block), blocks, generator=self.random)
        draw = draw.repeat_interleave(self.block, 2)[:, :, :tokens].masked_fill((block == own) & chosen, 2.0)
        if self.causal:
            draw = draw.masked_fill(block > own, -1.0)
        return draw.argsort(-1, descending=True).argsort(-1) < chosen.sum(-1, keepdim=True)

    def _draw_members(self, taken: Tensor) -> Tensor:
        """As many tokens for each cluster as are `taken`, int64 `[B, R, clusters, w]`, ascending."""
        draw = torch.rand(*taken.shape[:3], self.tokens, generator=self.random)
        return draw.argsort(-1)[..., : taken.shape[3]].sort(-1).values
