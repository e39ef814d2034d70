"""Statistics: what every update is given, as arithmetic on plain numbers.

A recipe (`policy`) is turned into another with the same gradient noise (`transform`) and becomes a
plan (`plan`); `adaptive` decides the plan while the noise is measured. NumPy only: it knows no JAX,
no device, no network, no data set, and nothing of the packages above it.
"""
