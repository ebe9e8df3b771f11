"""Measuring caches: rows come from the registry, quality at full budget is dense's, on tiny models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from saccade.bench import cache_speed
from saccade.bench.cache import COLUMNS, bench_cache
from saccade.bench.cache_quality import forced, make_material, measure_quality, recall
from saccade.bench.cache_rows import candidates, matching, shares_of
from saccade.bench.cache_speed import bench_decode
from saccade.catalog import cards
from saccade.mechanisms.cache.base import Everything, compose
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.models.ruler import recall_tasks
from saccade.plug import PagedCache, Recipe, apply
from saccade.plug.cache import cache_bytes
from saccade.types import Kind


def test_rows_come_from_the_registry() -> None:
    found, left_out = candidates(2048, 2, only=["h2o", "sink_recent", "tidal_decode"])
    assert [(one.name, one.budget) for one in found if one.name == "h2o"] == [("h2o", b) for b in (0.5, 0.25, 0.1)]
    for one in found:
        assert one.shares.of(one.effects) == pytest.approx(one.budget, rel=0.45)
    assert all(name.split(" at ")[0] in {card.name for card in cards()} for name in left_out)
    assert set(matching("h2o|recent")) >= {"h2o", "sink_recent"}
    assert set(matching(".")) == {card.name for card in cards() if card.kind is Kind.CACHE_POLICY}
    assert matching(None) is None


def test_shares_are_measured() -> None:
    assert shares_of(Everything(), 128, 2).held == 1.0
    assert shares_of(SinkRecent(0, 32), 128, 2).held == pytest.approx(1 / 3)  # of three pages
    assert shares_of(compose(store=Storage(bits=8)), 128, 1).held < 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.0]}, "budget=0.0: expected a part of the bytes"),
        ({"budgets": [1.5]}, "budget=1.5: expected a part of the bytes"),
        ({"only": ["h20"]}, "only='h20': expected some of "),
    ],
)
def test_bad_candidates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(256, 2, **options)


def test_everything_kept_is_as_good_as_dense(byte_model: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    model, tokenizer = byte_model
    material = make_material(tokenizer, 600, steps=4, windows=2, tries=1)
    dense = measure_quality(model, DynamicCache, material, cache_bytes)
    with apply(model, Recipe.uniform(model, "dense")):
        paged = measure_quality(model, lambda: PagedCache(model, Everything()), material, cache_bytes)
    assert paged.perplexity == pytest.approx(dense.perplexity, rel=1e-4)
    assert set(paged.found) == {"agnostic", "aware"}
    assert paged.log_prob["aware"]["passkey"] == pytest.approx(dense.log_prob["aware"]["passkey"], rel=1e-4)
    assert paged.log_prob["agnostic"]["multikey"] == pytest.approx(dense.log_prob["aware"]["multikey"], rel=1e-3)


def test_forced_steps_say_what_one_forward_says(byte_model: tuple[Any, Any]) -> None:
    from transformers import DynamicCache

    model, tokenizer = byte_model
    task = recall_tasks(tokenizer, 600, 1, names=["passkey"])[0]
    with torch.no_grad():
        ids = torch.cat([task.context, task.question, task.answer], 1)
        count = task.answer.shape[1]
        table = model(ids).logits[0, -count - 1 : -1].log_softmax(-1)
    expected = table.gather(1, task.answer[0][:, None])[:, 0]
    for protocol in ("agnostic", "aware"):
        run = recall(model, DynamicCache(), task, protocol, cache_bytes)
        torch.testing.assert_close(run.log_probs, expected, rtol=1e-4, atol=1e-4)
    run = forced(model, DynamicCache(), ids[:, :10], ids[:, 10:14], cache_bytes)
    assert (len(run.log_probs), len(run.right), len(run.seconds)) == (4, 4, 3)
    assert run.nbytes == 13 * 2 * 2 * 2 * 8 * 4


def test_the_table(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    result = bench_cache(
        model, tokenizer, 640, steps=3, windows=1, tries=1, budgets=(0.25,), only=["h2o", "sink_recent"]
    )  # fmt: skip
    assert [row.name for row in result.table] == ["dense", "h2o", "sink_recent"]
    dense, heavy, recent = result.table
    assert dense.held == dense.ratio == 1.0
    assert 0.2 < heavy.held < 0.4
    assert 0.2 < recent.held < 0.4
    assert all(len(cells) == len(COLUMNS) for cells in result.rows())
    assert result.markdown().count("\n") == 4
    assert json.loads(json.dumps(result.to_json()))["table"][1]["name"] == "h2o"
    with pytest.raises(ValueError, match="context=9000: expected at most 4096, the model's"):
        bench_cache(model, tokenizer, 9000)
    with pytest.raises(ValueError, match="steps=700: expected 1 to 639, fewer than the context"):
        bench_cache(model, tokenizer, 640, steps=700)


def test_decoding_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 32, "MLP": 32}.items():
        monkeypatch.setattr(cache_speed, name, value)
    rows = bench_decode((256,), rounds=1, registry=True)
    assert rows[0].name == cache_speed.DENSE
    assert rows[0].freed == 0
    assert rows[0].attention_speedup == 1
    by_name = {row.name: row for row in rows}
    assert by_name["h2o 25 %, 8 bits"].freed > 0.6
    assert by_name["everything, 8 bits"].freed > 0.3
    assert "sink_recent at 25 %" in by_name
    assert all(len(cells) == len(cache_speed.COLUMNS) for row in rows for cells in row.rows())
    assert json.loads(json.dumps(rows[0].to_json()))["tokens"] == 256
    with pytest.raises(ValueError, match=r"rounds=0, lengths=\(256,\): expected at least 1, and 64 tokens"):
        bench_decode((256,), rounds=0)
