"""The input of a data set in memory, beside tf.data's and Grain's pipelines.

    bigbatch data prepare fashion_mnist
    pip install '.[test,bench]'
    python -m tests.benchmarks.input_arrays

Fashion-MNIST with mirroring and a crop from 4 pixels of padding, in microbatches of 1,024. Every
figure is a median of `RUNS` runs, in which all that it is compared with take turns; minimum and
maximum stand beside it.
"""

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

import bigbatch
from bigbatch.data import dataset, sets, stream
from bigbatch.data.augment import Augment
from bigbatch.engine import functions as step
from bigbatch.layout.layout import Layout
from bigbatch.training import microbatches
from bigbatch.training.prefetch import Prefetch

Result = TypeVar("Result")

RUNS = 7
MICROBATCH_EXAMPLES = 1_024
IN_FLIGHT = 4
CHANGE = Augment(flip=True, pad_pixels=4)
BATCH_SIZES = (1_024, 65_536)


def ours(data: sets.Arrays) -> Iterator[Any]:
    """Microbatches of the example stream, through the prefetch, on the host."""

    def make(first_example: int) -> dict[str, np.ndarray]:
        return stream.examples(data, 0, first_example, MICROBATCH_EXAMPLES, CHANGE)

    with Prefetch(make, itertools.count(0, MICROBATCH_EXAMPLES), max_in_flight=IN_FLIGHT) as items:
        yield from items


def tf_data(data: sets.Arrays) -> Iterator[Any]:
    """tf.data as its guides have it: shuffle, repeat, map each element, batch, prefetch."""
    import tensorflow as tf

    height, width, channels = data.images.shape[1:]
    pad = CHANGE.pad_pixels

    def change(image: Any, label: Any) -> Any:
        image = tf.image.random_flip_left_right(image)
        image = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
        return tf.image.random_crop(image, [height, width, channels]), label

    elements = tf.data.Dataset.from_tensor_slices((data.images, data.labels))
    elements = elements.shuffle(len(data)).repeat().map(change, tf.data.AUTOTUNE)
    elements = elements.batch(MICROBATCH_EXAMPLES, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return iter(elements.as_numpy_iterator())


def grain_elements(data: sets.Arrays) -> Iterator[Any]:
    """Grain: shuffle, repeat, map each element, batch.

    Without its threads, which make it slower here: they wait for each other's Python.
    """
    import grain

    height, width, channels = data.images.shape[1:]
    pad = CHANGE.pad_pixels

    def change(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image = data.images[index]
        if rng.random() < 0.5:
            image = image[:, ::-1]
        padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
        padded[pad : pad + height, pad : pad + width] = image
        top, left = rng.integers(0, 2 * pad + 1, 2)
        return padded[top : top + height, left : left + width], data.labels[index]

    elements = grain.MapDataset.range(len(data)).seed(0).shuffle().repeat().random_map(change)
    elements = elements.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return iter(elements.batch(MICROBATCH_EXAMPLES, drop_remainder=True))


class Rate(NamedTuple):
    """Examples a second by the clock, and by the time of all cores that the process has used."""

    clock: float
    cpu: float


def rate(items: Iterator[Any], seconds: float) -> Rate:
    """What is delivered in at least so many seconds, the first microbatches left aside."""
    for _ in range(2):
        next(items)
    count, start, start_cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < seconds:
        next(items)
        count += MICROBATCH_EXAMPLES
    return Rate(count / passed, count / (time.process_time() - start_cpu))


def placed(data: sets.Arrays, batch_size: int, *, there: bool = False) -> Iterator[Any]:
    """The microbatches of updates of one batch size, on the device."""
    mesh = step.data_mesh(jax.devices()[:1])
    ghost = 128
    layout = Layout(ghost_batch_examples=ghost, devices=1, shapes=(MICROBATCH_EXAMPLES,))
    policy = bigbatch.constant(0.1, batch_size, 0.9)
    plan = bigbatch.make_plan(policy, train_examples=len(data), epochs=1_000)

    given = dataset.data_set(sets.info("fashion_mnist"), data, data, CHANGE, there)
    make = microbatches.of(given, layout, mesh, 0, ghost, takes_keys=False)
    requests = microbatches.requests(plan, layout, 0, plan.num_updates)
    with Prefetch(make, requests, max_in_flight=IN_FLIGHT) as items:
        for item in items:
            yield jax.block_until_ready(item)


def alternate(made: dict[str, Callable[[], Result]], runs: int = RUNS) -> dict[str, list[Result]]:
    """What each gives in turns."""
    values: dict[str, list[Result]] = {name: [] for name in made}
    for _ in range(runs):
        for name, measure in made.items():
            values[name].append(measure())
    return values


def cell(values: list[float], form: str) -> str:
    """Median and spread."""
    median, least, most = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{median} ({least} .. {most})"


def print_rates(head: str, rates: dict[str, list[Rate]]) -> None:
    """A table of rates; each is compared with the first, run by run."""
    print(f"\n| {head} | examples/s | examples/CPU s | first / this | by CPU time |")
    print("| --- | ---: | ---: | ---: | ---: |")
    first = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [
            [a / b for a, b in zip(*pair, strict=True)] for pair in zip(first, values, strict=True)
        ]
        columns = [[value.clock for value in values], [value.cpu for value in values]]
        texts = [cell(column, "{:,.0f}") for column in columns]
        texts += [f"{statistics.median(column):.3g}" for column in zip(*ratios, strict=True)]
        print("| " + " | ".join([name, *texts]) + " |", flush=True)


def first_microbatch_ms(data: sets.Arrays, position: int) -> float:
    """Milliseconds from nothing to the microbatch at a position."""
    for cache in (stream._order, stream._bits):
        cache.cache_clear()
    start = time.perf_counter()
    stream.examples(data, 0, position, MICROBATCH_EXAMPLES, CHANGE)
    return 1e3 * (time.perf_counter() - start)


def grown_mb(batch_size: int) -> None:
    """Prints by how many MB 128 microbatches have made this process larger, at the most (Linux)."""
    data = sets.load("fashion_mnist").train
    items = placed(data, batch_size)
    next(items)
    # The largest size so far is forgotten: loading the data takes more than the microbatches.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    for _ in itertools.islice(items, 127):
        pass
    print(_status_mb("VmHWM") - before)


def _status_mb(name: str) -> float:
    """An entry of this process's status that is given in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) * 1.024e-3


def main() -> None:
    """Prints Markdown."""
    data = sets.load("fashion_mnist").train
    names = ("jax", "numpy", "tensorflow-cpu", "grain")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} shared CPU cores\n")

    pipelines = {"bigbatch": ours, "tf.data": tf_data, "Grain": grain_elements}
    rates = alternate({n: lambda f=f: rate(f(data), 3.0) for n, f in pipelines.items()})
    print_rates("pipeline", rates)
    kinds = {f"updates of {b:,}": lambda b=b: rate(placed(data, b), 1.0) for b in BATCH_SIZES}
    kinds["data on the device"] = lambda: rate(placed(data, BATCH_SIZES[0], there=True), 1.0)
    print_rates("microbatches on the device", alternate(kinds, 3 * RUNS))

    print("\n| first microbatch at position | ms |\n| --- | ---: |")
    positions = (0, 10**8, 10**12)
    times = alternate({f"{p:,}": lambda p=p: first_microbatch_ms(data, p) for p in positions}, 21)
    for name, values in times.items():
        print(f"| {name} | {cell(values, '{:.1f}')} |", flush=True)

    print("\n| batch size | memory beyond the first microbatch, at most, MB |\n| --- | ---: |")

    def grown(batch_size: int) -> float:
        command = [sys.executable, "-m", "tests.benchmarks.input_arrays", str(batch_size)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    for name, values in alternate({f"{b:,}": lambda b=b: grown(b) for b in BATCH_SIZES}, 3).items():
        print(f"| {name} | {cell(values, '{:.1f}')} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        grown_mb(int(sys.argv[1]))
    else:
        main()
