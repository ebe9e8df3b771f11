"""What a tuning run will do and about how long it takes, before it does anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saccade.bench.measure import gemm_gflops
from saccade.tune.candidates import Candidate

SDPA_SHARE = 0.8
"""Speed of dense attention against a matrix product's, for the estimate."""

SHORTEST_QUESTION = 256
"""Tokens that a pass-key prompt has at least."""

PART_OF_DENSE = 0.33
"""Time of an average candidate against dense attention, for the estimate."""


@dataclass(frozen=True)
class Settings:
    """What `tune` is asked to do; see there.

    Args:
        context: Tokens of a prompt.
        budget: Largest allowed relative rise in perplexity.
        seed: Of the pass keys.
        confirmations: Mixtures tried end to end, at most.
        rounds: Held-out windows measured.
        questions: Pass keys to ask for: tokens of the prompt, and depth of the key in it.
    """

    context: int
    budget: float
    seed: int
    confirmations: int
    rounds: int
    questions: tuple[tuple[int, float], ...]

    @classmethod
    def make(cls, context: int, budget: float, seed: int, *, quick: bool) -> Settings:
        """Checked settings of a full or a quick run.

        Args:
            context: Tokens of a prompt, at least 256.
            budget: Largest allowed relative rise in perplexity, in (0, 1].
            seed: Of the pass keys.
            quick: Fewer confirmations, rounds and pass keys.

        Returns:
            The settings.

        Raises:
            ValueError: If `context` or `budget` is out of range.
        """
        if context < 256:
            raise ValueError(f"context={context}: expected at least 256 tokens")
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: expected a relative rise in perplexity in (0, 1], such as 0.01 for 1%")
        lengths = [n for n in (context // 4, context // 2) if n >= SHORTEST_QUESTION]
        depths = (0.25, 0.75) if quick else (0.1, 0.5, 0.9)
        questions = tuple((n, depth) for n in lengths for depth in depths)
        if not quick or not questions:
            questions += ((context, 0.5),)  # one, since the longest prompts take longest
        return cls(context, budget, seed, 2 if quick else 3, 1 if quick else 3, questions)


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Args:
        settings: Of the run.
        candidates: What will be scored in every layer.
        left_out: Other mechanisms and why.
        minutes: Estimated minutes of each stage on this machine.
        prefill_seconds: Estimated time of one dense prefill.
    """

    settings: Settings
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]
    minutes: dict[str, float] = field(default_factory=dict)
    prefill_seconds: float = 0.0

    @property
    def total_minutes(self) -> float:
        """All stages."""
        return sum(self.minutes.values())


def make_plan(model: Any, settings: Settings, candidates: list[Candidate], left_out: dict[str, str]) -> Plan:
    """Estimate the stages from the model's size and this machine's matrix-product speed."""
    config = model.config.get_text_config()
    device = str(model.device)
    rate = gemm_gflops(device, size=2048) * 1e9
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    head_dim = config.hidden_size // heads if head_dim is None else head_dim
    embedding = config.vocab_size * config.hidden_size
    dense_layers = sum(p.numel() for p in model.parameters()) - embedding

    def prefill(n: int) -> tuple[float, float]:
        attention = 2 * head_dim * heads * n * n * layers / (SDPA_SHARE * rate)
        return 2 * dense_layers * n / (SDPA_SHARE * rate) + attention, attention

    total, attention = prefill(settings.context)
    head = 2 * embedding * settings.context / rate
    keys = sum(prefill(length)[0] for length, _ in settings.questions)
    seconds = {
        "score candidates per layer": total + attention * PART_OF_DENSE * len(candidates),
        "search and confirm": (settings.confirmations + 1) * (total + head) + 2 * keys,
        "measure on held-out text": settings.rounds * (2 * total + 3 * head) + 2 * total,
        "pass keys": 2 * keys,
        "pictures and report": 1.2 * total,
    }
    return Plan(settings, tuple(candidates), left_out, {k: v / 60 for k, v in seconds.items()}, total)
