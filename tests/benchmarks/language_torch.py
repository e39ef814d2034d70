"""The transformer of `tests.benchmarks.language` in PyTorch: prints tokens/s; needs nothing else.

PYTHON_WITH_TORCH tests/benchmarks/language_torch.py JSON_OF_SIZES
"""

import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Attention with normalised queries and keys and rotary positions, then SwiGLU."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.head_norms = nn.ModuleList(nn.RMSNorm(width // heads) for _ in range(2))
        self.query, self.key, self.value, self.attended = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up, self.gate = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, cos, sin):
        examples, length, width = x.shape

        def heads(linear, norm=None):
            y = linear(normed).view(examples, length, self.heads, -1)
            if norm is not None:
                a, b = norm(y).chunk(2, dim=-1)
                y = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
            return y.transpose(1, 2)

        normed = self.norms[0](x)
        query, key = (
            heads(linear, norm)
            for linear, norm in zip((self.query, self.key), self.head_norms, strict=True)
        )
        seen = functional.scaled_dot_product_attention(
            query, key, heads(self.value), is_causal=True
        )
        x = x + self.attended(seen.transpose(1, 2).reshape(examples, length, width))
        normed = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.half, self.scale = width // heads // 2, math.sqrt(width)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1] - 1)[:, None]
        angles = places * 10_000.0 ** (-torch.arange(self.half) / self.half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.embedding(tokens[:, :-1]) * self.scale
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.output(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    layers, width, heads, vocabulary, inner, batch, length, updates = json.loads(sys.argv[1])
    torch.manual_seed(0)
    model = Transformer(layers, width, heads, vocabulary, inner)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    tokens = torch.randint(vocabulary, (batch, length + 1))
    for number in range(updates + 3):
        if number == 3:
            began_s = time.perf_counter()
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    print(updates * batch * length / (time.perf_counter() - began_s))


main()
