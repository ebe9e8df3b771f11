"""A fingerprint of a model: enough to refuse a recipe that was tuned on another one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 8
"""Values of each parameter that enter the hash."""


@dataclass(frozen=True)
class Fingerprint:
    """What makes a model this model.

    Args:
        architecture: Name of its class.
        layers: Decoder layers, or None if the config does not say; so for the next five.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Size of a head.
        hidden_size: Width of the residual stream.
        vocab_size: Tokens in the vocabulary.
        weights: SHA-256 over the names and shapes of all parameters and a few values of each, rounded to bfloat16:
            the same for a model held in fp32 and in bf16, another one after fine-tuning.
    """

    architecture: str
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int | None
    vocab_size: int | None
    weights: str

    def differences(self, other: Fingerprint) -> str:
        """Words for the fields in which `other` differs, "" if in none."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return ", ".join(f"{name}={theirs!r} instead of {mine!r}" for name, mine, theirs in pairs if mine != theirs)


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a transformers model; reads a few values of each parameter, changes nothing.

    Args:
        model: A transformers model.

    Returns:
        Its fingerprint.

    Raises:
        ValueError: If the model has no transformers config, or its weights are not loaded (meta device).
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"model of type {type(model).__name__}: expected a transformers model with a config")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    kv_heads, head_dim = _count(config, "num_key_value_heads"), _count(config, "head_dim")
    if head_dim is None and heads is not None and hidden is not None:
        head_dim = hidden // heads
    return Fingerprint(
        architecture=type(model).__name__,
        layers=_count(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        vocab_size=_count(config, "vocab_size"),
        weights=_hash_weights(model),
    )


def _count(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.device.type == "meta":
            raise ValueError(f"model: {name} is on the meta device, expected loaded weights")
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _sample(parameter: Tensor) -> bytes:
    """A few evenly spread values, as bytes that do not depend on the device."""
    flat = parameter.reshape(-1)
    values = flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].cpu()
    if not values.is_floating_point():
        return bytes(values.contiguous().view(torch.uint8).numpy())
    # Adding 0 turns -0 into 0.
    return bytes((values.to(torch.bfloat16) + 0).contiguous().view(torch.uint8).numpy())
