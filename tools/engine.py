"""One line that says whether the C++ engine was built, for the end of an install."""

from saccade.kernels import cpu

if cpu.missing() is None:
    print(f"C++ engine: built; this machine runs it on {cpu.instruction_set()}")
else:
    print(f"C++ engine: absent, everything runs on PyTorch alone: {cpu.missing()}")
