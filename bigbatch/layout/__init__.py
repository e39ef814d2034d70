"""Hardware: how an update is cut, shared among devices, fitted into memory, and timed.

`layout` cuts into microbatches, `sharing` lets devices share a ghost batch, `memory` finds the
largest microbatch that fits, `time_model` says what an update takes. Nothing here changes a result,
and nothing here knows of data sets, networks, tasks or recipes.
"""
