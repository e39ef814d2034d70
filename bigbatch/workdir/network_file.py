"""A network in a file of plain arrays: what `export` writes, and with which a run can begin.

`params/...` are the parameters, `running_statistics/...` those of batch norm, each array by its
place in the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbatch.engine.task import PyTree
from bigbatch.errors import Problem, UserError, listed
from bigbatch.places.paths import place
from bigbatch.places.replacing import replacing

FIELD = "initial_params"


class Network(NamedTuple):
    """What evaluation needs of a state.

    Attributes:
      params: of the model.
      running_statistics: likewise.
    """

    params: PyTree
    running_statistics: PyTree


def write(out: Path, network: Network) -> int:
    """Writes a network's arrays, and gives their number.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named(network).items()}
    try:
        with replacing(out) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise UserError(Problem("out", str(out), allowed)) from error
    return len(arrays)


def read(path: str, like: Network) -> Network:
    """The network in a file.

    Args:
      path: of the file.
      like: shapes and dtypes of the network that it must be.

    Raises:
      UserError: there is no such file, it cannot be read, or its arrays are another network's.
    """
    try:
        # NumPy leaves a damaged file open that it opened itself.
        with place(path, FIELD).open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        allowed = "a file that is there, as `bigbatch export` writes it"
        raise UserError(Problem(FIELD, path, allowed)) from None
    except Exception as error:
        # zip, zlib and npy each have errors of their own for a damaged file.
        allowed = f"an npz file that can be read ({type(error).__name__}: {error})"
        raise UserError(Problem(FIELD, path, allowed)) from error
    problems = _unlike(path, arrays, named(like))
    if problems:
        raise UserError(problems)
    leaves = [arrays[name] for name in named(like)]
    network: Network = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return network


def _unlike(
    path: str, arrays: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Problem]:
    """What keeps a file's arrays from being a network's."""
    network = f"the {len(expected)} arrays of this config's network, as `bigbatch export` writes"
    problems = []
    missing = [name for name in expected if name not in arrays]
    if missing:
        problems.append(Problem(FIELD, f"{path}, without {listed(missing)}", network))
    superfluous = [name for name in arrays if name not in expected]
    if superfluous:
        problems.append(Problem(FIELD, f"{path}, with {listed(superfluous)}", network))
    given = {name: _words(arrays[name]) for name in expected if name in arrays}
    allowed = {name: _words(expected[name]) for name in given}
    others = [name for name in given if given[name] != allowed[name]]
    if others:
        found = listed(f"{name} {given[name]}" for name in others)
        wanted = listed(f"{name} {allowed[name]}" for name in others)
        problems.append(Problem(FIELD, f"{path}, with {found}", wanted))
    return problems


def named(network: Network) -> dict[str, Any]:
    """The leaves of a network by their names in a file."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(network._asdict())
    }


def _words(array: np.ndarray | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}{list(array.shape)}"
