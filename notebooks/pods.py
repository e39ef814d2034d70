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
# # What a growing batch buys on a pod
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/the--maintainers/bigbatch/blob/main/notebooks/pods.ipynb)
#
# The paper trains Inception-ResNet-V2 on ImageNet. How long would it take on 1 to 2,048 devices?
# Nothing is trained here, and no device is looked for. A time model answers, from speeds that you give it.
#
# **The speeds below are assumed.** `bigbatch bench` measures those of your device.

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
import matplotlib.pyplot as plt
import numpy as np

from bigbatch.commands import plan as plan_table
from bigbatch.commands import plan_time
from bigbatch.config.file import load_config
from bigbatch.layout.time_model import Speeds

SPEEDS = Speeds(
    examples_per_s=400.0,  # of one device
    update_s=0.003,  # a fixed cost of each update
    allreduce_gbps=400.0,  # 1e9 bits a second, from one device to the next
)

# %% [markdown]
# ## The plans
#
# The recipe has 8,192 examples in every update and momentum 0.9. It divides the learning rate by 10 at epochs 30, 60 and 80.
# Three plans grow the batch to 65,536 instead. The higher their momentum, the larger the batch that they begin with.

# %%
plans = {
    experiment: load_config(f"imagenet_inception_resnet_v2:{experiment}")
    for experiment in ("momentum_0.9", "momentum_0.95", "momentum_0.975")
}
for config in plans.values():
    print(plan_table.text(config, devices=128).split("\n\n")[1], "\n")

# %% [markdown]
# ## The time
#
# An update takes its microbatches, one all-reduce of the gradients, and the fixed cost. A microbatch takes its examples divided by the speed.
# Latency, input, evaluation and compilation are not in it.

# %%
found = {
    experiment: plan_time.times(config, 1024, SPEEDS)
    for experiment, config in plans.items()
}
ways = {"recipe": found["momentum_0.9"].original}
ways |= {experiment: times.growing for experiment, times in found.items()}
hours = {
    way: {row.devices: row.seconds / 3600 for row in rows}
    for way, rows in ways.items()
}

print("hours on" + "".join(f"{way:>16}" for way in hours))
for devices in hours["recipe"]:
    print(
        f"{devices:>8,}" + "".join(f"{hours[way][devices]:>16.3f}" for way in hours)
    )

# %% [markdown]
# ## Where more devices stop helping
#
# A device gets whole ghost batches of 64 examples. The recipe's 8,192 examples are 128 of them, so past 128 devices the others idle.
# Left: the recipe's line is flat from there on, and the growing plans go on falling.
# Right: what the time costs. A point is a number of devices; lower and further left is better.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
for way in ways:
    devices = np.array([number for number in hours[way] if number >= 16])
    taken = np.array([hours[way][number] for number in devices])
    style = "k--" if way == "recipe" else "o-"
    left.loglog(devices, taken, style, label=way, markersize=4)
    right.loglog(taken, taken * devices, style, markersize=4)
left.set(title="Hours", xlabel="devices")
left.set_xticks([16, 128, 1024], ["16", "128", "1,024"])
right.set(title="Device-hours", xlabel="hours")
for axis in (left.yaxis, right.xaxis, right.yaxis):
    axis.set_major_formatter("{x:g}")
left.legend(frameon=False)
plt.show()

# %%
least = hours["recipe"][128]
print(f"recipe on 128 devices: {least:.3f} hours, {128 * least:.0f} device-hours")
for way in plans:
    for devices in (128, 1024):
        faster = least / hours[way][devices]
        print(
            f"{way} on {devices:,} devices: {faster:.2f} times as fast,"
            f" {devices / 128 / faster:.2f} times the device-hours"
        )

# %% [markdown]
# With the recipe's 128 devices the growing batch gains 4 to 6 %. It pays with more devices: on 1,024, momentum 0.975 is
# six times as fast for a third more device-hours. The recipe gains nothing from them.
#
# This is arithmetic on assumed speeds. The all-reduce on 1,024 devices and the input of 400,000 images a second are the least sure.
# The paper reports 77.8 and 78.7 % for the recipe, and about 77 % for momentum 0.975. Neither was trained here.
#
# Your own: `bigbatch plan --config=FILE --devices=N --bench=bench.json --allreduce-gbps=G`. On real pods: [GPUs and pods](../docs/pods.md).
