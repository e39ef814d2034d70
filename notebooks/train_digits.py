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
# # The paper's figure 5 in minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
# (give it the address of this repository, and choose `notebooks/train_digits.ipynb`)
#
# Four schedules on 1,437 images of handwritten digits: a step decay, two that grow the batch instead, and a control that
# takes a large batch without care. By epochs the first three are one curve; by updates they are not.
# A few minutes on 2 CPU cores.

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

from bigbatch.commands.compare import compare

# The tests run this notebook with one short experiment.
FAST = "BIGBATCH_FAST" in os.environ
EXPERIMENTS = ["increase_lr"] if FAST else ["decay", "increase", "increase_lr", "large"]
SHORT = [("epochs", "0.2"), ("policy.boundaries_epochs", "[0.1]"), ("model.strides", "(2,2,1)")]

# %%
directory = Path(tempfile.mkdtemp())
(report,) = compare(
    "digits",
    directory,
    experiments=EXPERIMENTS,
    seeds=1 if FAST else 3,
    overrides=SHORT if FAST else [],
)

# %% [markdown]
# ## What came out
#
# `report.page` is a page to open in a browser, with figures that answer to the pointer; these are its pictures.

# %%
for path in report.figures:
    plt.figure(figsize=(12, 6))
    plt.imshow(plt.imread(path))
    plt.axis("off")
print(report.page)

# %%
for experiment in report.summary.experiments:
    accuracy = experiment.metrics[0]
    print(
        f"{experiment.name}: {experiment.updates.mean:,.0f} updates ({experiment.updates_ratio:.1f} times fewer), "
        f"test accuracy {accuracy.mean:.2f} +- {accuracy.sd:.2f} %, n = {accuracy.n}"
    )

# %% [markdown]
# The same on your own config: `bigbatch compare --config=FILE.py --workdir=DIR`.
