"""Cases that read a long cache once: decoding, and decoding over the best keys only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from saccade.bench.case import DTYPES, Case, Peer, Work, draw
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import attend, decode_attend, gather_attend
from saccade.types import KVPages, TokenIndex
from saccade.types.pages import dequantise, quantise

QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128


def cases(quick: bool) -> list[Case]:
    """32 query heads over 8 key/value heads, D = 128."""
    found = []
    for tokens, dtype in itertools.product((1024,) if quick else (8192, 32768, 131072), DTYPES):
        found.append(Case(f"decode cache={tokens:,} D=128 {dtype}", partial(_decode, tokens, DTYPES[dtype])))
    tokens = 1024 if quick else 32768
    found += [Case(f"decode cache={tokens:,} D=128 int{bits}", partial(_codes, tokens, bits)) for bits in (8, 4)]
    lists = [(1024, 64)] if quick else itertools.product((32768, 131072), (1024, 4096))
    for (tokens, kept), dtype in itertools.product(lists, DTYPES):
        name = f"top-k {kept:,} of {tokens:,} D=128 {dtype}"
        found.append(Case(f"{name} in tensors", partial(_top_k, tokens, kept, DTYPES[dtype])))
        found.append(Case(f"{name} in a store", partial(_top_k_stored, tokens, kept, DTYPES[dtype])))
    return found


def cache(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One query per head, and the keys and values."""
    q = draw(1, QUERY_HEADS, 1, DIM, dtype=dtype)
    k, v = (draw(1, KV_HEADS, tokens, DIM, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v


def read(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """The limit: summing the same bytes as fp32, once."""
    words = [x.view(-1).view(torch.float32) for x in tensors]
    return lambda: [x.sum() for x in words]


def read_rows(rows: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The limit where what is read lies scattered: summing the rows, in place."""
    start = rows.new_zeros(1)
    return [embedding_bag(rows, x.view(-1, DIM), start, mode="sum") for x in tensors]


def cold() -> Callable[[], Tensor]:
    """Reads 128 MiB of other data, as the other layers of a model would, so that a cache comes from memory."""
    return torch.ones(2**25).sum


def _decode(tokens: int, dtype: torch.dtype) -> Work:
    q, k, v = cache(tokens, dtype)

    def matmuls() -> Tensor:
        grouped = q.view(1, KV_HEADS, -1, DIM) * DIM**-0.5
        weights = (grouped @ k.mT).softmax(-1, dtype=torch.float32).to(dtype)
        return (weights @ v).view(q.shape)

    return Work(
        _must_run(lambda: attend(q, k, v, impl="cpu")),
        {
            "SDPA, grouped": Peer(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)),
            "grouped matmuls": Peer(matmuls),
            "one read of the cache": Peer(read(k, v), same=False),
        },
        bytes=k.nbytes + v.nbytes,
        before=cold(),
    )


def _codes(tokens: int, bits: int) -> Work:
    """A cache in codes with a scale per 64 channels, in pages of 64 tokens, dequantised inside the engine."""
    q, k, v = cache(tokens, torch.float32)
    (keys, k_scale, _), (values, v_scale, _) = (quantise(x.view(-1, 64, DIM), bits, 64) for x in (k, v))
    table = torch.arange(len(keys)).view(1, KV_HEADS, -1)
    lengths = torch.full((1, KV_HEADS), tokens)
    pages = KVPages(keys, values, table, lengths, k_scale, v_scale)

    def dequantised() -> Tensor:
        near, far = (
            dequantise(codes, scale, None).view(1, KV_HEADS, tokens, DIM)
            for codes, scale in ((keys, k_scale), (values, v_scale))
        )
        return scaled_dot_product_attention(q, near, far, enable_gqa=True)

    stored = (keys, values, k_scale, v_scale)
    return Work(
        _must_run(lambda: decode_attend(q, pages, impl="cpu")),
        {
            "dequantise + SDPA": Peer(dequantised),
            "one read of the cache": Peer(read(*stored), same=False),
        },
        bytes=sum(x.nbytes for x in stored),
        before=cold(),
    )


def best(tokens: int, kept: int) -> Tensor:
    """Places of the keys that each key/value head would choose, in order: int64 `[KV_HEADS, kept]`."""
    noise = torch.rand(KV_HEADS, tokens, generator=torch.Generator().manual_seed(3))
    return noise.topk(kept, -1).indices.sort(-1).values


def _top_k(tokens: int, kept: int, dtype: torch.dtype) -> Work:
    q, k, v = cache(tokens, dtype)
    chosen = best(tokens, kept)
    index = TokenIndex(chosen[None, :, None], 1, tokens)  # a list per key/value head, shared by its query heads
    flat = (chosen + torch.arange(KV_HEADS)[:, None] * tokens).reshape(-1)

    def gathered() -> Tensor:
        near, values = (x.view(-1, DIM).index_select(0, flat).view(1, KV_HEADS, kept, DIM) for x in (k, v))
        return scaled_dot_product_attention(q, near, values, enable_gqa=True)

    return Work(
        _must_run(lambda: gather_attend(q, k, v, index, impl="cpu")),
        {
            "index_select + SDPA": Peer(gathered),
            "one read of as many bytes": Peer(
                read(k[:, :, :kept].contiguous(), v[:, :, :kept].contiguous()), same=False
            ),
            "one read of the same rows": Peer(partial(read_rows, flat, k, v), same=False),
        },
        bytes=2 * KV_HEADS * kept * DIM * q.element_size(),
        before=cold(),
    )


def _top_k_stored(tokens: int, kept: int, dtype: torch.dtype) -> Work:
    """The same keys in the memory of a `KVStore`, which lies in large pages where the system has them."""
    q, k, v = cache(tokens, dtype)
    store = KVStore()
    store.append(k, v)
    pages, chosen = store.pages(), best(tokens, kept)
    nbytes = 2 * KV_HEADS * kept * DIM * q.element_size()
    page = chosen // pages.page_size
    rows = pages.table[0].gather(1, page), chosen % pages.page_size

    def gathered() -> Tensor:
        near, values = (x[rows][None] for x in (pages.k, pages.v))
        return scaled_dot_product_attention(q, near, values, enable_gqa=True)

    return Work(
        _must_run(lambda: decode_attend(q, store.pages(), slots=chosen[None], impl="cpu")),  # pages go with the store
        {
            "indexing + SDPA": Peer(gathered),
            "one read of as many bytes of the store": Peer(read(store.table.arena.bytes.view(-1)[:nbytes]), same=False),
        },
        bytes=nbytes,
        before=cold(),
    )


def _must_run(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call, after it ran once: an engine that cannot run it says why here, as a ValueError."""
    call()
    return call
