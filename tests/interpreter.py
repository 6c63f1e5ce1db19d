"""Runs a test file's kernels in Triton's interpreter. Imports neither torch nor diffusers, for a fast inner run."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_in_the_interpreter(file: str, tests: str) -> None:
    """Runs the tests of `file` that pytest's expression `tests` selects in a process of its own, since Triton reads the
    variable when it is imported. The process has no conftest.py, whose imports take longer than small kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "--noconftest", "-m", "not gpu", "-k", tests, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parent.parent,
        capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
