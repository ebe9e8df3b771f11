"""Recording what each layer's attention sees on calibration text, and scoring every candidate on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.passkey import Passkey, with_answer
from saccade.models.tasks import last_hidden_states
from saccade.plug import Observation, Recipe, watch
from saccade.tune.candidates import Candidate
from saccade.tune.score import CandidateScore, LayerInputs, score_layer


@dataclass(frozen=True, eq=False)
class Calibration:
    """The text that candidates are scored on: a retrieval prompt over calibration text, answer included.

    Args:
        ids: int64 `[1, N]`.
        focus: Bool `[N]`, the tokens from which the answer is read off.
    """

    ids: Tensor
    focus: Tensor

    @classmethod
    def from_passkey(cls, prompt: Passkey, tokenizer: Any) -> Calibration:
        """The prompt with its right answer; the focus is where the answer's tokens are predicted."""
        ids, answer = with_answer(tokenizer, prompt)
        focus = torch.zeros(len(ids), dtype=torch.bool)
        focus[-len(answer) - 1 : -1] = True
        return cls(ids[None], focus)


def score_model(
    model: nn.Module,
    calibration: Calibration,
    candidates: list[Candidate],
    known: Callable[[str], list[CandidateScore] | None],
    found: Callable[[str, list[CandidateScore]], None],
    exact: Recipe,
) -> None:
    """Run the model once and score the candidates in each layer as it passes.

    Args:
        model: A transformers causal language model.
        calibration: What to run.
        candidates: What to score; dense attention is always scored first.
        known: Scores of a layer from an earlier run, or None; such layers are skipped.
        found: Called with each layer's name and scores.
        exact: Dense attention, as the model runs meanwhile.
    """
    history: list[list[CandidateScore]] = []

    def see(layer: str, inputs: LayerInputs) -> None:
        rows = known(layer)
        if rows is None:
            rows = score_layer(inputs, candidates, history)
            found(layer, rows)
        history.append(rows)

    each_layer(model, calibration, exact, see)


def each_layer(
    model: nn.Module, calibration: Calibration, recipe: Recipe, see: Callable[[str, LayerInputs], None]
) -> None:
    """Run the model once and show what each layer's attention sees.

    Args:
        model: A transformers causal language model.
        calibration: What to run.
        recipe: What the layers run meanwhile.
        see: Called with each layer's name and inputs, in order.
    """
    residuals: dict[str, Tensor] = {}

    def observe(seen: Observation) -> None:
        focus = calibration.focus.to(seen.q.device)
        scale = seen.q.shape[3] ** -0.5 if seen.scale is None else seen.scale
        residual = residuals.get(seen.layer)
        see(seen.layer, LayerInputs(seen.q, seen.k, seen.v, scale, output_projection(seen), residual, focus))

    hooks = [
        parent.register_forward_pre_hook(_keep_norm(residuals, name), with_kwargs=True)
        for name, parent in decoder_layers(model).items()
    ]
    try:
        with torch.no_grad(), watch(model, observe, recipe):
            last_hidden_states(model, calibration.ids)
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """For each attention layer's name, the module around it, whose input is the residual stream."""
    from saccade.plug import attention_layers

    return {name: model.get_submodule(name.rpartition(".")[0]) for name in attention_layers(model) if "." in name}


def _keep_norm(residuals: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.ndim == 3:
            residuals[name] = hidden[0].float().norm(dim=-1)

    return hook


def output_projection(seen: Observation) -> Tensor | None:
    """The `[C, H * E]` weight that mixes the heads' outputs, under the names transformers uses, or None."""
    width = seen.q.shape[1] * seen.v.shape[3]
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        weight = getattr(getattr(seen.module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == width:
            return weight.detach()
    return None
