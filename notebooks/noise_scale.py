# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Watch the gradient's noise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/the--maintainers/bigbatch/blob/main/notebooks/noise_scale.ipynb)
#
# A gradient is computed from some of the examples, so it is noisy. Its **gradient noise scale** is the batch size at which
# the noise is as large as the gradient itself.
#
# - Far below it, twice the batch needs nearly half the updates.
# - Far above it, twice the batch gains little.
#
# It is measured while a run goes on, and it grows during training. So may the batch.
# (The *noise scale* of a recipe, g = lr N / (B (1 - m)), is another quantity: it is set and not measured.)

# %%
# In Colab only: install the project.
import subprocess
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/the--maintainers/bigbatch"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", source], check=True
    )

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from bigbatch.commands.critical.measure import Asked, measure
from bigbatch.commands.critical.table import section
from bigbatch.commands.report import read_run
from bigbatch.commands.saved import run_of
from bigbatch.config.assemble import train
from bigbatch.config.file import load_config
from bigbatch.workdir.files import Workdir

# %% tags=["parameters"]
OVERRIDES = [
    # Measure: gradients of every 32 examples beside that of the whole update.
    ("noise_small_batch_examples", "32"),
    # Microbatches of one such small batch are quickest on a CPU.
    ("microbatch_examples_per_device", "32"),
    # To go back to, below.
    ("keep_every_epochs", "1"),
]
FROM_UPDATE = 45
ASKED = Asked()

# %% [markdown]
# ## Train, and measure
#
# Fields of the config turn the measurement on, and keep a checkpoint of every epoch.

# %%
config = load_config("digits:increase", OVERRIDES)
files = Workdir(Path(tempfile.mkdtemp()) / "run")
result, _ = train(config, files)
print(
    f"test accuracy {result['test_accuracy']:.2%} after {result['updates']} updates"
)

# %% [markdown]
# ## Look
#
# The dashed line is the batch size. Where the measured noise scale lies above it, a larger batch would still save updates.
# An update of 32 examples is one small batch, and the noise is measured between small batches. So there is no estimate before
# the batch grows, at epoch 9.

# %%
log = read_run(files.path).training
measured, error = log["gradient_noise_scale"], log["gradient_noise_scale_error"]
known = np.isfinite(measured)
epochs = log["epoch"][known]
plt.figure(figsize=(8, 4), layout="constrained")
low, high = (np.maximum(measured + sign * error, 1)[known] for sign in (-1, 1))
plt.fill_between(
    epochs, low, high, alpha=0.25, linewidth=0, label="one standard error"
)
plt.plot(epochs, measured[known], label="gradient noise scale, measured")
plt.step(log["epoch"], log["batch_size"], "k--", label="batch size")
plt.yscale("log")
plt.xlabel("epochs")
plt.ylabel("examples")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The critical batch size
#
# To a fixed loss, a batch of B takes about `1 + noise scale / B` times as many updates as a huge batch.
# It takes about `1 + B / noise scale` times as many examples as a tiny one (McCandlish et al. 2018).
# Where B is the noise scale, both are 2. That B is the *critical batch size*.
#
# So far that is a prediction. Here is the measurement: short runs branch off from a checkpoint, at several batch sizes.
# Each goes on until the training loss has fallen by a given share. `bigbatch critical --workdir=DIR` does this for any run.

# %%
(point,) = measure(run_of(files, config), files, ASKED, at_updates=[FROM_UPDATE])
display(Markdown(section(point).partition("\n\n")[2]))

# %% [markdown]
# Each point is a branch, the solid line the fit. The dashed line is what the noise scale predicts, through the same corner.
# The noise scale gives the order of magnitude, and no more: [what was shown](../docs/results/evidence.md#the-noise-scale-and-the-critical-batch-size).

# %%
plt.figure(figsize=(6, 4), layout="constrained")
for size in point.sizes:
    updates = np.array(size.reached)
    plt.loglog(
        updates, updates * size.batch_size, "o", label=f"B = {size.batch_size:,}"
    )
if point.fit is not None:
    fit, noise = point.fit, point.noise.scale
    sizes = np.geomspace(
        point.sizes[0].batch_size / 2, point.sizes[-1].batch_size * 2
    )
    lines = {
        f"fit, critical batch size {fit.critical_batch_size:,.0f}": fit.updates(
            sizes
        ),
        f"noise scale {noise:,.0f}": fit.fewest_updates * (1 + noise / sizes),
    }
    for (label, updates), style in zip(lines.items(), ("k-", "k--"), strict=True):
        plt.loglog(updates, updates * sizes, style, label=label)
plt.xlabel("updates")
plt.ylabel("examples")
plt.legend(frameon=False)
plt.show()
