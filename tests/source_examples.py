"""Sources of single examples, which a process that reads them imports: quickly."""

import os

import numpy as np

N = 23
RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.normal(size=(N, 3)).astype(np.float32),
    "y": RNG.integers(0, 9, N, dtype=np.int32),
}


class Items:
    """Something that gives single examples, in the form asked for."""

    def __init__(self, form=dict):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, number):
        example = {name: array[number] for name, array in ARRAYS.items()}
        return self.form(example)


def shifted(example, key):
    """Another example for another key; in place, which must not reach the source."""
    example["x"] += (key[0] % 1000).astype(np.float32)
    return {"x": example["x"], "y": example["y"], "coin": key[1] >> 31}


class Faulty(Items):
    def __getitem__(self, number):
        if number == 2:
            return {"x": np.zeros(4, np.float32), "y": np.int32(0)}
        if number == 3:
            os._exit(1)
        return super().__getitem__(number)
