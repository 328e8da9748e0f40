"""What is built: the wheel holds the package's files and nothing else, and is what CI tests."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).parent.parent
DIST = os.environ.get("SECATEUR_DIST")  # where `make test` left what it installed
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources():
    """Files of src that are ours, relative to it."""
    found = [p.relative_to(ROOT / "src") for p in (ROOT / "src").rglob("*") if p.is_file()]
    return {str(p) for p in found if "__pycache__" not in p.parts and not p.parts[0].endswith(".egg-info")}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A wheel and the sdist it was built from."""
    if DIST:
        return ROOT / DIST
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_left_out.py").write_text("")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy], check=True, capture_output=True)
    return copy / "dist"


def names(dist):
    """Files of the wheel, and of the sdist below its folder."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as other:
        return set(archive.namelist()), {member.name.partition("/")[2] for member in other if member.isfile()}


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    held = {name for name in names(dist)[0] if ".dist-info/" not in name}
    assert held == sources()
    assert {Path(name).suffix for name in held} == {".py", ".css", ".js", ".h", ".cpp", ".typed"}


def test_the_sdist_holds_what_it_is_built_from(dist):
    held = names(dist)[1]
    assert {f"src/{name}" for name in sources()} | {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


def test_the_version_stands_everywhere():
    assert PROJECT["project"]["version"] == secateur.__version__ == importlib.metadata.version("secateur")


def test_what_is_tested_is_what_was_built():
    where = Path(secateur.__file__).resolve().parent.parent
    if DIST:
        assert where == Path(sysconfig.get_path("purelib")).resolve(), "`make test` tests the installed wheel"
        assert shutil.which("secateur", path=sysconfig.get_path("scripts"))
    else:
        assert where == ROOT / "src"
