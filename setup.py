"""Builds the extension; everything else about the package is in pyproject.toml."""

from glob import glob

import numpy
import scipy_openblas32
from setuptools import Extension, setup

# The library is loaded by foldprune/_openblas.py before the extension, so the extension needs
# no run path to it: pip builds in an isolated environment whose paths are gone afterwards.
core = Extension(
    "foldprune._core",
    sources=sorted(glob("csrc/*/*.c")),
    depends=sorted(glob("csrc/*/*.h")),
    include_dirs=["csrc/include", "csrc/kernels", "csrc/methods", numpy.get_include()],
    library_dirs=[scipy_openblas32.get_lib_dir()],
    libraries=[scipy_openblas32.get_library()],
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[core])
