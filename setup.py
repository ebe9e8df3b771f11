"""Builds the optional C++ engine; everything else is in pyproject.toml.

The same sources are compiled once per instruction set; which one runs is decided when the library is loaded.
"""

import hashlib
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/saccade/kernels/cpu")
FLAGS = [
    "-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-Wno-psabi", "-pthread",
]  # fmt: skip
LINK = ["-pthread"]
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".hpp", ".inl"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()  # library.py compares it
if os.environ.get("SACCADE_SANITIZE"):  # see tools/sanitize.py
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    FLAGS = [flag for flag in FLAGS if flag not in ("-O3", "-g0")]
    FLAGS += ["-O1", "-fexpensive-optimizations", "-g1", *SANITIZERS]  # the second fuses a * b + c as -O3 does
    FLAGS += ["-Wno-maybe-uninitialized"]  # false alarms of instrumented code, also in the compiler's own headers
    LINK = [*LINK, *SANITIZERS]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}  # fmt: skip


class OptionalBuild(build_ext):
    """A missing or failing compiler costs one line, not the install; the package keeps the line (see library.py)."""

    skipped = None

    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001
            self.skip(error)
        self.leave_word()

    def build_extension(self, ext):
        try:
            for name, flags in INSTRUCTION_SETS.items():
                chosen = flags if platform.machine() in ("x86_64", "AMD64") else []
                ext.extra_objects += self.compiler.compile(
                    [str(FOLDER / f"isa_{name}.cpp")], output_dir=self.build_temp, extra_postargs=[*FLAGS, *chosen]
                )
            self.force = True  # the objects are new, whatever the age of the library says
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            self.skip(error)

    def skip(self, error):
        reason = str(error) if len(str(error)) < 200 else "the compiler failed; python setup.py build_ext shows how"
        self.skipped = self.skipped or reason
        print(f"saccade: the C++ CPU engine is skipped ({reason}); everything runs on PyTorch alone")

    def leave_word(self):
        """Beside where the library would be, say why there is none; and leave none of other sources there."""
        library = Path(self.get_ext_fullpath(self.extensions[0].name))
        reason = library.with_name("_native.missing")
        if self.skipped is None:
            reason.unlink(missing_ok=True)
        else:
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{self.skipped}\n", encoding="utf-8")
            library.unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension(
            "saccade.kernels.cpu._native",
            sorted(str(path) for path in FOLDER.glob("entry*.cpp")),
            depends=[str(path) for path in SOURCES],
            define_macros=[("SACCADE_DIGEST", f'"{DIGEST}"')],
            language="c++",
            optional=True,
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": OptionalBuild},
)
