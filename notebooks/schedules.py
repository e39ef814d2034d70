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
# # Turn your own recipe into a growing-batch one
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
# (give it the address of this repository, and choose `notebooks/schedules.ipynb`)
#
# You have a learning-rate schedule and a batch size. The same training, at the same gradient noise, in fewer updates:
# where the schedule lowers the learning rate, raise the batch size instead.

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
import matplotlib.pyplot as plt
import optax

import bigbatch as bb
from bigbatch.schedule.diagnostics import diagnose

# %% [markdown]
# ## The recipe that you have
#
# Any schedule of Optax, a function of the update count, with the batch size that it was written for. Time becomes
# epochs: an update of 128 examples is 128 / 50,000 of one.

# %%
TRAIN_EXAMPLES, EPOCHS, BATCH_SIZE = 50_000, 200, 128
schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=1_000, decay_steps=78_125)
source = bb.from_optax(
    schedule, BATCH_SIZE, momentum=0.9, train_examples=TRAIN_EXAMPLES, epochs=EPOCHS
)

# %% [markdown]
# ## The recipe that you want
#
# `grow_batch` turns the decay into growth up to a largest batch size; the learning rate takes what the batch cannot.
# `scale` raises learning rate and batch size together, `raise_momentum` the momentum and the batch size.

# %%
RECIPES = {
    "decay": source,
    "growing": bb.grow_batch(source, max_batch_size=5_120),
    "growing, lr times 5": bb.grow_batch(bb.scale(source, 5), max_batch_size=5_120),
    "growing, momentum 0.95": bb.grow_batch(bb.raise_momentum(source, 0.95), max_batch_size=5_120),
}
plans = {
    name: bb.make_plan(
        recipe, train_examples=TRAIN_EXAMPLES, epochs=EPOCHS, batch_multiple_examples=128
    )
    for name, recipe in RECIPES.items()
}
for name, plan in plans.items():
    fewer = plans["decay"].num_updates / plan.num_updates
    print(f"{name}: {plan.num_updates:,} updates, {fewer:.2f} times fewer")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
for name, plan in plans.items():
    epochs = plan.first_examples / TRAIN_EXAMPLES
    axes[0].plot(epochs, plan.batch_sizes, label=name)
    axes[1].plot(epochs, plan.hypers["learning_rate"])
    axes[2].plot(epochs, plan.noise_scales)
for panel, title in zip(axes, ("batch size", "learning rate", "noise scale"), strict=True):
    panel.set(title=title, xlabel="epochs", yscale="log")
axes[0].legend(frameon=False)
# %% [markdown]
# The noise scales are one curve, and that is the point: what differs is how many updates it takes to follow it.
#
# ## What to be warned of

# %%
for name, plan in plans.items():
    print(name)
    for found in diagnose(plan, plans["decay"]):
        print("   ", found.warning or found.text)

# %% [markdown]
# ## Use it
#
# A plan is an Optax schedule, and a table of what each update is given.

# %%
plan = plans["growing, lr times 5"]
optimizer = optax.inject_hyperparams(optax.sgd)(plan.learning_rate, plan.momentum)
for stage in plan.stages[:: max(1, len(plan.stages) // 5)]:
    print(
        f"update {stage.first_update:>6,}: {stage.batch_size:>5,} examples, {stage.learning_rate:.4f}"
    )
