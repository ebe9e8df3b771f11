"""Laws about living in a system: offsets, refusals, compilation, cost, models, many devices (8, 10, 11, 13, 14, 15)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from saccade.laws.base import (
    Broken,
    NotApplicable,
    Problem,
    counted_work,
    expect,
    expect_close,
    expect_equal,
    expect_growth,
    expect_refusal,
)  # fmt: skip
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject, engine_of, split_keys
from saccade.ops import merge
from saccade.types import BlockLayout, Geometry, Kind, Pattern

BEYOND_INT32 = 2**31


def wide_offsets(subject: Subject) -> str:
    """8. Nothing wraps where an offset passes 2^31."""
    if subject.card.kind is Kind.SELECTOR:
        return _wide_selection(subject)
    if subject.card.kind in (Kind.SCORE, Kind.INTERVENTION):
        raise NotApplicable("all its offsets are those of the engine `attend`, which tests/laws/test_engines.py covers")
    tokens, heads = 2**26 + 3, 4
    groups = heads // 2 if "gqa" in subject.card.supports else heads
    q, k, v = (torch.empty(1, count, tokens, 8, device="meta") for count in (heads, groups, groups))
    expect(q.numel() > BEYOND_INT32, "the problem is too small to show anything")
    mechanism: Any = subject.mechanism
    if isinstance(mechanism, torch.nn.Module):
        mechanism.to("meta")
    if subject.card.kind is Kind.HEADS:
        shared, _ = mechanism.share(q, q)
        expect(shared.shape[2:] == q.shape[2:], f"shape {tuple(shared.shape)} for {tokens} tokens")
    elif subject.card.kind is Kind.POSITION:
        out = mechanism.encode(q, torch.empty(tokens, dtype=torch.int64, device="meta"))
        expect(out.shape == q.shape, f"shape {tuple(out.shape)} for {tokens} tokens")
    else:
        out = subject.run(Problem(q, k, v, Geometry(causal=subject.causal)))
        expect(out.shape == q.shape, f"shape {tuple(out.shape)} for {tokens} tokens")
    return f"shapes of {q.numel():,} elements on the meta device"


def _wide_selection(subject: Subject) -> str:
    """Choose among N^2 > 2^31 pairs; the choice is valid and its counts are right."""
    tokens = 49_152
    problem = subject.problem(queries=tokens, batch=1, heads=1, groups=1, dim=8)
    chosen = subject.mechanism.pattern(problem.q, problem.k, problem.geometry)
    chosen.validate()
    density = chosen.density()
    expect(0 < density <= 1, f"density {density} at {tokens} tokens")
    if isinstance(chosen, BlockLayout):
        last = int(chosen.counts[..., -1].min())
        expect(last > 0, "the last query block reads nothing")
    return f"{tokens:,}^2 = {tokens**2:,} pairs, {density:.2%} kept"


def refusals(subject: Subject) -> str:
    """10. What is not supported raises one clear error that names it."""
    card, good = subject.card, subject.problem(queries=32)

    def refused(problem: Problem, words: str, what: str) -> str:
        return expect_refusal(lambda: subject.run(problem), words, what)

    done = [
        refused(Problem(good.q[0], good.k, good.v, good.geometry), "q of shape", "3-D q"),
        refused(Problem(good.q, good.k[..., :-1], good.v, good.geometry), "k of shape", "k of another head dim"),
        refused(Problem(good.q, good.k, good.v[:, :, :-1], good.geometry), "v of shape", "v of another length"),
    ]
    if card.patterns:
        done += [
            refused(replace(good, geometry=Geometry(causal=causal)), f"causal={causal}", f"causal={causal}")
            for causal in (True, False)
            if not {Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF} & card.patterns
            and not {Pattern.CAUSAL_CROSS if causal else Pattern.NONCAUSAL_CROSS} & card.patterns
        ]
    if "segments" not in card.supports:
        ids = torch.zeros(1, 32, dtype=torch.int64, device=subject.device)
        geometry = Geometry(causal=subject.causal, q_segments=ids, kv_segments=ids)
        done.append(refused(replace(good, geometry=geometry), "segments", "segments"))

    def smoke(settings: dict[str, Any]) -> None:
        Subject(card, subject.device, settings).run(good)

    return ", ".join([*done, refuse_settings(card, smoke)])


def compilation(subject: Subject) -> str:
    """11. `torch.compile(fullgraph=True)` traces it (a selector: its engine), other lengths without endless graphs."""
    if subject.card.kind is Kind.SELECTOR:
        problem = subject.problem(queries=48)
        run = engine_of(subject.mechanism.pattern(problem.q, problem.k, problem.geometry))
        return expect_compiles(run, [problem.leaves])
    whole_rows = subject.card.kind in (Kind.SCORE, Kind.INTERVENTION)  # the engine calls back for each chunk of rows
    problems = [subject.problem(queries=n) for n in ((32,) if whole_rows else (32, 48, 64, 80))]
    geometry = problems[0].geometry
    return expect_compiles(lambda q, k, v: subject.run(Problem(q, k, v, geometry)), [p.leaves for p in problems])


def expect_compiles(function: Any, calls: list[Any]) -> str:
    """Trace without a compiler, so that this runs anywhere; compare, and count the graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for inputs in calls:
            expect_close(compiled(*inputs), function(*inputs), "compiled and not", 1e-5)
    frames = counter.frame_count
    torch.compiler.reset()
    expect(frames <= 3, f"{frames} graphs for {len(calls)} lengths")
    return f"{frames} graphs for {len(calls)} lengths"


def complexity(subject: Subject) -> str:
    """13. Counted work at N and 2N grows as the card declares."""
    sizes = (512, 1024) if subject.card.kind is Kind.SELECTOR else (1024, 2048)
    small, large = (_work(subject, tokens) for tokens in sizes)
    return expect_growth(subject.card.complexity, small, large, f"N={sizes[0]} to {sizes[1]}")


def _work(subject: Subject, tokens: int) -> float:
    """Operations that are the mechanism's own: for a selector those of choosing and those of the chosen pairs."""
    problem = subject.problem(queries=tokens, batch=1, heads=4, dim=8)
    kind, mechanism = subject.card.kind, subject.mechanism
    if kind is Kind.HEADS:
        return counted_work(lambda: mechanism.share(problem.k, problem.v))
    if kind is Kind.POSITION:
        return counted_work(lambda: mechanism.encode(problem.q, torch.arange(tokens, device=problem.q.device)))
    if kind is not Kind.SELECTOR:
        return counted_work(lambda: subject.run(problem))
    chosen: list[Any] = []
    planning = counted_work(lambda: chosen.append(mechanism.pattern(problem.q, problem.k, problem.geometry)))
    (_, heads, _, dim), values = problem.q.shape, problem.v.shape[3]
    return planning + chosen[0].density() * tokens * tokens * heads * 2 * (dim + values)


def undo(subject: Subject) -> str:
    """14. apply -> undo leaves a model bit-equal; a recipe survives a round trip; another model's is refused."""
    card = subject.card
    if not card.training_free or card.kind not in (Kind.SELECTOR, Kind.SCORE, Kind.INTERVENTION):
        raise NotApplicable("not put into pretrained models: it needs training, or replaces no attention")
    if Pattern.CAUSAL_SELF not in card.patterns:
        raise NotApplicable("language models need causal self-attention")
    try:
        from saccade.laws.models import tiny_llama
        from saccade.plug import Recipe, apply
    except ImportError as error:
        raise NotApplicable(f"transformers is not installed: {error}") from error
    model, other = tiny_llama(hidden=32, device=subject.device), tiny_llama(hidden=64, device=subject.device)
    state, modules = {name: x.clone() for name, x in model.state_dict().items()}, list(model.modules())
    implementation = model.config._attn_implementation  # noqa: SLF001  transformers' own switch
    ids = torch.arange(40, device=subject.device)[None] % 50
    with torch.no_grad():
        before = model(ids).logits
        recipe = Recipe.uniform(model, card.name, dict(card.example))
        again = Recipe.from_json(recipe.to_json())
        expect(again == recipe, "a recipe changed on its round trip through JSON")
        handle = apply(model, again, strict=True)
        during = model(ids).logits
        expect(bool(torch.isfinite(during).all()), "logits with the recipe are not finite")
        handle.undo()
        expect_equal(model(ids).logits, before, "logits after undo")
    for name, x in model.state_dict().items():
        expect_equal(x, state[name], f"weight {name} after undo")
    expect(list(model.modules()) == modules, "the model's modules are not the same after undo")
    expect(model.config._attn_implementation == implementation, "the config is not the same after undo")  # noqa: SLF001
    try:
        apply(other, recipe)
    except ValueError:
        return f"largest change while applied {float((during - before).abs().max()):.3g}"
    raise Broken("a recipe for another model was accepted")


def sharding(subject: Subject) -> str:
    """15. Parts over shards of the keys merge to the whole."""
    subject.require("lse")
    if subject.card.kind is not Kind.SELECTOR:
        raise NotApplicable("only selectors return partial results over shards of the keys")
    problem = subject.problem(queries=128)
    chosen = subject.mechanism.pattern(problem.q, problem.k, problem.geometry)
    at = 64 if not isinstance(chosen, BlockLayout) else -(-64 // chosen.block[1]) * chosen.block[1]
    whole = engine_of(chosen)(*problem.leaves)
    parts = [
        engine_of(part)(problem.q, problem.k[:, :, keys], problem.v[:, :, keys], return_lse=True)
        for keys, part in split_keys(chosen, min(at, 128))
    ]
    expect_close(merge(parts).out, whole, "merged shards and the whole")
    return f"keys split at {at}"
