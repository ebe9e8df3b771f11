"""What the tuner may put into a layer, and why the rest of the registry is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import cards, get
from saccade.ops import attend, recording
from saccade.plug.choices import DENSE, Choice, label
from saccade.types import Geometry, Kind, Pattern


@dataclass(frozen=True)
class Candidate:
    """A mechanism with settings, or dense attention.

    Args:
        mechanism: Registry name, or "dense".
        settings: Its hyperparameters.
        dtype: What queries, keys and values are rounded to; None leaves them as they are.
    """

    mechanism: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    @classmethod
    def of(cls, choice: Choice) -> Candidate:
        """The candidate that a recipe chose."""
        return cls(choice.mechanism, dict(choice.settings), choice.dtype)

    @property
    def label(self) -> str:
        """`name(setting=value, ...) in dtype`."""
        return label(self.mechanism, self.settings, self.dtype)

    @property
    def key(self) -> str:
        """A stable name for files."""
        return json.dumps([self.mechanism, self.settings, self.dtype], sort_keys=True)

    def build(self) -> Any:
        """The mechanism; `ValueError` for dense attention, which is none."""
        if self.mechanism == DENSE:
            raise ValueError("mechanism='dense': expected a registered mechanism to build")
        return get(self.mechanism).build(**self.settings)

    def round(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the dtype that it computes in."""
        return tensors if self.dtype is None else tuple(x.to(getattr(torch, self.dtype)) for x in tensors)

    def attention(self) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
        """Causal attention of q, k, v and a scale as it computes them, in the dtype of q."""
        mechanism = None if self.mechanism == DENSE else self.build()

        def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            rounded = self.round(q, k, v)
            if mechanism is None:
                return attend(*rounded, causal=True, scale=scale).to(q.dtype)
            out: Tensor = mechanism(*rounded, geometry=Geometry(causal=True), scale=scale)
            return out.to(q.dtype)

        return run


def dense_candidate(device: str) -> Candidate:
    """Dense attention on Saccade's engine if that has a kernel of its own for it, else as the model has it."""
    x = torch.zeros(1, 1, 64, 16, device=device)
    with recording() as records:
        attend(x, x, x, causal=True)
    return Candidate(DENSE, {"engine": "saccade"} if records[0].impl == "cpu" else {})


def fast_dtype(model: Any) -> str | None:
    """What attention is faster in than in the model's dtype: bfloat16 for fp32 models where products of it are fast."""
    if model.dtype != torch.float32:
        return None
    if model.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    x = torch.zeros(1, 1, 64, 16, device=model.device, dtype=torch.bfloat16)
    with recording() as records:
        attend(x, x, x, causal=True)
    return "bfloat16" if "bf16" in (records[0].instruction_set or "") else None


def rounded(candidates: list[Candidate], dtype: str | None) -> list[Candidate]:
    """Candidates in `dtype`, dense attention on Saccade's engine before them; as they are for None.

    Nothing is scored in both dtypes: a head that bears leaving pairs out bears rounding too, whose error is less.

    Args:
        candidates: Mechanisms.
        dtype: As in `Candidate`.

    Returns:
        The candidates.
    """
    if dtype is None:
        return candidates
    engine = Candidate(DENSE, {"engine": "saccade"}, dtype)
    return [engine, *(replace(candidate, dtype=dtype) for candidate in candidates)]


def find_candidates(context: int, names: Iterable[str] | None = None) -> tuple[list[Candidate], dict[str, str]]:
    """Every training-free causal selector on its ladder at `context` tokens, and for the others why not.

    Args:
        context: Tokens of a prompt.
        names: Only these mechanisms; None means all that apply.

    Returns:
        `(candidates, left_out)`: `left_out` maps each other mechanism to the reason.

    Raises:
        ValueError: If a name is unknown, or named but not applicable.
    """
    wanted = None if names is None else {get(name).name for name in names}
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    for card in cards():
        reason = _why_not(card)
        if wanted is not None and card.name not in wanted:
            left_out[card.name] = "not asked for"
        elif reason is not None:
            if wanted is not None:
                raise ValueError(f"mechanisms={card.name!r}: cannot be tuned: {reason}")
            left_out[card.name] = reason
        else:
            for settings in card.ladder(context):  # type: ignore[misc]
                candidate = Candidate(card.name, dict(settings))
                if candidate not in found:
                    found.append(candidate)
    return found, left_out


def _why_not(card: Any) -> str | None:
    """Why the tuner cannot use this mechanism in a pretrained language model, or None."""
    if card.kind is not Kind.SELECTOR:
        return f"of kind {card.kind}: chooses no pairs that a layer could leave out"
    if not card.training_free:
        return "needs training"
    if Pattern.CAUSAL_SELF not in card.patterns:
        return "not causal"
    if card.prefill_only:
        return f"prefill only, so that the likelihood of a text does not measure it: {card.prefill_only}"
    if card.ladder is None:
        return "its card has no ladder of settings"
    return None


def every_other(candidates: list[Candidate]) -> list[Candidate]:
    """Every second step of each ladder, the most computed one included."""
    kept: list[Candidate] = []
    for name in dict.fromkeys(c.mechanism for c in candidates):
        ladder = [c for c in candidates if c.mechanism == name]
        kept += ladder[::-2][::-1]
    return kept
