"""CIFAR-10, Wide ResNet 16-4: the paper's figures 1 to 5.

    bigbatch train --config=configs/cifar10.py:increase_lr --workdir=DIR

200 epochs of 50,000 images, ghost batches of 128, the noise scale divided by 5 at epochs 60, 120
and 160. The data is read where tensorflow-datasets has prepared it (`cifar10`).
"""

from ml_collections import ConfigDict

_TRANSFORMATIONS = {
    "decay": [],
    "hybrid": [{"name": "grow_batch", "max_batch_size": 640, "until_epoch": 120}],
    "increase": [{"name": "grow_batch", "max_batch_size": 5120}],
    "increase_uncapped": [{"name": "grow_batch"}],
    "increase_lr": [
        {"name": "scale", "factor": 5},
        {"name": "grow_batch", "max_batch_size": 5120},
    ],
    "increase_momentum": [
        {"name": "scale", "factor": 5},
        {"name": "raise_momentum", "momentum": 0.98},
        {"name": "grow_batch", "max_batch_size": 5120},
    ],
}
EXPERIMENTS = tuple(_TRANSFORMATIONS)


def get_config(experiment: str) -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 200,
            "ghost_batch_examples": 128,
            "data": {"name": "cifar10", "flip": True, "pad_pixels": 4},
            "model": {"name": "wide_resnet", "depth": 16, "width": 4},
            "optimizer": {"name": "momentum", "weight_decay": 5e-4},
            "policy": {
                "name": "step_decay",
                "learning_rate": 0.1,
                "batch_size": 128,
                "momentum": 0.9,
                "boundaries_epochs": (60, 120, 160),
                "factor": 0.2,
            },
            "transformations": _TRANSFORMATIONS[experiment],
            "microbatch_examples_per_device": 640,
            "evaluation_batch_examples": 1000,
            "log_every_examples": 50_000,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 5,
        }
    )
