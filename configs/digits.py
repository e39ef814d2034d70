"""Handwritten digits: the paper's schedules in seconds.

    bigbatch compare --config=configs/digits.py --workdir=runs/digits

1,437 training images of 8x8 pixels, Wide ResNet 10-1. The noise scale falls by 5 at epochs 9, 18
and 24 of 30, as in the paper at 30, 60 and 80 %. `adaptive` has no schedule: it grows the batch as
the measured gradient noise asks for. To compare it with the schedules at its own ghost batch:

    bigbatch compare --config=configs/digits.py --workdir=runs/adaptive
    --experiments=increase,adaptive,large --config.ghost_batch_examples=16
"""

from ml_collections import ConfigDict

_TRANSFORMATIONS = {
    "decay": [],
    "hybrid": [{"name": "grow_batch", "max_batch_size": 160, "until_epoch": 18}],
    "increase": [{"name": "grow_batch", "max_batch_size": 320}],
    "increase_lr": [
        {"name": "scale", "factor": 5},
        {"name": "grow_batch", "max_batch_size": 320},
    ],
    "increase_momentum": [
        {"name": "scale", "factor": 2},
        {"name": "raise_momentum", "momentum": 0.95},
        {"name": "grow_batch", "max_batch_size": 320},
    ],
}
_CONTROLS = {
    "large": [{"name": "batch_stages", "batch_size": "0:320"}],
    "unscaled": [{"name": "batch_stages", "batch_size": "0:160 9_epochs:320"}],
}
_TRANSFORMATIONS |= _CONTROLS
# What `bigbatch compare` runs unless it is told.
COMPARED = tuple(_TRANSFORMATIONS)
EXPERIMENTS = (*COMPARED, "adaptive")


def get_config(experiment: str) -> ConfigDict:
    if experiment == "adaptive":
        return _adaptive()
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 30,
            "ghost_batch_examples": 32,
            "data": {"name": "digits"},
            "model": {"name": "wide_resnet", "depth": 10, "width": 1, "strides": (1, 2, 1)},
            "optimizer": {"name": "momentum", "weight_decay": 5e-4},
            "policy": {
                "name": "step_decay",
                "learning_rate": 0.1,
                "batch_size": 32,
                "momentum": 0.9,
                "boundaries_epochs": (9, 18, 24),
                "factor": 0.2,
            },
            "transformations": _TRANSFORMATIONS[experiment],
            "microbatch_examples_per_device": 160,
            "evaluation_batch_examples": 360,
            "log_every_updates": 1,
            "evaluate_every_epochs": 1,
            # A run takes seconds: it is saved at its end, and where it is told to stop.
            "checkpoint_every_epochs": 30,
        }
    )


def _adaptive() -> ConfigDict:
    """The base batch and learning rate of `decay`, and no schedule.

    Two small batches must fit into the base batch, so the ghost batch is half as large here.
    """
    config = get_config("decay")
    config.ghost_batch_examples = config.noise_small_batch_examples = 16
    # A microbatch that is one small batch is measured without a loop, which is slow on CPU.
    config.microbatch_examples_per_device = 16
    base = config.policy
    config.policy = {
        "name": "adaptive",
        "learning_rate": base.learning_rate,
        "batch_size": base.batch_size,
        "momentum": base.momentum,
        "max_batch_size": 320,
    }
    return config
