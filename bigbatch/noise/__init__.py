"""The gradient noise scale in any training loop: what is measured, as pure functions of JAX.

`sums` makes a measurement's addends of gradients; `bigbatch.schedule.adaptive.gradient_noise` makes
the estimate of the measurement, to which a loop that draws without replacement adds its `shares`.
It knows nothing of the engine, which is one caller of it.
"""
