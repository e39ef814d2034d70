"""`bigbatch plan --fastest`: what to run where the noise is known, and what that saves.

`verb` reads the flags, `answer` finds the plan, `words` tells it and draws the frontier.
"""

import argparse

from bigbatch.checks import Checks

_FLAGS = (
    ("noise", str, "RUN", "a run that measured its noise, or its metrics.jsonl"),
    ("max_devices", int, "N", "there are so many (default 1; --devices=auto too)"),
    ("max_batch_size", int, "EXAMPLES", "default: a tenth of the training set, or the config's"),
    ("restart_s", float, "SECONDS", "of a change of devices (default 60; --devices=auto too)"),
    ("max_hours", float, "HOURS", "minimise the cost within so many"),
    ("max_cost", float, "MONEY", "minimise the hours within it (device-hours without a price)"),
    ("weight", str, "HOURS:MONEY", "minimise this weighted sum (default 1:0)"),
)
_BY_STAGES = (("efficiency", float, "SHARE", "of the devices that pay (default 0.7)"),)
FASTEST, BY_STAGES = "--fastest", "--devices=auto"
# By what is asked for: the flags that only it reads, and those that it would ignore.
_READ = {
    FASTEST: {flag[0] for flag in _FLAGS},
    BY_STAGES: {"efficiency", "max_devices", "restart_s"},
}
_IGNORED = {
    FASTEST: ("devices", "compile_for", "emit", "against", "sequence_length"),
    BY_STAGES: ("plot", "critical", "compile_for", "emit", "against", "sequence_length"),
}


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Adds the flags that only --fastest and --devices=auto read."""
    group = verb.add_argument_group("the fastest plan of equal progress, from measured noise")
    group.add_argument("--fastest", action="store_true", help="find it; with --noise and speeds")
    for name, kind, metavar, text in (*_FLAGS, *_BY_STAGES):
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def asked(options: argparse.Namespace) -> str | None:
    """Which of the two is asked for, if any.

    Raises:
      UserError: there are flags that it would ignore.
    """
    mode = FASTEST if options.fastest else BY_STAGES if options.devices == "auto" else None
    checks, read = Checks(), _READ.get(mode or "", set())
    for name in _IGNORED.get(mode or "", ()):
        given = getattr(options, name)
        checks.require(given is None, name, given, f"none with {mode}")
    for name in sorted(set().union(*_READ.values()) - read):
        given, of = getattr(options, name), [of for of, names in _READ.items() if name in names]
        checks.require(given is None, name, given, f"none without {' or '.join(of)}")
    checks.done()
    return mode
