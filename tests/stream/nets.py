"""A small language model of plain modules, and a folder with its shards."""

import json

import torch
from safetensors.torch import save_file
from torch import nn


class Block(nn.Module):
    """Attention whose queries, keys and values read one tensor, a gated MLP, and a mask that may be absent."""

    def __init__(self, d=16, hidden=24):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=i == 3) for i in range(4))
        self.gate, self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x, mask=None, *, scale=1.0):
        h = self.norm1(x)
        a = self.q(h) @ self.k(h).mT * scale / 4
        a = a if mask is None else a.masked_fill(~mask, float("-inf"))
        x = x + self.o(a.softmax(-1) @ self.v(h))
        h = self.norm2(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


class Text(nn.Module):
    """Every second block sees a narrower window, as in models with sliding windows."""

    def __init__(self, words=31, d=16, depth=3):
        super().__init__()
        self.embed = nn.Embedding(words, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, words, bias=False)
        self.register_buffer("table", torch.linspace(0, 1, d), persistent=False)

    def forward(self, ids):
        n = ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        x = self.embed(ids) + self.table
        for i, layer in enumerate(self.layers):
            x = layer(x, causal if i % 2 == 0 else causal & causal.T.logical_not().logical_or(torch.eye(n).bool()).tril(), scale=1.0 + i)
        return self.head(self.norm(x))


def made(seed=0):
    torch.manual_seed(seed)
    return Text().eval()


def feeds(n=6, length=20):
    random = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 31, (1, length), generator=random)} for _ in range(n)]


def folder(path, model, dtype=torch.float32, shards=2):
    """The model's tensors in shards, with an index."""
    path.mkdir()
    state = {n: t.to(dtype).contiguous() for n, t in model.state_dict().items()}
    names, where = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        some = names[i::shards]
        save_file({n: state[n] for n in some}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text("{}")
    return path


def loaded(path):
    """A model with the tensors of a folder of shards."""
    from safetensors.torch import load_file

    model, state = Text().eval(), {}
    for file in sorted(path.glob("*.safetensors")):
        state |= load_file(file)
    model.load_state_dict({n: t.float() for n, t in state.items()})
    return model
