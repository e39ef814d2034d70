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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
# (give it the address of this repository, and choose `notebooks/noise_scale.ipynb`)
#
# The *planned* noise scale g = lr N / (B (1 - m)) is what a recipe sets. The *gradient* noise scale is measured: the batch
# size at which the noise of a gradient is as large as the gradient itself. Far below it, twice the batch takes nearly half
# the updates; far above it, twice the batch gains little. It grows during training, and so may the batch.

# %%
# In Colab only: fetch and install the project.
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    address = input("Address of the bigbatch repository: ")
    subprocess.run(["git", "clone", "-q", address, "bigbatch"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./bigbatch"], check=True)
    os.chdir("bigbatch/notebooks")

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from bigbatch.commands.critical.measure import Asked, measure
from bigbatch.commands.critical.table import section
from bigbatch.commands.report import read_run
from bigbatch.commands.saved import run_of
from bigbatch.config.assemble import train
from bigbatch.config.file import load_config
from bigbatch.workdir.files import Workdir

# The tests run this notebook for a few updates.
FAST = "BIGBATCH_FAST" in os.environ
SHORT = [
    ("epochs", "1"),
    ("policy.boundaries_epochs", "[0.5]"),
    ("model.strides", "(2,2,1)"),
    ("keep_every_updates", "5"),
]

# %% [markdown]
# ## Train, and measure beside it
#
# One field turns the measurement on: the gradients of every 32 examples are compared with the whole update's. (Microbatches of
# one such small batch are quickest on a CPU.) A checkpoint of every epoch is kept, to go back to below.

# %%
overrides = [("noise_small_batch_examples", "32"), ("microbatch_examples_per_device", "32")]
overrides += SHORT if FAST else [("keep_every_epochs", "1")]
config = load_config("digits:increase_lr", overrides)
files = Workdir(Path(tempfile.mkdtemp()) / "run")
result, _ = train(config, files)
print(f"test accuracy {result['test_accuracy']:.2%} after {result['updates']} updates")

# %% [markdown]
# ## Look

# %%
log = read_run(files.path).training
measured, error = log["gradient_noise_scale"], log["gradient_noise_scale_error"]
known = np.isfinite(measured)
epochs = log["epoch"][known]
plt.figure(figsize=(8, 4), layout="constrained")
low, high = (np.maximum(measured + sign * error, 1)[known] for sign in (-1, 1))
plt.fill_between(epochs, low, high, alpha=0.25, linewidth=0)
plt.plot(epochs, measured[known], label="gradient noise scale, measured, one standard error")
plt.step(log["epoch"], log["batch_size"], "k--", label="batch size")
plt.yscale("log")
plt.xlabel("epochs")
plt.ylabel("examples")
plt.legend(frameon=False)
print(f"{known.sum()} of {known.size} records have an estimate")

# %% [markdown]
# ## The critical batch size
#
# To a fixed loss, a batch of B takes about `1 + noise scale / B` times as many updates as a huge batch, and
# `1 + B / noise scale` times as many examples as a tiny one (McCandlish et al. 2018). Where B is the noise scale, both are 2:
# the *critical* batch size. That is a prediction. The measurement: from a checkpoint, short runs at several batch sizes go
# on until the training loss has fallen by a given share. `bigbatch critical --workdir=DIR` does this for any run.

# %%
asked = Asked()
if FAST:
    asked = Asked(sizes=(32, 64, 128), branches=2, loss_share=0.1, most_epochs=1)
(point,) = measure(run_of(files, config), files, asked, at_updates=[5 if FAST else 9])
print(section(point))

# %% [markdown]
# Updates against examples: each point is a batch size, the line the fit, the dashed line what the noise scale predicts, through
# the same corner.

# %%
if point.fit is not None:
    fit, noise = point.fit, point.noise.scale
    plt.figure(figsize=(6, 4), layout="constrained")
    for size in point.sizes:
        if size.reached:
            updates = np.array(size.reached)
            plt.loglog(updates, updates * size.batch_size, "o", label=f"B = {size.batch_size:,}")
    sizes = np.geomspace(point.sizes[0].batch_size / 2, point.sizes[-1].batch_size * 2)
    updates = fit.updates(sizes)
    label = f"fit, critical batch size {fit.critical_batch_size:,.0f}"
    plt.loglog(updates, updates * sizes, "k-", label=label)
    updates = fit.fewest_updates * (1 + noise / sizes)
    plt.loglog(updates, updates * sizes, "k--", label=f"noise scale {noise:,.0f}")
    plt.xlabel("updates")
    plt.ylabel("examples")
    plt.legend(frameon=False)
