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
# # A language model with a growing batch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/the--maintainers/bigbatch/blob/main/notebooks/language_model.ipynb)
#
# A small transformer learns the bytes of the King James Bible, with AdamW:
#
# - `cosine` lowers the learning rate. Its batch size is 4 sequences of 128 bytes.
# - `seesaw` doubles the batch size instead, and divides the rate by the root of 2 where the cosine has halved.
# - `late` keeps the small batch for two thirds of the run, and then takes 64 sequences.
# - `large` is a control. It has 64 sequences from the start, at the learning rate of `cosine`.
#
# One seed each takes a few minutes on a CPU.

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

from bigbatch.commands.compare import compare
from bigbatch.config.file import load_config

# %% tags=["parameters"]
EXPERIMENTS = ["cosine", "seesaw", "late", "large"]
OVERRIDES = []  # of the config's fields, such as ("tokens", "300_000")

# %% [markdown]
# ## The plans
#
# Every update is known before anything runs: its batch size, its learning rate, and the tokens behind it.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for name in EXPERIMENTS:
    plan = load_config(f"language:{name}", OVERRIDES).plan
    tokens = plan.first_examples * plan.tokens_per_example
    axes[0].step(tokens, plan.batch_sizes, where="post", label=name)
    axes[1].plot(tokens, plan.hypers["learning_rate"])
    print(f"{name}: {plan.num_updates:,} updates")
axes[0].set(xlabel="tokens", ylabel="batch size, sequences", yscale="log")
axes[1].set(xlabel="tokens", ylabel="learning rate")
axes[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Train
#
# The config `language` comes with the package, and so does the text. The runs and the report go into a new directory.

# %%
directory = Path(tempfile.mkdtemp())
(report,) = compare(
    "language", directory, experiments=EXPERIMENTS, seeds=1, overrides=OVERRIDES
)

# %% [markdown]
# ## The training loss
#
# Left by epochs, right by updates.

# %%
figure = plt.figure(figsize=(9, 4.68))
panel = figure.add_axes((0, 0, 1, 1))
panel.imshow(plt.imread(report.figures[0]))
panel.axis("off")
plt.show()

# %% [markdown]
# ## What it cost
#
# Perplexity is that of a byte, on text that was not trained on.

# %%
for experiment in report.summary.experiments:
    print(
        f"{experiment.name}: {experiment.updates.mean:,.0f} updates, "
        f"test perplexity {experiment.metrics[0].mean:.3f}"
    )

# %% [markdown]
# One seed shows little: with AdamW seeds differ by 2.6 %. Three seeds of these and more are in `notebooks/results/language`.
# There no growing batch was shown to equal `cosine`. `seesaw` cost 2.2 ± 5.6 % of the perplexity and `late` 5.4 ± 5.7 %; `large` doubled it.
# The critical batch size was measured too: 12 to 46 sequences. All of these but `cosine` go past it.
#
# The same on your own text: `bigbatch data prepare tokens --from FILES --directory=DIR`, and `"data": {"name": "tokens", "directory": DIR, ...}` in a
# config of your own.
