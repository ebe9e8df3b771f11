"""`PagedCache` in `generate()`: the same tokens as dense at full budget, less memory below it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.chai import Chai
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.tidal_decode import TidalDecode
from saccade.plug import Choice, LayerRecipe, PagedCache, Recipe, apply, explain
from saccade.plug.cache import cache_in_words

Build = Callable[..., Any]
FULL = [
    Everything(),
    H2O(heavy=64, recent=64),
    SinkRecent(sinks=4, recent=100),
    TidalDecode(tokens=100, first_selection=0, reselection=None),
]
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "dtype": torch.float32}


def generate(model: Any, ids: Tensor, policy: CachePolicy | None = None, **options: Any) -> Tensor:
    cache = None if policy is None else PagedCache(model, policy)
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("policy", FULL, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("settings", [None, {"engine": "saccade"}])
def test_full_budget_gives_the_same_tokens(tiny: Build, ids: Tensor, policy: CachePolicy, settings: Any) -> None:
    model = tiny()
    expected = generate(model, ids)
    with apply(model, Recipe.uniform(model, "dense", settings), strict=True):
        assert torch.equal(generate(model, ids, policy), expected)
        assert "decode_attend" in str(explain(model))
    assert torch.equal(generate(model, ids), expected)


def test_a_policy_that_needs_weights_gets_those_of_rounded_heads(tiny: Build, ids: Tensor) -> None:
    model = tiny().float()
    base = Recipe.uniform(model, "dense")
    engine = {"engine": "saccade"}
    choices = (Choice((0, 2), "dense", engine, dtype="bfloat16"), Choice((1, 3), "dense", engine))
    layer = LayerRecipe(choices, (Choice("all", "dense"),))
    recipe = Recipe(base.model, {"model.layers.0.self_attn": layer})  # the other layer is not named
    with apply(model, recipe, strict=True), torch.no_grad():
        rounded = model(ids, past_key_values=PagedCache(model, H2O(heavy=4, recent=6))).logits
        plain = model(ids).logits
    with torch.no_grad():
        exact = model(ids).logits
    assert torch.allclose(rounded, plain, atol=1e-5)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize(
    "first",
    [
        Choice("all", "dense"), Choice("all", "sink_window", {"sinks": 1, "window": 8}),
        Choice("all", "dense", {"engine": "saccade"}, dtype="bfloat16"),
    ],
    ids=["dense", "sparse", "rounded"],
)  # fmt: skip
def test_heads_share_keys_after_any_prefill(tiny: Build, ids: Tensor, first: Choice) -> None:
    """CHAI's clusters serve a dense prompt and decoding, and decoding alone where the recipe changes the prefill."""
    model = tiny()
    base = Recipe.uniform(model, "dense")
    recipe = Recipe(base.model, dict.fromkeys(base.layers, LayerRecipe((first,), (Choice("all", "dense"),))))
    with apply(model, recipe, strict=True), torch.no_grad():
        cache = PagedCache(model, Chai(heads=0.5))
        logits = model(ids, past_key_values=cache).logits
        everything = PagedCache(model, Everything())
        expected = model(ids, past_key_values=everything).logits
        assert torch.allclose(logits, expected) is (first != Choice("all", "dense"))
        assert cache.nbytes < 0.9 * everything.nbytes
        model(ids[:, :1], past_key_values=cache)
    for layer in cache.layers:
        assert isinstance(layer.store, SharedKeyStore)
        assert bool(layer.store.grouped.all())
        assert layer.store.table.shares


def test_a_cache_in_words(tiny: Build) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        assert cache_in_words(PagedCache(model, Everything())) == "PagedCache: everything"
        mixed = PagedCache(model, [compose(store=Storage(bits=8)), Everything()])
        assert cache_in_words(mixed) == "PagedCache: store bits=8 in 1 layers; everything in 1"
    assert cache_in_words(DynamicCache()) == "DynamicCache"


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Qwen3", "GptOss"])
def test_models_with_windows_caps_and_sinks(tiny: Build, ids: Tensor, family: str) -> None:
    extra = {"sliding_window": 16} if family != "Qwen3" else {}
    model = tiny(family, attn_implementation="eager", **extra, **(EXPERTS if family == "GptOss" else {}))
    expected = generate(model, ids)
    with apply(model, Recipe.uniform(model, "dense")):
        cache = PagedCache(model, Everything())
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert torch.equal(out, expected)
    windowed = [layer for layer in cache.layers if not layer.store.complete]
    assert len(windowed) == {"Mistral": 2, "Qwen3": 0}.get(family, 1)
    assert all(len(layer.store) == 16 for layer in windowed)


@pytest.mark.parametrize("policy", [*FULL, H2O(heavy=4, recent=6), SinkRecent(sinks=2, recent=9)], ids=repr)
def test_left_padded_batch_equals_one_by_one(tiny: Build, ids: Tensor, policy: CachePolicy) -> None:
    model, short = tiny(), 23
    padded, keep = ids.clone(), torch.ones_like(ids)
    padded[1, : 40 - short] = 0
    keep[1, : 40 - short] = 0
    with apply(model, Recipe.uniform(model, "dense", {"engine": "saccade"})):
        together = generate(model, padded, policy, attention_mask=keep)
        assert torch.equal(together[:1], generate(model, ids[:1], policy))
        assert torch.equal(together[1:, 40 - short :], generate(model, padded[1:, 40 - short :], policy))


def test_a_policy_per_layer_evicts_after_the_prompt_and_while_decoding(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        cache = PagedCache(model, [H2O(heavy=3, recent=4), compose(keep=SinkRecent(2, 6), store=Storage(bits=8))])
        with torch.no_grad():
            model(ids, past_key_values=cache)
            assert [layer.store.lengths.unique().tolist() for layer in cache.layers] == [[7], [7]]
            held = cache.nbytes
            for _ in range(5):
                model(ids[:, :1], past_key_values=cache)
    assert cache.nbytes == held
    assert cache.get_seq_length() == 45
    assert cache.layers[1].store.seen.tolist() == [45, 45]


@torch.no_grad()
def test_what_is_kept_keeps_its_place(tiny: Build, ids: Tensor) -> None:
    model, token = tiny(), ids[:, :1]
    whole = DynamicCache()
    model(ids, past_key_values=whole)
    hidden = torch.ones(41, dtype=torch.bool)
    hidden[[0, 1, *range(35, 41)]] = False  # the token to come is one of the six
    mask = torch.zeros(len(ids), 1, 1, 41, dtype=model.dtype).masked_fill(hidden, -torch.inf)
    expected = model(token, past_key_values=whole, attention_mask=mask).logits
    with apply(model, Recipe.uniform(model, "dense")):
        cache = PagedCache(model, SinkRecent(sinks=2, recent=6))
        model(ids, past_key_values=cache)
        found = model(token, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_chunks_and_a_second_turn_equal_one_prompt(tiny: Build, ids: Tensor, family: str) -> None:
    model = tiny(family, **({"sliding_window": 16} if family == "Mistral" else {}))
    with apply(model, Recipe.uniform(model, "dense")), torch.no_grad():
        expected = model(ids).logits
        cache = PagedCache(model, Everything())
        parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 20, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-6)


def test_beams_and_crop(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    expected = generate(model, ids, num_beams=3)
    with apply(model, Recipe.uniform(model, "dense")):
        assert torch.equal(generate(model, ids, Everything(), num_beams=3), expected)
        cache = PagedCache(model, Everything())
        with torch.no_grad():
            first = model(ids, past_key_values=cache).logits[:, -1]
            cache.crop(-1)
            assert cache.get_seq_length() == 39
            again = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(again, first, rtol=0, atol=1e-6)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3]))
            after = model(ids[1:, :1], past_key_values=cache).logits
            cache.reset()
            whole = model(torch.cat([ids, ids[:, :1]], 1), past_key_values=cache).logits
            torch.testing.assert_close(after[0, -1], whole[1, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "policy", [SnapKV(tokens=16, window=4), compose(keep=SnapKV(tokens=16, window=4), store=Storage(bits=8))], ids=repr
)
def test_assisted_generation_over_a_prompt_that_was_cut(tiny: Build, ids: Tensor, policy: CachePolicy) -> None:
    """Wrong guesses, which came after the cut, are taken back: the same tokens as one by one."""
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        expected = generate(model, ids[:1], policy)
        cropped = []
        cache = PagedCache(model, policy)
        cache.crop = lambda count: cropped.append(count) or PagedCache.crop(cache, count)  # type: ignore[method-assign]
        out = model.generate(
            ids[:1], past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
    assert any(cropped)
    assert torch.equal(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("policy", [Everything(), SnapKV(tokens=16, window=4)], ids=repr)
def test_a_prompt_read_once_for_several_questions(tiny: Build, ids: Tensor, policy: CachePolicy) -> None:
    """`deepcopy`, as transformers' guide has it: each copy goes on by itself, and what is the same is held once."""
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        prompt = PagedCache(model, policy)
        model(ids, past_key_values=prompt)
        before = prompt.nbytes
        copies = [deepcopy(prompt) for _ in range(2)]
        assert [cache.nbytes for cache in copies] == [before] * 2
        for number, cache in enumerate(copies):
            alone = PagedCache(model, policy)
            model(ids, past_key_values=alone)
            for start in (3 + number, 20 + number):
                question = ids[:, start : start + 1]
                assert torch.equal(
                    model(question, past_key_values=cache).logits, model(question, past_key_values=alone).logits
                )
        assert prompt.get_seq_length() == ids.shape[1]


def test_bad_use_raises_one_error_and_leaves_the_cache(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="model: no recipe is applied, expected saccade.apply"):
        PagedCache(model, Everything())
    with pytest.raises(ValueError, match="model of type Linear: expected a transformers model with a cache"):
        PagedCache(torch.nn.Linear(2, 2), Everything())
    with apply(model, Recipe.uniform(model, "dense")):
        with pytest.raises(ValueError, match="expected a CachePolicy, or one for each of 2 layers"):
            PagedCache(model, [Everything()])
        cache = PagedCache(model, H2O(heavy=2, recent=2))
        with torch.no_grad():
            model(ids, past_key_values=cache)
            with pytest.raises(ValueError, match=r"crop\(-1\): layer 0 has given tokens up since \(H2O.* at most 0,"):
                cache.crop(-1)
            with pytest.raises(ValueError, match="attention_mask of the caller's own .Tensor.: expected causal"):
                model(
                    ids, past_key_values=PagedCache(model, Everything()), attention_mask=torch.ones(2, 1, 40, 40).bool()
                )
    with pytest.raises(ValueError, match="model: no recipe is applied"):
        model(ids[:, :1], past_key_values=cache)
    sparse = {"window": 6, "sinks": 2, "block": 8}
    with apply(model, Recipe.uniform(model, "sink_window", sparse)), torch.no_grad():
        with pytest.raises(ValueError, match=r"mechanism='sink_window': .* H2O\(.*\) needs all"):
            model(ids, past_key_values=PagedCache(model, H2O()))
        cache = PagedCache(model, Everything())
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="mechanism='sink_window': expected dense attention in the recipe where"):
            model(ids[:, :1], past_key_values=cache)


def test_a_second_turn_runs_dense_over_the_cache_and_says_so(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    exact = Recipe.uniform(model, "sink_window", {"window": 64, "sinks": 0}, decode=False)  # sees all of the first turn
    with torch.no_grad():
        expected = model(ids).logits[:, 24:]
        with apply(model, exact):
            cache = PagedCache(model, Everything())
            model(ids[:, :24], past_key_values=cache)
            found = model(ids[:, 24:], past_key_values=cache).logits
            row = explain(model).rows[0]
        assert torch.allclose(found, expected, atol=1e-9)
        assert (row.phase, row.mechanism, row.queries) == ("prefill", "sink_window", 16)
        assert row.fallback == "earlier tokens are in a PagedCache, and its policy says what is read of them"
        with apply(model, exact, strict=True):
            cache = PagedCache(model, Everything())
            model(ids[:, :24], past_key_values=cache)
            with pytest.raises(RuntimeError, match="cannot run sink_window: earlier tokens are in a PagedCache"):
                model(ids[:, 24:], past_key_values=cache)


def test_a_saved_cache_goes_on_and_a_foreign_one_is_refused(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "cache.safetensors"
    policy = H2O(heavy=6, recent=6)
    with apply(model, Recipe.uniform(model, "dense")), torch.no_grad():
        cache, other = PagedCache(model, policy), PagedCache(model, policy)
        model(ids, past_key_values=cache)
        cache.save(path)
        other.load(path)
        assert other.get_seq_length() == 40
        expected = model(ids[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(model(ids[:, :1], past_key_values=other).logits, expected, rtol=0, atol=0)
        packed = PagedCache(model, compose(keep=policy, store=Storage(bits=8)))
        with pytest.raises(ValueError, match=r"layer 0 has a store of the form .*'bits': None.*, expected .*'bits': 8"):
            packed.load(path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match="not a whole cache"):
            other.load(path)
        assert other.get_seq_length() == 41
        cache.save(path)
    stranger = tiny(hidden_size=16)
    with apply(stranger, Recipe.uniform(stranger, "dense")):
        other = PagedCache(stranger, policy)
    with pytest.raises(ValueError, match="a cache of another model, expected one of this"):
        other.load(path)


@torch.no_grad()
def test_refused_calls_and_files_leave_the_running_generation(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    policy = H2O(heavy=6, recent=6)

    def go_on(model: Any, cache: PagedCache, token: Tensor, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(token)
        return found

    model, stranger = tiny(), tiny(hidden_size=16)
    with apply(model, Recipe.uniform(model, "dense")):
        expected = go_on(model, PagedCache(model, policy), ids, 6)
        cache = PagedCache(model, policy)
        found = go_on(model, cache, ids, 2)
        cut, foreign = tmp_path / "cut", tmp_path / "foreign"
        cache.save(cut)
        cut.write_bytes(cut.read_bytes()[:-1])
    with apply(stranger, Recipe.uniform(stranger, "dense")):
        other = PagedCache(stranger, policy)
        stranger(ids, past_key_values=other)
        other.save(foreign)
    with apply(model, Recipe.uniform(model, "sink_window", {"window": 6, "sinks": 2, "block": 8})):
        with pytest.raises(ValueError, match="mechanism='sink_window': expected dense attention in the recipe where"):
            model(found[-1], past_key_values=cache)
        refused = PagedCache(model, policy)
        with pytest.raises(ValueError, match=r"mechanism='sink_window': .* H2O\(.*\) needs all its weights"):
            model(ids, past_key_values=refused)
        assert (refused.get_seq_length(), refused.nbytes) == (0, 0)
    for path, message in ((cut, "not a whole cache"), (foreign, "a cache of another model"), (tmp_path, "not a whole")):
        with pytest.raises(ValueError, match=message):
            cache.load(path)
    with apply(model, Recipe.uniform(model, "dense")):
        found += go_on(model, cache, found[-1], 4)
    assert torch.equal(torch.cat(found), torch.cat(expected))
