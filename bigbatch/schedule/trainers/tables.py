"""Schedules written out update by update: Python modules for Optax and PyTorch, CSV and JSON.

They can say all that a plan says, at any number of updates.
"""

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigbatch.errors import Problem, UserError
from bigbatch.schedule.noise_scale import Array
from bigbatch.schedule.plan import Plan
from bigbatch.schedule.run_lengths import run_starts

_HEAD = '''"""{updates:,} updates on {examples:,} examples, {epochs:g} epochs of {train_examples:,}.

{use}
"""

'''
_OPTAX = '''import jax.numpy as jnp
import numpy as np
import optax

NUM_UPDATES = {updates}
NUM_EXAMPLES = {examples}


def _schedule(starts, values, dtype):
    """values[i] from update starts[i] on."""
    starts, values = np.array(starts, np.int32), np.array(values, dtype)

    def value(count):
        updates = jnp.asarray(count, jnp.int32)
        run = jnp.searchsorted(jnp.asarray(starts), updates, side="right") - 1
        return jnp.asarray(values)[run]

    return value


{columns}

def optimizer(make=optax.sgd, **others):
    """An optimizer that follows the schedules that its constructor has arguments for."""
    return optax.inject_hyperparams(make)(**{{**{arguments}, **others}})
'''
_PYTORCH = '''from bisect import bisect_right

NUM_UPDATES = {updates}
NUM_EXAMPLES = {examples}
{columns}

def at(examples_seen):
    """The batch size and the hyperparameters of the update that starts there."""
    found = {{}}
    for name, (starts, values) in COLUMNS.items():
        found[name] = values[bisect_right(starts, examples_seen) - 1]
    return found
'''
_USE = {
    "optax": """Schedules of the update count; update k takes the next batch_size(k) examples.
Needs numpy and optax, with the jax that it brings.""",
    "pytorch": """Before each update: settings = at(examples_seen). Take settings["batch_size"]
examples, divide the summed loss by it, and give "learning_rate" to group["lr"] and "momentum" to
group["momentum"] of every group of optimizer.param_groups. Needs nothing but Python.""",
}


def _columns(plan: Plan) -> dict[str, Any]:
    return {"batch_size": plan.batch_sizes, **plan.hypers}


def _module(plan: Plan, name: str, body: str, **texts: str) -> str:
    numbers = {"updates": plan.num_updates, "examples": plan.num_examples}
    head = _HEAD.format(
        **numbers, epochs=plan.epochs, train_examples=plan.train_examples, use=_USE[name]
    )
    return head + body.format(**numbers, **texts)


def write_optax(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A module with a schedule for each column."""
    lines = ""
    for name, column in _columns(plan).items():
        starts, dtype = run_starts(column), "np.int32" if name == "batch_size" else "np.float32"
        values = f"{starts.tolist()}, {column[starts].tolist()}"
        lines += f"{name} = _schedule({values}, {dtype})\n"
    # SGD's momentum of 0 is none at all; Adam has other names.
    names = {"learning_rate"} | {n for n in plan.hypers if plan.hypers[n].any()}
    pairs = ", ".join(f'"{name}": {name}' for name in plan.hypers if name in names)
    yield _module(plan, "optax", _OPTAX, columns=lines, arguments=f"{{{pairs}}}")


def write_pytorch(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A module with a function of the examples seen."""
    lines = ""
    for name, column in _columns(plan).items():
        starts = run_starts(column)
        values = f"{plan.first_examples[starts].tolist()}, {column[starts].tolist()}"
        lines += f'    "{name}": ({values}),\n'
    yield _module(plan, "pytorch", _PYTORCH, columns=f"COLUMNS = {{\n{lines}}}\n")


def write_csv(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """A line an update, with its first example."""
    columns = {"update": np.arange(plan.num_updates), "first_example": plan.first_examples}
    columns |= _columns(plan)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    yield text.getvalue()


def write_json(plan: Plan, ranks: int, sequence_length: int) -> Iterator[str]:
    """As `Plan.to_json`."""
    yield plan.to_json()


def run_optax(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the module's schedules give, called as Optax calls them."""
    module: dict[str, Any] = {}
    exec(text, module)
    updates = np.arange(module["NUM_UPDATES"])
    return _plan(plan, {name: np.asarray(module[name](updates)) for name in _columns(plan)})


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
    """What the table says."""
    return read_csv(text, plan)


def run_json(text: str, plan: Plan, ranks: int, sequence_length: int) -> Plan:
    """What the file says."""
    return Plan.from_json(text)


def read_csv(text: str, plan: Plan) -> Plan:
    """The plan of a table with a line an update.

    Args:
      text: with a header that names `batch_size` and `learning_rate`, perhaps `momentum` and more.
      plan: for the same training set.

    Raises:
      UserError: the text is no such table.
    """
    try:
        rows = list(csv.DictReader(text.splitlines()))
        columns = {
            name: np.array([float(row[name]) for row in rows])
            for name in (rows[0] if rows else ())
            if name not in ("update", "first_example")
        }
        sizes, rates = columns["batch_size"], columns["learning_rate"]
        whole = (sizes % 1 == 0).all() and np.isfinite(rates).all()
        if not (whole and 1 <= sizes.min() <= sizes.sum() < 2**53):
            raise ValueError("batch sizes are whole numbers from 1 on, learning rates are finite")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        allowed = f"a table with batch_size and learning_rate, a line an update ({error})"
        raise UserError(Problem("csv", text[:40], allowed)) from error
    columns.setdefault("momentum", np.zeros(len(rows)))
    return _plan(plan, columns)


def _plan(plan: Plan, columns: dict[str, Any]) -> Plan:
    sizes = columns.pop("batch_size").astype(np.int64)
    hypers: dict[str, Array] = {name: np.array(c, np.float64) for name, c in columns.items()}
    epochs = int(sizes.sum()) / plan.train_examples
    return Plan(plan.train_examples, epochs, plan.rule, sizes, hypers)
