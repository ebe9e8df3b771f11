"""Measuring caches: rows come from the registry, one prompt serves all as its own would, full budget is dense's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from saccade.bench import cache_layer, cache_speed
from saccade.bench.cache import COLUMNS, PARTS, bench_cache
from saccade.bench.cache_layer import MeanLayer, layer_kinds
from saccade.bench.cache_prompt import Counted, distinct, read_prompt
from saccade.bench.cache_quality import forced, make_material, recall_quality, text_quality
from saccade.bench.cache_rows import BUDGETS, candidates, composed, matching
from saccade.bench.cache_speed import bench_decode
from saccade.bench.plot import plot_caches
from saccade.catalog import cards
from saccade.mechanisms.cache.base import Everything, compose, decode_step
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.key_norm import KeyNorm
from saccade.mechanisms.cache.pool import Pool
from saccade.mechanisms.cache.quest import Quest
from saccade.mechanisms.cache.reading import WeightedSlots
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.tidal_decode import TidalDecode
from saccade.mechanisms.cache.zipcache import ZipCache
from saccade.plug import PagedCache, Recipe, apply
from saccade.plug.cache import cache_bytes
from saccade.types import Kind, TokenIndex


def test_rows_come_from_the_registry() -> None:
    found, left_out = candidates(2048, 30)
    policies = {card.name for card in cards() if card.kind is Kind.CACHE_POLICY}
    assert {one.name for one in found} | {name.split(" at ")[0] for name in left_out} == policies
    assert [one.budget for one in found if one.name == "h2o"] == list(BUDGETS)
    assert "kivi at 10%" in left_out
    assert not any(one.name == "tidal_decode" for one in candidates(2048, 1)[0])
    evicting = {one.name for one in found if one.effects == {"evicting"}}
    assert {one.name for one in composed(2048, 30)} >= {f"{name} + 8 bits" for name in evicting} | {"4 bits"}


def test_rows_by_name() -> None:
    rows = candidates(512, 2, (0.25,))[0]
    assert [one.label for one in matching(rows, "^h2o|sink_recent")] == ["h2o at 25%", "sink_recent at 25%"]
    assert matching(rows, None) == rows
    with pytest.raises(ValueError, match="only='h20': expected a part of one of adakv at 25%"):
        matching(rows, "h20")
    for budget in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"budget={budget}: expected a part of the bytes"):
            candidates(256, 2, [budget])


@pytest.mark.parametrize(
    "policy",
    [
        Everything(),
        SinkRecent(4, 100),
        H2O(heavy=64, recent=64),
        SnapKV(tokens=128, window=16),
        ZipCache(block=64),
        Quest(tokens=64, page=16, dense_layers=1),
        compose(keep=H2O(heavy=64, recent=64), store=Storage(bits=8)),
    ],
    ids=repr,
)
def test_a_prompt_read_once_is_as_good_as_its_own(byte_model: tuple[Any, Any], policy: Any) -> None:
    model, tokenizer = byte_model
    windows = make_material(tokenizer, 330, steps=10, windows=2, tries=0).windows
    with apply(model, Recipe.uniform(model, "dense")), torch.no_grad():
        prompt = read_prompt(model, windows)
        for tokens, batch in ((None, None), (300, 1)):
            ids = windows[:batch, :tokens]
            own, filled = PagedCache(model, policy), PagedCache(model, policy)
            model(input_ids=ids, past_key_values=own)
            prompt.fill(filled, tokens, batch)
            assert filled.nbytes == own.nbytes
            rest = windows[:batch, :5]
            for token in rest.split(1, 1):
                wanted, got = (model(input_ids=token, past_key_values=cache).logits for cache in (own, filled))
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_shared_is_summed_once_and_rightly(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    windows = make_material(tokenizer, 260, steps=10, windows=1, tries=0).windows
    with apply(model, Recipe.uniform(model, "dense")), torch.no_grad():
        prompt = read_prompt(model, windows)
        caches = [PagedCache(model, H2O(heavy=heavy, recent=32)) for heavy in (32, 64, 32)]
        for cache in caches:
            prompt.fill(cache)
        first, other, again = ([layer.store.positions for layer in cache.layers] for cache in caches)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(set(a[0, 0].tolist()) < set(b[0, 0].tolist()) for a, b in zip(first, other, strict=True))
        assert all(cache.step.known is None for cache in caches)


def test_distinct_slots() -> None:
    policy = Everything()
    store = policy.store()
    x = torch.randn(1, 2, 10, 4)
    decode_step(policy, store, torch.randn(1, 4, 10, 4), x, x)
    q = torch.randn(1, 4, 1, 4)
    lists = torch.tensor([[0, 1, 2], [2, 1, -1], [5, 6, -1], [7, 8, 9]])[None]
    assert distinct(None, q, store) == 20
    assert distinct(TokenIndex(lists[:, :, None], 1, 10), q, store) == 3 + 5
    assert distinct(TokenIndex(lists[:, :1, None], 1, 10), q, store) == 2 * 3
    assert distinct(WeightedSlots(lists, torch.zeros(1, 4, 3)), q, store) == 8


def test_everything_kept_is_as_good_as_dense(byte_model: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    model, tokenizer = byte_model
    material = make_material(tokenizer, 600, steps=4, windows=2, tries=1)
    questions = material.questions
    assert questions is not None
    with apply(model, Recipe.uniform(model, "dense")):
        text = read_prompt(model, material.windows[:, :-4])
        asked = read_prompt(model, questions.ids[:, : -questions.answer])

    def measured(counted: Counted | None) -> list[dict[str, Any]]:
        caches = (DynamicCache() if counted is None else PagedCache(model, counted) for _ in range(3))
        rows = [text_quality(model, next(caches), counted, text, material, cache_bytes)]
        return rows + [
            recall_quality(model, next(caches), counted, asked, questions, protocol, cache_bytes)
            for protocol in ("agnostic", "aware")
        ]

    dense, agnostic, aware = measured(None)
    with apply(model, Recipe.uniform(model, "dense")):
        paged_rows = measured(Counted(Everything()))
    assert paged_rows[0]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert paged_rows[0]["read"] == 1.0
    assert dense["held"] == 1.0
    assert agnostic["log_prob"] == pytest.approx(aware["log_prob"], rel=1e-3)
    for got, wanted in zip(paged_rows[1:], (agnostic, aware), strict=True):
        assert got["log_prob"] == pytest.approx(wanted["log_prob"], rel=1e-3)
        assert got["found"] == wanted["found"]


def test_forced_steps_say_what_one_forward_says(byte_model: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    model, tokenizer = byte_model
    ids = make_material(tokenizer, 60, steps=5, windows=2, tries=0).windows
    with torch.no_grad():
        table = model(ids).logits[:, -6:-1].log_softmax(-1)
        expected = table.gather(2, ids[:, -5:, None])[..., 0]
        cache = DynamicCache()
        logits = model(ids[:, :-5], past_key_values=cache).logits[:, -1]
    log_probs, right = forced(model, cache, logits, ids[:, -5:])
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(right, table.argmax(-1) == ids[:, -5:])


def test_the_table(byte_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = byte_model
    notes, done = tmp_path / "notes.jsonl", list[str]()
    sizes: dict[str, Any] = {"steps": 3, "windows": 1, "tries": 1, "rounds": 1, "budgets": (0.25,)}
    sizes |= {"only": "^(h2o|quest) at", "notes": notes, "progress": done.append}
    part = bench_cache(model, tokenizer, 640, parts=("text",), **sizes)
    assert part.table[0].cells()[COLUMNS.index("aware: nats")] == ""
    assert len(notes.read_text().splitlines()) == 3
    result = bench_cache(model, tokenizer, 640, **sizes)
    assert sum(note.startswith("text: ") and "prompt" not in note for note in done) == 3  # not measured again
    dense, heavy, quest = result.table
    assert (dense.name, heavy.name, quest.name) == ("dense", "h2o", "quest")
    assert all(set(row.measured) == set(PARTS) for row in result.table)
    assert dense.measured["text"]["held"] == dense.ratio == 1.0
    assert dense.nats == {"agnostic": 0.0, "aware": 0.0}
    assert heavy.nats["aware"] != 0
    assert heavy.cells()[COLUMNS.index("aware: nats")] == f"{heavy.nats['aware']:+.2f}"
    assert 0.2 < heavy.measured["text"]["held"] < 0.4
    assert 0.2 < heavy.measured["text"]["read"] < 0.3
    assert quest.measured["text"]["held"] > 1 > quest.measured["text"]["read"]
    assert all(len(cells) == len(COLUMNS) for cells in result.rows())
    assert json.loads(json.dumps(result.to_json()))["table"][1]["name"] == "h2o"
    picture = tmp_path / "caches.svg"
    plot_caches(result, picture)
    drawn = picture.read_text()
    assert all(word in drawn for word in ("<svg", "h2o", "quest"))
    with pytest.raises(ValueError, match="context=9000: expected at most 4096, the model's"):
        bench_cache(model, tokenizer, 9000)
    with pytest.raises(ValueError, match="steps=700: expected 1 to 639, fewer than the context"):
        bench_cache(model, tokenizer, 640, steps=700)
    with pytest.raises(ValueError, match="parts='quality': expected some of text, agnostic, aware, speed"):
        bench_cache(model, tokenizer, 640, parts=("quality",))


@pytest.fixture
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 32, "MLP": 32}.items():
        for module in (cache_layer, cache_speed):
            monkeypatch.setattr(module, name, value, raising=False)


def test_kinds_of_layers() -> None:
    assert layer_kinds(H2O()) == {0: 32}
    assert layer_kinds(Quest(dense_layers=2)) == {0: 2, 2: 30}
    assert layer_kinds(TidalDecode(first_selection=2, reselection=13)) == {0: 2, 2: 2, 3: 28}
    assert layer_kinds(TidalDecode(first_selection=0, reselection=1)) == {0: 2, 2: 30}
    assert layer_kinds(compose(keep=KeyNorm(whole_layers=3), read=Quest(dense_layers=1))) == {0: 1, 1: 2, 3: 29}


def test_the_mean_layer_weighs_layers_and_counts_the_rest_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Lasts(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self) -> None:
            now[0] += self.seconds

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList([Lasts(1.0), Lasts(2.0), Lasts(4.0)])

        def forward(self, past_key_values: Any, token: int) -> int:
            now[0] += 100.0
            for layer in self.model.layers:
                layer()
            return token + past_key_values

    monkeypatch.setattr(cache_layer, "perf_counter", lambda: now[0])
    mean = MeanLayer(Model(), 3, {0: 2, 2: 2, 3: 28})
    assert [mean(token=4), mean(token=5)] == [7, 8]
    assert mean.seconds == [100 + (2 * 1 + 2 * 2 + 28 * 4) / 32] * 2


@pytest.mark.usefixtures("small_layer")
def test_decoding_where_layers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each kind runs as the layer it stands for, and the row is that of their mean."""
    ran: list[int] = []
    read = TidalDecode.read

    def seen(policy: TidalDecode, q: Any, store: Any, step: Any) -> Any:
        chosen = read(policy, q, store, step)
        if q.shape[2] == 1:
            ran.append(step.layer)
            assert step.layers == cache_layer.LAYERS
            assert (chosen is None) == (step.layer < 3)
        return chosen

    monkeypatch.setattr(TidalDecode, "read", seen)
    rows = bench_decode((256,), rounds=2, only="^tidal_decode|^everything")
    assert ran == [0, 2, 3] * 4  # two calls to warm up
    dense, tidal, everything = rows
    assert [dense.name, tidal.name, everything.name] == [cache_speed.DENSE, "tidal_decode at 25%", "everything"]
    assert tidal.nbytes == everything.nbytes
    assert tidal.layer > 0


@pytest.mark.usefixtures("small_layer")
def test_decoding_beside_transformers() -> None:
    rows = bench_decode((256,), rounds=1, only="^h2o|^8 bits|^sink_recent at|^snapkv|^lamina|^vattention")
    assert rows[0].name == cache_speed.DENSE
    assert rows[0].freed == 0
    assert rows[0].layer_speedup == rows[0].attention_speedup == 1
    by_name = {row.name: row for row in rows}
    assert by_name["h2o + 8 bits at 75%"].freed > 0.4
    assert by_name["8 bits"].freed > 0.2
    assert by_name["lamina"].freed == 1.0
    assert by_name["vattention"].nbytes > 0
    assert by_name["sink_recent at 25%"].freed > 0.6
    assert by_name["snapkv at 25%"].freed > 0.4
    assert by_name["snapkv + 8 bits at 75%"].freed > by_name["8 bits"].freed
    assert all(len(cells) == len(cache_speed.COLUMNS) for row in rows for cells in row.rows())
    assert json.loads(json.dumps(rows[0].to_json()))["tokens"] == 256
    with pytest.raises(ValueError, match=r"rounds=0, lengths=\(256,\): expected at least 1, and 64 tokens"):
        bench_decode((256,), rounds=0)


@pytest.mark.usefixtures("small_layer")
def test_decoding_with_half_of_the_pages_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: dict[bool, int] = dict.fromkeys((True, False), 0)
    read = Pool._fetch

    def counted(pool: Pool, pages: Any) -> None:
        fetched[pool.ahead] += 1
        read(pool, pages)

    monkeypatch.setattr(Pool, "_fetch", counted)
    rows = bench_decode((1024,), rounds=1, only="^everything|^quest|^snapkv at", disk=tmp_path)
    by_name = {row.name: row for row in rows}
    away = [name for name in by_name if "half on disk" in name]
    assert away == [
        f"{name}, half on disk{words}" for name in ("quest at 25%", "everything") for words in ("", ", not ahead")
    ]
    for name in ("everything, half on disk", "everything, half on disk, not ahead"):
        assert by_name[name].nbytes == pytest.approx(by_name["everything"].nbytes / 2, rel=0.05)
        assert by_name[name].layer > 0
    assert fetched[True] > 0 == fetched[False]
    assert list(tmp_path.iterdir()) == []
