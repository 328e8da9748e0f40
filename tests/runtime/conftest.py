import sys

import pytest

from secateur.runtime.build import NoKernels, compiler, load


@pytest.fixture(scope="session")
def kernels():
    """The compiled kernels; skips where there is no compiler."""
    try:
        compiler()
    except NoKernels as error:
        pytest.skip(str(error).splitlines()[0])
    return load()


@pytest.fixture
def taken(monkeypatch):
    """Every layer takes its quickest sparse form, whatever is measured."""
    for name in ("GAIN", "SLOWER"):
        monkeypatch.setattr(sys.modules["secateur.runtime.convert"], name, 1e9)
