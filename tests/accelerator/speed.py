"""Examples/s of WRN-16-4 on 32 x 32 images, by the examples of a call; and PyTorch's.

A call is accumulate and apply_update on one microbatch that lies on the card, as a plan of that
batch size has them; PyTorch's is forward, loss, backward and fused SGD, compiled with CUDA graphs,
channels last. Same network, same card, same minutes, by turns.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bigbatch as bb
from bigbatch.models.classification import image_classification
from bigbatch.models.wide_resnet import WideResNet
from bigbatch.training.microbatches import Request

GHOST = 128
# Of accumulate, forward and backward, as XLA counts it for one example of WRN-16-4.
_GFLOP_AN_EXAMPLE = 2.18
# Dense bfloat16 of an H100 SXM, NVIDIA's data sheet.
_PEAK_GFLOP_S = 989_000
_SHAPE = (32, 32, 3)


def rows(toy: bool) -> Iterator[dict[str, Any]]:
    """A row for each size, dtype and trainer."""
    depth, width, sizes = (10, 1, (128,)) if toy else (16, 4, (1024, 256, 4096, 128, 512, 2048))
    seconds = 0.2 if toy else 1.5
    for size in sizes:
        for dtype in ("bfloat16", "float32"):
            name = dtype if dtype == "bfloat16" else "tf32"
            update, peak_mib = _ours(depth, width, size, dtype)
            yield _row("bigbatch", name, size, *_rate(update, size, seconds), peak_mib())
            theirs = _torch(depth, width, size, dtype, compiled=not toy)
            if theirs is not None:
                yield _row("PyTorch", name, size, *_rate(theirs[0], size, seconds), theirs[1]())


def _row(
    who: str, dtype: str, size: int, rate: float, low: float, high: float, peak_mib: float
) -> dict[str, Any]:
    return {
        "trainer": who,
        "dtype": dtype,
        "examples a call": size,
        "examples/s": round(rate),
        "quartiles": f"{low:,.0f} to {high:,.0f}",
        "share of bf16 peak": rate * _GFLOP_AN_EXAMPLE / _PEAK_GFLOP_S,
        "peak MiB": round(peak_mib),
    }


def _rate(update: Callable[[int], None], size: int, seconds: float) -> tuple[float, float, float]:
    """Median and quartiles of the examples/s of 9 stretches, after two of warming up."""
    update(2)
    start_s = time.perf_counter()
    update(3)
    count = max(1, round(3 * seconds / 9 / (time.perf_counter() - start_s)))
    rates = []
    for _ in range(9):
        start_s = time.perf_counter()
        update(count)
        rates.append(count * size / (time.perf_counter() - start_s))
    middle, low, high = np.percentile(rates, (50, 25, 75))
    return float(middle), float(low), float(high)


def _ours(
    depth: int, width: int, size: int, dtype: str
) -> tuple[Callable[[int], None], Callable[[], float]]:
    """Makes so many updates and waits for them; the most memory that was in use so far."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(size, 1024), *_SHAPE), np.uint8)
    arrays = {"image": images, "label": rng.integers(0, 10, len(images)).astype(np.int32)}
    network = WideResNet(depth, width, 10, GHOST, dtype=jnp.dtype(dtype))
    task = image_classification(network, _SHAPE, (127.0,) * 3, (64.0,) * 3)
    plan = bb.make_plan(bb.constant(0.1, size, 0.9), train_examples=len(images), epochs=4)
    run = bb.prepare(
        task,
        arrays,
        plan,
        bb.Momentum(weight_decay=5e-4),
        ghost_batch_examples=GHOST,
        microbatch_examples_per_device=size,
    )
    (part,) = run.layout.microbatches(size)
    held, examples = run.microbatch(Request(0, part))
    examples = jax.device_put(dict(examples))
    hyper = jax.device_put({name: np.float32(0.1) for name in run.optimizer.hyper_names})
    own: list[Any] = [run.first_state(), run.programs.empty_accumulator()]

    def update(count: int) -> None:
        state, accumulator = own
        for _ in range(count):
            accumulator = run.programs.accumulate[held](state, accumulator, examples, run.frozen)
            state, accumulator, _ = run.programs.apply_update(state, accumulator, hyper)
        own[:] = jax.block_until_ready((state, accumulator))

    def peak_mib() -> float:
        memory = jax.devices()[0].memory_stats() or {}
        return float(memory.get("peak_bytes_in_use", 0)) / 2**20

    return update, peak_mib


def _torch(
    depth: int, width: int, size: int, dtype: str, *, compiled: bool
) -> tuple[Callable[[int], None], Callable[[], float]] | None:
    try:
        from tests.accelerator import torch_wrn
    except ModuleNotFoundError:
        return None
    return torch_wrn.trainer(depth, width, size, dtype, compiled=compiled)
