"""The two compiled functions of an update, and what they are given.

`functions` holds `accumulate` and `apply_update`; `task` says what is trained, `optimizer` and
`transformations` how; `exact_sums` sums reproducibly; `parts` says how arrays lie on the devices,
and `layers` makes a network's whole. It knows no network, no config, no data set
and no layout: it sees arrays, the axis of a mesh, and functions.
"""
