"""`bigbatch plan --fastest`: what to run where the noise is known, and what that saves.

`verb` reads the flags, `answer` finds the plan, `words` tells it and draws the frontier.
"""

import argparse

from bigbatch.checks import Checks

_FLAGS = (
    ("noise", str, "RUN", "a run that measured its noise, or its metrics.jsonl"),
    ("max_devices", int, "N", "there are so many (default 1)"),
    ("max_batch_size", int, "EXAMPLES", "default: a tenth of the training set, or the config's"),
    ("restart_s", float, "SECONDS", "of a change of the number of devices (default 60)"),
    ("max_hours", float, "HOURS", "minimise the cost within so many"),
    ("max_cost", float, "MONEY", "minimise the hours within it (device-hours without a price)"),
    ("weight", str, "HOURS:MONEY", "minimise this weighted sum (default 1:0)"),
)
# What --fastest would ignore.
_OTHERS = ("devices", "compile_for", "emit", "against", "sequence_length")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Adds the flags that only --fastest reads."""
    group = verb.add_argument_group("the fastest plan of equal progress, from measured noise")
    group.add_argument("--fastest", action="store_true", help="find it; with --noise and speeds")
    for name, kind, metavar, text in _FLAGS:
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def require_alone(options: argparse.Namespace) -> None:
    """Refuses flags that need --fastest without it, and those that it would ignore.

    Raises:
      UserError: there are some.
    """
    names = _OTHERS if options.fastest else [flag[0] for flag in _FLAGS]
    allowed = f"none {'with' if options.fastest else 'without'} --fastest"
    checks = Checks()
    for name in names:
        checks.require(getattr(options, name) is None, name, getattr(options, name), allowed)
    checks.done()
