"""What tests of data sets ask again and again."""

import re

import pytest
import torch

from secateur.errors import DataError
from secateur.models import load_data


def refused(spec, *patterns):
    with pytest.raises(DataError) as error:
        load_data(spec)
    message = str(error.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} not in {message!r}"
    assert "\n" in message, "the message ends with a way out"


def everything(batches):
    parts = list(batches)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
