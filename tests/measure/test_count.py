"""Every number here was worked out by hand; none was read off the counter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import InputError
from secateur.measure import count, count_bytes, count_params


class Apply(nn.Module):
    """A network that is one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def attention(q, k, v, **how):
    return Apply(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how)), (
        torch.empty(q), torch.empty(k), torch.empty(v),
    )  # fmt: skip


def lstm_macs(steps_times_rows, gates, inputs, hidden):
    return steps_times_rows * gates * hidden * (inputs + hidden)


CASES = {
    "linear": (nn.Linear(5, 7), (torch.empty(3, 5),), 3 * 5 * 7),
    "linear without bias, 3-d": (nn.Linear(5, 7, bias=False), (torch.empty(2, 3, 5),), 6 * 5 * 7),
    "linear on one vector": (nn.Linear(5, 7), (torch.empty(5),), 5 * 7),
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (torch.empty(2, 3, 10, 10),), 2 * 100 * 8 * 3 * 9),
    "conv, stride 2": (nn.Conv2d(3, 8, 3, stride=2), (torch.empty(1, 3, 11, 11),), 25 * 8 * 3 * 9),
    "grouped conv": (nn.Conv2d(4, 8, 3, groups=2), (torch.empty(1, 4, 5, 5),), 9 * 8 * 2 * 9),
    "depthwise conv": (nn.Conv2d(6, 6, 3, groups=6), (torch.empty(1, 6, 5, 5),), 9 * 6 * 9),
    "conv1d": (nn.Conv1d(4, 5, 3), (torch.empty(2, 4, 9),), 2 * 7 * 5 * 4 * 3),
    "conv3d": (nn.Conv3d(2, 3, 2), (torch.empty(1, 2, 4, 4, 4),), 27 * 3 * 2 * 8),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, stride=2), (torch.empty(1, 4, 5, 5),), 25 * 4 * 6 * 9),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (torch.empty(1, 4, 5, 5),), 25 * 4 * 3 * 9),
    "norm and activation": (nn.Sequential(nn.BatchNorm2d(3), nn.GELU()), (torch.empty(2, 3, 4, 4),), 0),
    "embedding": (nn.Embedding(10, 4), (torch.zeros(2, 3, dtype=torch.long),), 0),
    "bilinear": (nn.Bilinear(3, 4, 5), (torch.empty(2, 3), torch.empty(2, 4)), 2 * 3 * 4 * 5),
    "matrix by vector": (Apply(torch.matmul), (torch.empty(3, 4), torch.empty(4)), 12),
    "vector by vector": (Apply(torch.matmul), (torch.empty(4), torch.empty(4)), 4),
    "addmv": (Apply(torch.addmv), (torch.empty(3), torch.empty(3, 4), torch.empty(4)), 12),
    "addbmm": (Apply(torch.addbmm), (torch.empty(3, 5), torch.empty(2, 3, 4), torch.empty(2, 4, 5)), 2 * 3 * 4 * 5),
    "baddbmm": (Apply(torch.baddbmm), (torch.empty(2, 3, 5), torch.empty(2, 3, 4), torch.empty(2, 4, 5)), 120),
    "int8 matrices": (Apply(torch._int_mm), (torch.empty(32, 8, dtype=torch.int8), torch.empty(8, 16, dtype=torch.int8)), 32 * 8 * 16),
    "einsum": (
        Apply(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b)),
        (torch.empty(2, 3, 4, 5), torch.empty(2, 3, 6, 5)),
        2 * 3 * 4 * 6 * 5,
    ),
    # scores L*S*D, values L*S*E, for every row and query head
    "attention": (*attention((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16)), 2 * 4 * 8 * 8 * 32),
    "causal attention": (*attention((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16), is_causal=True), 2 * 4 * 8 * 8 * 32),
    "masked attention": (
        *attention((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16), attn_mask=torch.zeros(8, 8)),
        2 * 4 * 8 * 8 * 32,
    ),
    "cross attention": (*attention((2, 4, 8, 16), (2, 4, 5, 16), (2, 4, 5, 16)), 2 * 4 * 8 * 5 * 32),
    "narrow values": (*attention((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 24)), 2 * 4 * 8 * 8 * 40),
    "grouped queries": (
        *attention((2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16), enable_gqa=True),
        2 * 4 * 8 * 8 * 32,
    ),
    "lstm": (nn.LSTM(4, 6, batch_first=True), (torch.empty(2, 3, 4),), lstm_macs(6, 4, 4, 6)),
    "two-way two-layer lstm": (
        nn.LSTM(4, 6, 2, bidirectional=True),
        (torch.empty(3, 2, 4),),
        2 * lstm_macs(6, 4, 4, 6) + 2 * lstm_macs(6, 4, 12, 6),
    ),
    "projected lstm": (nn.LSTM(4, 6, proj_size=5), (torch.empty(3, 2, 4),), 6 * (24 * (4 + 5) + 5 * 6)),
    "gru": (nn.GRU(4, 6), (torch.empty(3, 2, 4),), lstm_macs(6, 3, 4, 6)),
    "rnn": (nn.RNN(4, 6), (torch.empty(3, 2, 4),), lstm_macs(6, 1, 4, 6)),
    # fused q, k, v projection, attention, output projection
    "multi-head attention": (
        Apply(nn.MultiheadAttention(16, 4, batch_first=True)),
        (torch.empty(2, 3, 16), torch.empty(2, 3, 16), torch.empty(2, 3, 16)),
        2 * 3 * 16 * 48 + 2 * 3 * 3 * 32 + 2 * 3 * 16 * 16,
    ),
    "transformer layer": (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        (torch.empty(2, 3, 16),),
        2 * 3 * 16 * 48 + 2 * 3 * 3 * 32 + 2 * 3 * 16 * 16 + 2 * (2 * 3 * 16 * 32),
    ),
}


def on_meta(model, args):
    return model.to("meta"), tuple(arg.to("meta") for arg in args)


@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name):
    model, args, macs = CASES[name]
    assert count(model, args).macs == macs


@pytest.mark.parametrize("name", [name for name in CASES if name != "masked attention"])  # its mask is a CPU constant
def test_meta_device_agrees(name):
    model, args, macs = CASES[name]
    assert count(*on_meta(copy.deepcopy(model), args)).macs == macs


@pytest.mark.parametrize("name", ["linear", "conv", "attention", "lstm", "gru", "multi-head attention"])
def test_float64_and_bfloat16_agree(name):
    model, args, macs = CASES[name]
    for dtype in (torch.float64, torch.bfloat16):
        assert count(copy.deepcopy(model).to(dtype), tuple(arg.to(dtype) for arg in args)).macs == macs


def test_grouped_mm_counts_each_row_once():
    rows = torch.zeros(32, 16, dtype=torch.bfloat16)
    experts = torch.zeros(4, 16, 32, dtype=torch.bfloat16)
    ends = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    assert count(Apply(lambda a, b: F.grouped_mm(a, b, offs=ends)), (rows, experts)).macs == 32 * 16 * 32


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_tensor_counts_like_a_dense_one(layout):
    a, b = torch.eye(6, 5), torch.eye(5, 7)
    for second in (b, getattr(b, layout)()):
        assert count(Apply(torch.sparse.mm), (getattr(a, layout)(), second)).macs == 6 * 5 * 7


def test_int8_linear_layers_count():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)), {nn.Linear}, torch.qint8)
    assert count(model, (torch.rand(3, 5),)).macs == 3 * (5 * 7 + 7 * 2)


def test_module_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    cost = count(Twice(), (torch.empty(3, 4),))
    assert (cost.macs, cost.params) == (2 * 3 * 16, 20)


def test_a_parameter_may_be_the_argument_of_a_module():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.zeros(3, 4))
            self.layer = nn.Linear(4, 5)

        def forward(self, x):
            return self.layer(self.query) + x

    assert count(Learned(), (torch.zeros(3, 5),)).macs == 3 * 4 * 5


def test_exported_model_counts_the_same():
    model, args, macs = CASES["transformer layer"]
    program = torch.export.export(model.eval(), args, strict=False)
    assert count(program.module(), args).macs == macs


def test_region_without_gradients_is_seen_after_export():
    class Region(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x @ x
            return y + x

    x = torch.rand(4, 4, requires_grad=True)
    program = torch.export.export(Region(), (x,), strict=False)
    assert count(program.module(), (x,)).macs == 64


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert (count_params(model), count_bytes(model)) == (16, 64)


def test_parameters_tied_by_storage_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert (count_params(model), count_bytes(model)) == (16, 64)


def test_bytes_know_the_dtype_and_the_buffers():
    model = nn.BatchNorm1d(8)  # weight, bias, mean, variance: 8 each; one int64 counter
    assert count_bytes(model) == 4 * 8 * 4 + 8
    assert count_bytes(model.half()) == 4 * 8 * 2 + 8


def test_view_counts_what_it_shows_and_overlap_counts_once():
    model = nn.Module()
    whole = torch.zeros(100)
    model.register_buffer("part", whole[:10])
    assert count_bytes(model) == 40
    model.register_buffer("whole", whole)
    assert count_bytes(model) == 400


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, (torch.rand(2, 3, 8, 8),))
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_wrong_shape_is_said_with_the_shape():
    with pytest.raises(InputError, match=r"\(2, 5\) float32"):
        count(nn.Linear(4, 4), (torch.empty(2, 5),))
