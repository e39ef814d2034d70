"""The growing schedule in PyTorch: microbatches of 32, whose gradients accumulate.

    PYTHON_WITH_TORCH -m tests.benchmarks.growing_torch NAME DIRECTORY

A microbatch is what its BatchNorm2d sees, so it is the ghost batch; the running statistics advance
once a microbatch. Nothing is compiled. It needs PyTorch and NumPy only.
"""

import json
import resource
import sys
import time
from pathlib import Path

START_S = time.perf_counter()

import numpy as np  # noqa: E402 - imports are part of the time
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

MICROBATCH = 32


class Block(nn.Module):
    """A pre-activation block of a Wide ResNet."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        changes = before != after or stride != 1
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if changes else None

    def forward(self, x):
        y = functional.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(functional.relu(self.norm2(self.conv1(y))))


def network() -> nn.Module:
    """WRN-10-1 for 8x8 images."""
    channels = (16, 16, 32, 64)
    blocks = [Block(channels[i], channels[i + 1], stride) for i, stride in enumerate((1, 2, 1))]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        *blocks,
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return model


def main() -> None:
    torch.manual_seed(0)
    directory = Path(sys.argv[2])
    plan = json.loads((directory / "plan.json").read_text())
    with np.load(directory / "data.npz") as arrays:
        mean, std = arrays["mean"].item(), arrays["std"].item()

        def images(name: str) -> torch.Tensor:
            scaled = (arrays[name].astype(np.float32) - mean) / std
            return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())

        train_x, test_x = images("train_images"), images("test_images")
        train_y = torch.from_numpy(arrays["train_labels"].astype(np.int64))
        test_y = torch.from_numpy(arrays["test_labels"].astype(np.int64))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    order, accuracy = torch.empty(0, dtype=torch.long), 0.0
    for size, rate in zip(plan["batch_sizes"], plan["rates"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        epoch_ends = len(order) < size
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(train_y))])
        now, order = order[:size], order[size:]
        optimizer.zero_grad()
        for part in now.split(MICROBATCH):
            loss = functional.cross_entropy(model(train_x[part]), train_y[part])
            (loss * len(part) / size).backward()
        optimizer.step()
        if epoch_ends or not len(order):
            model.eval()
            with torch.no_grad():
                accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
            model.train()
    found = {
        "seconds": time.perf_counter() - START_S,
        "compilations": 0,
        "compilation_s": 0.0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": accuracy,
        "version": f"torch {torch.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
