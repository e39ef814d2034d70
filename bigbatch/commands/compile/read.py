"""What a compiled program is, read from its text; and what it must compute, from what was traced.

The text is XLA's: a block of lines for every computation, an operation a line.

>>> text = '''
... ENTRY %main (p: f32[8]) -> f32[8] {
...   %p = f32[8]{0} parameter(0)
...   %copy.1 = f32[8]{0} copy(%p)
...   ROOT %sum = f32[8]{0} all-reduce(%copy.1), replica_groups=[1,4]<=[4], to_apply=%add
... }
... '''
>>> collectives(text)
[{'kind': 'all-reduce', 'count': 1, 'bytes': 32, 'groups': '1 x 4', 'trips': 1}]
>>> operations(text)["kernels"], operations(text)["copies"]
(2, {'count': 1, 'bytes': 32})
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

_NAME = r"%?([\w.\-]+)"
_OPERATION = re.compile(rf"\s+(?:ROOT )?{_NAME} = (.*?) ([a-z][\w\-]*)\((.*)")
_BLOCK = re.compile(rf"(ENTRY )?{_NAME} .*\{{\s*$")
_ARRAY = re.compile(r"\b(pred|[subf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all|send)"
    r"(?:-start)?"
)
_CALLED = re.compile(rf"(?:body|condition|calls|to_apply)={_NAME}|branch_computations=\{{(.*?)\}}")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,]*\},?)*\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
# A TPU's collective that goes on through several kernels is in the text of each of them.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_KNOWN_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
# Their work is that of the computations that they call.
_CALLS = ("while", "call", "conditional", "async-start")
# Nothing is done for them, or it is done where they started.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|"
    r"opt-barrier|[\w\-]+-done|[\w\-]+-update|" + "|".join(_CALLS)
)
_MOVES = {"copies": "copy", "transposes": "transpose"}


class _Line(NamedTuple):
    """An operation: its name, what it gives, its kind, and the rest of the line."""

    name: str
    gives: str
    kind: str
    rest: str


def collectives(text: str, axes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The collectives of a program, those of one kind, the same groups and the same loop together.

    Args:
      text: the program's.
      axes: the mesh that its devices are, by axis; None where groups are enough.

    Returns:
      For each: `kind`; `count`, of calls in the text; `bytes` that the calls give on a device;
      `groups`, "how many x of how many devices", or "all"; `trips`, how often each call is
      executed, None in a loop that the text does not count; and `over`, the axes of the mesh that
      the groups are along, "?" where they are along none. What goes from slice to slice is a
      `send`, through their hosts.
    """
    entry, blocks = _blocks(text)
    trips = _trips(entry, blocks)
    found: dict[tuple[str, str, float, str], list[int]] = {}
    chains: set[str] = set()
    for block, lines in blocks.items():
        known = {line.name: line.gives for line in lines}
        for line in lines:
            kind = _COLLECTIVE.fullmatch(line.kind)
            chain = _CHAIN.search(line.rest) if kind else None
            if chain:
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            if kind:
                groups = _groups(line.rest, math.prod((axes or {}).values()))
                shape = "all" if groups is None else " x ".join(map(str, groups.shape))
                among = "slices" if kind[1] == "send" else shape
                over = "" if groups is None or axes is None else _over(groups, axes)
                entry_of = found.setdefault((kind[1], among, trips[block], over), [0, 0])
                entry_of[0] += 1
                # A send also gives a number of four bytes.
                entry_of[1] += _bytes(line.gives) - 4 * (kind[1] == "send")
                # What is started early gives what it takes beside its results; sums do not.
                if line.kind.endswith("-start") and kind[1] != "all-reduce":
                    entry_of[1] -= sum(_bytes(known.get(name, "")) for name in _operands(line))
    return [
        {"kind": kind, "count": count, "bytes": size, "groups": groups}
        | {"trips": None if trips == math.inf else int(trips)}
        | ({} if axes is None else {"over": over})
        for (kind, groups, trips, over), (count, size) in sorted(found.items())
    ]


def _trips(entry: str, blocks: dict[str, list[_Line]]) -> Mapping[str, float]:
    """How often each computation is executed: its loops' trips, infinite where they are unknown."""
    trips: dict[str, float] = dict.fromkeys(blocks, 1)
    # A computation stands before those that call it.
    for name in reversed(blocks):
        for line in blocks[name]:
            known = _KNOWN_TRIPS.search(line.rest)
            times = (int(known[1]) if known else math.inf) if line.kind == "while" else 1
            for one, several in _CALLED.findall(line.rest):
                for called in [one] if one else re.findall(_NAME, several):
                    trips[called] = max(trips.get(called, 1), trips[name] * times)
    return trips


def _groups(rest: str, devices: int) -> np.ndarray | None:
    """The devices of each group, [groups, size]; None for all of an unknown number.

    XLA writes them one by one, as the numbers from 0 in another shape (of which the axes may be
    turned), or as axes of a mesh, of which a part may be meant: `'axis':(before)size`.
    """
    mesh = _MESH.search(rest)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        cut = {
            name: (int(before or 1), int(size or sizes[name]))
            for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2])
        }
        shape: list[int] = []
        along = []
        for name, size in sizes.items():
            before, own = cut.get(name, (size, 1))
            along.append(len(shape) + 1)
            shape += [before, own, size // (before * own)]
        places = np.moveaxis(
            np.arange(math.prod(shape)).reshape(shape), along, range(-len(along), 0)
        )
        return places.reshape(-1, math.prod(own for _, own in cut.values()))
    iota = _IOTA.search(rest)
    if iota:
        wanted, shape_of, turned = (
            [int(n) for n in (g or "").split(",") if n] for g in iota.groups()
        )
        places = np.arange(math.prod(shape_of)).reshape(shape_of)
        return places.transpose(turned or None).reshape(wanted)
    written = _GROUPS.search(rest)
    inner = re.findall(r"\{([\d,]+)\}", written[1]) if written else []
    if inner:
        return np.array([[int(n) for n in group.split(",")] for group in inner])
    return np.arange(devices)[None] if devices > 1 else None


def _over(groups: np.ndarray, axes: Mapping[str, int]) -> str:
    """The axes of a mesh, with commas between, that groups of devices are along."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())))
    along = [n for n, place in enumerate(places) if np.any(place != place[:, :1])]
    size = math.prod(list(axes.values())[n] for n in along)
    fits = groups.shape[1] == size and groups.size == math.prod(axes.values())
    return ",".join(list(axes)[n] for n in along) if fits else "?"


def operations(text: str) -> dict[str, Any]:
    """What a program does besides.

    Returns:
      `kernels`: operations that a device is given, those of a loop once. `products`: convolutions
      and products of matrices, by the narrowest dtype that they take. `reductions`: fusions that
      reduce. `copies`, `transposes`: how many, and the bytes that they give. `bytes`: that all
      kernels take and give, as if nothing stayed on the chip between them.
    """
    entry, blocks = _blocks(text)
    products: dict[str, int] = {}
    # A fusion holds its product and its reduction in a computation of its own.
    for lines in blocks.values():
        known = {line.name: line.gives for line in lines}
        for line in lines:
            target = re.search(r'custom_call_target="(__cu[^"]*)"', line.rest)
            if line.kind in ("convolution", "dot") or target:
                taken = " ".join(known.get(name, "") for name in _operands(line)[:2])
                types = [kind for kind, _ in _ARRAY.findall(taken)]
                kind = min(types, key=_width, default="unknown")
                products[kind] = products.get(kind, 0) + 1
    found: dict[str, Any] = {"kernels": 0, "products": products, "reductions": 0, "bytes": 0}
    found |= {name: {"count": 0, "bytes": 0} for name in _MOVES}
    for block in _executed(entry, blocks):
        known = {line.name: line.gives for line in blocks[block]}
        for line in blocks[block]:
            if _FREE.fullmatch(line.kind):
                continue
            found["kernels"] += 1
            given = _bytes(line.gives)
            found["bytes"] += given + sum(_bytes(known.get(name, "")) for name in _operands(line))
            called = _CALLED.search(line.rest)
            if line.kind == "fusion" and called:
                inner = blocks.get(called[1], [])
                found["reductions"] += any(each.kind == "reduce" for each in inner)
            for name, move in _MOVES.items():
                # Fusions are called after what they do; what is started early is on its way into
                # the chip's own memory.
                if move in line.name and line.kind != "copy-start":
                    found[name]["count"] += 1
                    found[name]["bytes"] += given
    return found


def _blocks(text: str) -> tuple[str, dict[str, list[_Line]]]:
    """The name of the first computation that is executed, and the lines of all by name."""
    blocks: dict[str, list[_Line]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _BLOCK.match(line)
            if head:
                name = head[2]
                blocks[name] = []
                entry = name if head[1] else entry
        elif name:
            found = _OPERATION.match(line)
            if found:
                blocks[name].append(_Line(*found.groups()))
    return entry, blocks


def _executed(entry: str, blocks: dict[str, list[_Line]]) -> Iterator[str]:
    """The computations that are no part of an operation."""
    waiting, seen = [entry], set()
    while waiting:
        block = waiting.pop()
        if block in seen or block not in blocks:
            continue
        seen.add(block)
        yield block
        for line in blocks[block]:
            if line.kind in _CALLS:
                for one, several in _CALLED.findall(line.rest):
                    waiting += [one] if one else re.findall(_NAME, several)


def _operands(line: _Line) -> list[str]:
    inside = re.sub(r"/\*.*?\*/", "", line.rest).split(")")[0]
    return re.findall(r"%([\w.\-]+)", inside)


def _bytes(types: str) -> int:
    """Of all arrays in a type."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * _width(kind)
        for kind, shape in _ARRAY.findall(types)
    )


def _width(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


def model_flops(jaxpr: Any) -> int:
    """Floating-point operations of the convolutions and matrix products of a traced program.

    Of a convolution only those with numbers of its operands count: not those with padding, nor with
    the zeros that a stride puts between numbers in a gradient. What is under `shard_map` is one
    device's.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, options = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            total += _convolution_flops(equation)
        elif name == "dot_general":
            (contracted, _), _ = options["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * equation.outvars[0].aval.size * inner
        inner_programs = [
            model_flops(getattr(each, "jaxpr", each))
            for value in options.values()
            for each in (value if isinstance(value, list | tuple) else [value])
            if hasattr(getattr(each, "jaxpr", each), "eqns")
        ]
        if name == "cond":
            total += max(inner_programs, default=0)
        else:
            total += sum(inner_programs) * options.get("length", 1)
    return total


def _convolution_flops(equation: Any) -> int:
    options = equation.params
    image, kernel = (atom.aval.shape for atom in equation.invars)
    given = equation.outvars[0].aval.shape
    numbers = options["dimension_numbers"]
    batch, features, *places = numbers.out_spec
    taps = 1
    for i, place in enumerate(places):
        size, spread = image[numbers.lhs_spec[2 + i]], options["lhs_dilation"][i]
        reach = np.arange(kernel[numbers.rhs_spec[2 + i]]) * options["rhs_dilation"][i]
        starts = np.arange(given[place]) * options["window_strides"][i] - options["padding"][i][0]
        index = starts[:, None] + reach
        taps *= int(np.sum((index >= 0) & (index <= (size - 1) * spread) & (index % spread == 0)))
    # A kernel holds the inputs of one group.
    inputs = kernel[numbers.rhs_spec[1]]
    return 2 * given[batch] * given[features] * inputs * taps
