"""Trees of arrays as bytes: against `tobytes`, whatever the dtypes and shapes."""

import hashlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from bigbatch.workdir import packing

DTYPES = st.sampled_from([np.float32, np.float64, np.int32, np.uint8, np.bool_, jnp.bfloat16])
SHAPES = numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@given(st.lists(st.tuples(DTYPES, SHAPES), max_size=6), st.randoms(use_true_random=False))
def test_what_was_packed_is_unpacked(kinds, random):
    # Numbers that look like nothing, and arrays that are not row-major.
    arrays = [
        np.frombuffer(random.randbytes(np.dtype(d).itemsize * int(np.prod(s))), d).reshape(s).T
        for d, s in kinds
        if d is not np.bool_
    ] + [np.zeros(s, d) for d, s in kinds if d is np.bool_]
    tree = {"some": arrays[:2], "others": tuple(arrays[2:])}
    packed = packing.pack(tree)
    leaves = jax.tree.leaves(tree)
    assert packed.tobytes() == b"".join(leaf.tobytes() for leaf in leaves)
    assert packing.num_bytes(tree) == len(packed)
    size = random.randint(1, 9)
    pieces = (packed[begin : begin + size] for begin in range(0, len(packed), size))
    found, checksum = packing.unpack(pieces, tree)
    assert checksum == zlib.crc32(packed)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for leaf, other in zip(jax.tree.leaves(found), leaves, strict=True):
        assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape)
        assert leaf.tobytes() == other.tobytes()
        assert leaf.flags.writeable
        assert leaf.flags.aligned


def test_another_number_of_bytes_is_an_error():
    with pytest.raises(ValueError, match="fewer than 12 bytes"):
        packing.unpack([np.zeros(8, np.uint8)], {"a": jnp.zeros(3)})


def test_the_bytes_are_not_the_arrays_own():
    array = np.zeros(3, np.float32)
    packed = packing.pack([array])
    array[:] = 1
    assert not packed.any()


@given(st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=3), st.integers(0, 255))
def test_the_hash_is_of_names_shapes_dtypes_and_bytes(kinds, byte):
    tree = {f"a{i}": np.full(s, byte % 2).astype(d) for i, (d, s) in enumerate(kinds)}
    content = b"".join(
        f"['{name}'] {array.shape} {array.dtype};".encode() + array.tobytes()
        for name, array in tree.items()
    )
    assert packing.sha256(tree) == hashlib.sha256(content).hexdigest()
