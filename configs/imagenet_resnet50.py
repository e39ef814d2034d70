"""ImageNet, ResNet-50: Goyal et al. 2017, the paper's growing batch, and MLPerf's LARS recipe.

    bigbatch train --config=configs/imagenet_resnet50.py:increase --workdir=runs/resnet50

90 epochs of 1,281,167 images, read from the files that `bigbatch data prepare imagenet2012` or
tensorflow-datasets itself wrote (--config.data.directory=DIR). Meant for a TPU slice or a cluster
of 64 or more accelerators, and mlperf_lars for a whole TPU pod. On the real images nothing of this
file has been run here; the updates are computed from the plan.

| experiment | updates | the result of its authors | how sure |
| --- | --- | --- | --- |
| decay | 14,076 | 76.3 % (Goyal et al. 2017) | read |
| increase | 9,384 | 76.1 % in under 30 minutes on a TPU pod (the paper) | read |
| mlperf_lars | 1,760 | 0.47 minutes on 4,096 TPU v3 (MLPerf v0.7) | read; accuracy not known here |

- decay: batch size 8,192, ghost batch 32, learning rate 3.2 after a linear warm-up of 5 epochs,
  divided by 10 at epochs 30, 60 and 80 (read). Weight decay 1e-4, not on batch norm (believed);
  here it is on kernels, so not on the classifier's bias either. The warm-up starts at the learning
  rate of batch size 256, 0.1 (believed).
- increase: 8,192 examples for 30 epochs, then 16,384 (read). That the learning rate takes the rest
  of each drop by 10, and that all else is as in decay, is believed.
- mlperf_lars: batch size 65,536, learning rate 23.08, momentum 0.954, 33 epochs of warm-up, then
  polynomial decay of power 2, weight decay 1e-4, batch-norm groups of 64, 88 to 92 epochs (read).
  Label smoothing 0.1 and the trust coefficient 0.001 are believed; a warm-up from 0, the decay to
  0 and 90 epochs are chosen by us. On 1,024 devices or fewer whole ghost batches lie on one. On
  4,096 chips with 16 examples each, 4 share one (microbatch_examples_per_device=16), as 8 cores
  with 8 each did in MLPerf's own run (read in its log: `model_bn_span` 64 on 8,192 cores); with
  ghost_batch_examples=16 no microbatch waits for another chip, and the recipe is another one.

Images have 224x224 pixels: a random window of 8 to 100 % of the area, mirrored or not; for
evaluation the middle after resizing to 256.
"""

from ml_collections import ConfigDict

_GOYAL = {
    "ghost_batch_examples": 32,
    "optimizer": {"name": "momentum", "weight_decay": 1e-4, "decayed": "kernels"},
    "policy": {
        "name": "step_decay",
        "learning_rate": 3.2,
        "batch_size": 8192,
        "momentum": 0.9,
        "boundaries_epochs": (30, 60, 80),
        "factor": 0.1,
    },
    "transformations": [{"name": "warmup", "warmup_epochs": 5, "initial_learning_rate": 0.1}],
}
_GROW = {"name": "grow_batch", "max_batch_size": 16_384}
_LARS = {
    "ghost_batch_examples": 64,
    "label_smoothing": 0.1,
    "optimizer": {"name": "lars", "weight_decay": 1e-4, "trust_coefficient": 0.001},
    "policy": {
        "name": "polynomial",
        "learning_rate": 23.08,
        "batch_size": 65_536,
        "momentum": 0.954,
        "power": 2,
        "from_epoch": 33,
    },
    "transformations": [{"name": "warmup", "warmup_epochs": 33}],
}
_EXPERIMENTS = {
    "decay": _GOYAL,
    "increase": _GOYAL | {"transformations": [*_GOYAL["transformations"], _GROW]},
    "mlperf_lars": _LARS,
}
EXPERIMENTS = tuple(_EXPERIMENTS)


def get_config(experiment: str) -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 90,
            "data": {"name": "imagenet2012", "flip": True},
            "model": {"name": "resnet", "depth": 50},
            **_EXPERIMENTS[experiment],
            "microbatch_examples_per_device": 128,
            "evaluation_batch_examples": 2000,
            "log_every_epochs": 0.1,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 1,
        }
    )
