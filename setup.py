"""Builds the optional C++ engine; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("src/saccade/kernels/cpu").glob("*.cpp"))


class OptionalBuild(build_ext):
    """A missing or failing compiler costs one line, not the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001
            print(f"saccade: the C++ CPU engine is skipped ({error}); everything runs on PyTorch alone")

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            print(f"saccade: the C++ CPU engine is skipped ({error}); everything runs on PyTorch alone")


setup(
    ext_modules=[
        Extension("saccade.kernels.cpu._native", SOURCES, language="c++", extra_compile_args=["-O3", "-std=c++20"])
    ]
    if SOURCES
    else [],
    cmdclass={"build_ext": OptionalBuild},
)
