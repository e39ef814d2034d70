"""The input: `example = f(seed, position)`, from arrays in memory to microbatches.

`random` is the generator and the permutation, `sets` the data sets and what is known of them
(`tfds_files` reads those that do not come with the package),
`augment` flips and crops, `stream` any range of examples, `prefetch` the bounded look-ahead.
"""
