"""`saccade bench cache`: what every cache policy costs in quality, for what it saves in bytes and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saccade.bench.cache_quality import PROTOCOLS, Material, Quality, make_material, measure_quality
from saccade.bench.cache_rows import BUDGETS, Candidate, Shares, candidates
from saccade.mechanisms.cache.base import CachePolicy
from saccade.models.ruler import TASKS

COLUMNS = (
    "cache", "settings", "budget", "bytes held", "bytes read", "MB", "tokens/s", "perplexity",
    *(f"{task}, {protocol}" for protocol in PROTOCOLS for task in TASKS),
)  # fmt: skip


@dataclass(frozen=True)
class CacheRow:
    """A policy at a budget, or dense attention.

    Args:
        name: Registry name, or "dense": transformers' own cache and attention.
        settings: `name=value`, with commas between.
        budget: The part of the bytes that was asked for; None for dense.
        shares: Parts of dense attention's bytes that the setting holds and reads on random keys.
        held: Part of the dense cache's bytes that this one held in the model.
        quality: What was measured in the model.
        ratio: Its perplexity over that of dense.
    """

    name: str
    settings: str
    budget: float | None
    shares: Shares
    held: float
    quality: Quality
    ratio: float

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `COLUMNS`."""
        quality = self.quality
        recall = (quality.found.get(protocol, {}).get(task) for protocol in PROTOCOLS for task in TASKS)
        return (
            self.name, self.settings, "" if self.budget is None else f"{self.budget:.0%}", f"{self.held:.0%}",
            f"{self.shares.read:.0%}", f"{quality.nbytes / 1e6:.1f}", f"{1 / quality.seconds:.1f}",
            f"{quality.perplexity:.3f} ({self.ratio - 1:+.1%})",
            *("" if part is None else f"{part:.0%}" for part in recall),
        )  # fmt: skip


@dataclass(frozen=True)
class CacheBench:
    """What `bench_cache` measured.

    Args:
        context: Tokens of a window or prompt.
        steps: Tokens decoded of each window.
        windows: Of text.
        tries: Recall tasks of each kind.
        table: Dense first, then by policy and falling budget.
        left_out: Policies and budgets that are not in the table, and why.
    """

    context: int
    steps: int
    windows: int
    tries: int
    table: tuple[CacheRow, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the table."""
        return [row.cells() for row in self.table]

    def markdown(self) -> str:
        """The table, for a document."""
        rule = ("---",) * 2 + ("---:",) * (len(COLUMNS) - 2)
        lines = [COLUMNS, rule, *(("`" + row[0] + "`", *row[1:]) for row in self.rows())]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bench_cache(
    model: Any, tokenizer: Any, context: int = 2048, *, steps: int = 64, windows: int = 2, tries: int = 4,
    budgets: Sequence[float] = BUDGETS, only: Sequence[str] | None = None, progress: Callable[[str], object] = str,
) -> CacheBench:  # fmt: skip
    """Run a model with every registered cache policy at some budgets, dense beside it.

    Args:
        model: A transformers causal language model in eval mode, without a recipe.
        tokenizer: Its tokenizer.
        context: Tokens of a window or prompt, question and answer included.
        steps: Of a window of text, how many are decoded one by one.
        windows: Of held-out text.
        tries: Recall tasks of each kind, each asked in both protocols; 0 for none.
        budgets: Parts of the bytes.
        only: Names of policies; None for all.
        progress: Told what is done next.

    Returns:
        The measurements.

    Raises:
        ValueError: If an argument is out of range, or longer than the model's context.
    """
    from transformers import DynamicCache

    from saccade.plug import PagedCache, Recipe, apply
    from saccade.plug.cache import cache_bytes

    config = model.config.get_text_config()
    if context > config.max_position_embeddings:
        raise ValueError(f"context={context}: expected at most {config.max_position_embeddings}, the model's")
    material = make_material(tokenizer, context, steps, windows, tries)
    chosen, left_out = candidates(context, config.num_hidden_layers, budgets, only)
    progress("dense")
    dense = measure_quality(model, DynamicCache, material, cache_bytes)
    table = [CacheRow("dense", "", None, Shares(1.0, 1.0), 1.0, dense, 1.0)]
    with apply(model, Recipe.uniform(model, "dense", {"engine": "saccade"})):

        def cached(policy: CachePolicy) -> Quality:
            return measure_quality(model, lambda: PagedCache(model, policy), material, cache_bytes)

        for candidate in chosen:
            progress(f"{candidate.name} at {candidate.budget:.0%}")
            try:
                table.append(_row(candidate, cached(candidate.policy), dense))
            except ValueError as error:
                left_out[f"{candidate.name} at {candidate.budget:.0%}"] = str(error)
    return CacheBench(context, steps, len(material.windows), tries, tuple(table), left_out)


def _row(candidate: Candidate, quality: Quality, dense: Quality) -> CacheRow:
    settings = ", ".join(f"{name}={value}" for name, value in candidate.settings.items())
    held, ratio = quality.nbytes / dense.nbytes, quality.perplexity / dense.perplexity
    return CacheRow(candidate.name, settings, candidate.budget, candidate.shares, held, quality, ratio)


__all__ = ["COLUMNS", "CacheBench", "CacheRow", "Material", "bench_cache"]
