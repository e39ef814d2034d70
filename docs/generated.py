"""The directive `generated`: the parts of the reference that are read from the code.

    ```{generated} config
    ```

Each part is a function of this file that gives Markdown.
"""

import argparse
import inspect
import re
import typing
from collections.abc import Callable, Iterator

import docstring_parser
from sphinx.util.docutils import SphinxDirective

import bigbatch
from bigbatch import cli
from bigbatch.checks import HARDWARE
from bigbatch.config import config as config_room
from bigbatch.config.binding import describe
from bigbatch.config.fields import Fields
from bigbatch.data.sets import Options
from bigbatch.data.tokens import TokenOptions
from bigbatch.engine.optimizer import OPTIMIZERS
from bigbatch.models import MODELS
from bigbatch.schedule.transform import TRANSFORMATIONS

# What the groups of a recipe never say: `config.read_config` knows it of other fields.
_KNOWN = {
    "policy",
    "train_examples",
    "tokens_per_example",
    "epochs",
    "batch_multiple_examples",
    "small_batch_examples",
}
CONTEXT = {"policy": _KNOWN, "transformations": _KNOWN}
# Heading -> what the groups of that name are made by, by their own names.
GROUPS = {
    "data": {"images": Options, "tokens": TokenOptions},
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "policy": config_room._POLICIES,
    "transformations": TRANSFORMATIONS,
}


class Row(typing.NamedTuple):
    """A field of a config.

    Attributes:
      name: in the config.
      type: in words.
      default: as Python writes it, or that it is required; in Markdown.
      kind: "statistical" or "hardware".
      text: what it is.
    """

    name: str
    type: str
    default: str
    kind: str
    text: str


def rows(constructor: Callable[..., typing.Any], context: set[str]) -> Iterator[Row]:
    """The fields that a constructor takes from a config."""
    hints = typing.get_type_hints(constructor)
    classes = [c for c in getattr(constructor, "__mro__", [constructor]) if c.__doc__]
    texts = {p.arg_name: p.description for c in reversed(classes) for p in _parsed(c).params}
    fields = getattr(constructor, "__dataclass_fields__", {})
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name in context or parameter.kind is parameter.VAR_KEYWORD:
            continue
        is_required = parameter.default is parameter.empty
        default = "*required*" if is_required else f"*default* `{parameter.default!r}`"
        is_hardware = name in fields and fields[name].metadata == HARDWARE
        kind = "hardware" if is_hardware else "statistical"
        # Times are told of once, in the first of their units.
        stem = next((known for known in texts if _stem(known) == _stem(name)), None)
        text = texts.get(name) or (f"see `{stem}`." if stem else "")
        text = text[:1].upper() + text[1:]
        yield Row(
            name, describe(hints.get(name, typing.Any)), default, kind, " ".join(text.split())
        )


def _stem(name: str) -> str:
    for unit in ("epochs", "epoch", "examples", "example", "updates", "update", "tokens", "token"):
        name = name.removesuffix(f"_{unit}")
    return name


def _parsed(documented: typing.Any) -> docstring_parser.Docstring:
    return docstring_parser.parse(
        inspect.getdoc(documented), docstring_parser.DocstringStyle.GOOGLE
    )


def listed(found: list[Row]) -> str:
    """The fields as a list of definitions."""
    entries = (
        f"`{row.name}`\n: *{row.type}; {row.kind};* {row.default}\\\n  {row.text}" for row in found
    )
    return "\n\n".join(entries) or "It has no fields."


def config() -> str:
    """Every field of a config, group by group."""
    parts = ["## At the top", listed(list(rows(Fields, set())))]
    for group, makers in GROUPS.items():
        parts.append(f"## `{group}`")
        for name, maker in makers.items():
            text = _parsed(maker)
            said = [text.short_description, text.long_description]
            parts += [f"### `{group}`: `{name}`", *filter(None, said)]
            parts.append(listed(list(rows(maker, CONTEXT.get(group, set())))))
    return "\n\n".join(parts)


def commands() -> str:
    """Every verb of the command with its flags."""
    return "\n\n".join(_verbs(cli._parser(), 2))


def _verbs(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for verb in (verb for sub in subs for verb in sub.choices.values()):
        inner = [a for a in verb._actions if isinstance(a, argparse._SubParsersAction)]
        yield f"{'#' * level} `{verb.prog}`"
        yield verb.description or ""
        yield from _verbs(verb, level + 1) if inner else [_flags(verb)]


def _flags(verb: argparse.ArgumentParser) -> str:
    lines = ["| argument | what it is |", "| --- | --- |"]
    for action in verb._actions:
        if action.dest == "help":
            continue
        name = "=".join(filter(None, [*action.option_strings[-1:], _value(action)]))
        text = (action.help or "") + (" (required)" if action.required else "")
        lines.append(f"| `{name}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _value(action: argparse.Action) -> str:
    return "" if action.nargs == 0 else str(action.metavar or action.dest.upper())


def python(*wanted: str) -> str:
    """The public names that are defined in some rooms, from their docstrings."""
    rooms: dict[str, list[str]] = {}
    for module in (bigbatch, bigbatch.noise):
        for name in module.__all__:
            value = getattr(module, name)
            room = getattr(value, "__module__", "").split(".")[1:2] or ["constants"]
            if value is not bigbatch.noise:
                rooms.setdefault(room[0], []).append(_documented(module.__name__, name, value))
    parts = (f"## {room}\n\n```{{eval-rst}}\n{chr(10).join(rooms[room])}\n```" for room in wanted)
    return "\n\n".join(parts)


def _documented(module: str, name: str, value: typing.Any) -> str:
    if isinstance(value, type):
        return f".. autoclass:: {module}.{name}\n   :members:\n"
    if callable(value):
        return f".. autofunction:: {module}.{name}\n"
    said = ", ".join(f"`{entry}`" for entry in value) if isinstance(value, dict) else f"`{value}`"
    return f".. py:data:: {module}.{name}\n\n   {said}\n"


def escaped(app, what, name, object, options, lines):
    """Bars in docstrings are those of magnitudes, and no markup; nor is a property's colon."""
    lines[:] = [line.replace("|", r"\|") for line in lines]
    if what in ("attribute", "property"):
        lines[:1] = [line.replace(": ", "; ") for line in lines[:1]]


def shortened(app, what, name, object, options, signature, returned):
    """Defaults that are no literals, such as <function ...>, are dots; ArrayLike has its name."""
    short = re.sub(r"<(?:[^<>]|<[^<>]*>)*>", "...", signature or "")
    short = re.sub(r"[^,:(]*_Buffer \|.*?\[complex \| bytes \| str\]", " ArrayLike", short)
    return signature and (short, returned)


class Generated(SphinxDirective):
    """Puts a part of the reference where it is named."""

    required_arguments, optional_arguments = 1, 9

    def run(self):
        part, *wanted = self.arguments
        text = globals()[part](*wanted)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app):
    app.add_directive("generated", Generated)
    # Before napoleon, which reads sections.
    app.connect("autodoc-process-docstring", escaped, priority=400)
    app.connect("autodoc-process-signature", shortened)
    return {"parallel_read_safe": True}
