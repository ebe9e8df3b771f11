"""What KeyNorm and KeyDiff keep between steps is what all stored keys, looked at again, say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import _keys
from saccade.mechanisms.cache.base import CachePolicy, Step, compose, decode_step
from saccade.mechanisms.cache.key_norm import KeyNorm
from saccade.mechanisms.cache.keydiff import KeyDiff
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore

pytestmark = pytest.mark.quick

CALLS = (20, 1, 1, 1, 5, 1, 1, 1, 1)
"""Tokens of a prompt, of steps, of another chunk, and of steps."""

FORMS = (Storage(), Storage(dtype=torch.bfloat16), Storage(bits=8, normalise=True), Storage(bits=2, group=8))


def tokens(count: int) -> Tensor:
    x = torch.randn(2, 2, count, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, ::7] = 0.0  # no direction, and a length that reads as not known yet
    return x


def likeness(store: KVStore) -> Tensor:
    keys = store.keys.double()
    directions = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("bgnd,bgd->bgn", directions, directions.sum(2))


def by_norm(store: KVStore) -> Tensor:
    return store.keys.double().norm(dim=-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("policy", "cost"), [(KeyNorm(tokens=12, whole_layers=0), by_norm), (KeyDiff(tokens=12), likeness)]
)
def test_keeps_the_least_of_all_stored_keys(form: Storage, policy: CachePolicy, cost: type[CachePolicy]) -> None:
    """Also where a sequence is padded, after tokens were forgotten, and in a fork."""
    policy, k = compose(keep=policy, store=form), tokens(sum(CALLS))
    store, start = policy.store(), 0
    present = torch.ones(2, CALLS[0], dtype=torch.bool)
    present[1, :3] = False
    for number, count in enumerate(CALLS):
        part = k[:, :, start : start + count]
        before = store.fork()
        before.append(part, part, present if not start else None)
        expected = cost(before).masked_fill(~before.present, torch.inf).sort(-1).values[..., :12]
        decode_step(policy, store, part, part, part, present=present if not start else None)
        left = before.positions[..., None] == store.positions[:, :, None]
        found = cost(before).masked_fill(~(left.any(-1) & before.present), torch.inf).sort(-1).values[..., :12]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
        assert store.lengths.tolist() == [[12, 12]] * 2
        start += count
        if number == 6:
            store = store.fork()


def test_a_step_reads_its_new_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt no policy asks for a copy of all keys."""
    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    for policy in (KeyNorm(tokens=12, whole_layers=0), KeyDiff(tokens=12)):
        store = policy.store()
        decode_step(policy, store, *[x[:, :, :30]] * 3)
        with monkeypatch.context() as patch:
            patch.setattr(KVStore, "keys", property(lambda store: pytest.fail("all keys were copied")))
            for i in range(30, 40):
                decode_step(policy, store, *[x[:, :, i : i + 1]] * 3)


def test_norms_follow_tokens_that_are_forgotten_and_come_anew() -> None:
    x, policy = tokens(31), KeyNorm(tokens=12, whole_layers=0)
    store = policy.store()
    decode_step(policy, store, *[x[:, :, :30]] * 3)
    store.crop(5)
    store.append(*[x[:, :, 30:]] * 2)
    torch.testing.assert_close(_keys.key_norms(store).double(), by_norm(store), rtol=1e-6, atol=0)


def test_the_sum_is_taken_anew_where_the_eviction_did_not_follow() -> None:
    x = tokens(31)
    policy = KeyDiff(tokens=12)
    store = policy.store()
    store.append(*[x[:, :, :30]] * 2)
    assert policy.keep(x[:, :, :30], store, Step()) is not None
    store.crop(1)  # in its place
    norms = _keys.key_norms(store)
    directions = store.keys.double() / by_norm(store).clamp(min=1e-12)[..., None]
    torch.testing.assert_close(_keys.sum_of_directions(store, norms), directions.sum(2), rtol=1e-5, atol=1e-5)
