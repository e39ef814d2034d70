"""Config files, and the fields that the command line changes.

A config file is Python. It defines `get_config(experiment)`, which returns an `ml_collections`
ConfigDict (any nested mapping will do), and `EXPERIMENTS`, the names that it takes.
"""

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bigbatch.config import UNITS, Config, read_config
from bigbatch.errors import Problem, UserError, nearest_name


def load_config(reference: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Reads the config that the command line names.

    Args:
      reference: "FILE.py:EXPERIMENT"; without an experiment the file's first one.
      overrides: dotted field names and values as typed, e.g. ("policy.batch_size", "64").

    Returns:
      The config.

    Raises:
      UserError: with every mistake that was found.
    """
    path, _, experiment = reference.partition(":")
    module = _load_module(path)
    names = list(getattr(module, "EXPERIMENTS", ()))
    experiment = experiment or (names[0] if names else "")
    if names and experiment not in names:
        allowed = "one of " + ", ".join(names)
        raise UserError(Problem("config", experiment, allowed, nearest_name(experiment, names)))
    tree = plain(module.get_config(experiment))
    for name, text in overrides:
        override(tree, name, text)
    return read_config(tree, experiment)


def experiment_names(path: str) -> list[str]:
    """The experiments that a config file names; one without a name if it has none.

    Raises:
      UserError: there is no such file, or it is no config file.
    """
    return list(getattr(_load_module(path), "EXPERIMENTS", [""]))


def _load_module(path: str) -> ModuleType:
    """Runs a config file."""
    if not Path(path).is_file():
        siblings = [str(p) for p in Path(path).parent.glob("*.py")]
        allowed = "a Python file, optionally followed by a colon and an experiment"
        raise UserError(Problem("config", path, allowed, nearest_name(path, siblings)))
    spec = importlib.util.spec_from_file_location(f"bigbatch_config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(Problem("config", path, "a Python file, its name ending in .py"))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        what = f"a Python file that runs ({type(error).__name__}: {error})"
        raise UserError(Problem("config", path, what)) from error
    if not hasattr(module, "get_config"):
        raise UserError(Problem("config", path, "a file that defines get_config(experiment)"))
    return module


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
        if isinstance(node, list):
            child = next((c for c in node if isinstance(c, dict) and c.get("name") == group), None)
        else:
            child = node.setdefault(group, {})
        if not isinstance(child, dict | list):
            raise UserError(Problem(name, text, f"a field of its own: {group} holds no fields"))
        node = child
    if isinstance(node, list):
        names = [str(child.get("name")) for child in node]
        allowed = "a field of one of the list's groups: " + (", ".join(names) or "it has none")
        raise UserError(Problem(name, text, allowed))
    stem, _, unit = last.rpartition("_")
    if unit in UNITS:
        for other in UNITS:
            node.pop(f"{stem}_{other}", None)
    try:
        node[last] = plain(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        node[last] = text
