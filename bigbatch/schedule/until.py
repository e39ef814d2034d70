"""Where a start of a run is to end before the run does: after a stage, or at a time in any unit."""

import re

from bigbatch.checks import Checks
from bigbatch.schedule.durations import NO_TOKENS, QUANTITY, TIME_UNITS, quantity
from bigbatch.schedule.intervals import Every
from bigbatch.schedule.plan import Plan

_TIME = re.compile(rf"{QUANTITY}_({'|'.join(TIME_UNITS)})")
_LONGEST = 32


def until(
    given: str | int, plan: Plan, tokens_per_example: int | None = None, decides: bool = False
) -> Every:
    """The time at which a start ends: with the first update that completes it.

    Args:
      given: the number of a stage of the plan, from 1; or a time such as "30_epochs",
        "2M_examples", "500_updates" or "4B_tokens".
      plan: of the run.
      tokens_per_example: which a time in tokens needs.
      decides: whether the run decides its stages while it goes on: then they have no numbers.

    Raises:
      UserError: it is none of them.

    >>> from bigbatch.schedule.plan import make_plan
    >>> from bigbatch.schedule.policy import constant
    >>> plan = make_plan(constant(0.1, 10), train_examples=1_000, epochs=1)
    >>> until(1, plan), until("0.5_epochs", plan)
    (Every(value=100, unit='updates'), Every(value=Fraction(1, 2), unit='epochs'))
    """
    text, stages, checks = str(given), () if decides else plan.stages, Checks()
    match = _TIME.fullmatch(text) if len(text) < _LONGEST else None
    times = "a time such as 30_epochs, 2M_examples, 500_updates or 4B_tokens"
    if match is None:
        number = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None
        allowed = f"a stage of the plan, 1 to {len(stages):,}, or {times}"
        if decides:
            allowed = f"{times}: this run decides its stages while it goes on"
        nearest = min(max(number, 1), len(stages)) if stages and number is not None else None
        checks.require(number is not None and number == nearest, "until", given, allowed, nearest)
        checks.done()
        stage = stages[int(text) - 1]
        return Every(stage.first_update + stage.num_updates, "updates")
    *parts, unit = match.groups()
    value = quantity(*parts)
    checks.require(value > 0, "until", given, f"above 0, {times}")
    if unit == "tokens":
        checks.require(bool(tokens_per_example), "until", given, NO_TOKENS)
        value, unit = value / (tokens_per_example or 1), "examples"
    checks.done()
    return Every(value, unit)
