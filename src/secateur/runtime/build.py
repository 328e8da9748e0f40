"""The kernels compiled for the torch that is installed, once, and loaded.

    python -m secateur.runtime.build     # compile now instead of at first use
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from secateur.errors import SecateurError

SOURCES = Path(__file__).parent / "csrc"
COMMON = ["-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"]
X86 = {
    "avx512": (16, ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx512vbmi2", "-mfma", "-mprefer-vector-width=512"]),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "baseline": (4, []),
}
OTHER: dict[str, tuple[int, list[str]]] = {"baseline": (4, [])}


class NoKernels(SecateurError):
    """The kernels cannot be compiled or loaded here."""


def compiler() -> str:
    """
    Raises:
        NoKernels: there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(shlex.split(name)[0]):
            return name
    raise NoKernels("there is no C++ compiler, so the sparse kernels cannot be made.\n  Install g++ or clang++, or set CXX.")


def folder() -> Path:
    """Where the compiled kernels lie: SECATEUR_KERNELS, or the user's cache."""
    given = os.environ.get("SECATEUR_KERNELS")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    except RuntimeError:  # a user without a home
        return _without_home()


@lru_cache(maxsize=1)
def _without_home() -> Path:
    """A folder below the temporary one that nobody else may write to: its name can be guessed, and what lies in it is run. Where somebody was there
    first, a new one for this process."""
    path = Path(tempfile.gettempdir()) / f"secateur-{os.getuid()}"
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return path
    return Path(tempfile.mkdtemp(prefix="secateur-"))


def _name() -> str:
    """One file for each version of the sources, of torch and of the machine."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    digest.update(f"{torch.__version__} {platform.machine()} {COMMON} {X86}".encode())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def build(to: Path | None = None, extra: list[str] | None = None) -> Path:
    """Compile, unless it was done before. The result is written under another name first, so that it is whole.

    Raises:
        NoKernels: no compiler, or it fails.
    """
    path = (to or folder()) / _name()
    if path.is_file() and not extra:
        return path
    cxx, root = shlex.split(compiler()), Path(torch.__file__).parent
    x86 = platform.machine() in ("x86_64", "AMD64")
    include = [f"-I{root / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            lines, objects = [], []
            for isa, (width, flags) in (X86 if x86 else OTHER).items():
                names = [f"-DSECATEUR_ISA={isa}", f"-DSECATEUR_WIDTH={width}"]
                for part in ("kernels", "conv", "pool", "decode"):
                    objects.append(f"{work}/{part}-{isa}.o")
                    lines.append([*cxx, *COMMON, *flags, *(extra or []), *names, "-c", str(SOURCES / f"{part}.cpp"), "-o", objects[-1]])
            lines.append([*cxx, *COMMON, *(extra or []), *include, "-c", str(SOURCES / "ops.cpp"), "-o", f"{work}/ops.o"])
            fresh = f"{work}/{path.name}"
            lines.append([*cxx, "-shared", "-o", fresh, *objects, f"{work}/ops.o", f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch", *(extra or [])])
            for line in lines:
                try:
                    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
                except OSError as error:
                    raise NoKernels(f"{cxx[0]} cannot be run: {error}.\n  Set CXX to a C++ compiler.") from error
                if done.returncode:
                    said = next((s for s in done.stderr.splitlines() if "error" in s), done.stderr[-300:])
                    raise NoKernels(f"{cxx[0]} cannot compile the sparse kernels: {said.strip()[:300]}.\n  Use g++ 11 or clang++ 14, or later.")
            os.replace(fresh, path)
    except OSError as error:
        raise NoKernels(f"the sparse kernels cannot be written to {path.parent}: {error}.\n  Set SECATEUR_KERNELS to a folder that can.") from error
    return path


@lru_cache(maxsize=1)
def load() -> Path:
    """Compile where that was not done yet, and register the operators `torch.ops.secateur`.

    Raises:
        NoKernels: no compiler, it fails, or what is there cannot be loaded.
    """
    path = build()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded: {error}.\n  Remove it, so that it is compiled again.") from error
    return path


if __name__ == "__main__":
    print(build())
