"""What a tuning run will do and about how long it takes, before it does anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade.bench.measure import gemm_gflops, interleaved
from saccade.ops import attend
from saccade.tune.caches import CacheCandidate
from saccade.tune.candidates import DENSE, Candidate

LINEAR_SHARE = 0.8
"""Speed of the model's other layers against a large matrix product's, for the estimate."""

TIMED_TOKENS = 2048
"""Tokens of the attention that is timed for the estimate."""

SHORTEST_QUESTION = 256
"""Tokens that a pass-key prompt has at least."""

CACHE_TRIALS, TAIL_COST, CACHE_SCORE_SECONDS = 2, 1.2, 0.1
"""Trials of caches that are usual, the time of a prompt and its tail over that of a prompt alone, and the time of
scoring a cache in a layer, for the estimate."""

PART_OF_DENSE = 0.36
"""Time of scoring an average candidate against dense attention of all queries, for the estimate."""


@dataclass(frozen=True)
class Settings:
    """What `tune` is asked to do; see there.

    Args:
        context: Tokens of a prompt.
        budget: Largest allowed relative rise in perplexity.
        seed: Of the pass keys.
        confirmations: Mixtures tried end to end, at most.
        rounds: Held-out windows measured.
        picture: Tokens of the text that pictures are drawn from.
        questions: Pass keys to ask for on held-out text: tokens of the prompt, and depth of the key in it.
        trial_questions: The same for the mixtures tried in the search, on calibration text.
        cache_budget: Part of the dense cache's bytes to aim for; None keeps everything.
    """

    context: int
    budget: float
    seed: int
    confirmations: int
    rounds: int
    picture: int
    questions: tuple[tuple[int, float], ...]
    trial_questions: tuple[tuple[int, float], ...]
    cache_budget: float | None = None

    @classmethod
    def make(
        cls, context: int, budget: float, seed: int, *, quick: bool, cache_budget: float | None = None
    ) -> Settings:
        """Checked settings of a full or a quick run.

        Args:
            context: Tokens of a prompt, at least 256.
            budget: Largest allowed relative rise in perplexity, in (0, 1].
            seed: Of the pass keys.
            quick: Fewer confirmations, rounds and pass keys.
            cache_budget: Part of the dense cache's bytes to aim for, in (0, 1), or None.

        Returns:
            The settings.

        Raises:
            ValueError: If `context` or a budget is out of range.
        """
        if context < 256:
            raise ValueError(f"context={context}: expected at least 256 tokens")
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: expected a relative rise in perplexity in (0, 1], such as 0.01 for 1%")
        if cache_budget is not None and not 0 < cache_budget < 1:
            raise ValueError(
                f"cache_budget={cache_budget}: expected a part of the dense cache's bytes in (0, 1), or None"
            )
        lengths = [n for n in (context // 4, context // 2) if n >= SHORTEST_QUESTION]
        depths = (0.5,) if quick else (0.1, 0.5, 0.9)
        questions = tuple((n, depth) for n in lengths for depth in depths)
        # The longest prompts take longest, but a key is lost there first: the search asks for more of them.
        at_context = () if quick and questions else (0.25, 0.75)
        trials = (0.5,) if quick else (0.2, 0.5, 0.8)
        return cls(
            context, budget, seed, 2 if quick else 3, 1 if quick else 3, context // 2 if quick else context,
            questions + tuple((context, depth) for depth in at_context),
            questions + tuple((context, depth) for depth in trials), cache_budget,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Args:
        settings: Of the run.
        candidates: What will be scored in every layer.
        left_out: Other mechanisms and why.
        minutes: Estimated minutes of each stage on this machine.
        prefill_seconds: Estimated time of one dense prefill.
        caches: Caches that will be scored in every layer.
    """

    settings: Settings
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]
    minutes: dict[str, float] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    caches: tuple[CacheCandidate, ...] = ()

    @property
    def total_minutes(self) -> float:
        """All stages."""
        return sum(self.minutes.values())


def make_plan(
    model: Any, settings: Settings, candidates: list[Candidate], left_out: dict[str, str],
    caches: Sequence[CacheCandidate] = (),
) -> Plan:  # fmt: skip
    """Estimate the stages from the model's size and this machine's speed in matrix products and attention."""
    config = model.config.get_text_config()
    device = str(model.device)
    rate = gemm_gflops(device, size=2048) * 1e9
    embedding = config.vocab_size * config.hidden_size
    dense_layers = sum(p.numel() for p in model.parameters()) - embedding
    pairs = {
        name: config.num_hidden_layers * seconds
        for name, seconds in _seconds_per_pair(model, settings, candidates).items()
    }

    def prefill(n: int, engine: str) -> float:
        return 2 * dense_layers * n / (LINEAR_SHARE * rate) + pairs[engine] * n * n

    dense, tuned = prefill(settings.context, "model"), prefill(settings.context, "saccade")
    attention, scored = (pairs[engine] * settings.context**2 for engine in ("saccade", "scored"))
    head = 2 * embedding * settings.context / rate
    trial_keys = sum(prefill(length, "saccade") for length, _ in settings.trial_questions)
    whole = sum(length == settings.context for length, _ in settings.trial_questions)
    keys = sum(prefill(length, engine) for length, _ in settings.questions for engine in ("model", "saccade"))
    seconds = {
        "score candidates per layer": tuned + attention + scored * PART_OF_DENSE * len(candidates),
        "search and confirm": (1 + 0.6 * settings.confirmations) * (trial_keys + whole * head),
        "measure on held-out text": (settings.rounds + 1) * (dense + tuned) + settings.rounds * 3 * head,
        "pass keys": keys,
        "pictures and report": 1.2 * prefill(settings.picture, "saccade"),
    }
    if settings.cache_budget is not None:
        scoring = tuned + attention + len(caches) * CACHE_SCORE_SECONDS * config.num_hidden_layers
        seconds["search caches"] = scoring + CACHE_TRIALS * TAIL_COST * trial_keys
        seconds["measure on held-out text"] += TAIL_COST * settings.rounds * (dense + tuned)
    return Plan(settings, tuple(candidates), left_out, {k: v / 60 for k, v in seconds.items()}, dense, tuple(caches))


def _seconds_per_pair(model: Any, settings: Settings, candidates: list[Candidate]) -> dict[str, float]:
    """Time of causal attention per pair of tokens and layer: the model's, Saccade's, and that as candidates round."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    tokens = min(settings.context, TIMED_TOKENS)
    q, k, v = (
        torch.randn(1, count, tokens, head_dim, device=model.device, dtype=model.dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = {
        "model": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        "saccade": lambda: attend(q, k, v, causal=True),
        "scored": lambda: Candidate(DENSE, dtype=candidates[0].dtype if candidates else None).attention()(
            q, k, v, None
        ),
    }
    times = interleaved(calls, 3, device=str(model.device))
    return {name: min(seconds) / tokens**2 for name, seconds in times.items()}
