"""ImageNet, Inception-ResNet-V2: the paper's figures 6 and 7.

    bigbatch train --config=configs/imagenet_inception_resnet_v2.py:momentum_0.9 --workdir=runs/0.9

90 epochs of 1,281,167 images, the noise scale divided by 10 at epochs 30, 60 and 80. Meant for a
TPU slice or a cluster of 64 or more accelerators. On the real images nothing of this file has been
run here; the updates are computed from the plan.

| experiment | updates | the paper's result | how sure |
| --- | --- | --- | --- |
| decay | 14,076 | 78.7 and 77.8 % in about 14,000 updates (fig 6) | read |
| increase | 5,631 | 78.1 and 76.8 % in under 6,000 updates (fig 6) | read |
| momentum_0.9 | 5,865 | 78.8 % in under 6,000 updates (fig 7) | read; the % believed |
| momentum_0.95 | 3,519 | 78.1, 77.8 % in under 3,500 updates (fig 7) | read; the % believed |
| momentum_0.975 | 2,346 | about 77 % in under 2,500 updates (fig 7) | read; 77.5, 76.8 % believed |

`increase` turns only the first drop into growth, 8,192 -> 81,920 examples; the later ones are the
learning rate's. The three others grow to 65,536 and start at 8,192, 16,384 and 32,768. Momentum
0.95 makes 3,519 updates where the paper says under 3,500: the exact batch sizes or lengths of the
stages are not known here.

- Read, in the abstract or in a text about the paper: the momenta, ghost batch 32 in figure 6 and 64
  in figure 7, batch size 8,192, B_max 65,536.
- Believed: learning rate 3.0 without warm-up, growth to 81,920 in figure 6, images of 299x299
  pixels. The 90 epochs, the drops and their epochs too; the numbers of updates computed from them
  fit the paper's.
- Chosen by us, as the paper's values are not known here: weight decay 4e-5 on kernels and label
  smoothing 0.1, believed to be usual for this network; the usual random window and mirroring.
"""

from ml_collections import ConfigDict

# Ghost batch, transformations.
_GROW = {"name": "grow_batch", "max_batch_size": 65_536}
_EXPERIMENTS = {
    "decay": (32, []),
    "increase": (32, [{"name": "grow_batch", "max_batch_size": 81_920, "until_epoch": 60}]),
    "momentum_0.9": (64, [_GROW]),
    "momentum_0.95": (64, [{"name": "raise_momentum", "momentum": 0.95}, _GROW]),
    "momentum_0.975": (64, [{"name": "raise_momentum", "momentum": 0.975}, _GROW]),
}
EXPERIMENTS = tuple(_EXPERIMENTS)


def get_config(experiment: str) -> ConfigDict:
    ghost_batch_examples, transformations = _EXPERIMENTS[experiment]
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 90,
            "ghost_batch_examples": ghost_batch_examples,
            "label_smoothing": 0.1,
            "data": {"name": "imagenet2012", "flip": True, "image_size": 299},
            "model": {"name": "inception_resnet_v2"},
            "optimizer": {"name": "momentum", "weight_decay": 4e-5, "decayed": "kernels"},
            "policy": {
                "name": "step_decay",
                "learning_rate": 3.0,
                "batch_size": 8192,
                "momentum": 0.9,
                "boundaries_epochs": (30, 60, 80),
                "factor": 0.1,
            },
            "transformations": transformations,
            "microbatch_examples_per_device": 64,
            "evaluation_batch_examples": 2000,
            "log_every_epochs": 0.1,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 1,
        }
    )
