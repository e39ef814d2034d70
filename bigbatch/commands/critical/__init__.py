"""`bigbatch critical`: the critical batch size, from short runs that branch from checkpoints.

`measure` runs the branches, `fit` is the arithmetic, `table` what is printed. No other package
knows of it.
"""
