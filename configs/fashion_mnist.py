"""Fashion-MNIST at the size of two CPU cores: the paper's figures 1 to 5 on real images.

    bigbatch data prepare fashion_mnist
    bigbatch compare --config=configs/fashion_mnist.py --seeds=3 --workdir=runs/fashion_mnist

The first 6,000 training images, all 10,000 test images, Wide ResNet 10-1 whose maps are 14, 7 and 4
pixels wide, 20 epochs. The noise scale falls by 5 at epochs 6, 12 and 16, as in the paper at 30,
60 and 80 %. The learning rate is half of the paper's: at 0.1 `decay` does no better, and five times
that is too much for so small a network. The paper's own network at its own length is
`configs/fashion_mnist_wrn16_4.py`.

| experiment | updates |
| --- | --- |
| decay | 3,750 |
| hybrid | 1,650 |
| increase | 1,425 |
| increase_lr | 357 |
| increase_momentum | 320 |
| large | 188 |
| unscaled | 357 |
| uncapped | 1,386 |
| excessive | 244 |

Without a suffix the optimizer is SGD with momentum 0.9; `-nesterov`, `-sgd` and `-adam` are the
others. `large` is the control of each: the largest batch from the start, at the learning rate of
`decay`. `unscaled` has the batches of `increase_lr`, likewise without its learning rate. Two are
expected to fail, and `bigbatch plan` warns of both: `uncapped` grows to two thirds of the training
set, `excessive` starts at ten times the effective learning rate lr / (1 - m). All 21 experiments of
three seeds take about 1.5 hours on one CPU core.

`adaptive` has no schedule: it grows the batch as the measured gradient noise asks for. To compare
it with the schedules at its own ghost batch:

    bigbatch compare --config=configs/fashion_mnist.py --workdir=runs/adaptive --seeds=5
    --experiments=increase,adaptive,large --config.ghost_batch_examples=16
"""

from ml_collections import ConfigDict

_GROW = {"name": "grow_batch", "max_batch_size": 640}
_SCHEDULES = {
    "decay": [],
    "hybrid": [{"name": "grow_batch", "max_batch_size": 160, "until_epoch": 12}],
    "increase": [_GROW],
    "large": [{"name": "batch_stages", "batch_size": "0:640"}],
}
_LARGER_RATES = {
    "increase_lr": [{"name": "scale", "factor": 5}, _GROW],
    "increase_momentum": [
        {"name": "scale", "factor": 3},
        {"name": "raise_momentum", "momentum": 0.95},
        _GROW,
    ],
    "unscaled": [{"name": "batch_stages", "batch_size": "0:160 6_epochs:640"}],
    "uncapped": [{"name": "grow_batch"}],
    "excessive": [
        {"name": "scale", "factor": 5},
        {"name": "raise_momentum", "momentum": 0.95},
        _GROW,
    ],
}
# The learning rate at batch size 32, and the momentum. Plain SGD has the noise scale of the others.
_OPTIMIZERS = {"nesterov": (0.05, 0.9), "sgd": (0.5, 0.0), "adam": (1e-3, 0.0)}
_DEFAULT = {"momentum": (0.05, 0.9)}
# What `bigbatch compare` runs unless it is told.
COMPARED = (
    *_SCHEDULES,
    *_LARGER_RATES,
    *(f"{schedule}-{optimizer}" for optimizer in _OPTIMIZERS for schedule in _SCHEDULES),
)
EXPERIMENTS = (*COMPARED, "adaptive")


def get_config(experiment: str) -> ConfigDict:
    if experiment == "adaptive":
        return _adaptive()
    schedule, _, optimizer = experiment.partition("-")
    optimizer = optimizer or "momentum"
    learning_rate, momentum = (_DEFAULT | _OPTIMIZERS)[optimizer]
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 20,
            "ghost_batch_examples": 32,
            "data": {
                "name": "fashion_mnist",
                "train_examples": 6_000,
                "flip": True,
                "pad_pixels": 2,
            },
            "model": {"name": "wide_resnet", "depth": 10, "width": 1, "strides": (2, 2, 2)},
            "optimizer": {"name": optimizer, "weight_decay": 5e-4},
            "policy": {
                "name": "step_decay",
                "learning_rate": learning_rate,
                "batch_size": 32,
                "momentum": momentum,
                "boundaries_epochs": (6, 12, 16),
                "factor": 0.2,
            },
            "transformations": (_SCHEDULES | _LARGER_RATES)[schedule],
            "microbatch_examples_per_device": 32,
            "evaluation_batch_examples": 1_000,
            "log_every_examples": 1_000,
            "evaluate_every_epochs": 4,
            "checkpoint_every_epochs": 10,
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
        "max_batch_size": _GROW["max_batch_size"],
    }
    return config
