"""`saccade.plug.transformers`: apply, run and undo on tiny random models of several families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saccade.plug import Choice, LayerRecipe, Recipe, RecipeError, apply, explain

Build = Callable[..., Any]
WIDE = {"window": 256, "sinks": 0, "block": 16}
NARROW = {"window": 6, "sinks": 2, "block": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "dtype": torch.float32}
FIRST = "model.layers.0.self_attn"


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.quick
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Qwen3", "GptOss"])
def test_dense_recipe_is_bit_equal_and_leaves_nothing(tiny: Build, ids: Tensor, family: str) -> None:
    model = tiny(family, **(EXPERTS if family == "GptOss" else {}))
    before, former = logits(model, input_ids=ids), model.config._attn_implementation
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = apply(model, Recipe.uniform(model, "dense"))
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=0)
    handle.undo()
    handle.undo()
    assert model.config._attn_implementation == former
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_over_everything_equals_dense(tiny: Build, ids: Tensor, family: str, attention: str) -> None:
    model = tiny(family, attn_implementation=attention)
    before = logits(model, input_ids=ids)
    with apply(model, Recipe.uniform(model, "sink_window", WIDE), strict=True):
        torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=0)


def test_softcap_and_sinks_of_the_model_are_kept(tiny: Build, ids: Tensor) -> None:
    for family, extra in (
        ("Gemma2", {"sliding_window": 256, "attn_logit_softcapping": 2.0}),
        ("GptOss", {"sliding_window": 256, **EXPERTS}),
    ):
        # Eager, because some releases let SDPA run these families and drop the soft cap.
        model = tiny(family, attn_implementation="eager", **extra)
        before = logits(model, input_ids=ids)
        with apply(model, Recipe.uniform(model, "sink_window", WIDE), strict=True):
            torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-5)


@pytest.mark.quick
def test_narrow_window_changes_the_output_and_matches_a_masked_model(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    distance = torch.arange(40)[:, None] - torch.arange(40)
    mask = (distance >= 0) & ((distance < 6) | (torch.arange(40) < 2))
    expected = logits(model, input_ids=ids, attention_mask=mask[None, None].expand(2, 1, 40, 40))
    before = logits(model, input_ids=ids)
    with apply(model, Recipe.uniform(model, "sink_window", NARROW), strict=True):
        found = logits(model, input_ids=ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((found - before).abs().max()) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mechanism", [("dense", {}), ("dense", {"engine": "saccade"}), ("sink_window", NARROW)])
def test_padded_batch_equals_one_by_one(tiny: Build, ids: Tensor, side: str, mechanism: tuple[str, Any]) -> None:
    model, name, settings = tiny(), *mechanism
    short = 27
    keep = torch.ones(2, 40, dtype=torch.long)
    padded, real = ids.clone(), slice(40 - short, 40) if side == "left" else slice(0, short)
    keep[1] = 0
    keep[1, real] = 1
    padded[1] = 0
    padded[1, real] = ids[1, :short]
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    with apply(model, Recipe.uniform(model, name, settings)):
        together = logits(model, input_ids=padded, attention_mask=keep, position_ids=positions)
        torch.testing.assert_close(together[0], logits(model, input_ids=ids[:1])[0], rtol=0, atol=1e-6)
        alone = logits(model, input_ids=ids[1:, :short])[0]
        if name == "sink_window" and side == "left":
            # Sinks are places in the cache, so only a window without them is the same after left padding.
            settings = {**NARROW, "sinks": 0}
    if name == "sink_window":
        with apply(model, Recipe.uniform(model, name, settings), strict=True):
            together = logits(model, input_ids=padded, attention_mask=keep, position_ids=positions)
            alone = logits(model, input_ids=ids[1:, :short])[0]
    torch.testing.assert_close(together[1, real], alone, rtol=0, atol=1e-6)


def test_dense_attention_on_saccades_engine(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    before = logits(model, input_ids=ids)
    with apply(model, Recipe.uniform(model, "dense", {"engine": "saccade"}), strict=True):
        torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-5)
        rows = explain(model).rows
    assert all(row.engine.startswith("attend:") for row in rows if row.ran)
    with apply(model, Recipe.uniform(model, "dense"), strict=True):
        assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize(("mechanism", "settings"), [("dense", {"engine": "saccade"}), ("sink_window", NARROW)])
def test_heads_computed_in_another_dtype(tiny: Build, ids: Tensor, mechanism: str, settings: dict[str, Any]) -> None:
    model = tiny().float()
    base = Recipe.uniform(model, "dense")

    def logits(dtype: str | None) -> Tensor:
        layer = LayerRecipe((Choice("all", mechanism, settings, dtype=dtype),), (Choice("all", "dense"),))
        with apply(model, Recipe(base.model, dict.fromkeys(base.layers, layer)), strict=True), torch.no_grad():
            out: Tensor = model(ids).logits
            if dtype is not None:
                assert f" in {dtype} " in str(explain(model))
                assert explain(model).rows[0].dtype == dtype
        return out

    exact, narrow = logits(None), logits("bfloat16")
    assert narrow.dtype == exact.dtype == torch.float32
    difference = float((narrow - exact).norm() / exact.norm())
    assert 1e-5 < difference < 2e-2
    assert float((logits("float16") - exact).norm() / exact.norm()) < difference  # three more bits


def test_what_stands_in_for_a_rounded_mechanism_is_not_rounded(tiny: Build, ids: Tensor) -> None:
    model = tiny().float()
    base = Recipe.uniform(model, "dense")
    below = Choice("all", "sink_window", NARROW, min_tokens=100, dtype="bfloat16")
    layer = LayerRecipe((below,), (Choice("all", "dense"),))
    with torch.no_grad():
        expected = model(ids).logits
        with apply(model, Recipe(base.model, dict.fromkeys(base.layers, layer))):
            assert torch.equal(model(ids).logits, expected)


def test_no_quadratic_mask_is_built_for_layers_with_a_mechanism(
    tiny: Build, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    def refuse(**_: Any) -> None:
        raise AssertionError("a quadratic mask was built")

    model = tiny()
    keep = torch.ones(2, 40, dtype=torch.long)
    keep[1, :9] = 0
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", refuse)
    with apply(model, Recipe.uniform(model, "sink_window", NARROW), strict=True):
        logits(model, input_ids=ids, attention_mask=keep)
    with apply(model, Recipe.uniform(model, "dense")), pytest.raises(AssertionError, match="quadratic"):
        logits(model, input_ids=ids, attention_mask=keep)


def test_packed_positions_equal_separate_sequences(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, 40)
    engine = {"engine": "saccade"}
    for name, settings in (
        ("dense", {}),
        ("dense", engine),
        ("sink_window", {**NARROW, "sinks": 0}),
        ("sink_window", WIDE),
    ):
        with apply(model, Recipe.uniform(model, name, settings), strict=True):
            packed = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
            parts = [logits(model, input_ids=ids[:, :25]), logits(model, input_ids=ids[:, 25:])]
        torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=0, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_cache_equals_without(tiny: Build, ids: Tensor, padded: bool) -> None:
    model = tiny()
    keep = torch.ones(2, 40, dtype=torch.long)
    if padded:
        keep[1, :9] = 0
    options = {"attention_mask": keep, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with apply(model, Recipe.uniform(model, "sink_window", NARROW), strict=True):
        cached = model.generate(ids, use_cache=True, **options)
        torch.testing.assert_close(cached, model.generate(ids, use_cache=False, **options))
        rows = explain(model).rows
    assert {row.phase for row in rows if row.ran} == {"prefill", "decode"}
    assert explain(model).rows == ()


def test_chunked_prefill_on_a_warm_cache_equals_one_pass(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "sink_window", NARROW), strict=True), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :17], use_cache=True)
        second = model(ids[:, 17:39], past_key_values=first.past_key_values, use_cache=True)
        third = model(ids[:, 39:], past_key_values=second.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole, rtol=0, atol=1e-6)


def test_static_cache_is_right(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    with apply(model, Recipe.uniform(model, "sink_window", NARROW), strict=True):
        static = model.generate(ids, cache_implementation="static", **options)
        torch.testing.assert_close(static, model.generate(ids, **options))


def test_prefill_and_decode_are_routed_apart(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    recipe = Recipe.uniform(model, "sink_window", NARROW, decode=False)
    with apply(model, recipe):
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        rows = {row.phase: row for row in explain(model).rows if row.layer == FIRST}
    assert rows["prefill"].mechanism == "sink_window"
    assert rows["prefill"].engine.startswith("block_attend")
    assert rows["decode"].mechanism == "dense"
    assert rows["decode"].engine == "model's sdpa"


@pytest.mark.parametrize("split", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((3,), (0, 1, 2)), ((0, 1, 3), (2,))])
def test_heads_of_one_layer_may_differ(tiny: Build, ids: Tensor, split: tuple[tuple[int, ...], ...]) -> None:
    model = tiny()
    before = logits(model, input_ids=ids)
    base = Recipe.uniform(model, "dense")

    def recipe(settings: dict[str, Any]) -> Recipe:
        choices = (Choice(split[0], "sink_window", settings), Choice(split[1], "dense"))
        return Recipe(base.model, {FIRST: LayerRecipe(choices, choices)})

    with apply(model, recipe(WIDE), strict=True):
        torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-6)
    seen: list[Tensor] = []
    hook = model.get_submodule(FIRST).o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with apply(model, recipe(NARROW), strict=True):
        logits(model, input_ids=ids)
    logits(model, input_ids=ids)
    hook.remove()
    changed = (seen[0] - seen[1]).abs().view(2, 40, 4, 8).amax((0, 1, 3)) > 1e-6
    assert tuple(changed.nonzero()[:, 0].tolist()) == split[0]


def test_below_the_crossover_length_dense_attention_runs(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    before = logits(model, input_ids=ids)
    base = Recipe.uniform(model, "dense")
    for keys, engine in ((41, "model's sdpa"), (40, "block_attend:")):
        choice = (Choice("all", "sink_window", NARROW, min_tokens=keys),)
        with apply(model, Recipe(base.model, dict.fromkeys(base.layers, LayerRecipe(choice, choice))), strict=True):
            found = logits(model, input_ids=ids)
            row = explain(model).rows[0]
        assert row.engine.startswith(engine)
        assert row.rule == ("dense below 41 tokens" if keys == 41 else None)
        assert torch.equal(found, before) == (keys == 41)


def test_unnamed_layers_stay_as_they_are(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    recipe = Recipe.uniform(model, "sink_window", NARROW)
    only = Recipe(recipe.model, {FIRST: recipe.layers[FIRST]})
    with apply(model, only):
        logits(model, input_ids=ids)
        assert {row.layer for row in explain(model).rows} == {FIRST}


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_layers_with_a_window_of_their_own_stay_dense_within_it(tiny: Build, ids: Tensor, family: str) -> None:
    model = tiny(family, sliding_window=8)
    before = logits(model, input_ids=ids)
    recipe = Recipe.uniform(model, "sink_window", WIDE)
    with apply(model, recipe):
        torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-5)
        reasons = [row.fallback for row in explain(model).fallbacks]
    assert any("a sliding window of 8 tokens of its own" in str(reason) for reason in reasons)
    with apply(model, recipe, strict=True), pytest.raises(RuntimeError, match="a sliding window of 8 tokens"):
        logits(model, input_ids=ids)


def test_sliding_window_cache_generates_the_same(tiny: Build, ids: Tensor) -> None:
    model = tiny("Mistral", sliding_window=8)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    with apply(model, Recipe.uniform(model, "sink_window", WIDE)):
        torch.testing.assert_close(model.generate(ids, **options), expected)


def test_a_custom_mask_runs_dense_and_says_so(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 5:9] = False
    mask |= torch.eye(40, dtype=torch.bool)
    expected = logits(model, input_ids=ids, attention_mask=mask)
    with apply(model, Recipe.uniform(model, "sink_window", NARROW)):
        torch.testing.assert_close(logits(model, input_ids=ids, attention_mask=mask), expected, rtol=0, atol=0)
        assert "a mask of the caller's own" in str(explain(model).rows[0].fallback)


def test_dropout_in_training_runs_dense_and_says_so(tiny: Build, ids: Tensor) -> None:
    model = tiny(attention_dropout=0.5).train()
    with apply(model, Recipe.uniform(model, "sink_window", NARROW)):
        model(ids)
        assert explain(model).rows[0].fallback == "dropout=0.5 on the attention weights"


def test_gradients_flow_through_an_applied_recipe(tiny: Build, ids: Tensor) -> None:
    model = tiny().train()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    choices = (Choice((0, 3), "sink_window", WIDE), Choice((1, 2), "dense"))
    base = Recipe.uniform(model, "dense")
    with apply(model, Recipe(base.model, dict.fromkeys(base.layers, LayerRecipe(choices, choices))), strict=True):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-6)


def test_output_attentions_is_refused(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    refused = pytest.raises(ValueError, match="output_attentions=True: expected False")
    with apply(model, Recipe.uniform(model, "sink_window", NARROW)), refused:
        model(ids, output_attentions=True)
    eager = tiny(attn_implementation="eager")
    eager.config.output_attentions = True
    with pytest.raises(ValueError, match="config.output_attentions=True: expected False"):
        apply(eager, Recipe.uniform(eager, "dense"))


def test_what_cannot_be_applied_changes_nothing(tiny: Build, ids: Tensor) -> None:
    model, other = tiny(), tiny(hidden_size=16)
    recipe = Recipe.uniform(model, "sink_window", NARROW)
    layer = recipe.layers[FIRST]
    heads = (Choice((0, 1, 2), "dense"),)
    unknown = LayerRecipe((Choice("all", "sink_windo"),), (Choice("all", "dense"),))
    wrong = {
        "another model: this one has .*hidden_size=32 instead of 16": Recipe.uniform(other, "dense"),
        "no attention layer of this name, nearest is": Recipe(recipe.model, {"model.layers.0.attn": layer}),
        "unknown mechanism 'sink_windo'; did you mean 'sink_window'": Recipe(recipe.model, {FIRST: unknown}),
        "window=0: expected at least 1 token": Recipe.uniform(model, "sink_window", {"window": 0}),
        "sink_window: .*unexpected keyword argument 'width'": Recipe.uniform(model, "sink_window", {"width": 3}),
        "expected each of 0 to 3 exactly once": Recipe(recipe.model, {FIRST: LayerRecipe(heads, heads)}),
    }
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            apply(model, bad)
    with pytest.raises(RecipeError, match="recipe of type str: expected a Recipe"):
        apply(model, recipe.to_json())  # type: ignore[arg-type]
    assert model.config._attn_implementation == "sdpa"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_second_recipe_is_refused_and_a_third_after_undo_accepted(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    recipe = Recipe.uniform(model, "sink_window", NARROW)
    with apply(model, recipe), pytest.raises(ValueError, match="a recipe is applied already, call undo"):
        apply(model, recipe)
    with apply(model, recipe):
        assert explain(model).applied


def test_models_that_cannot_be_patched_are_refused(tiny: Build) -> None:
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    recipe = Recipe.uniform(tiny(), "dense")
    with pytest.raises(ValueError, match="model of type Linear: expected a transformers PreTrainedModel"):
        apply(nn.Linear(2, 2), recipe)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM: its attention does not call"):
        apply(bloom, recipe)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    former = t5.config._attn_implementation
    with pytest.raises(ValueError, match="T5ForConditionalGeneration: its "):
        apply(t5, recipe)
    assert t5.config._attn_implementation == former


def test_copies_and_other_models_are_independent(tiny: Build, ids: Tensor) -> None:
    model, other = tiny(), tiny()
    before = logits(other, input_ids=ids)
    handle = apply(model, Recipe.uniform(model, "sink_window", NARROW))
    narrow = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(other, input_ids=ids), before, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    handle.undo()
    torch.testing.assert_close(logits(twin, input_ids=ids), narrow, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=0)


def test_a_model_inside_a_larger_one(ids: Tensor, tiny: Build) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict.fromkeys(("num_hidden_layers", "num_key_value_heads"), 2)
    text |= {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=63, mm_tokens_per_image=1)
    model = Gemma3ForConditionalGeneration(config).eval()
    before = logits(model, input_ids=ids)
    recipe = Recipe.uniform(model, "sink_window", WIDE)
    assert all("language_model" in name for name in recipe.layers), list(recipe.layers)
    with apply(model, recipe, strict=True):
        torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-4)
        assert model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=0)
