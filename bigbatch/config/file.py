"""Config files, and the fields that the command line changes.

A config file is Python. It defines `get_config(experiment)`, which returns an `ml_collections`
ConfigDict (any nested mapping will do), and `EXPERIMENTS`, the names that it takes. Those of the
project come with the package, and go by their names alone: `digits:increase`.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bigbatch.config.config import Config, read_config
from bigbatch.errors import Problem, UserError, among, nearest_name
from bigbatch.schedule.durations import TIME_UNITS
from bigbatch.schedule.intervals import MINUTES


def load_config(reference: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Reads the config that the command line names.

    Args:
      reference: "FILE.py:EXPERIMENT"; without an experiment the file's first one. FILE without
        its suffix is a bundled config.
      overrides: dotted field names and values as typed, e.g. ("policy.batch_size", "64").

    Returns:
      The config.

    Raises:
      UserError: with every mistake that was found.
    """
    path, experiment = file_and_experiment(reference)
    module = _load_module(path)
    names = _names(module, "EXPERIMENTS") or []
    experiment = experiment or (names[0] if names else "")
    if names and experiment not in names:
        raise UserError(Problem("config", experiment, *among(experiment, names)))
    tree = _run(reference, lambda: plain(module.get_config(experiment)))
    if not isinstance(tree, dict):
        allowed = "a file whose get_config returns a ConfigDict"
        raise UserError(Problem("config", path, allowed))
    problems: list[Problem] = []
    for name, text in overrides:
        try:
            override(tree, name, text)
        except UserError as error:
            problems += error.problems
    own = _Callables(module)
    try:
        config = read_config(tree, experiment, own.named)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return dataclasses.replace(config, sources=own.sources)


def file_and_experiment(reference: str) -> tuple[str, str]:
    """The two parts of "FILE.py:EXPERIMENT"; a colon in the path of a file is no end of it."""
    file, _, experiment = reference.rpartition(":")
    if Path(reference).is_file():
        return reference, ""
    if not Path(file).is_file():
        file, _, experiment = reference.partition(":")
    return file, experiment


def experiment_names(path: str) -> list[str]:
    """The experiments that a config file names; one without a name if it has none.

    Raises:
      UserError: there is no such file, or it is no config file.
    """
    return _names(_load_module(path), "EXPERIMENTS") or [""]


def compared_names(path: str) -> list[str]:
    """The experiments that are compared unless others are named: `COMPARED`, or else all.

    Raises:
      UserError: there is no such file, or it is no config file.
    """
    module = _load_module(path)
    return _names(module, "COMPARED") or _names(module, "EXPERIMENTS") or [""]


def _names(module: ModuleType, attribute: str) -> list[str] | None:
    """The names of experiments in a config file's list; None: it has none."""
    found = getattr(module, attribute, None)
    if found is None:
        return None
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise UserError(Problem("config", found, f"a list of names as {attribute}"))
    return [str(name) for name in found]


def _load_module(path: str) -> ModuleType:
    """Runs a config file."""
    bundled = _bundled()
    file = path if Path(path).is_file() else bundled.get(path)
    if file is None:
        siblings = [str(p) for p in Path(path).parent.glob("*.py")]
        words = "a Python file, optionally followed by a colon and an experiment, or instead of "
        allowed, _ = among(path, bundled, f"{words}the file the name of a bundled one: ")
        nearest = nearest_name(path, [*siblings, *bundled])
        raise UserError(Problem("config", path, allowed, nearest))
    spec = importlib.util.spec_from_file_location(f"bigbatch_config_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(Problem("config", path, "a Python file, its name ending in .py"))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look there for what their annotations name.
    sys.modules[spec.name] = module
    loader = spec.loader
    # What it imports, and names later, may lie beside it or where the command is given.
    beside = str(Path(file).parent.absolute()), str(Path.cwd())
    sys.path += [place for place in beside if place not in sys.path]
    _run(path, lambda: loader.exec_module(module))
    if not hasattr(module, "get_config"):
        raise UserError(Problem("config", path, "a file that defines get_config(experiment)"))
    return module


class _Callables:
    """The user's callables that a config file names.

    Attributes:
      sources: the config's file, and those of the modules beside it that it names.
    """

    def __init__(self, module: ModuleType):
        self._config = module
        self._beside = Path(str(module.__file__)).parent.absolute()
        self.sources: tuple[Path, ...] = (Path(str(module.__file__)),)

    def named(self, name: str) -> Callable[..., Any]:
        """The callable "package.module:callable", or ":callable" of the config file itself.

        Raises:
          UserError: there is none. What the callable raises is one too.
        """
        place, _, attribute = name.partition(":")
        module = self._imported(place, name) if place else self._config
        function = getattr(module, attribute, None)
        if not callable(function):
            names = [known for known, value in vars(module).items() if callable(value)]
            nearest = nearest_name(attribute, names)
            allowed = f"a callable in {module.__file__}"
            raise UserError(Problem("", name, allowed, nearest and f"{place}:{nearest}"))

        @functools.wraps(function)
        def told(*arguments: Any, **fields: Any) -> Any:
            return _run(name, lambda: function(*arguments, **fields), field="name")

        return told

    def _imported(self, place: str, name: str) -> ModuleType:
        """A module that is installed, in the current directory, or beside the config file."""
        module = _run(name, lambda: importlib.import_module(place), field="")
        file = Path(module.__file__ or "").absolute()
        if self._beside in file.parents and file not in self.sources:
            self.sources += (file,)
        return module


def _bundled() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    package = Path(__file__).parents[1]
    # A wheel has them in the package, a clone beside it.
    directory = package if (package / "configs").is_dir() else package.parent
    return {file.stem: file for file in sorted(directory.glob("configs/*.py"))}


def _run(reference: str, function: Callable[[], Any], field: str = "config") -> Any:
    """Runs the user's code; whatever it raises is a mistake in what the field names."""
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"Python code that runs ({type(error).__name__}: {error})"
        raise UserError(Problem(field, reference, what)) from error


def plain(tree: Any) -> Any:
    """ConfigDicts and other mappings as dictionaries, tuples as lists: what JSON gives back."""
    if hasattr(tree, "to_dict"):
        tree = tree.to_dict()
    if isinstance(tree, Mapping):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree


def override(tree: dict[str, Any], name: str, text: str) -> None:
    """Sets one field, in place.

    A duration replaces the same duration in another unit: `log_every_updates` takes the place of
    `log_every_epochs`. A group of a list is named by its field `name`:
    `transformations.grow_batch.max_batch_size`.

    Args:
      tree: the config's values.
      name: dotted name of the field.
      text: a Python literal; anything else is taken as a text.

    >>> tree = {"log_every_epochs": 1}
    >>> override(tree, "log_every_updates", "10")
    >>> tree
    {'log_every_updates': 10}
    """
    *groups, last = name.split(".")
    node: Any = tree
    for group in groups:
        node = _child(node, group, Problem(name, text, ""))
    if not isinstance(node, dict):
        raise UserError(Problem(name, text, "a field of one of the list's groups, by its name"))
    stem, _, unit = last.rpartition("_")
    for units in ((*TIME_UNITS, MINUTES), [unit.removesuffix("s") for unit in TIME_UNITS]):
        if unit in units:
            for other in units:
                node.pop(f"{stem}_{other}", None)
    try:
        node[last] = plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        node[last] = text


def _child(node: Any, group: str, problem: Problem) -> Any:
    """The group of that name: a field of a group, or an entry of a list by its field `name`."""
    if isinstance(node, dict):
        child = node.setdefault(group, {})
        allowed, nearest = f"a field of the config; {group} holds no fields", None
    else:
        entries = [entry for entry in node if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry for entry in entries}
        child = named.get(group)
        if sum(str(entry.get("name")) == group for entry in entries) > 1:
            allowed = f"a group of which there is one; several are named {group!r}: change them in "
            raise UserError(dataclasses.replace(problem, allowed=f"{allowed}the config file"))
        allowed, nearest = among(group, named)
        allowed = allowed if named else "nothing: the list holds no groups"
    if not isinstance(child, dict | list):
        raise UserError(dataclasses.replace(problem, allowed=allowed, nearest=nearest))
    return child
