"""An LSTM: hidden units go from all gates, from the recurrence and from what reads them. It stays an ordinary `nn.LSTM`.

GRU and RNN, several layers and both directions work alike; all layers and directions keep the same units' number, because the module has
one `hidden_size`. With `proj_size` the projection loses units and the hidden ones stay. Packed sequences: trace with a padded batch.
"""

import torch
import torch.nn.functional as F
from show import show
from torch import nn

import secateur as sc
from secateur.models import load_data


class Reader(nn.Module):
    """Reads the eight rows of a digit one after the other. (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, hidden=64):
        super().__init__()
        self.rnn = nn.LSTM(8, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x):
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


def accuracy(model):
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in data.test]
    return 100 * torch.cat(right).mean().item()


data = load_data("digits")  # 1,437 to learn from, 360 to test, from scikit-learn
torch.manual_seed(0)
model = Reader()
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(12):
    for x, y in data.train:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

# What reads a recurrence besides itself is fitted anew to the dense network, without labels. The default score, "obs", speaks of
# linear layers and convolutions only: for recurrent layers name another.
(x, _) = data.example(2)
result = sc.prune(model.eval(), x, sc.MACs(at_most="50%"), data=data.train, score="l2")

show("LSTM, 2 layers, 8 steps", model, result.model, x, result.proof)
print(f"  {model.rnn} -> {result.model.rnn}")
print(f"  test accuracy {accuracy(model):.1f} % -> {accuracy(result.model):.1f} %, without training")
