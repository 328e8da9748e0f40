"""What the README says is run, and its table is what the result files say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_of_the_readme_runs(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = map(int, re.findall(r"\b(\d+)\b", done.stdout)[:2])
    assert 0 < after <= before / 2
    assert float(done.stdout.split()[-1]) < 1e-9
    assert (tmp_path / "out" / "plan.json").exists()


def test_there_is_a_snippet_and_it_is_short():
    assert len(SNIPPETS) == 1
    assert len(SNIPPETS[0].splitlines()) <= 12


def test_readme_fits_one_screen():
    assert README.count("\n") <= 100


def test_results_table_is_what_the_files_say():
    done = subprocess.run([sys.executable, "scripts/readme_table.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `make readme`"


def test_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in re.findall(r"^secateur (\w+)", README, flags=re.MULTILINE):
        done = subprocess.run([sys.executable, "-m", "secateur", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
