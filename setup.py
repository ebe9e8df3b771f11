"""Builds the optional C++ engine; everything else is in pyproject.toml.

The same sources are compiled once per instruction set; which one runs is decided when the library is loaded.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/saccade/kernels/cpu")
FLAGS = [
    "-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-Wno-psabi", "-pthread",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"],
}  # fmt: skip


class OptionalBuild(build_ext):
    """A missing or failing compiler costs one line, not the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001
            self.skip(error)

    def build_extension(self, ext):
        try:
            for name, flags in INSTRUCTION_SETS.items():
                chosen = flags if platform.machine() in ("x86_64", "AMD64") else []
                ext.extra_objects += self.compiler.compile(
                    [str(FOLDER / f"isa_{name}.cpp")], output_dir=self.build_temp, extra_postargs=[*FLAGS, *chosen]
                )
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            self.skip(error)

    @staticmethod
    def skip(error):
        print(f"saccade: the C++ CPU engine is skipped ({error}); everything runs on PyTorch alone")


setup(
    ext_modules=[
        Extension(
            "saccade.kernels.cpu._native",
            sorted(str(path) for path in FOLDER.glob("entry*.cpp")),
            depends=sorted(str(path) for path in FOLDER.glob("*.[hic]*")),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)
