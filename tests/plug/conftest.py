"""Tiny random models: no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 63,
}  # fmt: skip


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("Llama", **changes)`: a random two-layer causal language model of that family, in fp64 unless told."""

    def build(family: str = "Llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        import transformers

        config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.15)
        return model.to(dtype).eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of 40 tokens."""
    return torch.randint(1, 60, (2, 40), generator=torch.Generator().manual_seed(1))
