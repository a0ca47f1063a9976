"""Fuzzes one target with atheris (pip install atheris), from the corpus in the repository:

    python tests/fuzz/run.py file|header|restore|unpack [-max_total_time=SECONDS] [FOLDER ...]

Other arguments are libFuzzer's; a first FOLDER collects what is found to be new. A finding is
written to crash-* in the working folder; once it is fixed, its file goes to corpus/TARGET.
"""

from __future__ import annotations

import sys
import warnings

import atheris

with atheris.instrument_imports(include=["foldprune", "targets"]):
    import targets

if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    warnings.simplefilter("ignore")
    seeds = str(targets.CORPUS / name)
    atheris.Setup([sys.argv[0], *rest, seeds], targets.TARGETS[name])
    atheris.Fuzz()
