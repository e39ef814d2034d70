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
# # Plan a batch of 65,536 on ImageNet, and its time on pods
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github)
# (give it the address of this repository, and choose `notebooks/pods.ipynb`)
#
# No device, no data, nothing trained: the arithmetic of the paper's ImageNet runs, and what they would take on hardware
# whose speeds you give. **The speeds below are made up.** Measure yours with `bigbatch bench`.

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

from bigbatch.commands import plan as plan_table
from bigbatch.commands import plan_time as time_table
from bigbatch.config.file import load_config
from bigbatch.layout.time_model import Speeds, most_worthwhile

CONFIG = "imagenet_inception_resnet_v2"

# %% [markdown]
# ## The plan
#
# 8,192 examples an update for 30 epochs, then 65,536.

# %%
config = load_config(f"{CONFIG}:momentum_0.9", [])
print(plan_table.text(config, devices=256))

# %% [markdown]
# ## The time
#
# Microbatches x (a fixed cost + examples / speed) + all-reduce + a fixed cost of the update. Latency, input and
# evaluation are not in it.

# %%
speeds = Speeds(
    examples_per_s=400.0,  # of one device
    update_s=0.003,
    allreduce_gbps=400.0,  # 1e9 bits a second, from one device to the next
    cost_per_device_hour=3.0,
)
times = time_table.times(config, 256, speeds)
print(time_table.text(times, speeds))

# %% [markdown]
# ## Where more devices stop helping
#
# A batch of 8,192 is 128 ghost batches of 64: past 128 devices the original recipe leaves devices idle. The growing one has work for 1,024 in its 60 epochs of 65,536, and in its first 30 epochs it leaves them idle too; a higher momentum, below, shortens those.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, rows in (("original", times.original), ("growing", times.growing)):
    devices = [row.devices for row in rows]
    axes[0].loglog(devices, [row.seconds / 3600 for row in rows], "o-", label=name)
    axes[1].loglog(devices, [row.device_hours for row in rows], "o-", label=name)
    print(f"{name}: up to {most_worthwhile(rows):,} devices are worth it")
axes[0].set(title="hours", xlabel="devices")
axes[1].set(title="device-hours", xlabel="devices")
axes[0].legend(frameon=False)
# %% [markdown]
# ## Three momenta
#
# The paper's figure 7: a higher momentum allows a larger batch from the start.

# %%
for experiment in ("momentum_0.9", "momentum_0.95", "momentum_0.975"):
    config = load_config(f"{CONFIG}:{experiment}", [])
    hours = [
        time_table.times(config, devices, speeds).seconds / 3600 for devices in (64, 256, 1024)
    ]
    print(
        f"{experiment}: {config.plan.num_updates:,} updates; on 64, 256 and 1,024 devices "
        + ", ".join(f"{h:.2f}" for h in hours)
        + " hours"
    )
