"""The whole training loop against its bare compiled functions; see tests/benchmarks/trainer.py."""

from collections.abc import Iterator
from typing import Any

from tests.benchmarks import trainer

_WRN = {"ghost_batch_examples": 128, "model.dtype": "bfloat16"}


def _work(size: int, updates: int, rounds: int, **more: Any) -> tuple[Any, ...]:
    sizes = {"microbatch_examples_per_device": size, "policy.batch_size": size}
    return "configs/cifar10.py:decay", {**_WRN, **sizes, **more}, 1, updates, rounds


WORKS = {
    "wrn16-4, batch 1,024, bfloat16": _work(1024, 60, 5),
    "the same, data.on_device": _work(1024, 60, 5, **{"data.on_device": True}),
    "digits, batch 32": ("configs/digits.py:decay", {}, 1, 1350, 5),
}
_TOY = "configs/digits.py:decay", {"data.on_device": True}, 1, 5, 1
TOY = {"digits, batch 32, data.on_device": _TOY, "the same again": _TOY}


def rows(toy: bool, _: str) -> Iterator[dict[str, Any]]:
    """A row for each work."""
    if toy:
        trainer.HOST_UPDATES = 120
    for name, work in (TOY if toy else WORKS).items():
        trainer.WORKS[name] = work
        yield dict(zip(trainer.COLUMNS, trainer.row(name, trainer.measure(name)), strict=True))
