"""ImageNet's training input beside a tf.data pipeline, on the same files and cores.

    python -m tests.benchmarks.input_records DIRECTORY > tests/benchmarks/results/input_records.md

DIRECTORY is filled at the first call: imagenet2012 as tensorflow-datasets prepares it, from 1,000
generated JPEGs of 500x375 pixels. The peer is the usual tf.data pipeline of JAX's and TensorFlow's
ImageNet examples: a random box, decode-and-crop, bicubic resizing, mirroring, normalisation. Every
pipeline has as many threads as there are cores; the peer does not shuffle, and begins anew each
turn, as what it makes ahead would be made in the others' turns. Every round measures every pipeline
once. On a machine that others use, the processor's time per image is what can be compared.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigbatch.data import sets, stream
from bigbatch.data.records import jpeg
from bigbatch.data.records.crops import training_window
from bigbatch.data.records.reader import Records, parse
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.training.prefetch import Prefetch

SIZE, IMAGES, MICROBATCH, ROUNDS, TAKEN = 224, 1000, 64, 5, 960
IMAGENET_EXAMPLES = 1_281_167
IN_FLIGHT = 4


class Delivery(NamedTuple):
    """What it took to deliver examples.

    Attributes:
      examples: delivered.
      seconds: from the first request to the last example.
      processor_s: that all threads of this process spent on the processors, its own work included.
    """

    examples: int
    seconds: float
    processor_s: float

    @property
    def examples_per_s(self) -> float:
        """The rate by the clock: what other work on the machine takes away is missing from it."""
        return self.examples / self.seconds

    @property
    def processor_ms_per_example(self) -> float:
        """The cost, which other work changes little."""
        return 1e3 * self.processor_s / self.examples


def deliver(
    source, *, num_examples: int, microbatch_examples: int, first_example: int = 0
) -> Delivery:
    """Takes examples from a source as a run does that computes nothing: made ahead and dropped.

    Args:
      source: of the examples.
      num_examples: how many to take.
      microbatch_examples: how many at a time.
      first_example: position of the first.

    Returns:
      What it took.
    """
    end = first_example + num_examples
    requests = [
        (first, min(microbatch_examples, end - first))
        for first in range(first_example, end, microbatch_examples)
    ]
    began_s, began_processor_s = time.perf_counter(), time.process_time()
    with Prefetch(lambda r: source(*r), requests, max_in_flight=IN_FLIGHT) as parts:
        for _ in parts:
            pass
    return Delivery(
        num_examples, time.perf_counter() - began_s, time.process_time() - began_processor_s
    )


def prepare(directory: Path) -> None:
    from tests import imagenet_files

    if not (directory / "tfrecord").exists():
        directory.mkdir(parents=True, exist_ok=True)
        imagenet_files.prepare(directory, images_per_class=IMAGES // 4, size=(375, 500), quality=75)


def opened(directory: Path, file_format: str, decoding: str, workers: int | None = None):
    return sets.load(
        "imagenet2012",
        train_examples=IMAGES,
        test_examples=1,
        image_size=SIZE,
        directory=directory / file_format,
        flip=True,
        decoding=decoding,
        workers=workers,
    )


def ours(directory: Path, file_format: str, decoding: str, workers: int | None = None):
    """The source of the training examples."""
    data = opened(directory, file_format, decoding, workers)
    return lambda first, number: data.training(0, first, number)


def tf_data(directory: Path, fast: bool):
    """The peer's batches of one turn, as a tf.data.Dataset."""
    import tensorflow as tf

    prepared = tfds_metadata.find("imagenet2012", directory / "tfrecord")
    decoding = {"fancy_upscaling": not fast, "dct_method": "INTEGER_FAST" if fast else ""}
    mean = tf.constant([123.675, 116.28, 103.53])
    std = tf.constant([58.395, 57.12, 57.375])

    def example(record):
        features = {
            "image": tf.io.FixedLenFeature((), tf.string),
            "label": tf.io.FixedLenFeature((), tf.int64),
        }
        parsed = tf.io.parse_single_example(record, features)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(parsed["image"]),
            bounding_boxes=tf.constant([0.0, 0.0, 1.0, 1.0], shape=(1, 1, 4)),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(parsed["image"], window, channels=3, **decoding)
        image = tf.image.resize(image, (SIZE, SIZE), method="bilinear" if fast else "bicubic")
        image = tf.image.random_flip_left_right(image)
        return (image - mean) / std, parsed["label"]

    files = [str(file) for file in prepared.files("train")]
    data = tf.data.TFRecordDataset(files).take(TAKEN)
    data = data.map(example, num_parallel_calls=os.cpu_count())
    data = data.batch(MICROBATCH, drop_remainder=True).prefetch(IN_FLIGHT)
    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = os.cpu_count()
    return data.with_options(options)


def deliver_peer(batches) -> Delivery:
    began_s, began_processor_s = time.perf_counter(), time.process_time()
    for _ in batches:
        pass
    return Delivery(TAKEN, time.perf_counter() - began_s, time.process_time() - began_processor_s)


def pipelines(directory: Path) -> None:
    """Images per second of every pipeline."""
    peers = {
        "tf.data: bicubic, TensorFlow's own decoder settings": tf_data(directory, fast=False),
        "tf.data: bilinear, fast DCT, plain upsampling": tf_data(directory, fast=True),
    }
    own = {
        "bigbatch fast, TFRecord": ours(directory, "tfrecord", "fast"),
        "bigbatch fast, ArrayRecord": ours(directory, "array_record", "fast"),
        "bigbatch smooth, TFRecord": ours(directory, "tfrecord", "smooth"),
    }
    found: dict[str, list[Delivery]] = {name: [] for name in [*peers, *own]}
    for turn in range(ROUNDS + 1):
        for name, batches in peers.items():
            found[name].append(deliver_peer(batches))
        for name, source in own.items():
            span = {"num_examples": TAKEN, "microbatch_examples": MICROBATCH}
            found[name].append(deliver(source, first_example=turn * TAKEN, **span))
    base, *_ = found.values()
    print(
        "| pipeline | images/s, median (least, most) | of the first | processor ms per image | "
        "first / this |\n| --- | --- | --- | --- | --- |"
    )
    for name, runs in found.items():
        # The first round warms everything up.
        rates = [run.examples_per_s for run in runs[1:]]
        costs = [run.processor_ms_per_example for run in runs[1:]]
        first_rates = [run.examples_per_s for run in base[1:]]
        first_costs = [run.processor_ms_per_example for run in base[1:]]
        ratio = statistics.median(a / b for a, b in zip(rates, first_rates, strict=True))
        cost = statistics.median(costs)
        print(
            f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f}, {max(rates):,.0f}) | "
            f"{ratio:.2f} | {cost:.2f} | {statistics.median(first_costs) / cost:.2f} |"
        )


def differences(directory: Path) -> None:
    """How far the pixels of decodings lie apart, on the same windows."""
    import tensorflow as tf

    prepared = tfds_metadata.find("imagenet2012", directory / "tfrecord")
    records = Records(prepared, "train")
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"fast": [], "smooth": []}
    jpeg.prepare_thread()
    for i in range(0, IMAGES, 10):
        encoded, _ = parse(records.read(i))
        size = jpeg.image_size(encoded)
        window = training_window(rng.integers(0, 2**32, (11, 2)).tolist(), *size)
        crop = tf.io.decode_and_crop_jpeg(encoded, tf.constant(window), channels=3)
        peer = tf.image.resize(crop, (SIZE, SIZE), method="bicubic").numpy()
        for name, errors in found.items():
            out = np.empty((SIZE, SIZE, 3), np.uint8)
            jpeg.decode(encoded, size, window, jpeg.DECODINGS[name], flip=False, out=out)
            errors.append(np.abs(out - np.clip(peer, 0, 255)).ravel())
    for name, errors in found.items():
        values = np.concatenate(errors)
        print(
            f"- {name} against tf.data's bicubic on the same windows: mean {values.mean():.2f}, "
            f"99 % below {np.quantile(values, 0.99):.0f} of 255"
        )


def rebatching(directory: Path) -> None:
    """The same microbatches, for updates of 128 and of 65,536 examples."""
    from bigbatch import make_plan, step_decay
    from bigbatch.layout.sharing import layout_over
    from bigbatch.training import microbatches

    source = ours(directory, "tfrecord", "fast")
    rates: dict[int, list[float]] = {MICROBATCH: [], 65_536: []}
    costs: dict[int, list[float]] = {MICROBATCH: [], 65_536: []}
    for _ in range(ROUNDS):
        for batch_size, found in rates.items():
            policy = step_decay(0.1, batch_size, 0.9, boundaries_epochs=[], factor=0.1)
            plan = make_plan(policy, train_examples=IMAGES, epochs=70)
            layout = layout_over(
                plan,
                ghost_batch_examples=32,
                devices=1,
                microbatch_examples_per_device=MICROBATCH,
            )
            wanted = microbatches.requests(plan, layout, 0, plan.num_updates)
            began_s, began_processor_s = time.perf_counter(), time.process_time()
            make = lambda r: source(r.first_example, r.part.num_examples)  # noqa: E731
            with Prefetch(make, wanted, max_in_flight=IN_FLIGHT) as parts:
                taken = sum(len(next(parts)["label"]) for _ in range(2 * TAKEN // MICROBATCH))
            found.append(taken / (time.perf_counter() - began_s))
            costs[batch_size].append((time.process_time() - began_processor_s) / taken)
    small, large = rates.values()
    ratio = statistics.median(b / a for a, b in zip(small, large, strict=True))
    print(
        f"- delivery for updates of 65,536 examples over that for updates of {MICROBATCH}: "
        f"{ratio:.3f} (medians {statistics.median(large):,.0f} and "
        f"{statistics.median(small):,.0f} images/s); processor time per image "
        f"{statistics.median(costs[65_536]) / statistics.median(costs[MICROBATCH]):.3f} of it"
    )


def start(directory: Path) -> None:
    """The first microbatch at position 0 and at 10^8, with nothing kept from before."""
    source = ours(directory, "tfrecord", "fast")
    times: dict[int, list[float]] = {0: [], 10**8: []}
    orders: dict[int, list[float]] = {0: [], 10**8: []}
    for _ in range(3 * ROUNDS):
        for position in times:
            for kept in (stream._order, stream._bits):
                kept.cache_clear()
            began_s = time.perf_counter()
            stream.indices(IMAGENET_EXAMPLES, 0, position, MICROBATCH)
            orders[position].append(1e3 * (time.perf_counter() - began_s))
            began_s = time.perf_counter()
            source(position, 16)
            times[position].append(1e3 * (time.perf_counter() - began_s))
    for words, kept in (("16 images", times), ("order of 1,281,167 examples", orders)):
        at = {position: f"{statistics.median(found):.1f} ms" for position, found in kept.items()}
        print(f"- first {words} at position 0: {at[0]}; at 10^8: {at[10**8]}")


def memory(directory: Path) -> None:
    """Peak host memory of a process of its own, by the updates' batch size."""
    for batch_size in (MICROBATCH, 65_536):
        command = [sys.executable, "-m", __spec__.name, str(directory), str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"- peak memory with updates of {batch_size:,} examples: {done.stdout.strip()}")


def peak(directory: Path, batch_size: int) -> None:
    source = ours(directory, "tfrecord", "fast")
    before = _peak_mb()
    deliver(source, num_examples=min(max(batch_size, 1024), 2048), microbatch_examples=MICROBATCH)
    print(f"{_peak_mb():.0f} MB, of which {_peak_mb() - before:.0f} MB for the input")


def _peak_mb() -> float:
    """This process's own; getrusage counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def access(directory: Path) -> None:
    """Records in the stream's order and one file after the other, with the files not in memory."""
    prepared = tfds_metadata.find("imagenet2012", directory / "tfrecord")
    files = prepared.files("train")
    size = sum(file.stat().st_size for file in files)
    orders = {"one after the other": range(IMAGES), "in an epoch's order": None}
    found: dict[str, list[float]] = {name: [] for name in [*orders, "whole files"]}
    for turn in range(ROUNDS):
        for name in found:
            for file in files:
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
            records = Records(prepared, "train")
            order = orders.get(name) or stream.indices(IMAGES, turn, 0, IMAGES).tolist()
            began_s = time.perf_counter()
            if name == "whole files":
                for file in files:
                    file.read_bytes()
            else:
                for i in order:
                    records.read(i)
            found[name].append(time.perf_counter() - began_s)
            records.close()
    for name, times in found.items():
        seconds = statistics.median(times)
        print(
            f"- {size / 1e6:.0f} MB of TFRecord files, {name}: {size / 1e6 / seconds:,.0f} MB/s, "
            f"{1e6 * seconds / IMAGES:.0f} microseconds a record, one thread"
        )


def main(directory: Path) -> None:
    prepare(directory)
    prepared = tfds_metadata.find("imagenet2012", directory / "tfrecord")
    size = sum(file.stat().st_size for file in prepared.files("train"))
    print(
        f"{os.cpu_count()} shared cores, {platform.machine()}, Python "
        f"{platform.python_version()}; load {os.getloadavg()[0]:.0f} at the start.\n\n"
        f"{IMAGES:,} JPEGs of 500x375 pixels, {size / IMAGES / 1e3:.0f} kB each, to {SIZE}x{SIZE}; "
        f"{TAKEN} images a turn, {ROUNDS} alternating turns after one to warm up.\n"
    )
    pipelines(directory)
    print()
    for part in (differences, rebatching, start, memory, access):
        part(directory)
        sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        peak(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
