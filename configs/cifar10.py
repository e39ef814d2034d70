"""CIFAR-10, Wide ResNet 16-4: the paper's figures 1 to 5.

    bigbatch train --config=configs/cifar10.py:increase_lr --workdir=runs/increase_lr
    bigbatch compare --config=configs/cifar10.py --experiments=decay,increase --workdir=runs/fig5

200 epochs of 50,000 images, the noise scale divided by 5 at epochs 60, 120 and 160. Meant for one
accelerator: the base batch is a single ghost batch, which only the later stages outgrow. The data
is read where tensorflow-datasets has prepared it (`cifar10`). Nothing of this file has been run
here; the updates are computed from the plan.

| experiment | updates | the paper's result | how sure |
| --- | --- | --- | --- |
| decay | 78,125 | 94.3 % (fig 5) | read |
| hybrid | 34,376 | the training curve of decay (figs 1 to 4) | read |
| increase | 29,142 | 94.4 % in about 29,000 updates (fig 5, B_max 5,120) | read |
| increase_uncapped | 28,876 | the training curve of decay (figs 1 to 4) | read |
| increase_lr | 6,407 | 94.5 % in under 6,500 updates (fig 5) | read |
| increase_momentum | 2,305 | 93.3 % in under 2,500 updates (fig 5) | read |

These names are SGD with momentum. SCHEDULE-nesterov, SCHEDULE-sgd and SCHEDULE-adam have the same
batch sizes and updates: the paper's figures 1 to 4 show decay, hybrid and increase_uncapped
coincide for each (read); the others were not in the paper. increase_momentum needs a momentum to
raise, and is left out for plain SGD and Adam.

- Read, in the abstract or in a text about the paper: learning rate 0.1 with momentum 0.9; momentum
  0.9 for Nesterov; learning rate 1e-3 for Adam.
- Computed: the noise scale's drops by 5 and their epochs, from the paper's numbers of updates.
- Believed: ghost batch 128, weight decay 5e-4, flips, and crops from 4 pixels of padding.
- Chosen by us, as the paper's values are not known here: Nesterov's learning rate, 0.1; plain
  SGD's, 1.0 = 0.1/(1 - 0.9), the same noise scale; Adam's weight decay, that of the others, added
  to the gradient.

Adam's noise scale has m = 0, as b1 is an average. Its learning rate follows the batch size by the
linear rule, which is the paper's.
"""

from ml_collections import ConfigDict

_SCHEDULES = {
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
# The learning rate at batch size 128, and the momentum.
_OPTIMIZERS = {"nesterov": (0.1, 0.9), "sgd": (1.0, 0.0), "adam": (1e-3, 0.0)}
_DEFAULT = {"momentum": (0.1, 0.9)}
EXPERIMENTS = (
    *_SCHEDULES,
    *(
        f"{schedule}-{optimizer}"
        for optimizer, (_, momentum) in _OPTIMIZERS.items()
        for schedule in _SCHEDULES
        if momentum or schedule != "increase_momentum"
    ),
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
            "data": {"name": "cifar10", "flip": True, "pad_pixels": 4},
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
            "transformations": _SCHEDULES[schedule],
            "microbatch_examples_per_device": 640,
            "evaluation_batch_examples": 1000,
            "log_every_examples": 50_000,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 5,
        }
    )
