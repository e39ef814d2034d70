"""The gradient noise scale in any training loop: what is measured, as pure functions of JAX.

It is tr(S) / |G|^2 of the gradients, in examples, and nothing of a plan's noise scale g. `sums`
makes a measurement's addends of gradients; `bigbatch.schedule.adaptive.gradient_noise` makes the
estimate of the measurement; `in_loops` is both for a loop of one's own, as in
`docs/noise_in_your_loop.md`; `geometry` is what is measured where the optimizer is not plain SGD.
It knows nothing of the engine, which is one caller of it. The names are imported when they are
first asked for: they need JAX.
"""

import importlib
import typing

_HOMES = {
    "in_loops": ("add", "average", "empty", "measure", "read", "start", "watching"),
    "geometry": ("L2", "SIGN", "SPECTRAL", "Geometry", "by_group", "preconditioned"),
}
__all__ = [*_HOMES["in_loops"], *_HOMES["geometry"]]


def __getattr__(name: str) -> typing.Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
