"""Running a parallel mechanism on several gloo processes that meet through a file in a temporary directory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from saccade.catalog import Card
from saccade.laws.base import Broken, NotApplicable, deterministic, make_problem, poisoned_empty

TIME_LIMIT = 120
"""Seconds that all processes of one mechanism may take together."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call over `len(sizes)` ranks; rank r holds `sizes[r]` keys."""

    sizes: tuple[int, ...]
    queries: int
    causal: bool
    groups: int
    dtype: str = "float64"

    def inputs(self) -> list[Tensor]:
        """Whole q, k, v and the gradient of the loss with respect to the output, the same in every process."""
        problem = make_problem(queries=self.queries, keys=sum(self.sizes), groups=self.groups, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(problem.q.shape, generator=generator, dtype=torch.float64)
        return [x.to(DTYPES[self.dtype]) for x in (*problem.leaves, cotangent)]

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The part of `[B, H, N, D]` that a rank holds."""
        return x.split(list(self.sizes), 2)[rank]


Results = dict[tuple[int, int], dict[str, Tensor]]
"""For each (number of the case, rank): out, again, poisoned, alone, dq, dk, dv in fp64."""


def run_ranks(card: Card, settings: dict[str, Any], cases: tuple[Case, ...]) -> Results:
    """Run every case in as many processes as it has shards.

    Args:
        card: Of the parallel mechanism.
        settings: Its hyperparameters.
        cases: Problems and their shards.

    Returns:
        What every rank of every case found.

    Raises:
        Broken: If a process fails or they do not end in time.
        NotApplicable: If this system has no gloo or no fork.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise NotApplicable("this torch is built without gloo")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NotApplicable("processes cannot be forked on this system")
    target = card.target
    where = (target.__module__, inspect.getfile(target), target.__qualname__, card.name)
    return _run_ranks(where, json.dumps(settings, sort_keys=True), cases)


@lru_cache(maxsize=8)
def _run_ranks(where: tuple[str, str, str, str], settings: str, cases: tuple[Case, ...]) -> Results:
    """Fresh processes, not forks of this one, whose threads a fork would lose."""
    with tempfile.TemporaryDirectory(prefix="saccade-ranks-") as folder:
        job = {"where": where, "settings": settings, "cases": [asdict(case) for case in cases]}
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from saccade.laws.processes import main; main()", folder]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired as error:
            raise Broken(f"the processes did not end within {TIME_LIMIT} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that outlive their parent, too
            process.wait()
        if process.returncode:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise Broken(f"the processes failed: {''.join(last)}")
        return {
            (number, rank): _load(Path(folder, f"{number}-{rank}.npz"))
            for number, case in enumerate(cases)
            for rank in range(len(case.sizes))
        }


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def main() -> None:
    """In the fresh process: fork the ranks of each world, one world after another."""
    from torch.multiprocessing import start_processes

    folder = sys.argv[1]
    job = json.loads(Path(folder, "job.json").read_text(encoding="utf-8"))
    _load_target(*job["where"])
    for world in sorted({len(case["sizes"]) for case in job["cases"]}):
        start_processes(_rank_main, (world, folder, job), nprocs=world, start_method="fork")


def _load_target(module: str, file: str, qualname: str, name: str) -> Any:
    """The registered class, or one that a file outside the library defines."""
    if module.startswith("saccade."):
        target: Any = importlib.import_module(module)
    else:
        spec = importlib.util.spec_from_file_location(module, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"file={file!r} of {name}: expected a Python file")
        target = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(target)
    for part in qualname.split("."):
        target = getattr(target, part)
    return target


def _rank_main(rank: int, world: int, folder: str, job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    mechanism = _load_target(*job["where"])(**json.loads(job["settings"]))
    for number, fields in enumerate(job["cases"]):
        case = Case(**{**fields, "sizes": tuple(fields["sizes"])})
        if len(case.sizes) != world:
            continue
        found: dict[str, Any] = {
            name: x.detach().double().numpy() for name, x in _rank_case(mechanism, case, rank).items()
        }
        np.savez(Path(folder, f"{number}-{rank}.npz"), **found)
    dist.destroy_process_group()


def _rank_case(mechanism: Any, case: Case, rank: int) -> dict[str, Tensor]:
    """Output and gradients on one rank, the output again, with poisoned memory, and of the first batch entry alone."""
    *whole, cotangent = case.inputs()
    mine = [case.shard(x, rank) if name in mechanism.sharded else x for name, x in zip("qkv", whole, strict=True)]
    leaves = [x.clone().requires_grad_() for x in mine]
    cotangent = case.shard(cotangent, rank) if "q" in mechanism.sharded else cotangent
    with deterministic():
        out = mechanism(*leaves, causal=case.causal)
        again = mechanism(*mine, causal=case.causal)
    grads = torch.autograd.grad(out, leaves, cotangent)
    with poisoned_empty():
        poisoned = mechanism(*mine, causal=case.causal)
    alone = mechanism(*(x[:1] for x in mine), causal=case.causal)
    found = {"out": out, "again": again, "poisoned": poisoned, "alone": alone}
    return {**found, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
