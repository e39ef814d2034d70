"""Fashion-MNIST at the paper's size: Wide ResNet 16-4, 60,000 images, 200 epochs.

    bigbatch data prepare fashion_mnist
    bigbatch compare --config=configs/fashion_mnist_wrn16_4.py --workdir=runs/fashion_mnist_wrn16_4

The schedules of `configs/cifar10.py` with the same ghost batch, learning rates and drops of the
noise scale, for one accelerator. Not run so far. `large` is a control: the largest batch from the
start, at the learning rate of `decay`. `configs/fashion_mnist.py` is the size of two CPU cores.

| experiment | updates |
| --- | --- |
| decay | 93,750 |
| hybrid | 41,250 |
| increase | 34,969 |
| increase_lr | 7,688 |
| increase_momentum | 2,766 |
| large | 2,344 |

Without a suffix the optimizer is SGD with momentum 0.9; `-nesterov`, `-sgd` and `-adam` are the
others.
"""

from ml_collections import ConfigDict

_GROW = {"name": "grow_batch", "max_batch_size": 5_120}
_SCHEDULES = {
    "decay": [],
    "hybrid": [{"name": "grow_batch", "max_batch_size": 640, "until_epoch": 120}],
    "increase": [_GROW],
}
_LARGER_RATES = {
    "increase_lr": [{"name": "scale", "factor": 5}, _GROW],
    "increase_momentum": [
        {"name": "scale", "factor": 5},
        {"name": "raise_momentum", "momentum": 0.98},
        _GROW,
    ],
    "large": [{"name": "batch_stages", "batch_size": "0:5120"}],
}
# The learning rate at batch size 128, and the momentum. Plain SGD has the others' noise scale.
_OPTIMIZERS = {"nesterov": (0.1, 0.9), "sgd": (1.0, 0.0), "adam": (1e-3, 0.0)}
_DEFAULT = {"momentum": (0.1, 0.9)}
EXPERIMENTS = (
    *_SCHEDULES,
    *_LARGER_RATES,
    *(f"{schedule}-{optimizer}" for optimizer in _OPTIMIZERS for schedule in _SCHEDULES),
)


def get_config(experiment: str) -> ConfigDict:
    schedule, _, optimizer = experiment.partition("-")
    optimizer = optimizer or "momentum"
    learning_rate, momentum = (_DEFAULT | _OPTIMIZERS)[optimizer]
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 200,
            "ghost_batch_examples": 128,
            "data": {"name": "fashion_mnist", "flip": True, "pad_pixels": 4},
            "model": {"name": "wide_resnet", "depth": 16, "width": 4},
            "optimizer": {"name": optimizer, "weight_decay": 5e-4},
            "policy": {
                "name": "step_decay",
                "learning_rate": learning_rate,
                "batch_size": 128,
                "momentum": momentum,
                "boundaries_epochs": (60, 120, 160),
                "factor": 0.2,
            },
            "transformations": (_SCHEDULES | _LARGER_RATES)[schedule],
            "microbatch_examples_per_device": 640,
            "evaluation_batch_examples": 1_000,
            "log_every_examples": 60_000,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 5,
        }
    )
