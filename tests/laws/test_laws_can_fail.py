"""A check that cannot fail is a defect: for every law, mechanisms that break it and must be found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from saccade.catalog import Card
from saccade.catalog import card as registry
from saccade.catalog.card import EFFECTS
from saccade.laws import LAWS, processes, run_law
from saccade.laws.suite import FORMS
from saccade.mechanisms.base import ALL_PATTERNS, Intervention, Layer, Mixer, Probe, Reduced, Reducer, Score, Selector
from saccade.mechanisms.cache._derived import Derived
from saccade.mechanisms.cache.base import CachePolicy, best
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.diffusion.base import OutputReuse
from saccade.mechanisms.where.sink_window import SinkWindow
from saccade.ops import attend
from saccade.types import BlockLayout, Kind, Pattern, TokenIndex

EVERYTHING = frozenset({"backward", "gqa", "segments", "streaming"})
CAUSAL = frozenset({Pattern.CAUSAL_SELF})


def card_of(target: type, kind: Kind, **facts: Any) -> Card:
    """A card that is not registered."""
    defaults = {"patterns": ALL_PATTERNS, "supports": EVERYTHING, "training_free": True, "complexity": "N^2"}
    card = Card(name="broken", kind=kind, target=target, room="where", summary="", **{**defaults, **facts})
    target.card = card
    return card


class Softmax(Score):
    """Keeps every law; the broken ones differ from it in one thing."""

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        floor = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, floor).softmax(-1).masked_fill(~mask, 0.0)


class Imprecise(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, impl: str = "auto", **options: Any) -> Tensor:
        out = super().__call__(q, k, v, impl=impl, **options)
        return out * 1.0001 if impl == "auto" and out.dtype == torch.float32 else out


class NoKeyGradient(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k.detach(), v, **options)


class LeaksPadding(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, **options) + v.mean()


class FillsEmptyRows(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, **options) + 1


class SeesTheFuture(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, **options) + 1e-6 * v.sum(2, keepdim=True).mean(1, keepdim=True)


class CountsQueries(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, scale=1 / q.shape[2], **options)


class MixesTheBatch(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v - v.mean(0), **options)


class NumbersHeads(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q * torch.arange(q.shape[1], dtype=q.dtype)[:, None, None], k, v, **options)


class FirstGroupOnly(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, **options) / k.shape[1]


class LeavesMemory(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        whole = super().__call__(q, k, v, **options)
        out = torch.empty_like(whole)
        out[:, :, :-1] = whole[:, :, :-1]
        return out


class IgnoresSegments(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Any, **options: Any) -> Tensor:
        return attend(q, k, v, causal=geometry.causal)


class TakesAnySetting(Softmax):
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


@dataclass(frozen=True)
class CrashesLate(Softmax):
    size: int = 1

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().normalise(scores, mask) + torch.zeros(self.size).sum()


@dataclass(frozen=True)
class NamesNoSetting(Softmax):
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("bad value")


class Branches(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q if float(q.sum()) > 0 else -q, k, v, **options)


class Random(Softmax):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return super().__call__(q, k, v, **options) + 1e-6 * torch.rand(())


class PeeksAtNorms(Selector):
    """The window depends on the largest of all keys."""

    def select(self, q: Tensor, k: Tensor, geometry: Any) -> BlockLayout:
        left = int(k.norm(dim=-1).mean((0, 1)).argmax()) % 11
        return BlockLayout.window(q.shape[2], k.shape[2], left, 0, block=16)


class Everything(Selector):
    def select(self, q: Tensor, k: Tensor, geometry: Any) -> BlockLayout:
        return BlockLayout.window(q.shape[2], k.shape[2], -1, -1, block=64)


class QuadraticPlan(Selector):
    """Few pairs, chosen by scoring all."""

    def select(self, q: Tensor, k: Tensor, geometry: Any) -> BlockLayout:
        left = int((q[:, :1] @ k[:, :1].mT).argmax() > 0)
        return BlockLayout.window(q.shape[2], k.shape[2], left, 0, block=16)


class WrapsAround(Selector):
    """Offsets in int32, negative past 2^31: those rows are taken for padding."""

    def select(self, q: Tensor, k: Tensor, geometry: Any) -> BlockLayout:
        tokens, blocks = q.shape[2], -(-q.shape[2] // 64)
        offset = torch.arange(blocks, dtype=torch.int32) * 64 * tokens
        mask = torch.eye(blocks, dtype=torch.bool) & (offset >= 0)[:, None]
        return BlockLayout.from_block_mask(mask[None, None], 64, 64, tokens, tokens)


class Unstable(Mixer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, Any]:
        return (v.cumsum(2) + 1e4) - 1e4, None


class ForgetsState(Mixer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, Any]:
        return q * (k * v).cumsum(2), None


class LosesToken(Mixer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, Any]:
        return (q * v)[:, :, :-1], None


class MapsToNaN(Intervention):
    def edit(self, weights: Tensor, mask: Tensor) -> Tensor:
        return weights * float("nan")


PLAIN = {"patterns": ALL_PATTERNS, "supports": EVERYTHING}
MIXER = {"supports": frozenset({"backward", "streaming"}), "patterns": CAUSAL, "complexity": "N"}
SELECTOR = {"patterns": CAUSAL, "supports": frozenset({"backward", "gqa", "lse"}), "complexity": "N"}
WINDOW = {"patterns": CAUSAL, "supports": EVERYTHING, "example": {"window": 24, "block": 16}}

PAIRWISE = [
    (1, Imprecise, Kind.SCORE, PLAIN, "out in torch.float32: error"),
    (1, Unstable, Kind.MIXER, MIXER, "out in fp32: error"),
    (2, NoKeyGradient, Kind.SCORE, PLAIN, "analytic and numeric gradients differ"),
    (3, LeaksPadding, Kind.SCORE, PLAIN, "NaN in padding: not finite"),
    (3, FillsEmptyRows, Kind.SCORE, PLAIN, "a padded query's output is not 0"),
    (4, SeesTheFuture, Kind.SCORE, PLAIN, "outputs before token 1 after later tokens changed"),
    (4, SeesTheFuture, Kind.SCORE, {"deviations": ("the output is not causal",)}, "after later tokens changed"),
    (4, PeeksAtNorms, Kind.SELECTOR, SELECTOR, "after later tokens changed"),
    (5, CountsQueries, Kind.SCORE, PLAIN, "queries over a warm cache"),
    (5, IgnoresSegments, Kind.SCORE, PLAIN, "packed and alone"),
    (5, ForgetsState, Kind.MIXER, MIXER, "carried in pieces"),
    (6, SinkWindow, Kind.SELECTOR, {**WINDOW, "exact_when": "", "exact": lambda n: {"window": 8}}, "against dense"),
    (6, SinkWindow, Kind.SELECTOR, {**WINDOW, "ladder": lambda n: ({"window": n}, {"window": 4})}, "error grows"),
    (7, MixesTheBatch, Kind.SCORE, PLAIN, "an item alone and in its batch"),
    (7, NumbersHeads, Kind.SCORE, PLAIN, "heads in another order"),
    (7, FirstGroupOnly, Kind.SCORE, PLAIN, "grouped and repeated key/value heads"),
    (8, WrapsAround, Kind.SELECTOR, {**SELECTOR, "patterns": ALL_PATTERNS}, "the last query block reads nothing"),
    (8, LosesToken, Kind.MIXER, MIXER, "tokens"),
    (9, LeavesMemory, Kind.SCORE, PLAIN, "with poisoned memory"),
    (10, IgnoresSegments, Kind.SCORE, {"supports": frozenset()}, "segments: ran without an error"),
    (10, IgnoresSegments, Kind.SCORE, {"patterns": CAUSAL}, "causal=False: ran without an error"),
    (10, TakesAnySetting, Kind.SCORE, PLAIN, "an unknown setting: ran without an error"),
    (10, CrashesLate, Kind.SCORE, PLAIN, "size=-7: accepted, then RuntimeError"),
    (10, NamesNoSetting, Kind.SCORE, PLAIN, "does not name it: bad value"),
    (11, Branches, Kind.SCORE, PLAIN, "data-dependent"),
    (12, Random, Kind.SCORE, PLAIN, "out of two runs"),
    (13, Softmax, Kind.SCORE, {"complexity": "N"}, "work grows"),
    (13, Everything, Kind.SELECTOR, SELECTOR, "work grows"),
    (13, QuadraticPlan, Kind.SELECTOR, SELECTOR, "work grows"),
]  # fmt: skip


class NoMap(Reducer):
    def reduce(self, tokens: Tensor, keys: Tensor | None = None) -> Reduced:
        kept = torch.arange(tokens.shape[1] // 2).expand(tokens.shape[0], -1)
        return Reduced(tokens[:, : kept.shape[1]], kept, torch.zeros(tokens.shape[:2], dtype=torch.int64))


@dataclass(frozen=True)
class Halves(Reducer):
    half: bool = True

    def reduce(self, tokens: Tensor, keys: Tensor | None = None) -> Reduced:
        kept = torch.arange(0, tokens.shape[1], 2).expand(tokens.shape[0], -1)
        picked = tokens[:, ::2] * (1 + tokens.mean(0, keepdim=True)[:, ::2].detach())
        return Reduced(picked, kept, torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1) // 2)


class KeepsAll(CachePolicy):
    pass


class ReadsTheFuture(KeepsAll):
    def read(self, q: Tensor, store: KVStore, step: Any) -> TokenIndex:
        slots = torch.arange(len(store)).expand(1, 1, q.shape[2], len(store)).contiguous()
        return TokenIndex(slots, q.shape[2], len(store))


class KeepsAtRandom(CachePolicy):
    def keep(self, q: Tensor, store: KVStore, step: Any) -> Tensor | None:
        return best(torch.rand(store.positions.shape), 8)


class KeepsByBatch(CachePolicy):
    def keep(self, q: Tensor, store: KVStore, step: Any) -> Tensor | None:
        return best(store.keys.norm(dim=-1).sum(0, keepdim=True).expand(store.positions.shape), 8)


class CountsOutsideTheStore(CachePolicy):
    """Evicts from a layer's 14th call on, and keeps the count where no file finds it."""

    def keep(self, q: Tensor, store: Any, step: Any) -> Tensor | None:
        store.calls = getattr(store, "calls", 0) + 1
        return store.positions >= store.seen[:, None, None] - 8 if store.calls > 13 else None


class KeepsWhatItDoesNotDeclare(CachePolicy):
    def read(self, q: Tensor, store: KVStore, step: Any) -> None:
        store.derived["plan"] = Derived(store.changes, {"x": q})


class ReadsTheLongest(CachePolicy):
    """Reads the last tokens of the longest sequence, also in shorter ones."""

    def read(self, q: Tensor, store: KVStore, step: Any) -> TokenIndex | None:
        last = torch.arange(len(store) - 20, len(store)).expand(*store.lengths.shape, 1, -1)
        last = last.masked_fill(last >= store.lengths[..., None, None], -1)
        return TokenIndex(last.contiguous(), 1, len(store)) if q.shape[2] == 1 else None


class CountsChunks(Probe):
    def __init__(self) -> None:
        self.chunks = 0

    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:
        self.chunks += 1

    def result(self) -> Tensor:
        return torch.tensor(float(self.chunks))


class SumsBatch(Probe):
    def __init__(self) -> None:
        self.total = torch.zeros(())

    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:
        self.total = self.total + weights.square().sum() + torch.rand(()) * 1e-3
        weights.zero_()

    def result(self) -> Tensor:
        return self.total


class ReusesAlways(OutputReuse):
    kinds = ("a", "b")

    def reuses(self, count: int, timestep: float, kind: str) -> bool:
        return count > 0


class CountsGlobally(ReusesAlways):
    calls = 0

    def reuses(self, count: int, timestep: float, kind: str) -> bool:
        type(self).calls += 1
        return type(self).calls % 7 == 0


class Batchy(Layer):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.detach()) + x.mean(0) + 1e-3 * x.flip(1) if x.ndim == 3 else x
        return out + 1e-6 * torch.rand(())

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 6, 4, generator=generator, dtype=dtype, device=device),)


class Squares(Batchy):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, 1:] = (x @ x.mT @ x)[:, 1:]
        return out[: 2**20] if bool(x.device.type == "meta") else out


CACHE = {
    "patterns": CAUSAL, "supports": frozenset({"gqa"}), "complexity": "N", "effects": frozenset({"evicting"})
}  # fmt: skip
CHUNKS = frozenset({"chunks", "gqa"})
SMALL, LARGE = {"heavy": 4, "recent": 4}, {"heavy": 32, "recent": 32}
FULL = {"exact_when": "always", "exact": lambda n: {}}
LAYER = {"patterns": CAUSAL, "supports": frozenset({"backward", "streaming"}), "complexity": "N"}

OTHERS = [
    (2, Batchy, Kind.LAYER, LAYER, "analytic and numeric gradients differ"),
    (4, Batchy, Kind.LAYER, LAYER, "after later tokens changed"),
    (5, Batchy, Kind.LAYER, LAYER, "tokens alone"),
    (7, Batchy, Kind.LAYER, LAYER, "an item alone"),
    (8, Squares, Kind.LAYER, LAYER, "for a batch of"),
    (9, Squares, Kind.LAYER, LAYER, "with poisoned memory"),
    (10, Batchy, Kind.LAYER, LAYER, "a flat input: ran without an error"),
    (12, Batchy, Kind.LAYER, LAYER, "two runs"),
    (13, Squares, Kind.LAYER, LAYER, "work grows"),
    (6, NoMap, Kind.REDUCER, {}, "the row that stands for a kept token"),
    (6, Halves, Kind.REDUCER, FULL, "at full budget the tokens"),
    (7, Halves, Kind.REDUCER, {}, "an item alone"),
    (2, Halves, Kind.REDUCER, {}, "analytic and numeric gradients differ"),
    (10, Halves, Kind.REDUCER, {}, "2-D tokens: "),
    (4, ReadsTheFuture, Kind.CACHE_POLICY, CACHE, "after later tokens changed"),
    (5, H2O, Kind.CACHE_POLICY, {**CACHE, "supports": EVERYTHING, "example": SMALL}, "pieces and whole"),
    (3, KeepsByBatch, Kind.CACHE_POLICY, CACHE, "beside a padded sequence and alone, layer 0 in step 1"),
    (3, ReadsTheLongest, Kind.CACHE_POLICY, CACHE, "behind padding and alone, layer 0 in step 1"),
    (5, H2O, Kind.CACHE_POLICY, {**CACHE, "supports": CHUNKS, "example": SMALL}, "a prompt in 3 chunks and whole"),
    (6, H2O, Kind.CACHE_POLICY, {**CACHE, "exact_when": "never", "exact": lambda n: SMALL}, "at full budget"),
    (6, H2O, Kind.CACHE_POLICY, {**CACHE, "ladder": lambda n: (LARGE, SMALL)}, "error grows"),
    (7, KeepsByBatch, Kind.CACHE_POLICY, CACHE, "a sequence alone"),
    (12, KeepsAtRandom, Kind.CACHE_POLICY, CACHE, "two runs"),
    *[
        (13, KeepsAll, Kind.CACHE_POLICY, {**CACHE, "effects": frozenset({effect})}, "of what dense attention takes")
        for effect in EFFECTS
    ],
    (13, KeepsAll, Kind.CACHE_POLICY, {**CACHE, "complexity": "1"}, "work grows"),
    (5, CountsChunks, Kind.PROBE, {}, "in chunks of about"),
    (10, CountsChunks, Kind.PROBE, {}, "nothing observed: ran without an error"),
    (7, SumsBatch, Kind.PROBE, {}, "two sequences and each alone"),
    (12, SumsBatch, Kind.PROBE, {}, "two readings"),
    (13, CountsChunks, Kind.PROBE, {"complexity": "N"}, "work grows"),
    (6, ReusesAlways, Kind.INTERVENTION, FULL, "at always"),
    (10, ReusesAlways, Kind.INTERVENTION, FULL, "an unknown kind of module: ran without an error"),
    (7, CountsGlobally, Kind.INTERVENTION, {}, "alone and among others"),
    (12, CountsGlobally, Kind.INTERVENTION, {}, "two generations"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "target", "kind", "facts", "words"),
    PAIRWISE + OTHERS,
    ids=[f"{number}-{target.__name__}-{row}" for row, (number, target, *_) in enumerate(PAIRWISE + OTHERS)],
)
def test_broken_mechanisms_fail(
    number: int, target: type, kind: Kind, facts: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "card", None, raising=False)  # classes of the library get theirs back
    verdict = run_law(LAWS[number - 1], card_of(target, kind, **facts))
    assert verdict.status == "failed", verdict
    assert words in verdict.detail


@pytest.mark.parametrize("law", LAWS, ids=lambda law: str(law.number))
def test_a_sound_mechanism_passes(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_of(Softmax, Kind.SCORE)
    monkeypatch.setitem(registry._CARDS, "broken", card)
    verdict = run_law(law, card)
    assert verdict.status in ("passed", "skipped"), verdict.detail


def test_each_law_has_a_mechanism_that_breaks_it() -> None:
    broken = {number for number, *_ in PAIRWISE}
    assert broken | {14, 15} == {law.number for law in LAWS}  # 14 and 15 are below
    assert set(FORMS["pairwise"].checks) == {law.number for law in LAWS}


def test_an_undo_that_forgets_fails_law_14(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("saccade.plug.transformers")
    card = card_of(NumbersHeads, Kind.SCORE)
    monkeypatch.setitem(registry._CARDS, "broken", card)
    assert run_law(LAWS[13], card).status == "passed"
    monkeypatch.setattr(transformers.Handle, "undo", lambda handle: None)
    verdict = run_law(LAWS[13], card)
    assert (verdict.status, "logits after undo" in verdict.detail) == ("failed", True)


def test_weights_that_are_not_finite_fail_law_14(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("saccade.plug.transformers")
    card = card_of(MapsToNaN, Kind.INTERVENTION)
    monkeypatch.setitem(registry._CARDS, "broken", card)
    verdict = run_law(LAWS[13], card)
    assert (verdict.status, verdict.detail) == ("failed", "logits with the recipe are not finite")


def test_a_recipe_of_another_model_that_is_accepted_fails_law_14(monkeypatch: pytest.MonkeyPatch) -> None:
    plug = pytest.importorskip("saccade.plug.transformers")
    card = card_of(Softmax, Kind.SCORE)
    monkeypatch.setitem(registry._CARDS, "broken", card)
    apply = plug.apply
    monkeypatch.setattr(
        plug, "apply", lambda model, recipe, **options: apply(model, recipe, **options) if options else None
    )
    monkeypatch.setattr("saccade.plug.apply", plug.apply, raising=False)
    verdict = run_law(LAWS[13], card)
    assert (verdict.status, verdict.detail) == ("failed", "a recipe for another model was accepted")


@pytest.mark.parametrize(
    ("target", "facts", "words"),
    [
        (H2O, {"exact_when": "never", "exact": lambda n: SMALL, "example": SMALL}, "full budget and of dense"),
        (KeepsByBatch, {}, "in a padded batch and alone"),
        (CountsOutsideTheStore, {}, "logits of call 14, loaded after 12: differs"),
        (KeepsWhatItDoesNotDeclare, {}, "derived['plan'] of"),
    ],
)
def test_broken_cache_policies_fail_law_14(
    target: type, facts: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("saccade.plug.transformers")
    monkeypatch.setattr(target, "card", None, raising=False)
    card = card_of(target, Kind.CACHE_POLICY, **{**CACHE, **facts})
    monkeypatch.setitem(registry._CARDS, "broken", card)
    verdict = run_law(LAWS[13], card)
    assert verdict.status == "failed", verdict
    assert words in verdict.detail


def test_wrong_log_sums_fail_law_15(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.laws.system.merge", lambda parts: parts[0])
    verdict = run_law(LAWS[14], card_of(Everything, Kind.SELECTOR, **SELECTOR))
    assert (verdict.status, "merged shards and the whole" in verdict.detail) == ("failed", True)


class Averages:
    """Joins the ranks' outputs by their mean."""

    sharded: ClassVar[tuple[str, ...]] = ("k", "v")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        out = attend(q, k, v, causal=causal).detach()
        dist.all_reduce(out)
        return out / dist.get_world_size() + 0 * (q.sum() + k.sum() + v.sum())


class Crashes(Averages):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        raise RuntimeError("a rank is lost")


class Waits(Averages):
    """Rank 0 waits for the others, which do not call."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        if dist.get_rank() == 0:
            dist.barrier()
        return q + k.sum() + v.sum()


PARALLEL = {"supports": frozenset({"backward", "gqa"}), "patterns": frozenset({Pattern.NONCAUSAL_SELF})}


@pytest.mark.parametrize(
    ("target", "words", "limit"),
    [(Averages, "out over shards of", 120), (Crashes, "the processes failed: RuntimeError", 120)],
)
def test_broken_parallel_mechanisms_fail_law_15(
    target: type, words: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TIME_LIMIT", limit)
    verdict = run_law(LAWS[14], card_of(target, Kind.PARALLEL, **PARALLEL))
    assert verdict.status == "failed", verdict
    assert words in verdict.detail


def test_ranks_that_do_not_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIME_LIMIT", 0.5)
    verdict = run_law(LAWS[14], card_of(Waits, Kind.PARALLEL, **PARALLEL))
    assert (verdict.status, verdict.detail) == ("failed", "the processes did not end within 0.5 s")
