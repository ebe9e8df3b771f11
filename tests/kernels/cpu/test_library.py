"""Choosing the instruction set, and living without the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade
from saccade.kernels import cpu
from saccade.ops import attend, block_attend
from saccade.types import BlockLayout

built = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")


@built
def test_the_best_instruction_set_is_in_use_until_another_is_chosen():
    best = cpu.instruction_set()
    try:
        assert cpu.use("portable") == cpu.instruction_set() == "portable"
        names = [cpu.use(name) for name in cpu.INSTRUCTION_SETS]
        assert next(name for name in names if name is not None) == best
        assert cpu.instruction_set() == "portable"
    finally:
        assert cpu.use(None) == best


@built
def test_unknown_instruction_sets_are_refused():
    with pytest.raises(ValueError, match="name='mmx': expected one of avx512_bf16, avx512, avx2, portable"):
        cpu.use("mmx")


WITHOUT = """
import torch
from saccade.kernels import cpu
from saccade.ops import attend, recording
x = torch.randn(1, 2, 32, 8)
with recording() as records:
    attend(x, x, x, causal=True)
print(records[0].impl, records[0].refused["cpu"])
print(cpu.instruction_set())
try:
    attend(x, x, x, impl="cpu")
except ValueError as error:
    print(error)
"""


def test_without_the_library_auto_says_why_and_an_explicit_choice_raises(tmp_path):
    """A copy of the package without the built file, as an install without a compiler leaves it."""
    shutil.copytree(Path(saccade.__file__).parent, tmp_path / "saccade", ignore=shutil.ignore_patterns("*.so"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    reason = "the C++ engine is not built (it takes a C++ compiler at install time)"
    assert found.stdout.splitlines() == [
        f"sdpa {reason}",
        "None",
        f"impl='cpu': attend cannot run it here: {reason}",
    ]


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = ((2, 4, 40, 16), (2, 2, 48, 16), (2, 2, 48, 8))
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]


@built
def test_the_operators_are_opaque_to_the_compiler():
    q, k, v = qkv()
    layout = BlockLayout.window(40, 48, 12, 3, block=(16, 24))
    parts = (layout.indptr, layout.indices, layout.kinds, layout.bits, 1, 1, 16, 24, 0.3, None, 2**20, "cpu")
    torch.library.opcheck(torch.ops.saccade.block_attend.default, (q, k, v, *parts))
    rules = (None, None, None, None, None, 12, 0, None, 0.3, 2**20, "cpu")
    torch.library.opcheck(torch.ops.saccade.attend.default, (q, k, v, *rules))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole_it_gives_the_same_bits(dtype):
    q, k, v = (x.detach() for x in qkv(dtype))
    layout = BlockLayout.window(40, 48, 12, 3, block=(16, 24))

    def both(q, k, v):
        return attend(q, k, v, causal=True, impl="cpu"), block_attend(q, k, v, layout, impl="cpu")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(q, k, v), both(q, k, v), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, wanted)
