"""Kernels compiled with the address and undefined-behaviour sanitizers, under their tests: `python scripts/sanitize.py [pytest arguments]`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.runtime.build import build, compiler

FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


def library(name: str) -> str:
    return subprocess.run([*compiler().split(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), FLAGS)
        environment = os.environ | {
            "SECATEUR_KERNELS": folder, "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        }  # fmt: skip
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(sys.argv[1:] or ["tests/runtime/test_kernels.py"])]
        return subprocess.run(line, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
