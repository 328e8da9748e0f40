"""What tests of several folders use."""

import pytest

from secateur import cli


@pytest.fixture
def run(capsys):
    """Run a command in this process; what it printed, with standard error where another exit code than 0 is asked for."""

    def run(*arguments, code=0):
        found = cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        assert found == code, said.out + said.err
        return said.out + (said.err if code else "")

    return run
