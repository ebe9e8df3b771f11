"""Tree Attention over 2 and 4 gloo processes against one dense softmax in this process.

Run as a script, `test_tree_decoding.py FOLDER`, this file starts the ranks; they meet through a file.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from saccade.mechanisms.parallel.tree_decoding import TreeDecoding

# (queries, keys per rank, causal, query heads, key/value heads)
CASES = {
    2: [
        (1, (5, 4), True, 2, 2),
        (1, (0, 6), True, 4, 2),
        (3, (7, 0), True, 2, 1),
        (4, (6, 2), True, 4, 2),
        (9, (5, 4), True, 2, 2),
        (5, (2, 1), True, 2, 2),
        (3, (4, 3), False, 6, 2),
        (2, (0, 0), False, 2, 2),
    ],
    4: [
        (1, (3, 0, 5, 2), True, 4, 2),
        (5, (6, 1, 2, 1), True, 4, 1),
        (4, (3, 3, 3, 0), True, 2, 2),
        (6, (1, 4, 0, 2), False, 2, 1),
    ],
}  # fmt: skip


def inputs(case: int, queries: int, sizes: tuple[int, ...], heads: int, groups: int) -> list[Tensor]:
    """q, whole k and v, and the gradient of the loss with respect to the output and the log-sum-exp."""
    generator = torch.Generator().manual_seed(case)
    keys = sum(sizes)
    shapes = ((2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 6), (2, heads, queries, 6))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [*drawn, torch.randn(2, heads, queries, generator=generator, dtype=torch.float64)]


def rank_main(rank: int, world: int, folder: str) -> None:
    """Run every case on one rank and save what it got."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{world}", rank=rank, world_size=world)
    results = []
    for case, (queries, sizes, causal, heads, groups) in enumerate(CASES[world]):
        q, k, v, out_weight, lse_weight = inputs(case, queries, sizes, heads, groups)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        leaves = [x.clone().requires_grad_() for x in (q, k[:, :, mine], v[:, :, mine])]
        out, lse = TreeDecoding()(*leaves, causal=causal, scale=0.4, return_lse=True)
        seen = lse > -torch.inf
        ((out * out_weight).sum() + (lse * lse_weight)[seen].sum()).backward()
        results.append([out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)])
    torch.save(results, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def dense(
    q: Tensor, k: Tensor, v: Tensor, out_weight: Tensor, lse_weight: Tensor, causal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp and gradients row by row; a row that sees nothing is 0, -inf and without gradient."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(out_weight), torch.full_like(lse_weight, -math.inf)
    loss = (q.sum() + k.sum() + v.sum()) * 0
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            last = i + k.shape[2] - q.shape[2] if causal else k.shape[2] - 1
            if last < 0:
                continue
            scores = (k[:, h // share, : last + 1] @ q[:, h, i, :, None])[..., 0] * 0.4
            row = (scores.softmax(-1)[..., None] * v[:, h // share, : last + 1]).sum(1)
            out[:, h, i], lse[:, h, i] = row.detach(), scores.detach().logsumexp(-1)
            loss = loss + (row * out_weight[:, h, i]).sum() + (scores.logsumexp(-1) * lse_weight[:, h, i]).sum()
    return out, lse, list(torch.autograd.grad(loss, (q, k, v)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks of both worlds have left their results; one fresh process forks them all."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_match_one_process(world: int, folder: Path) -> None:
    results = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    for case, (queries, sizes, causal, heads, groups) in enumerate(CASES[world]):
        expected_out, expected_lse, gradients = dense(*inputs(case, queries, sizes, heads, groups), causal)
        start = 0
        for rank, size in enumerate(sizes):
            out, lse, q_gradient, k_gradient, v_gradient = results[rank][case]
            torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-10)
            torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)
            torch.testing.assert_close(q_gradient, gradients[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(k_gradient, gradients[1][:, :, start : start + size], rtol=0, atol=1e-10)
            torch.testing.assert_close(v_gradient, gradients[2][:, :, start : start + size], rtol=0, atol=1e-10)
            start += size


def test_bad_input() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="group=None: torch.distributed is not initialised"):
        TreeDecoding()(q, q, q)
    with pytest.raises(ValueError, match=r"v of shape \(1, 2, 3, 4\): expected \(1, 2, 1\)"):
        TreeDecoding()(q, q, torch.zeros(1, 2, 3, 4))


if __name__ == "__main__":
    for ranks in CASES:
        start_processes(rank_main, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
