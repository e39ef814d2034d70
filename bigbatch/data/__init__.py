"""The input: `example = f(seed, position)`, from any source that is read at random.

`source` says what training needs of its data and makes it of one's own; `sets` has the data sets
with a name: in memory (`dataset`, `own_arrays`), or as encoded images in files (`records`), which
tensorflow-datasets prepared (`tfds`). `random` is the generator and the permutation, `stream` the
order and the random words of any range of examples, `augment` flips and crops, `on_device` looks
examples up on the devices.
"""
