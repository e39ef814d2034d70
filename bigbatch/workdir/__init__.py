"""What is kept of a run on disk: checkpoints, log, event files, exported networks, identity.

It is given plain values and trees of arrays. It knows no config, no data set, no network and no
training loop.
"""
