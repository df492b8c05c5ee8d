"""Compiles the CPU kernel, one shared object per instruction set; all else is in pyproject.toml.

Without a compiler the install succeeds, and plain torch ops serve.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    *(
        "-std=c++17",
        "-O2",
        "-g0",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
    ),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-ignored-attributes", "-Wno-psabi"),
]
AVX2 = ["-mavx2", "-mfma", "-mprfchw"]  # the last one's instruction is a nop where it is unknown
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    # The baseline serves no x86 processor, only tests, which -Og makes a tenth slower: two cores
    # are done in 46 s in place of 65 with -O1. What takes longest to compile comes first.
    INSTRUCTION_SETS = {"avx512": AVX512, "avx2": AVX2, "baseline": ["-Og"]}


class BuildKernel(build_ext):
    """Shared objects for ctypes: no Python in their names, no module in them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # an object per instruction set, all at once

    def run(self) -> None:
        if self.inplace:  # a build that fails must leave no kernel, not an old one
            for ext in self.extensions:
                Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = self.compiler.compile(
            ext.sources,
            output_dir=f"{self.build_temp}/{ext.name}",  # the source is the same one for all
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=ext.extra_link_args
        )

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    ext_modules=[
        Extension(
            f"torch_manual.csrc.lstm_{name}",
            ["torch_manual/csrc/lstm.cpp"],
            depends=[
                f"torch_manual/csrc/{header}.h"
                for header in (
                    "digest",
                    "lstm",
                    "lstm_dual",
                    "lstm_forward",
                    "lstm_forward_tiles",
                    "lstm_gradients",
                    "lstm_backward",
                    "lstm_backward_tiles",
                    "lstm_sums",
                    "lstm_tangent",
                    "packing",
                    "peak",
                    "product",
                    "threads",
                    "vector",
                )
            ],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
    cmdclass={"build_ext": BuildKernel},
)
