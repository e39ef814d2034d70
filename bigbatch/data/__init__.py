"""The input: `example = f(seed, position)`, from any random-access source to a batch of arrays.

`random` is the generator and the permutation, `sets` the data sets and what is known of them,
`augment` flips and crops, `stream` gives any range of examples; `records` reads files of encoded
images, `tfds` what tensorflow-datasets has prepared. It knows no training loop and no config.
"""
