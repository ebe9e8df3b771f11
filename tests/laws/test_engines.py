"""Law 8 for the engines: shapes past 2^31 elements on the meta device, and real reads at such offsets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade.ops import attend, block_attend, gather_attend, long_conv, scan
from saccade.types import BlockLayout, TokenIndex

WIDE = 2**28 + 64
"""Tokens at which D = 8 channels pass 2^31 elements."""


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lists = torch.zeros(1, 1, q.shape[2], 2, dtype=torch.int64, device=q.device)
    return gather_attend(q, k, v, TokenIndex(lists, q.shape[2], k.shape[2]))


def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(kept, 2**24, 2**24, q.shape[2], k.shape[2]).to(q.device)
    return block_attend(q, k, v, layout)


MANY = 2**8 + 1
"""Batch entries at which 2^23 elements each pass 2^31."""

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "attend": lambda q, k, v: attend(q, k, v, causal=True),
    "gather_attend": gathered,
    "block_attend": blocks,
    "scan": lambda q, k, v: scan(q, k, v)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_past_int32_on_the_meta_device(name: str) -> None:
    q, k, v = meta(MANY, 4, 2**18, 8), meta(MANY, 2, 2**18, 8), meta(MANY, 2, 2**18, 6)
    assert q.numel() > 2**31
    out = CALLS[name](q, k, v)
    assert out.shape == (MANY, 4, 2**18, 6)
    assert out.device.type == "meta"
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_long_conv_shapes_past_int32_on_the_meta_device() -> None:
    x, kernel = meta(MANY, 2, 2**22), meta(2, 2**22)
    out = long_conv(x, kernel)
    assert out.shape == x.shape
    grads = torch.autograd.grad(out, (x, kernel), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [x.shape, kernel.shape]


@pytest.fixture(scope="module")
def store() -> Tensor:
    """Keys `[1, 1, WIDE, 8]` of which only the last 64 are ever touched: 4 GiB of addresses, a page of memory."""
    try:
        keys = torch.empty(1, 1, WIDE, 8, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine does not lend addresses it need not back: {error}")
    keys[:, :, -64:] = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return keys


def expected(q: Tensor, store: Tensor, picked: Tensor) -> Tensor:
    near = store[:, :, picked].double()
    return torch.softmax(q.double() @ near.mT * 8**-0.5, -1) @ near


def test_gather_attend_reads_keys_past_int32(store: Tensor) -> None:
    q = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    picked = torch.tensor([WIDE - 1, WIDE - 33, WIDE - 64])
    index = TokenIndex(picked.expand(1, 1, 3, 3).contiguous(), 3, WIDE)
    with torch.no_grad():
        out = gather_attend(q, store, store, index)
    torch.testing.assert_close(out.double(), expected(q, store, picked), rtol=0, atol=2**-7)


def far_apart(store: Tensor, tokens: int, channels: int, first: int) -> Tensor:
    """`[2, 1, tokens, channels]` whose second batch entry lies more than 2^31 elements behind the first."""
    view = store.as_strided((2, 1, tokens, channels), (2**31 + 8, 0, channels, 1), first)
    return view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(first)))


STRIDED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **CALLS,
    "block_attend": lambda q, k, v: block_attend(q, k, v, BlockLayout.window(24, 24, 7, 0, block=8)),
    "long_conv": lambda q, k, v: long_conv(k[:, 0].mT, v[0, 0].mT),
}


@pytest.mark.parametrize("name", STRIDED)
def test_engines_read_and_write_gradients_over_strides_past_int32(name: str, store: Tensor) -> None:
    wide = [far_apart(store, 24, 4, first) for first in (0, 96, 192)]
    results = []
    for inputs in (wide, [x.contiguous() for x in wide]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = STRIDED[name](*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)))
    assert wide[0].stride(0) > 2**31
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
