"""Training with batch sizes that grow.

>>> import bigbatch as bb
>>> recipe = bb.step_decay(0.1, 128, 0.9, boundaries_epochs=[60, 120, 160], factor=0.2)
>>> growing = bb.grow_batch(recipe, max_batch_size=5120)
>>> plan = bb.make_plan(growing, train_examples=50_000, epochs=200)
>>> plan.num_updates
29142

The public names are those of `__init__.pyi`. Each is imported when it is first asked for, so that
the arithmetic needs no JAX.
"""

import pkgutil
from typing import Any

_STUB = pkgutil.get_data(__name__, "__init__.pyi") or b""
_LINES = [line.split() for line in _STUB.decode().splitlines()]
# from MODULE import NAME as NAME, or without the last two words where it gets another name here:
_MODULES = {words[3]: words[1] for words in _LINES if words[:1] == ["from"]}
# NAME = OTHER
_OTHERS = {words[0]: words[2] for words in _LINES if words[1:2] == ["="]}

__all__ = ["__version__", *(words[5] for words in _LINES if words[4:5] == ["as"]), *_OTHERS]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    attribute = _OTHERS.get(name, name)
    if _MODULES[attribute] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(_MODULES[attribute]), attribute)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
