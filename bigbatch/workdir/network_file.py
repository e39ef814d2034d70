"""The network of a run in a file of plain arrays, written by `export`, and runs that begin with it.

`params/...` are the parameters, `running_statistics/...` those of batch norm, each array by its
place in the network. A run that begins with such a file keeps the sha256 of what it held among its
config's fields, where a resume compares it as it does all the others.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbatch.config.config import Config
from bigbatch.engine.task import PyTree
from bigbatch.errors import Problem, UserError
from bigbatch.training.run import image_task
from bigbatch.workdir.checkpoint import params_sha256
from bigbatch.workdir.files import Workdir, read_json

_FIELD, _SHA256 = "initial_params", "initial_params_sha256"
# So many arrays that do not fit are told by their names.
_NAMED = 6


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
    arrays = {name: np.asarray(leaf) for name, leaf in _named(network).items()}
    try:
        with open(out, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise UserError(Problem("out", str(out), allowed)) from error
    return len(arrays)


def identified(config: Config, files: Workdir) -> Config:
    """The config with the sha256 of its initial parameters, without which no run is begun.

    The file is read and compared with the network. Where it is not there, what the working
    directory says of it counts, if that holds a checkpoint: the file is not needed any more.

    Raises:
      UserError: as `read_initial`.
    """
    if config.initial_params is None:
        return config
    sha256 = None
    if not Path(config.initial_params).exists():
        sha256 = _recorded(config.initial_params, files)
    if sha256 is None:
        sha256 = params_sha256(_read(config))
    elif config.initial_params_sha256 is not None:
        # It is compared with the recorded one as every field is.
        sha256 = config.initial_params_sha256
    tree = {**config.tree, _SHA256: sha256}
    return dataclasses.replace(config, initial_params_sha256=sha256, tree=tree)


def read_initial(config: Config) -> Network | None:
    """What a run begins with in place of random numbers; None where no file is named.

    Raises:
      UserError: there is no such file, it cannot be read, its arrays are not those of the config's
        network, or not those that the config's sha256 is of.
    """
    if config.initial_params is None:
        return None
    arrays, network = _read(config), network_shapes(config)
    leaves = [arrays[name] for name in _named(network)]
    read: Network = jax.tree.unflatten(jax.tree.structure(network), leaves)
    return read


def _recorded(path: str, files: Workdir) -> str | None:
    """The sha256 of a file that the run in a working directory has no more need of, or None."""
    # Those that are being written have longer names.
    saved = any(found.name.isdigit() for found in files.checkpoints.glob("*"))
    if not saved or not files.config.exists():
        return None
    tree = read_json(files.config)
    found: str | None = tree.get(_SHA256) if tree.get(_FIELD) == path else None
    return found


def _read(config: Config) -> dict[str, np.ndarray]:
    """The arrays of the config's file, by name, which are those of its network."""
    path = config.initial_params
    assert path is not None
    try:
        # NumPy leaves a damaged file open that it opened itself.
        with Path(path).open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        allowed = "a file that is there, as `bigbatch export` writes it"
        raise UserError(Problem(_FIELD, path, allowed)) from None
    except Exception as error:
        # zip, zlib and npy each have errors of their own for a damaged file.
        allowed = f"an npz file that can be read ({type(error).__name__}: {error})"
        raise UserError(Problem(_FIELD, path, allowed)) from error
    problems = _unlike(path, arrays, _named(network_shapes(config)))
    sha256, asked = params_sha256(arrays), config.initial_params_sha256
    if not problems and asked not in (None, sha256):
        allowed = f"{sha256!r}, of the arrays in {path}, or None"
        problems.append(Problem(_SHA256, asked, allowed, sha256))
    if problems:
        raise UserError(problems)
    return arrays


def _unlike(
    path: str, arrays: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Problem]:
    """What keeps a file's arrays from being a network's."""
    network = f"the {len(expected)} arrays of this config's network, as `bigbatch export` writes"
    problems = []
    missing = [name for name in expected if name not in arrays]
    if missing:
        problems.append(Problem(_FIELD, f"{path}, without {_listed(missing)}", network))
    superfluous = [name for name in arrays if name not in expected]
    if superfluous:
        problems.append(Problem(_FIELD, f"{path}, with {_listed(superfluous)}", network))
    given = {name: _words(arrays[name]) for name in expected if name in arrays}
    allowed = {name: _words(expected[name]) for name in given}
    others = [name for name in given if given[name] != allowed[name]]
    if others:
        found = _listed(f"{name} {given[name]}" for name in others)
        wanted = _listed(f"{name} {allowed[name]}" for name in others)
        problems.append(Problem(_FIELD, f"{path}, with {found}", wanted))
    return problems


def _named(network: Network) -> dict[str, Any]:
    """The leaves of a network by their names in a file."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(network._asdict())
    }


def network_shapes(config: Config) -> Network:
    """Shapes and dtypes of the config's network."""
    key = jax.eval_shape(jax.random.key, 0)
    return Network(*jax.eval_shape(image_task(config, config.data.info).init, key))


def _words(array: np.ndarray | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _listed(names: Iterable[str]) -> str:
    """Names with commas between, the first few of many."""
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
