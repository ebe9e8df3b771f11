"""Finding the built library, its threads and its instruction set."""

from __future__ import annotations

import ctypes
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")
"""Best first; the numbers that the library knows them by."""

NOT_BUILT = "the C++ engine is not built (it takes a C++ compiler at install time)"


STALE = "the C++ engine was built from other sources than those beside it: install Saccade again"


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_native*.so"))
    if not found:
        reason = folder / "_native.missing"  # what setup.py ran into
        return f"{NOT_BUILT}: {reason.read_text(encoding='utf-8').strip()}" if reason.exists() else NOT_BUILT
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"the C++ engine cannot be loaded: {error}"
    if not _is_current(library, folder):
        return STALE
    library.saccade_use.restype = ctypes.c_char_p
    library.saccade_threads_from.argtypes = [ctypes.c_void_p]
    runtime = _torch_threads()
    if runtime is not None:
        library.saccade_threads_from(runtime)
    if library.saccade_use(-1) is None:
        return "the C++ engine has no code for this machine"
    return library


def _is_current(library: ctypes.CDLL, folder: Path) -> bool:
    """Whether the library was built from the sources beside it; an installed package has none beside it."""
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".hpp", ".inl"))
    try:
        library.saccade_digest.restype = ctypes.c_char_p
        built: bytes = library.saccade_digest()
    except AttributeError:
        return False
    return not sources or built.decode() == sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _torch_threads() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that PyTorch brought, or None: then each call starts threads.

    One pool for both means that neither library's idle threads spin on a core that the other wants.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def missing() -> str | None:
    """Why the engine cannot be used here, or None if it can."""
    library = _load()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    """The loaded library.

    Returns:
        It, with an instruction set chosen.

    Raises:
        RuntimeError: If there is none, saying why.
    """
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def use(name: str | None = None) -> str | None:
    """Choose the instruction set, for tests and comparisons; the best is in use until then. Not for threads at work.

    Args:
        name: One of `INSTRUCTION_SETS`; None takes the best that the machine has.

    Returns:
        What it is called, or None if this machine or build does not have it (nothing changes then).

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the engine is missing.
    """
    if name is not None and name not in INSTRUCTION_SETS:
        raise ValueError(f"name={name!r}: expected one of {', '.join(INSTRUCTION_SETS)}")
    label = library().saccade_use(-1 if name is None else INSTRUCTION_SETS.index(name))
    return None if label is None else label.decode()


def instruction_set() -> str | None:
    """What the instruction set in use is called, or None without the engine."""
    if missing() is not None:
        return None
    library().saccade_using.restype = ctypes.c_char_p
    label: bytes = library().saccade_using()
    return label.decode()
