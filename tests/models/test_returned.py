"""Data that a function of the user's returns."""

import pytest
import torch

from secateur.errors import DataError
from secateur.models import Data, load_data
from tests.models.given import everything, refused


def test_functions_return_arrays_or_batches():
    assert len(everything(load_data("nets:rows").test)[0]) == 13
    data = load_data("nets:batches")  # a list: the last fifth of it, one batch at least, is for tests
    assert isinstance(data, Data) and data.labelled and len(list(data.train)) == len(list(data.test)) == 1


FORMS = """
import numpy as np, torch
from beside_the_data import ROWS
x, y = np.arange(ROWS * 8, dtype=np.float32).reshape(ROWS, 8), (np.arange(ROWS) % 3).astype(np.uint8)
t, u = torch.tensor(x), torch.tensor(y)
def arrays(): return x, y
def tensors(): return t, u
def inputs(): return t
def parts(): return (t[:30], u[:30]), (t[30:], u[30:])
def parts_of_arrays(): return (x[:30], y[:30]), (x[30:], y[30:])
def short(): return (t, u[:-1]), (t, u)
def words(): return np.array(["a", "b"]), y[:2]
"""


def test_what_a_function_may_return(tmp_path, monkeypatch):
    """Arrays and tensors, with labels and without, in one part or in two; the file sees what lies beside it from anywhere."""
    (tmp_path / "forms.py").write_text(FORMS)
    (tmp_path / "beside_the_data.py").write_text("ROWS = 40\n")
    spec = f"{tmp_path / 'forms.py'}"
    one, other = load_data(f"{spec}:arrays"), load_data(f"{spec}:tensors")
    for part in ("train", "test"):
        a, b = everything(getattr(one, part)), everything(getattr(other, part))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and one.labelled
    bare = load_data(f"{spec}:inputs")
    assert not bare.labelled and sum(map(len, bare.train)) == 32 and next(iter(bare.train)).shape == (32, 8)
    for name in ("parts", "parts_of_arrays"):
        data = load_data(f"{spec}:{name}")
        (x, y), (test_x, test_y) = everything(data.train), everything(data.test)
        assert data.labelled and torch.equal(torch.cat([x, test_x]).reshape(-1), torch.arange(320.0))
        assert y.tolist() == [n % 3 for n in range(30)] and test_y.tolist() == [n % 3 for n in range(30, 40)]
    refused(f"{spec}:words", "returned an array that is no tensor")


ODD = """
import torch
x, y = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
bad = x.clone()
bad[1, 2] = float("nan")
from collections import UserDict
mask = torch.full((4, 4), -float("inf")).triu(1)
def unlabelled(): return [(x, None)] * 10
def like_a_tokenizer(): return [UserDict(x=x, labels=y)] * 3
def masked(): return [(x, mask, y)] * 3
def masked_dicts(): return [{"x": x, "mask": mask}] * 3
def badly_masked(): return [(x, mask * 0, y)] * 3
def infinite(): return [(x / 0, mask, y)] * 3
def numbers(): return [[1.0, 2.0], [3.0, 4.0]]
def words(): return [{"text": "one"}, {"text": "two"}]
def no_inputs(): return [(None, y), (None, y)]
def sparse(): return [x.to_sparse()] * 3
def tested(): return [(x, y)] * 9 + [(bad, y)]
def tested_in_a_dict(): return [{"x": x, "labels": y}] * 3, [{"x": bad, "labels": y}]
def untested(): return [(x, y)] * 3, []
def alone(): return {"x": x, "labels": y}
def half_labelled(): return [(x, y)] * 3, [x]
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("numbers", r"first batch is of type list of float, without a tensor.*dicts of tensors"),
        ("words", r"of type dict of str, without a tensor"), ("no_inputs", r"of type tuple of NoneType, without a tensor"),
        ("alone", r"returned a dict, which is one batch.*\[batch\]"), ("sparse", r"layout torch.sparse_coo.*to_dense"),
        ("tested", "batch 2 of a part holds NaN"),
        ("tested_in_a_dict", "the first batch holds NaN"),
        ("untested", "returned no batches"), ("badly_masked", "holds NaN"),
        ("masked_dicts", "holds NaN or inf"), ("infinite", "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_batches_that_no_model_takes_are_refused(name, said, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    with pytest.raises(DataError, match=f"(?s){said}"):
        load_data(f"{tmp_path}/odd.py:{name}")


def test_batches_whose_labels_are_none_have_none(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    for name in ("like_a_tokenizer", "masked"):
        assert len(list(load_data(f"{tmp_path}/odd.py:{name}").train)) == 2
    assert not load_data(f"{tmp_path}/odd.py:unlabelled").labelled and not load_data(f"{tmp_path}/odd.py:half_labelled").labelled
