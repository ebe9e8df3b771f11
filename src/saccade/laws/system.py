"""Laws about living in a system: offsets, refusals, compilation, cost, models, many devices (8, 10, 11, 13, 14, 15)."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from saccade.laws.base import Broken, NotApplicable, Problem, expect, expect_close, expect_equal
from saccade.laws.subjects import Subject, engine_of, split_keys
from saccade.ops import merge
from saccade.types import BlockLayout, Geometry, Kind, Pattern

BEYOND_INT32 = 2**31


def wide_offsets(subject: Subject) -> str:
    """8. Nothing wraps where an offset passes 2^31."""
    subject.require_pairwise()
    if subject.card.kind is Kind.SELECTOR:
        return _wide_selection(subject)
    tokens = 2**27 + 3
    heads = 4
    groups = heads if "gqa" not in subject.card.supports else 2
    q, k, v = (torch.empty(1, count, tokens, 8, device="meta") for count in (heads, groups, groups))
    if q.numel() <= BEYOND_INT32:
        raise Broken("the problem is too small to show anything")
    if subject.card.kind in (Kind.POSITION, Kind.HEADS, Kind.MIXER) and not isinstance(subject.mechanism, torch.nn.Module):
        out = _on_meta(subject, q, k, v)
        expect(out.shape == (1, heads, tokens, 8), f"shape {tuple(out.shape)} for {tokens} tokens")
        return f"{q.numel():,} elements on the meta device"
    raise NotApplicable("runs on the engine `attend`, whose own tests cover it; it computes no offsets itself")


def _on_meta(subject: Subject, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if subject.card.kind is Kind.HEADS:
        shared, _ = subject.mechanism.share(q, q)
        return shared.expand(-1, q.shape[1] // shared.shape[1] * shared.shape[1], -1, -1) if shared.shape[1] == q.shape[1] else q
    return subject.run(Problem(q, k, v, Geometry(causal=subject.causal)))


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
    subject.require_pairwise()
    card, done = subject.card, []
    good = subject.problem(queries=32)

    def refused(problem: Problem, words: str, what: str) -> None:
        try:
            subject.run(problem)
        except ValueError as error:
            expect(words in str(error), f"{what}: the error does not name {words!r}: {error}")
            done.append(what)
            return
        raise Broken(f"{what}: ran without an error")

    refused(Problem(good.q[0], good.k, good.v, good.geometry), "q of shape", "3-D q")
    refused(Problem(good.q, good.k[..., :-1], good.v, good.geometry), "k of shape", "k of another head dim")
    refused(Problem(good.q, good.k, good.v[:, :, :-1], good.geometry), "v of shape", "v of another length")
    if card.kind in (Kind.SELECTOR, Kind.SCORE, Kind.MIXER, Kind.INTERVENTION):
        for causal in (True, False):
            wanted = Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF
            crossed = Pattern.CAUSAL_CROSS if causal else Pattern.NONCAUSAL_CROSS
            if not {wanted, crossed} & card.patterns:
                refused(Problem(*good.leaves, Geometry(causal=causal)), f"causal={causal}", f"causal={causal}")
        if "segments" not in card.supports:
            ids = torch.zeros(1, 32, dtype=torch.int64, device=subject.device)
            geometry = Geometry(causal=subject.causal, q_segments=ids, kv_segments=ids)
            refused(Problem(*good.leaves, geometry), "segments", "segments")
    try:
        card.build(**{**card.example, "no_such_setting": 1})
    except ValueError as error:
        expect("no_such_setting" in str(error), f"unknown setting: not named by {error}")
        done.append("an unknown setting")
    else:
        raise Broken("an unknown setting was accepted")
    return ", ".join(done)


def compilation(subject: Subject) -> str:
    """11. `torch.compile(fullgraph=True)` traces it (a selector: its engine) and other lengths do not recompile without end."""
    if subject.card.kind is Kind.LAYER:
        inputs = subject.mechanism.sample_inputs(2, torch.Generator().manual_seed(0), torch.float32, subject.device)
        module = subject.mechanism.float()
        return _compiled(module, [inputs])
    subject.require_pairwise()
    if subject.card.kind in (Kind.SCORE, Kind.INTERVENTION):
        problem = subject.problem(queries=32)
        return _compiled(lambda q, k, v: subject.run(Problem(q, k, v, problem.geometry)), [problem.leaves])
    if subject.card.kind is Kind.SELECTOR:
        problem = subject.problem(queries=48)
        run = engine_of(subject.mechanism.pattern(problem.q, problem.k, problem.geometry))
        return _compiled(lambda q, k, v: run(q, k, v), [problem.leaves])
    problems = [subject.problem(queries=n) for n in (32, 48, 64, 80)]
    return _compiled(lambda q, k, v: subject.run(Problem(q, k, v, problems[0].geometry)), [p.leaves for p in problems])


def _compiled(function: Any, calls: list[Any]) -> str:
    """Trace without a compiler, so that this runs anywhere; compare, and count the graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for inputs in calls:
            expect_close(compiled(*inputs), function(*inputs), "compiled and not", 1e-5)
    frames = counter.frame_count
    torch._dynamo.reset()
    expect(frames <= 3, f"{frames} graphs for {len(calls)} lengths")
    return f"{frames} graphs for {len(calls)} lengths"


def complexity(subject: Subject) -> str:
    """13. Counted work at N and 2N grows as the card declares."""
    declared = subject.card.complexity
    growth = {"N": 2.0, "N log N": 2.0 * 11 / 10, "N^1.5": 2.0**1.5, "N^2": 4.0}
    if declared not in growth:
        raise NotApplicable(f"complexity {declared!r} is not a power of N alone")
    subject.require_pairwise()
    small, large = (_work(subject, n) for n in (1024, 2048))
    if not small:
        raise NotApplicable("nothing that could be counted")
    ratio = large / small
    # Edges (sinks, the first rows of a causal pattern) weigh less as N grows, so the ratio may exceed the power a little.
    low, high = growth[declared] * 0.8, growth[declared] * 1.25
    expect(ratio <= high, f"work grows {ratio:.2f}x from N=1024 to 2048, {declared} allows {high:.2f}x")
    return f"{ratio:.2f}x from N=1024 to 2048, declared {declared}" + ("" if ratio >= low else " (less than declared)")


def _work(subject: Subject, tokens: int) -> float:
    problem = subject.problem(queries=tokens, batch=1, heads=4, dim=8)
    if subject.card.kind is Kind.SELECTOR:
        chosen = subject.mechanism.pattern(problem.q, problem.k, problem.geometry)
        return chosen.density() * tokens * tokens
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], with_flops=True, acc_events=True) as profiler:
        subject.run(problem)
    return float(sum(event.flops for event in profiler.events() if event.flops))


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
    ids = torch.arange(40, device=subject.device)[None] % 50
    with torch.no_grad():
        before = model(ids).logits
        recipe = Recipe.uniform(model, card.name, dict(card.example))
        again = Recipe.from_json(recipe.to_json())
        expect(again == recipe, "a recipe changed on its round trip through JSON")
        handle = apply(model, again)
        during = model(ids).logits
        expect(bool(torch.isfinite(during).all()), "logits with the recipe are not finite")
        handle.undo()
        expect_equal(model(ids).logits, before, "logits after undo")
    try:
        apply(other, recipe)
    except ValueError:
        return f"largest change while applied {float((during - before).abs().max()):.3g}"
    raise Broken("a recipe for another model was accepted")


def sharding(subject: Subject) -> str:
    """15. Parts over shards of the keys merge to the whole; a parallel mechanism equals one process."""
    if subject.card.kind is Kind.PARALLEL:
        from saccade.laws.processes import parallel_equals_one

        return parallel_equals_one(subject)
    subject.require_pairwise()
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
