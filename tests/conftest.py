"""Shared fixtures: a tiny random language model with a byte tokenizer, so that nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from saccade.kernels import cpu


def pytest_configure() -> None:
    """Run everything on one instruction set, or with so many threads, where tools/sanitize.py asks for it."""
    name, threads = os.environ.get("SACCADE_TEST_INSTRUCTION_SET"), os.environ.get("SACCADE_TEST_THREADS")
    if name is not None and cpu.use(name) is None:
        pytest.exit(f"SACCADE_TEST_INSTRUCTION_SET={name}: not on this machine", returncode=2)
    if threads is not None:
        torch.set_num_threads(int(threads))


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {sign: number + 2 for number, sign in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def byte_model() -> tuple[Any, Any]:
    """`(model, tokenizer)`: two layers, 4 query and 2 key/value heads, 4,096 positions."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    return model, byte_tokenizer()


@contextmanager
def _engine(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if isa is not None and cpu.use(isa) is None:
            pytest.skip(f"this machine or build has no {isa}")
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if isa is not None:
            cpu.use(None)
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def engine() -> Callable:
    """`with engine(isa, threads)`: inside, that instruction set and so many threads; None leaves either as it is."""
    return _engine
