"""Schedules written out update by update: Python modules for Optax and PyTorch, CSV and JSON.

They can say all that a plan says, at any number of updates.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import Problem, UserError
from bigbatch.schedule.durations import in_epochs
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.run_lengths import run_starts

_MODULE = '''"""{updates:,} updates on {examples:,} examples, {epochs} of {all:,}.

{use}
"""

{imports}

NUM_UPDATES = {updates}
NUM_EXAMPLES = {examples}
# From where on a value holds, in {unit}, and the values.
COLUMNS = {{
{columns}}}

'''
_OPTAX = '''
def _schedule(name):
    starts, values = COLUMNS[name]
    dtype = np.int32 if name == "batch_size" else np.float32
    starts, values = np.array(starts, np.int32), np.array(values, dtype)

    def value(count):
        updates = jnp.asarray(count, jnp.int32)
        run = jnp.searchsorted(jnp.asarray(starts), updates, side="right") - 1
        return jnp.asarray(values)[run]

    return value


{schedules}

def optimizer(make=optax.sgd, **others):
    """An optimizer that follows the schedules that its constructor has arguments for."""
    return optax.inject_hyperparams(make)(**{{**{arguments}, **others}})
'''
_PYTORCH = '''
def at(examples_seen):
    """The batch size and the hyperparameters of the update that starts there."""
    found = {}
    for name, (starts, values) in COLUMNS.items():
        found[name] = values[bisect_right(starts, examples_seen) - 1]
    return found
'''
_USE_OPTAX = """Schedules of the update count; update k takes the next batch_size(k) examples.
Needs numpy and optax, with the jax that it brings."""
_USE_PYTORCH = """Before each update: settings = at(examples_seen). Take settings["batch_size"]
examples, divide the summed loss by it, and give "learning_rate" to group["lr"] and "momentum" to
group["momentum"] of every group of optimizer.param_groups. Needs nothing but Python."""
# Columns of the CSV that follow from the others.
_PLACES = ("update", "first_example")


def columns_of(plan: Plan) -> dict[str, NDArray[Any]]:
    """Everything that a plan says of an update, by name."""
    return {"batch_size": plan.batch_sizes, **plan.hypers}


def _module(plan: Plan, unit: str, use: str, imports: str) -> str:
    places = plan.first_examples if unit == "examples" else np.arange(plan.num_updates)
    lines = ""
    for name, column in columns_of(plan).items():
        starts = run_starts(column)
        lines += f'    "{name}": ({places[starts].tolist()}, {column[starts].tolist()}),\n'
    return _MODULE.format(
        updates=plan.num_updates, examples=plan.num_examples, epochs=in_epochs(plan.epochs),
        use=use, all=plan.train_examples, imports=imports, unit=unit, columns=lines,
    )  # fmt: skip


def write_optax(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A module with a schedule for each column."""
    imports = "import jax.numpy as jnp\nimport numpy as np\nimport optax"
    # SGD's momentum of 0 is none at all; Adam has other names.
    used = [n for n, column in plan.hypers.items() if n == "learning_rate" or column.any()]
    yield _module(plan, "updates", _USE_OPTAX, imports) + _OPTAX.format(
        schedules="".join(f'{name} = _schedule("{name}")\n' for name in columns_of(plan)),
        arguments="{" + ", ".join(f'"{name}": {name}' for name in used) + "}",
    )


def write_pytorch(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A module with a function of the examples seen."""
    imports = "from bisect import bisect_right"
    yield _module(plan, "examples", _USE_PYTORCH, imports) + _PYTORCH


def write_csv(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A line an update, with its first example."""
    columns = {"update": np.arange(plan.num_updates), "first_example": plan.first_examples}
    columns |= columns_of(plan)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    yield text.getvalue()


def run_optax(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the module's schedules give, called as Optax calls them."""
    module: dict[str, Any] = {}
    exec(text, module)
    updates = np.arange(module["NUM_UPDATES"])
    return _plan(plan, {name: np.asarray(module[name](updates)) for name in module["COLUMNS"]})


def run_pytorch(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the module's function gives, called before each update."""
    module: dict[str, Any] = {}
    exec(text, module)
    rows, seen = [], 0
    while seen < module["NUM_EXAMPLES"]:
        rows.append(module["at"](seen))
        seen += rows[-1]["batch_size"]
    return _plan(plan, {name: np.array([row[name] for row in rows]) for name in rows[0]})


def run_csv(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """The plan of a table with a line an update.

    Args:
      text: with a header that names `batch_size` and `learning_rate`, perhaps `momentum` and more.
      plan: for the same training set.
      ranks: of no meaning here.
      sequence_length: likewise.

    Raises:
      UserError: the text is no such table.
    """
    try:
        rows = list(csv.DictReader(text.splitlines()))
        names = [name for name in (rows[0] if rows else ()) if name not in _PLACES]
        columns = {name: np.array([float(row[name]) for row in rows]) for name in names}
        sizes, rates = columns["batch_size"], columns["learning_rate"]
        whole = 1 <= sizes.min() <= sizes.sum() < 2**53 and (sizes % 1 == 0).all()
        if not (whole and np.isfinite(rates).all()):
            raise ValueError("batch sizes are whole numbers from 1 on, learning rates are finite")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        allowed = f"a table with batch_size and learning_rate, a line an update ({error})"
        raise UserError(Problem("csv", text[:40], allowed)) from error
    return _plan(plan, {"momentum": np.zeros(len(rows)), **columns})


def _plan(plan: Plan, columns: Mapping[str, NDArray[Any]]) -> Plan:
    sizes = columns["batch_size"].astype(np.int64)
    hypers = {n: np.array(c, np.float64) for n, c in columns.items() if n != "batch_size"}
    epochs = int(sizes.sum()) / plan.train_examples
    return Plan(plan.train_examples, epochs, plan.rule, sizes, hypers)
