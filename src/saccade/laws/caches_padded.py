"""The laws for cache policies that need padded batches or a model: padding, and `generate()` through a `PagedCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import Broken, NotApplicable, expect, expect_close, expect_equal
from saccade.laws.caches_saved import goes_on_elsewhere
from saccade.laws.subjects import Subject
from saccade.mechanisms.cache.attention import CachedAttention

LAYERS, PROMPT, STEPS = 2, 40, 12
PADDING = 17
"""Places of padding before the second of two sequences."""

ONE_LENGTH = "take sequences of one length"
"""Words in a card's deviations where a prompt selects, by slots that sequences of other lengths have elsewhere."""


def padding(subject: Subject) -> str:
    """3. Padding gives 0 and goes nowhere, NaN in it too: a padded sequence, in its batch, equals it alone."""
    if any(ONE_LENGTH in line for line in subject.card.deviations):
        raise NotApplicable(f"by its card, calls with several tokens {ONE_LENGTH}; law 14 pads prompts in a model")
    problem = subject.problem(queries=PROMPT + STEPS).to(torch.float64)
    present = torch.ones(2, PROMPT, dtype=torch.bool, device=subject.device)
    present[1, :PADDING] = False
    padded, first, second = (CachedAttention.stack(subject.mechanism, LAYERS) for _ in range(3))
    prompt = [x[:, :, :PROMPT].clone() for x in problem.leaves]
    for x in prompt[1:]:
        x[1, :, :PADDING] = float("nan")
    steps = ([x[:, :, i : i + 1] for x in problem.leaves] for i in range(PROMPT, PROMPT + STEPS))
    pieces: list[tuple[list[Tensor], Tensor | None]] = [(prompt, present), *((step, None) for step in steps)]
    for number, (piece, shown) in enumerate(pieces):
        cut = 0 if number else PADDING
        for layer, one, other in zip(padded, first, second, strict=True):
            out = layer(*piece, present=shown)
            where = f"layer {layer.layer} in {f'step {number}' if number else 'the prompt'}"
            expect(bool((out[1, :, :cut] == 0).all()), f"a padded query's output is not 0, {where}")
            expect_close(out[:1], one(*(x[:1] for x in piece)), f"beside a padded sequence and alone, {where}")
            alone = other(*(x[1:, :, cut:] for x in piece))
            expect_close(out[1:, :, cut:], alone, f"behind padding and alone, {where}")
    return "in the prompt and in steps after it"


def in_a_model(subject: Subject) -> str:
    """14. `generate()` through a `PagedCache`: dense at full budget, a padded batch as one by one, files, undo."""
    try:
        from saccade.laws.models import tiny_llama
        from saccade.plug import LayerCache, PagedCache, PolicyChoice, Recipe, apply
        from saccade.plug.cache_recipe import axes_of
    except ImportError as error:
        raise NotApplicable(f"transformers is not installed: {error}") from error
    card = subject.card
    model, other = (tiny_llama(hidden=size, device=subject.device, spread=0.15).double() for size in (32, 64))
    ids = torch.randint(1, 60, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to(subject.device)
    before, logits = generated(model, ids)
    done = []
    if card.exact is not None:
        with apply(model, Recipe.uniform(model, "dense"), strict=True):
            tokens, got = generated(model, ids, PagedCache(model, card.build(**card.exact(PROMPT + STEPS))))
        expect_equal(tokens, before, "tokens at full budget and of dense attention")
        expect_close(got, logits, "logits at full budget and of dense attention", 1e-4)
        done.append("dense's tokens at full budget")
    choice = PolicyChoice(card.name, dict(card.example))
    recipe = Recipe.uniform(model, "dense", cache=LayerCache(**dict.fromkeys(axes_of(card.target), choice)))
    again = Recipe.from_json(recipe.to_json())
    expect(again == recipe, "a recipe changed on its round trip through JSON")
    with apply(model, again, strict=True):
        whole, _ = generated(model, ids, again.make_cache(model))
        shown = torch.ones_like(ids)
        shown[1, :PADDING] = 0
        hidden = ids.masked_fill(shown == 0, 0)
        together, both = generated(model, hidden, again.make_cache(model), attention_mask=shown)
        for row, cut in ((0, 0), (1, PADDING)):
            tokens, got = generated(model, hidden[row : row + 1, cut:], again.make_cache(model))
            expect_equal(together[row : row + 1, cut:], tokens, f"tokens of sequence {row} in a padded batch and alone")
            expect_close(both[row : row + 1], got, f"logits of sequence {row} in a padded batch and alone", 1e-4)
        expect_equal(whole[:1], together[:1], "tokens of a sequence beside another")
    done.append("a padded batch equals one by one")
    twin = tiny_llama(hidden=32, device=subject.device, spread=0.15).double()
    with apply(model, again, strict=True), apply(twin, again, strict=True):
        goes_on_elsewhere(model, twin, again, hidden, shown)
    done.append("saved and loaded it goes on")
    tokens, got = generated(model, ids)
    expect_equal(got, logits, "logits after undo")
    expect_equal(tokens, before, "tokens after undo")
    try:
        apply(other, recipe)
    except ValueError:
        return ", ".join(done)
    raise Broken("a recipe for another model was accepted")


def generated(model: Any, ids: Tensor, cache: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy: all tokens, and the logits of the new ones `[B, STEPS, V]`."""
    made = model.generate(
        ids, past_key_values=cache, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits, 1)


__all__ = ["in_a_model", "padding"]
