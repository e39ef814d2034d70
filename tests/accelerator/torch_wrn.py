"""WRN-d-k in PyTorch, as fast as it is made to run there: the peer of `speed`."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from tests.benchmarks.growing_torch import Block


def network(depth: int, width: int) -> nn.Module:
    """For 32 x 32 images of three channels and ten classes."""
    blocks, before = [], 16
    for group in range(3):
        after = 16 * width * 2**group
        for block in range((depth - 4) // 6):
            blocks.append(Block(before, after, 2 if group and not block else 1))
            before = after
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        *blocks,
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, 10),
    )


def trainer(
    depth: int, width: int, size: int, dtype: str, *, compiled: bool
) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Makes so many updates and waits for them; the most memory in use so far, MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = network(depth, width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=device == "cuda"
    )
    x = torch.randn(size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (size,), device=device)
    kind = {"bfloat16": torch.bfloat16, "float32": None}[dtype]

    def loss() -> torch.Tensor:
        with torch.autocast(device, kind, enabled=kind is not None):
            return functional.cross_entropy(model(x), y)

    # With CUDA graphs.
    loss = torch.compile(loss, mode="max-autotune") if compiled else loss

    def update(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def peak_mib() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0

    return update, peak_mib
