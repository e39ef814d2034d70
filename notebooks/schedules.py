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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/the--maintainers/bigbatch/blob/main/notebooks/schedules.ipynb)
#
# You have a learning-rate schedule, and the batch size that it was written for.
# Where the schedule lowers the learning rate, raise the batch size instead.
# The gradient noise stays the same, and there are fewer updates. Nothing is trained here: it is all arithmetic.

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
import textwrap

import matplotlib.pyplot as plt
import optax

import bigbatch as bb
from bigbatch.schedule.diagnostics import diagnose

# %% [markdown]
# ## The recipe that you have
#
# It may be any schedule of Optax, which is a function of the update's number.
# bigbatch counts in epochs: an update of 128 of 50,000 examples is 0.00256 epochs.

# %%
TRAIN_EXAMPLES, EPOCHS, BATCH_SIZE = 50_000, 200, 128
schedule = optax.warmup_cosine_decay_schedule(
    0.0, 0.1, warmup_steps=1_000, decay_steps=78_125
)
source = bb.from_optax(
    schedule, BATCH_SIZE, momentum=0.9, train_examples=TRAIN_EXAMPLES, epochs=EPOCHS
)

# %% [markdown]
# ## The recipe that you want
#
# - `grow_batch` turns the decay into growth, up to a largest batch size. The learning rate does the rest.
# - `scale` multiplies the learning rate and the batch size by one factor.
# - `raise_momentum` raises the momentum, and the batch size with it.

# %%
RECIPES = {
    "decay": source,
    "growing": bb.grow_batch(source, max_batch_size=5_120),
    "growing, lr times 5": bb.grow_batch(bb.scale(source, 5), max_batch_size=5_120),
    "growing, momentum 0.95": bb.grow_batch(
        bb.raise_momentum(source, 0.95), max_batch_size=5_120
    ),
}
plans = {
    name: bb.make_plan(
        recipe,
        train_examples=TRAIN_EXAMPLES,
        epochs=EPOCHS,
        batch_multiple_examples=128,
    )
    for name, recipe in RECIPES.items()
}
for name, plan in plans.items():
    fewer = plans["decay"].num_updates / plan.num_updates
    print(f"{name}: {plan.num_updates:,} updates, {fewer:.2f} times fewer")

# %% [markdown]
# Each line is a plan. The batch sizes differ, and so do the learning rates. The noise scales are one curve, and that is the point:
# what differs is how many updates it takes to follow it.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for (name, plan), width in zip(plans.items(), (6, 4, 2.5, 1), strict=True):
    epochs = plan.first_examples / TRAIN_EXAMPLES
    axes[0].plot(epochs, plan.batch_sizes, label=name, linewidth=width)
    axes[1].plot(epochs, plan.hypers["learning_rate"], linewidth=width)
    axes[2].plot(epochs, plan.noise_scales, linewidth=width)
for panel, title in zip(
    axes, ("Batch size", "Learning rate", "Noise scale"), strict=True
):
    panel.set(title=title, xlabel="epochs", yscale="log")
axes[0].set_yticks([128, 640, 5120], ["128", "640", "5,120"])
axes[0].minorticks_off()
axes[1].set_ylim(1e-4, 1)
axes[2].set_ylim(1e-1, 1e3)
figure.legend(frameon=False, loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# ## What to be warned of
#
# A plan says where its approximations end. Each warning says what to do about it.

# %%
for name, plan in plans.items():
    said = [found.warning for found in diagnose(plan, plans["decay"])]
    print(f"{name}:", "" if any(said) else "no warnings")
    for warning in filter(None, said):
        print(textwrap.indent(textwrap.fill(warning, 76), "    "))

# %% [markdown]
# ## Use it
#
# In a loop of your own, `plan.learning_rate` and `plan.momentum` are schedules of Optax, and `plan.batch_size` says how many
# examples an update takes. [The plan](../docs/plan.md#a-plan-in-your-own-loop) shows the loop.

# %%
plan = plans["growing, lr times 5"]
optimizer = optax.inject_hyperparams(optax.sgd)(plan.learning_rate, plan.momentum)
for stage in plan.stages[:: len(plan.stages) // 5]:
    print(
        f"from update {stage.first_update:>5,}: {stage.batch_size:>5,} examples,"
        f" learning rate {stage.learning_rate:.4f}"
    )
