"""A network in a file of plain arrays: what `export` writes, and with which a run can begin.

`params/...` are the parameters, `running_statistics/...` those of batch norm, each array by its
place in the network.
"""

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbatch.engine.task import PyTree
from bigbatch.errors import Problem, UserError, listed
from bigbatch.places.paths import place
from bigbatch.places.replacing import replacing
from bigbatch.workdir.packing import on_host

FIELD = "initial_params"
_SUFFIX = ".npy"


class Network(NamedTuple):
    """What evaluation needs of a state.

    Attributes:
      params: of the model.
      running_statistics: likewise.
    """

    params: PyTree
    running_statistics: PyTree


def write(out: Path, network: Network) -> int:
    """Writes a network's arrays, one after the other as `numpy.savez` does, and gives their number.

    Args:
      out: the file.
      network: its arrays; what lies in parts is put together one array at a time.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = named(network)
    try:
        with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
            for name, leaf in arrays.items():
                with archive.open(name + _SUFFIX, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, on_host(leaf))
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise UserError(Problem("out", str(out), allowed)) from error
    return len(arrays)


def read(path: str, like: Network) -> Network:
    """The network in a file, of which no array is read yet: NumPy does where it is given one.

    Args:
      path: of the file.
      like: shapes and dtypes of the network that it must be.

    Raises:
      UserError: there is no such file, it cannot be read, or its arrays are another network's.
    """
    arrays = {}
    with _opened(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                version = "{}_{}".format(*np.lib.format.read_magic(member))
                header = getattr(np.lib.format, f"read_array_header_{version}")(member)
            arrays[info.filename.removesuffix(_SUFFIX)] = _Saved(path, info, header[0], header[2])
    problems = _unlike(path, arrays, named(like))
    if problems:
        raise UserError(problems)
    leaves = [arrays[name] for name in named(like)]
    network: Network = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return network


@dataclasses.dataclass(frozen=True)
class _Saved:
    """An array in a file, which NumPy reads when it makes an array of this: one at a time.

    Attributes:
      path: of the file.
      info: of its place there, and a checksum, with which what is read is compared.
      shape: of the array.
      dtype: likewise.
    """

    path: str
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with _opened(self.path) as archive, archive.open(self.info) as member:
            array: np.ndarray = np.lib.format.read_array(member)
            return array


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """A file of arrays that is read; whatever is wrong with it is a `UserError`."""
    try:
        with place(path, FIELD).open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        allowed = "a file that is there, as `bigbatch export` writes it"
        raise UserError(Problem(FIELD, path, allowed)) from None
    except Exception as error:
        # zip, zlib and npy each have errors of their own for a damaged file.
        allowed = f"an npz file that can be read ({type(error).__name__}: {error})"
        raise UserError(Problem(FIELD, path, allowed)) from error


def _unlike(
    path: str, arrays: Mapping[str, _Saved], expected: Mapping[str, jax.ShapeDtypeStruct]
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


def _words(array: _Saved | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}{list(array.shape)}"
