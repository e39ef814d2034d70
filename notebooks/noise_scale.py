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

from bigbatch.config_file import load_config
from bigbatch.report import read_run
from bigbatch.resume import open_run
from bigbatch.run import prepare
from bigbatch.train import train
from bigbatch.workdir import Workdir

# The tests run this notebook for a few updates.
FAST = "BIGBATCH_FAST" in os.environ
CONFIG = next(path / "configs" / "digits.py" for path in (Path.cwd().parent, Path.cwd()))
SHORT = [("epochs", "1"), ("policy.boundaries_epochs", "[0.5]"), ("model.strides", "(2,2,1)")]

# %% [markdown]
# ## Train, and measure beside it
#
# One field turns the measurement on: the gradients of every 32 examples are compared with the whole update's.

# %%
overrides = [("noise_small_batch_examples", "32"), *(SHORT if FAST else [])]
config = load_config(f"{CONFIG}:increase_lr", overrides)
files = Workdir(Path(tempfile.mkdtemp()) / "run")
result = train(prepare(config, open_run(config, files)), files.path)
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
# the *critical* batch size. This is what the estimate at the end says of it; it is a guide, not a measurement of updates.

# %%
if known.any():
    critical = float(measured[known][-1])
    sizes = np.geomspace(critical / 30, critical * 30)
    plt.figure(figsize=(6, 4), layout="constrained")
    plt.loglog(sizes, 1 + critical / sizes, label="updates / fewest")
    plt.loglog(sizes, 1 + sizes / critical, label="examples / fewest")
    plt.axvline(critical, color="grey", linestyle=":", label=f"{critical:,.0f} examples")
    plt.xlabel("batch size, examples")
    plt.legend(frameon=False)
