"""Break the library on purpose, one mutant at a time, and demand that the named tests notice.

The mutants are in tests/bite/mutants.py: a file, a text that stands in it exactly once, what to put there instead, and
the tests that must fail. Each is applied to a copy; the working tree is never touched.

    python scripts/bite.py            all of them
    python scripts/bite.py NAME ...   some of them
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.bite.mutants import MUTANTS, Mutant  # noqa: E402  the path has to be set first

# pytest: 0 all passed, 1 a test failed; anything else (no tests, a crash on collection) proves nothing
PASSED, FAILED = 0, 1


def run_tests(source: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The named tests against the package under ``source``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    surroundings = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)


def bite(mutant: Mutant) -> str:
    """Empty if the tests noticed the mutant, else what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        path = source / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"its old text stands {text.count(mutant.old)} times in {mutant.file}; it must stand there once"
        path.write_text(text.replace(mutant.old, mutant.new))
        done = run_tests(source, mutant.tests)
    if done.returncode == PASSED:
        return f"NOT NOTICED by {' '.join(mutant.tests)}"
    if done.returncode != FAILED:
        return f"pytest could not run (status {done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    return ""


def main() -> int:
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    if not wanted:
        print("no mutant of that name; there are:", *(mutant.name for mutant in MUTANTS))
        return 2
    tests = tuple(dict.fromkeys(test for mutant in wanted for test in mutant.tests))
    sound = run_tests(ROOT / "src", tests)
    if sound.returncode != PASSED:
        print(f"the tests fail without any mutant:\n{sound.stdout[-3000:]}")
        return 1
    wrong = 0
    for mutant in wanted:
        begin = time.perf_counter()
        trouble = bite(mutant)
        wrong += bool(trouble)
        sign, seconds = "!!" if trouble else "ok", time.perf_counter() - begin
        print(f"{sign} {mutant.name:40} {seconds:5.1f} s  {trouble or 'noticed'}", flush=True)
    print(f"{len(wanted) - wrong} of {len(wanted)} mutants noticed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
