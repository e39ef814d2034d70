"""Updates of any sizes, cut and shared out in any way, show the same examples."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.data import sets, stream
from bigbatch.data.augment import Augment
from bigbatch.layout.layout import Layout
from bigbatch.training.microbatches import Request

CHANGE = Augment(flip=True, pad_pixels=2)
GHOST = 4


def requests(layout, batch_sizes):
    """The microbatches of updates of these sizes, as those of a plan."""
    position = 0
    for batch_size in batch_sizes:
        for part in layout.microbatches(batch_size):
            yield Request(position + part.offset_examples, part)
        position += batch_size


@given(
    batch_sizes=st.lists(st.integers(1, 40).map(GHOST.__mul__), min_size=1, max_size=8),
    shapes=st.sets(st.integers(1, 5).map(GHOST.__mul__), min_size=1, max_size=3),
    devices=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_updates_show_the_stream_whatever_their_sizes(batch_sizes, shapes, devices):
    """Sizes that change with every update, cross epochs and pass the 31 examples of the set."""
    rng = np.random.default_rng(0)
    data = sets.Arrays(
        rng.integers(0, 256, (31, 6, 5, 1), dtype=np.uint8), np.arange(31, dtype=np.int32)
    )
    layout = Layout(GHOST, devices, tuple(sorted(shapes, reverse=True)))
    seen = [
        stream.examples(data, 5, request.first_example, request.part.num_examples, CHANGE)
        for request in requests(layout, batch_sizes)
    ]
    labels = np.concatenate([part["label"] for part in seen])
    images = np.concatenate([part["image"] for part in seen])
    assert len(labels) == sum(batch_sizes)
    one_by_one = [stream.examples(data, 5, p, 1, CHANGE) for p in range(len(labels))]
    np.testing.assert_array_equal(labels, [example["label"][0] for example in one_by_one])
    np.testing.assert_array_equal(images, [example["image"][0] for example in one_by_one])
    # Epochs follow each other without a gap, whatever the updates' edges.
    for epoch in range(len(labels) // 31):
        assert sorted(labels[31 * epoch : 31 * (epoch + 1)]) == list(range(31))


_PROCESS = """
import sys
import numpy as np
from bigbatch.data import sets, stream
from bigbatch.data.augment import Augment
rank, processes, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
data = sets.load("digits").train
parts = []
for first in range(0, 6_144, 1_024):
    share = 1_024 // processes
    made = stream.examples(data, 7, first + rank * share, share, Augment(True, 2))
    parts.append(np.concatenate([made["image"].reshape(share, -1), made["label"][:, None]], 1))
np.save(out, np.array(parts))
"""


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_shares_of_several_processes_join_to_the_whole(tmp_path, processes):
    """Each has a memory, a thread and caches of its own. Microbatches cross the epochs of 1,437."""
    files = [tmp_path / f"{rank}.npy" for rank in range(processes)]
    running = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(rank), str(processes), str(file)])
        for rank, file in enumerate(files)
    ]
    assert [process.wait() for process in running] == [0] * processes
    joined = np.concatenate([np.load(file) for file in files], axis=1).reshape(6_144, -1)
    whole = stream.examples(sets.load("digits").train, 7, 0, 6_144, Augment(True, 2))
    np.testing.assert_array_equal(joined[:, :-1], whole["image"].reshape(6_144, -1))
    np.testing.assert_array_equal(joined[:, -1], whole["label"])
