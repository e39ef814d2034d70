"""The networks of `speed` in PyTorch, as fast as they are made to run there.

Channels last, compiled with CUDA graphs (`reduce-overhead`), fused optimizers, cuDNN's fastest
algorithms, flash attention; parameters in float32, all else in the dtype that is asked for.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.growing_torch import Block

_KINDS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def wide_resnet(depth: int, width: int) -> nn.Module:
    """For 32 x 32 images of three channels and ten classes."""
    blocks, before = [], 16
    for group in range(3):
        after = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            blocks.append(Block(before, after, 2 if group and not block else 1))
            before = after
    return nn.Sequential(_conv(3, 16, 3), *blocks, *_norm(before), *_classifier(before, 10))


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """With bottlenecks, for images of three channels and a thousand classes; v1.5."""
    layers, before = [_conv(3, 64, 7, 2), *_norm(64), nn.MaxPool2d(3, 2, 1)], 64
    for group, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(before, 64 * 2**group, 2 if group and not block else 1))
            before = 256 * 2**group
    return nn.Sequential(*layers, *_classifier(before, 1000))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1, around which the input is carried."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.branch = nn.Sequential(
            *(_conv(before, width, 1), *_norm(width)),
            *(_conv(width, width, 3, stride), *_norm(width)),
            *(_conv(width, after, 1), nn.BatchNorm2d(after)),
        )
        changes = before != after or stride != 1
        shortcut = _conv(before, after, 1, stride), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential(*shortcut) if changes else nn.Identity()

    def forward(self, x):
        return functional.relu(self.shortcut(x) + self.branch(x))


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


def _norm(features: int) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(features), nn.ReLU(inplace=True)


def _classifier(features: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)


class Transformer(nn.Module):
    """That of `bigbatch.models.transformer`, SwiGLU, tied."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.scale = Norm(width), width**0.5
        half = width // heads // 2
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens, kind):
        """The logits of the next tokens."""
        x = self.embedding(tokens).to(kind) * self.scale
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return functional.linear(self.norm(x), self.embedding.weight)


class Layer(nn.Module):
    """Attention to what came before, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner, self.heads = -(-width // 3) * 8, heads
        self.attention_norm, self.inner_norm = Norm(width), Norm(width)
        self.query_norm, self.key_norm = Norm(width // heads), Norm(width // heads)
        self.taken = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.up, self.gate = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, cos, sin):
        taken = self.taken(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = taken.permute(2, 0, 3, 1, 4)
        query, key = (
            _turned(self.query_norm(query), cos, sin),
            _turned(self.key_norm(key), cos, sin),
        )
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(found.transpose(1, 2).flatten(2))
        normed = self.inner_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Norm(nn.Module):
    """RMSNorm, in float32."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * self.weight).to(x.dtype)


def _turned(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return torch.cat(turned, dim=-1).to(x.dtype)


# Name -> (network, what an example is), and as rehearsed. The last of a sequence is a target only.
NETWORKS = {
    "wrn16_4": (lambda: wide_resnet(16, 4), (3, 32, 32)),
    "resnet50": (lambda: resnet((3, 4, 6, 3)), (3, 224, 224)),
    "transformer": (lambda: Transformer(12, 768, 12, 50_304, 1_024), (1_025,)),
}
TOYS = {
    "wrn16_4": (lambda: wide_resnet(10, 1), (3, 32, 32)),
    "resnet50": (lambda: resnet((1, 1, 1, 1)), (3, 64, 64)),
    "transformer": (lambda: Transformer(1, 32, 2, 256, 16), (17,)),
}


def trainer(
    name: str, size: int, dtype: str, *, toy: bool
) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Makes so many updates and waits for them; the most memory in use so far, MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    make, shape = (TOYS if toy else NETWORKS)[name]
    model, kind, fused = make().to(device), _KINDS[dtype], device == "cuda"
    if name == "transformer":
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, fused=fused)
        tokens = torch.randint(0, model.embedding.num_embeddings, (size, *shape), device=device)
        x, y = tokens[:, :-1], tokens[:, 1:].flatten()
    else:
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=fused)
        x = torch.randn(size, *shape, device=device).to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (size,), device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device, kind, enabled=kind != torch.float32):
            logits = model(x, kind).flatten(0, 1) if name == "transformer" else model(x)
        return functional.cross_entropy(logits.float(), y)

    # A compilation for a CPU takes a minute and tells nothing of a card.
    compiled = torch.compile(loss, mode="reduce-overhead") if fused else loss
    if fused:
        torch.cuda.reset_peak_memory_stats()

    def update(count: int) -> None:
        # Where it is not flash attention it is an error.
        kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        flash = fused and dtype == "bfloat16"
        with sdpa_kernel(kinds) if flash else contextlib.nullcontext():
            for _ in range(count):
                optimizer.zero_grad(set_to_none=True)
                compiled().backward()
                optimizer.step()
        if fused:
            torch.cuda.synchronize()

    def peak_mib() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if fused else 0.0

    return update, peak_mib
