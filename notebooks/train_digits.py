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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/the--maintainers/bigbatch/blob/main/notebooks/train_digits.ipynb)
#
# Four schedules on 1,437 images of handwritten digits, three seeds each, on a CPU:
#
# - `decay` divides the learning rate by 5, three times. Its batch size is 32.
# - `increase` raises the batch size instead, up to 320, and then lowers the learning rate.
# - `increase_lr` does the same from a learning rate and a batch size that are five times larger.
# - `large` is a control. It has 320 examples an update from the start, at the learning rate of `decay`.

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
from IPython.display import Markdown, display

from bigbatch.commands.compare import compare
from bigbatch.commands.report.table import claims

# %% tags=["parameters"]
EXPERIMENTS = ["decay", "increase", "increase_lr", "large"]
SEEDS = 3
OVERRIDES = []  # of the config's fields, such as ("epochs", "10")

# %% [markdown]
# ## Train
#
# The config `digits` comes with the package. The runs and the report go into a new directory.

# %%
directory = Path(tempfile.mkdtemp())
(report,) = compare(
    "digits", directory, experiments=EXPERIMENTS, seeds=SEEDS, overrides=OVERRIDES
)

# %% [markdown]
# ## The training loss
#
# Left, by epochs, the curves of `decay` and `increase` lie on each other. That of `increase_lr` starts higher and comes near.
# That of `large` stays apart: a large batch alone is not enough. Right, by updates, the growing batches are done first.

# %%
figure = plt.figure(figsize=(9, 4.68))
panel = figure.add_axes((0, 0, 1, 1))
panel.imshow(plt.imread(report.figures[0]))
panel.axis("off")
plt.show()

# %% [markdown]
# ## The numbers
#
# The **curve gap** is how far two curves of the training loss lie apart, in standard deviations between seeds.
# About 0.9 is what chance gives between three runs and three.

# %%
for experiment in report.summary.experiments:
    (accuracy, *_) = experiment.metrics
    print(
        f"{experiment.name}: {experiment.updates.mean:,.0f} updates,"
        f" test accuracy {accuracy.mean:.2f} ± {accuracy.sd:.2f} %"
    )
lines = [f"- **{name}**: {claim}" for name, claim in claims(report.summary)]
display(Markdown("\n".join(lines)))

# %% [markdown]
# One test image is 0.28 points, so the accuracies alone would prove little. [What was shown](../docs/results/evidence.md) has
# seven schedules with five seeds each, and Fashion-MNIST, where a larger learning rate and momentum from the start cost accuracy.
#
# `report.page` is a page to open in a browser, with figures that answer to the pointer.
# The same on a config of your own: `bigbatch compare --config=FILE.py --workdir=DIR`.
