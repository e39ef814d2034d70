"""A plan's file as a recipe: the plan of another run, planned or adaptive, once more.

A run's plan.json holds its plan; that of an adaptive run what its controller decided.
"""

import numpy as np

from bigbatch.checks import Checks, text_of
from bigbatch.errors import Problem, UserError
from bigbatch.schedule.durations import in_epochs, num_reached
from bigbatch.schedule.noise_scale import Array, make_rule
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.policy import Policy, Settings


def plan_file(
    path: str, *, train_examples: int, epochs: float, batch_multiple_examples: int
) -> Policy:
    """The recipe of a plan's file; laid out over the same training set it is the same plan.

    Args:
      path: a plan.json, or any file with what `Plan.to_json` gives.
      train_examples: N (context), that of the file.
      epochs: length of the run (context), at most that of the file.
      batch_multiple_examples: the ghost batch (context), which divides every batch size.

    Raises:
      UserError: the file cannot be read, or is for another training set, a shorter run or another
        ghost batch.
    """
    allowed = "the path of a run's plan.json"
    try:
        plan = Plan.from_json(text_of(path))
    except (OSError, ValueError) as error:
        raise UserError(Problem("path", path, f"{allowed} ({error})")) from error
    checks = Checks()
    checks.require(
        plan.train_examples == train_examples,
        "path",
        path,
        f"the plan of a run on {train_examples:,} training examples; this one is for "
        f"{plan.train_examples:,}",
    )
    checks.require(
        plan.epochs >= epochs,
        "path",
        path,
        f"the plan of at least {in_epochs(epochs)}; this one is for {plan.epochs:g}",
    )
    odd = plan.batch_sizes[plan.batch_sizes % batch_multiple_examples != 0]
    checks.require(
        not odd.size,
        "path",
        path,
        f"a plan whose batch sizes are multiples of the {batch_multiple_examples} examples of a "
        f"ghost batch; this one has {odd[0] if odd.size else 0}",
    )
    checks.done()
    return as_policy(plan)


def as_policy(plan: Plan) -> Policy:
    """The recipe whose plan a plan is, whatever sizes it has."""
    starts = plan.first_examples / plan.train_examples

    def settings_at(at_epochs: Array) -> Settings:
        update = num_reached(starts[1:], at_epochs)
        hyper = {name: column[update] for name, column in plan.hypers.items()}
        return Settings(plan.batch_sizes[update].astype(np.float64), hyper)

    turning = [stage.epoch for stage in plan.stages]
    rates = plan.hypers["learning_rate"]
    turning += starts[1:][rates[1:] > rates[:-1]].tolist()
    rule = make_rule(plan.rule, plan.train_examples)
    return Policy(settings_at, tuple(sorted({*turning})), rule=rule)
