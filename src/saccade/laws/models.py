"""A tiny random language model for the laws."""

from __future__ import annotations

from typing import Any

import torch


def tiny_llama(*, hidden: int = 32, device: str = "cpu", spread: float | None = None) -> Any:
    """A two-layer random Llama with 4 query and 2 key/value heads; weights normal with deviation `spread`, if given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if spread is not None:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=spread)
        return model.to(device).eval()
