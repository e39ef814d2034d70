"""The loop: prepare a run, train it, evaluate it, and stop, continue and watch it.

It takes tasks, data, plans and optimizers as values. It knows no config, no data set by name, no
bundled network and no report.
"""
