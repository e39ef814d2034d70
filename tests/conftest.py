"""Eight virtual CPU devices for every test, before any backend starts."""

import os

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)

# CI draws the same examples every time, so that it judges the change and not the draw.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
