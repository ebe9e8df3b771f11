"""`PagedCache.save` and `load`: generation goes on elsewhere as it would have here, and refusals disturb nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.chai import Chai
from saccade.mechanisms.cache.files import CacheFileError, _digest
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.instinfer import InstInfer
from saccade.mechanisms.cache.kivi import Kivi
from saccade.mechanisms.cache.lamina import Lamina
from saccade.mechanisms.cache.quest import Quest
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.zipcache import ZipCache
from saccade.plug import PagedCache, Recipe, apply

safetensors = pytest.importorskip("safetensors.torch")

Build = Callable[..., Any]
KIVI = Kivi(bits=2, group=4, recent=8, channels=None)
POLICIES: dict[str, CachePolicy | list[CachePolicy]] = {
    "packed": KIVI,
    "salient": ZipCache(block=10),
    "shared keys": Chai(heads=0.5),
    "elsewhere": Lamina(threads=1),
    "8 bits elsewhere": Lamina(bits=8, threads=1),
    "in a drive": InstInfer(resident=0.5),
    "composed": compose(keep=SnapKV(tokens=20, window=6), read=Quest(tokens=8, page=4), store=Storage(bits=8)),
    "by layer": [Chai(heads=0.5), KIVI],
    "here and elsewhere": [H2O(heavy=6, recent=6), Lamina(threads=1)],
}


def logits(model: Any, cache: PagedCache, tokens: Tensor, steps: int) -> list[Tensor]:
    """Of the prompt, or of next tokens `[B, 1]`, and of `steps - 1` more that are chosen greedily."""
    found = []
    for _ in range(steps):
        found.append(model(tokens, past_key_values=cache).logits[:, -1:])
        tokens = found[-1].argmax(-1)
    return found


def forged(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Give a file another `about`, with a digest that is right."""
    with safetensors.safe_open(path, framework="pt") as file:
        header, found = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    about = json.loads(header["about"])
    change(about)
    header["about"] = json.dumps(about)
    header["digest"] = _digest(header, found)
    safetensors.save_file(found, path, metadata=header)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_generation_goes_on_elsewhere_and_a_damaged_file_disturbs_nothing(
    tiny: Build, ids: Tensor, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, other, path = tiny(dtype=dtype), tiny(dtype=dtype), tmp_path / "cache.safetensors"
    recipe = Recipe.uniform(model, "dense")
    with apply(model, recipe), apply(other, recipe):
        cache, loaded = PagedCache(model, POLICIES[name]), PagedCache(other, POLICIES[name])
        first = logits(model, cache, ids, 6)
        cache.save(path)
        loaded.load(path)
        assert loaded.get_seq_length() == 45
        path.write_bytes(path.read_bytes()[:-3] + b"???")
        with pytest.raises(CacheFileError, match="not a whole cache"):
            cache.load(path)
        token = first[-1].argmax(-1)
        here, there = logits(model, cache, token, 8), logits(other, loaded, token, 8)
    assert torch.equal(torch.cat(there), torch.cat(here))


@pytest.mark.parametrize("name", ["packed", "shared keys", "elsewhere"])
@torch.no_grad()
def test_generate_goes_on_from_a_file(tiny: Build, ids: Tensor, name: str, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "cache.safetensors"
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    with apply(model, Recipe.uniform(model, "dense")):
        caches = [PagedCache(model, POLICIES[name]) for _ in range(2)]
        text = model.generate(ids, past_key_values=caches[0], **options | {"max_new_tokens": 5, "min_new_tokens": 5})
        caches[0].save(path)
        caches[1].load(path)
        outs = [model.generate(text, past_key_values=cache, **options) for cache in caches]
    assert torch.equal(*outs)


@torch.no_grad()
def test_a_prompt_goes_on_in_the_midst(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model, path, policy = tiny(), tmp_path / "cache.safetensors", SnapKV(tokens=16, window=6, prompt=40)
    with apply(model, Recipe.uniform(model, "dense")):
        cache, loaded = (PagedCache(model, policy) for _ in range(2))
        model(ids[:, :36], past_key_values=cache)  # two tokens of the window have voted
        cache.save(path)
        loaded.load(path)
        for tokens in (ids[:, 36:], ids[:, :1]):
            here, there = (model(tokens, past_key_values=some).logits for some in (cache, loaded))
            assert torch.equal(here, there)
        assert [len(layer.store) for layer in loaded.layers] == [17, 17]


@torch.no_grad()
def test_a_step_that_failed_midway_is_not_saved(
    tiny: Build, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny(), tmp_path / "cache.safetensors"
    with apply(model, Recipe.uniform(model, "dense")):
        cache, loaded = (PagedCache(model, Everything()) for _ in range(2))
        token = logits(model, cache, ids, 1)[-1].argmax(-1)
        with monkeypatch.context() as patch:
            patch.setattr("saccade.plug.cached.evict_after", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
            for some in (cache, loaded):
                with pytest.raises(MemoryError, match="no memory"):
                    model(token, past_key_values=some)
        cache.save(path)
        loaded.load(path)  # which has failed too
        assert loaded.get_seq_length() == 40
        assert torch.equal(*(torch.cat(logits(model, some, token, 3)) for some in (cache, loaded)))


@torch.no_grad()
def test_tokens_can_be_taken_back_as_before(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model, path, policy = tiny(), tmp_path / "cache.safetensors", Kivi(bits=8, group=4, recent=6, channels=None)
    with apply(model, Recipe.uniform(model, "dense")):
        cache, loaded = (PagedCache(model, policy) for _ in range(2))
        token = logits(model, cache, ids, 4)[-1].argmax(-1)
        cache.save(path)
        loaded.load(path)
        assert [layer.cut for layer in loaded.layers] == [layer.cut for layer in cache.layers] == [42, 42]
        for some in (cache, loaded):
            with pytest.raises(ValueError, match="expected at most 1, or a policy"):
                some.crop(-2)
            some.crop(-1)
        assert torch.equal(*(torch.cat(logits(model, some, token, 3)) for some in (cache, loaded)))


@torch.no_grad()
def test_what_a_file_says_of_a_text_is_checked(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "cache.safetensors"
    with apply(model, Recipe.uniform(model, "dense")):
        cache = PagedCache(model, KIVI)
        model(ids, past_key_values=cache)
        cache.save(path)
        for length in (39, -1, None, 1e9, True, "40"):
            forged(path, lambda about, length=length: about.update(length=length))
            with pytest.raises(CacheFileError, match=r"length=.*, expected at least \[40, 40\] tokens"):
                cache.load(path)
        forged(path, lambda about: about.update(length=44))  # a padded text's
        cache.load(path)
        assert cache.get_seq_length() == 44
        for cuts in (5, [40], [40, 45], [True, 40], [40, -1], {}):
            forged(path, lambda about, cuts=cuts: about.update(cuts=cuts))
            with pytest.raises(CacheFileError, match=r"cuts=.*, expected a number up to 44 for each layer"):
                cache.load(path)
        forged(path, lambda about: about.pop("model"))
        with pytest.raises(CacheFileError, match="a cache of another model"):
            cache.load(path)
