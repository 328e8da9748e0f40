"""What eval mode never reads is told where it may no longer fit, and nowhere else."""

import torch
from torch import nn

import secateur as sc

HALF = sc.MACs(at_most="60%")


def told(model, *args):
    result = sc.prune(model.eval(), args, HALF)
    assert result.cut.how == "attributes"
    return result, [note for note in result.notes if "eval mode" in note]


class Quantiser(nn.Module):
    """Its codes are cut; their averages, which only training reads, are not. Nothing else here has a size that went."""

    def __init__(self, averaged=True):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Linear(24, 3)
        self.register_buffer("codes", torch.randn(16, 24))
        self.register_buffer("counts", torch.zeros(16))  # as many as there are codes
        self.register_buffer("places", torch.arange(24).view(1, 24), persistent=False)
        self.register_buffer("one", torch.zeros(1))
        if averaged:
            self.register_buffer("average", self.codes.clone())

    def forward(self, x):
        x = self.norm(self.a(x))
        near = (x @ self.codes.T).softmax(-1)
        if self.training:
            self.counts += near.sum(0)
            self.average.lerp_(near.T @ x, 0.1)
        return self.b(near @ self.codes)


def test_buffers_that_only_training_reads_are_named():
    result, notes = told(Quantiser(), torch.randn(4, 6))
    assert result.model.codes.shape[1] < result.model.average.shape[1] == 24
    assert len(notes) == 1 and "never reads average: left as they are" in notes[0]
    assert not told(Quantiser(averaged=False), torch.randn(4, 6))[1]


class Noisy(nn.Module):
    """`width` is read in training, `hidden` only tells what was built; both are 24."""

    def __init__(self, noise=True):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = 24
        if noise:
            self.width = 24
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3)

    def extra_repr(self):
        return f"hidden={self.hidden}"

    def forward(self, x):
        x = self.a(x)
        if self.training:
            x = x + torch.randn(x.shape[0], self.width)
        return self.b(x.relu())


class Holds(nn.Module):
    """The same within another module."""

    def __init__(self, noise=True):
        super().__init__()
        self.body, self.head = Noisy(noise), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_numbers_that_only_training_reads_are_named():
    for model, name in ((Noisy(), "width"), (Holds(), "body.width")):
        result, notes = told(model, torch.randn(4, 6))
        assert len(notes) == 1 and f"does as well with {name} = 24: left as they are" in notes[0]
    assert not told(Noisy(noise=False), torch.randn(4, 6))[1] and not told(Holds(noise=False), torch.randn(4, 6))[1]


class Limits(nn.Module):
    """A longest length that an op has as a number beside a width of the same size: an edit to try, and to take back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.longest = 24, [24]
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x):
        h = self.a(x[:, : self.longest[0]]).relu()
        return self.b(h.reshape(-1, x.shape[1], self.wide))


def test_edits_that_were_taken_back_are_named():
    result, notes = told(Limits(), torch.randn(2, 5, 6))
    assert result.model.wide < 24 and result.model.longest == [24] and [e.attribute for e in result.cut.edits if not e.module] == ["wide"]
    assert len(notes) == 1 and "does as well with longest = [24]:" in notes[0]
