"""Runs a program with pinned packages in an environment of its own, and checks what it prints."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path


def show(packages: Sequence[str], program: str, expected: str) -> None:
    """Install, run, print; ends with 1 if the program prints anything else than expected."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        result = subprocess.run(
            [python, "-c", program], cwd=folder, capture_output=True, text=True, check=False
        )
    if result.returncode:
        sys.exit(f"it does not run:\n{result.stderr}")
    print(f"Python {sys.version.split()[0]}, {', '.join(packages)}")
    print(result.stdout.strip())
    if result.stdout.strip() != expected.strip():
        sys.exit(f"this is new; it was:\n{expected.strip()}")
