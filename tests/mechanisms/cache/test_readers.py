"""Every policy that reads less, from the registry: over coded stores, after forks, and after tokens were taken back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.catalog import Card, cards
from saccade.mechanisms.cache import reading
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, compose
from saccade.mechanisms.cache.storage import Storage
from saccade.types import Kind

READERS = [card for card in cards() if card.kind is Kind.CACHE_POLICY and "selecting" in card.effects]
TOKENS, PROMPT, LAYERS = 40, 28, 4
FORMS = [
    Storage(bits=8),
    Storage(bits=4, group=4, zero_point=True),
    Storage(bits=2, group=4, zero_point=True),
    Storage(dtype=torch.bfloat16, page=8),
]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, TOKENS, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def decode(layers: list[CachedAttention], first: int, stop: int, *, whole: bool = False) -> Tensor:
    """Outputs of all layers for tokens first .. stop - 1, one by one or in one call."""
    sizes = [stop - first] if whole else [1] * (stop - first)
    parts = zip(*(x[:, :, first:stop].split(sizes, 2) for x in inputs()), strict=True)
    return torch.cat([torch.stack([layer(*part) for layer in layers]) for part in parts], 3)


def started(policy: CachePolicy) -> list[CachedAttention]:
    layers = CachedAttention.stack(policy, LAYERS)
    decode(layers, 0, PROMPT, whole=True)
    return layers


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_over_coded_stores(card: Card, form: Storage) -> None:
    """At full budget what is read is all that is stored, however it is; below it less is."""
    full = compose(read=card.build(**card.exact(TOKENS)), store=form)
    out = decode(started(full), PROMPT, TOKENS)
    expected = decode(started(compose(store=form)), PROMPT, TOKENS)
    rounded = 1e-5 if form.dtype is None else 0.01  # the engine rounds queries to the dtype of keys
    torch.testing.assert_close(out, expected, rtol=0, atol=rounded)
    layers = started(compose(read=card.build(**card.example), store=form))
    assert bool(decode(layers, PROMPT, TOKENS).isfinite().all())


@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_a_fork_and_its_origin_do_not_touch_each_other(card: Card) -> None:
    """A fork that goes on, or forgets, changes nothing in its origin, nor in what that keeps between steps."""
    policy = card.build(**card.example)
    layers, alone = started(policy), started(policy)
    decode(layers, PROMPT, PROMPT + 4)
    decode(alone, PROMPT, PROMPT + 4)
    forks = CachedAttention.stack(policy, LAYERS)
    for fork, layer in zip(forks, layers, strict=True):
        fork.kept = layer.kept.select(torch.tensor([1, 0]))
    assert bool(decode(forks, PROMPT, PROMPT + 3).isfinite().all())
    for fork in forks:
        fork.kept.crop(9)
    torch.testing.assert_close(decode(layers, PROMPT + 4, TOKENS), decode(alone, PROMPT + 4, TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_a_fork_goes_on_as_its_origin(card: Card) -> None:
    """What is kept between steps goes along, batch entry by batch entry."""
    policy = card.build(**card.example)
    layers = started(policy)
    decode(layers, PROMPT, PROMPT + 4)
    forks = CachedAttention.stack(policy, LAYERS)
    for fork, layer in zip(forks, layers, strict=True):
        fork.kept = layer.kept.select(torch.tensor([1, 0, 1])).select(torch.tensor([1, 2]))
        assert {name: kept.nbytes for name, kept in fork.kept.derived.items()} == {
            name: kept.nbytes for name, kept in layer.kept.derived.items()
        }
    torch.testing.assert_close(
        decode(forks, PROMPT + 4, TOKENS), decode(layers, PROMPT + 4, TOKENS), rtol=0, atol=0
    )  # fmt: skip


@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_tokens_taken_back_at_full_budget(card: Card) -> None:
    policy = card.build(**card.exact(TOKENS))
    layers, alone = started(policy), started(compose())
    decode(layers, PROMPT, PROMPT + 5)
    for layer in layers:
        layer.kept.crop(5)
        assert layer.kept.seen.tolist() == [PROMPT, PROMPT]
    torch.testing.assert_close(decode(layers, PROMPT, TOKENS), decode(alone, PROMPT, TOKENS), rtol=0, atol=1e-5)


def test_the_registry_has_readers() -> None:
    assert {card.target.read is not CachePolicy.read for card in READERS} == {True}
    assert len(READERS) > 5


@pytest.mark.parametrize("card", [x for x in cards() if x.kind is Kind.CACHE_POLICY], ids=lambda card: card.name)
def test_layers_said_to_be_alike(card: Card) -> None:
    """Of the same tokens a layer reads and keeps all if, and only if, the first that is alike to it does."""
    policy, tokens = card.build(**card.example), 160
    layers = CachedAttention.stack(policy, LAYERS + 2)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    sizes = [tokens - 3, 1, 1, 1]
    for part in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
        for layer in layers:
            layer(*part)
    did = [
        (layer.kept.tokens < 2 * tokens, layer.bytes_read < layer.kept.tokens * layer.kept.slot_nbytes)
        for layer in layers
    ]
    for number in range(len(layers)):
        first = policy.first_alike(number)
        assert policy.first_alike(first) == first <= number
        assert did[number] == did[first], f"layer {number} and {first}"


@pytest.mark.parametrize("card", READERS, ids=lambda card: card.name)
def test_copies_head_by_head_change_nothing(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied to be weighed comes in parts that stay in cache."""
    out = decode(started(card.build(**card.example)), PROMPT, TOKENS)
    monkeypatch.setattr(reading, "COPIED", 1)
    parts = decode(started(card.build(**card.example)), PROMPT, TOKENS)
    torch.testing.assert_close(parts, out, rtol=0, atol=1e-6)
