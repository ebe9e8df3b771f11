"""Putting a recipe into a transformers model, and taking it out again.

`apply` points the model's config at one attention implementation named "saccade", which it registers with transformers'
`AttentionInterface` and `AttentionMaskInterface` the first time (the only process-wide change; it does nothing to
models without a recipe). All else is kept on the model's own modules and goes away with `Handle.undo`.
"""

# ruff: noqa: SLF001 - transformers has no public way to set one config's attention implementation alone.

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from saccade.ops import recording
from saccade.plug.cache import LAYER
from saccade.plug.cache_recipe import check_caches, in_words
from saccade.plug.cached import LATER, attend_cached
from saccade.plug.fingerprint import fingerprint
from saccade.plug.layers import INTERFACE, attention_layers, forward_globals
from saccade.plug.masks import MaskPlan, Reading, UnreadableMaskError, build_plan, read_bare
from saccade.plug.recipe import PHASES, LayerRecipe, Recipe, check_dtypes, cover
from saccade.plug.route import Extras, HeadsReport, Route, build_route, refusal, run_routes
from saccade.plug.state import STATE, CacheReport, CallReport, LayerState, Observation
from saccade.plug.strict_json import RecipeError

NAME = "saccade"
"""Name of the attention implementation that transformers knows."""

FOREIGN = ("position_bias", "cache", "head_mask", "layer_head_mask", "alibi")
"""Arguments of an attention call whose meaning no mechanism knows."""


class Handle:
    """An applied recipe. `undo()`, or leaving its `with` block, restores the model.

    Args:
        recipe: The recipe.
        configs: Patched configs, each with the attention implementation it had.
        modules: Patched modules.
    """

    def __init__(self, recipe: Recipe, configs: list[tuple[Any, str]], modules: list[nn.Module]) -> None:
        self.recipe = recipe
        self._configs = configs
        self._modules = modules

    def undo(self) -> None:
        """Restore the model bit for bit; nothing happens the second time."""
        for config, former in self._configs:
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = former
        for module in self._modules:
            module.__dict__.pop(STATE, None)
        self._configs, self._modules = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.undo()


def apply(model: nn.Module, recipe: Recipe, *, strict: bool = False, record: bool = True) -> Handle:
    """Let the layers of a transformers model use the mechanisms of a recipe.

    A layer runs its `prefill` choice on calls with more than one query and its `decode` choice on those with one. Where
    a mechanism cannot run (padding it does not support, a sliding window of the layer's own, a custom mask, dropout),
    the layer runs dense for that call, and `explain` shows why.

    Args:
        model: A model whose class calls transformers' attention interface.
        recipe: Made for this model.
        strict: Raise `RuntimeError` where a mechanism cannot run, instead of running dense.
        record: Keep for `explain` what each layer did last.

    Returns:
        The handle to undo it with; also a context manager.

    Raises:
        ValueError: If the model cannot be patched or has a recipe already, or the recipe is for another model, names
            unknown layers or mechanisms, or has a setting out of range. Nothing is changed then.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe of type {type(recipe).__name__}: expected a Recipe, as from Recipe.load(path)")
    layers = patchable_layers(model)
    if any(STATE in module.__dict__ for module in model.modules()):
        raise ValueError("model: a recipe is applied already, call undo() of its handle first")
    differences = recipe.model.differences(fingerprint(model))
    if differences:
        raise RecipeError(f"recipe is for another model: this one has {differences}")
    check_caches(recipe.layers)
    policies = {
        name: in_words(layer.cache.build(f"layers[{name!r}].cache"))
        for name, layer in recipe.layers.items()
        if layer.cache is not None
    }
    routes = {name: _layer_routes(name, layer, layers) for name, layer in recipe.layers.items()}
    configs = {id(layers[name].config): layers[name].config for name in routes}
    for config in configs.values():
        if getattr(config, "output_attentions", False):
            raise ValueError("config.output_attentions=True: expected False, mechanisms do not return attention maps")
    patched = {name: module for name, module in layers.items() if id(module.config) in configs}
    _register()
    handle = Handle(recipe, [(config, config._attn_implementation) for config in configs.values()], [*patched.values()])
    for name, module in patched.items():
        former_name, former = module.config._attn_implementation, _former_function(module)
        module.__dict__[STATE] = LayerState(
            name, former_name, former, routes.get(name, {}), strict, record, policy=policies.get(name)
        )
    for config in configs.values():
        config._attn_implementation_internal = NAME
    return handle


def patchable_layers(model: nn.Module) -> dict[str, Any]:
    """The attention layers of `model` that a recipe can name.

    Args:
        model: A transformers model.

    Returns:
        Attention modules by name.

    Raises:
        ValueError: If the model is not one whose attention can be replaced, saying why.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model of type {type(model).__name__}: expected a transformers PreTrainedModel")
    layers: dict[str, Any] = dict(attention_layers(model))
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"model of type {kind}: its attention does not call transformers' attention interface")
    if not any(getattr(part, "_supports_attention_backend", False) for part in _pretrained(model)):
        raise ValueError(f"model of type {kind}: its class does not support attention backends of others")
    for name, module in layers.items():
        former = module.config._attn_implementation
        if former == "eager" and "eager_attention_forward" not in forward_globals(module):
            raise ValueError(f"model of type {kind}: {name} has no eager attention function to go back to")
    return layers


def _pretrained(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _layer_routes(name: str, layer: LayerRecipe, layers: dict[str, Any]) -> dict[str, tuple[Route, ...]]:
    """Build and check what a layer runs in each phase."""
    if name not in layers:
        nearest = difflib.get_close_matches(name, layers, n=1)
        hint = f", nearest is {nearest[0]!r}" if nearest else ""
        raise RecipeError(f"layers[{name!r}]: the model has no attention layer of this name{hint}")
    config = layers[name].config
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    kv_heads = heads if kv_heads is None else kv_heads
    routes = {}
    check_dtypes(layer, f"layers[{name!r}]")
    for phase in PHASES:
        choices = getattr(layer, phase)
        cover(choices, heads, f"layers[{name!r}].{phase}")
        routes[phase] = tuple(build_route(choice, heads, kv_heads) for choice in choices)
    return routes


def _register() -> None:
    """Make the one name known to transformers."""
    known = AttentionInterface._global_mapping.get(NAME)
    if known is not None and known is not attention:
        raise ValueError(
            f"attention implementation {NAME!r}: registered with transformers already, by {known.__module__}"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, build_plan)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: query `[B, H, M, D]`, returns `[B, M, H, E]` and None."""
    state: LayerState | None = module.__dict__.get(STATE)
    if state is None:
        raise RuntimeError(f"{type(module).__name__} uses the attention implementation {NAME!r} without a recipe")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: expected False, mechanisms return no attention maps; undo() first")
    if state.observe is not None:
        state.observe(Observation(state.name, module, query, key, value, kwargs.get("scaling")))
    phase = "decode" if query.shape[2] == 1 else "prefill"
    started = time.perf_counter()
    routes = state.routes.get(phase, ())
    layer = getattr(key, LAYER, None)
    if layer is None:
        out, weights, reports = _run(state, routes, module, query, key, value, attention_mask, kwargs)
    else:
        out, weights, reports = _run_cached(layer, state, routes, module, query, key, value, attention_mask, kwargs)
    if state.keep_records and reports and not torch.compiler.is_compiling():
        seconds = time.perf_counter() - started
        cache = None if layer is None else CacheReport(in_words(layer.policy), layer.store.lengths, layer.store.nbytes)
        state.last[phase] = CallReport(query.shape[2], key.shape[2], reports, seconds, cache)
    return out, weights


def _run_cached(
    layer: Any, state: LayerState, routes: tuple[Route, ...], module: nn.Module, query: Tensor, key: Tensor,
    value: Tensor, mask: Any, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None, list[HeadsReport]]:  # fmt: skip
    """The layer's attention over a `PagedCache`, and what it read."""
    later = query.shape[2] > 1 and not layer.store.empty
    reports = [route.report(LATER if later and route.changes else None) for route in routes]
    _raise_if_strict(state, reports)

    def prefill() -> Tensor:
        out, _, reports[:] = _run(state, routes, module, query, key, value, mask, kwargs)
        return out.transpose(1, 2)

    extras = Extras(kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
    window = kwargs.get("sliding_window")
    with recording() as runs:
        out = attend_cached(layer, query, key, value, mask, extras, window, routes, prefill)
    for report in reports:
        report.runs = report.runs or runs
    return out.transpose(1, 2).contiguous(), None, reports


def _run(
    state: LayerState, routes: tuple[Route, ...], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    mask: Any, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None, list[HeadsReport]]:  # fmt: skip
    """The layer's attention, and what each group of heads did."""
    routes = tuple(route.at(key.shape[2]) for route in routes)
    if all(route.as_before for route in routes):
        return *_former(state, module, query, key, value, mask, kwargs), [route.report() for route in routes]
    extras = Extras(kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
    reading, reason = _read(module, query, key, mask, kwargs)
    if reading is not None and len(routes) == 1 and routes[0].mechanism is not None:
        reason = refusal(routes[0].mechanism, query, key[:, :, : reading.keys], reading, extras)
    if reading is None or reason is not None:
        reports = [route.report(reason) for route in routes]
        _raise_if_strict(state, reports)
        return *_former(state, module, query, key, value, mask, kwargs), reports
    out, reports = run_routes(routes, query, key, value, reading, extras, state.keep_records)
    _raise_if_strict(state, reports)
    return out.transpose(1, 2).contiguous(), None, reports


def _read(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Reading | None, str | None]:
    """What the call lets queries see; or None and why no mechanism can run it."""
    if kwargs.get("dropout", 0.0) > 0:
        return None, f"dropout={kwargs['dropout']} on the attention weights"
    foreign = [name for name in FOREIGN if kwargs.get(name) is not None]
    if foreign:
        return None, f"the model's attention takes {', '.join(foreign)}"
    try:
        if not isinstance(mask, MaskPlan):
            is_causal = kwargs.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            return read_bare(mask, bool(is_causal), query.shape[2], key.shape[2]), None
        reading = mask.read(query.device)
    except UnreadableMaskError as reason:
        return None, str(reason)
    if reading.keys > key.shape[2] or mask.arguments["kv_length"] != key.shape[2]:
        return None, f"the layer holds {key.shape[2]} keys, its mask is for {mask.arguments['kv_length']}"
    return reading, None


def _former(
    state: LayerState, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Exactly what the model ran before `apply`."""
    if isinstance(mask, MaskPlan):
        mask = mask.former(state.former_name)
    out, weights = state.former(module, query, key, value, mask, **kwargs)
    return out, weights


def _former_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module's `forward` would call."""
    names, name = forward_globals(module), module.config._attn_implementation  # type: ignore[union-attr]
    function: Callable[..., Any] = names[INTERFACE].get_interface(name, names.get("eager_attention_forward"))
    return function


def _raise_if_strict(state: LayerState, reports: list[HeadsReport]) -> None:
    for report in reports if state.strict else ():
        if report.fallback is not None:
            raise RuntimeError(f"strict=True: {state.name} cannot run {report.mechanism}: {report.fallback}")
