"""What ``import foldprune`` adds to ``import numpy``, in fresh processes.

    python tests/bench/bench_import.py [--runs 25]

Bytecode must be written or installed (no PYTHONDONTWRITEBYTECODE): compiling it takes longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    env = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=25)
    runs = parser.parse_args().runs
    plain, both = "import numpy", "import numpy, foldprune"
    seconds(both)  # writes the bytecode
    times = [(seconds(plain), seconds(both)) for _ in range(runs)]
    numpy, foldprune = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"import numpy {numpy:.3f} s, with foldprune {foldprune - numpy:.3f} s more")


if __name__ == "__main__":
    main()
