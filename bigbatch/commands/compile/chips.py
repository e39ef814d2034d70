"""The chips that programs can be compiled for, their peaks, and what `--compile-for` asks for.

Peaks are those that the makers publish, for one chip. A TPU multiplies float32 in one pass of its
bfloat16 units, a GPU in TF32, as JAX asks of them by default.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import NamedTuple

from bigbatch.errors import Problem, UserError, among

_GIB = 2**30
_CLOUD = "docs.cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA's data sheet, SXM, 80 GB"
_BELIEVED = (
    "believed, from Jouppi et al. 2020, A Domain-Specific Supercomputer for Training Deep Neural "
    "Networks"
)
# Where a card is described for XLA, among the public figures in it.
_CARDS = Path(__file__).parent
_PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
MOST_DEVICES = 2**20
_ASKED = re.compile(r"(?:(\d+)\*)?(.+):(\d+(?:x\d+)*)")


class Chip(NamedTuple):
    """A kind of chip, by its public figures.

    Attributes:
      platform: "tpu" or "cuda", as the extras are called.
      bf16_flops_s: floating-point operations a second, dense, in bfloat16.
      float32_flops_s: likewise, of float32 numbers at JAX's default precision.
      memory_bytes: of its memory, as much as the compiler gives to a program (a TPU's says so where
        it refuses one).
      memory_bytes_s: read and written a second.
      sent_bytes_s: over all its links to others. Where a switch can sum, which halves what an
        all-reduce sends, both directions are counted.
      devices: that JAX sees in it: one for each core, or one.
      source: of these figures.
      cache_bytes: what may stay on the chip from one program to the next.
      cores: how libtpu puts a chip's cores together, where it is not its default.
    """

    platform: str
    bf16_flops_s: float
    float32_flops_s: float
    memory_bytes: float
    memory_bytes_s: float
    sent_bytes_s: float
    devices: int
    source: str
    cache_bytes: int = 0
    cores: str | None = None


CHIPS = {
    "v2": Chip("tpu", 46e12, 46e12, 2 * 7.48 * _GIB, 700e9, 248e9, 2, _BELIEVED),
    "v3": Chip("tpu", 123e12, 123e12, 2 * 15.48 * _GIB, 900e9, 328e9, 2, f"{_CLOUD}/v3"),
    "v4": Chip(
        *("tpu", 275e12, 275e12, 30.75 * _GIB, 1200e9, 300e9, 1, f"{_CLOUD}/v4"), cores="megacore"
    ),
    "v5e": Chip("tpu", 197e12, 197e12, 15.75 * _GIB, 819e9, 200e9, 1, f"{_CLOUD}/v5e"),
    "v5p": Chip("tpu", 459e12, 459e12, 95.74 * _GIB, 2765e9, 600e9, 1, f"{_CLOUD}/v5p"),
    "v6e": Chip("tpu", 918e12, 918e12, 31.25 * _GIB, 1638e9, 400e9, 1, f"{_CLOUD}/v6e"),
    "tpu7x": Chip("tpu", 2307e12, 2307e12, 2 * 94.75 * _GIB, 7380e9, 600e9, 2, f"{_CLOUD}/tpu7x"),
    "a100": Chip("cuda", 312e12, 156e12, 80 * _GIB, 2039e9, 300e9, 1, _NVIDIA, 40 * 2**20),
    "h100": Chip("cuda", 989e12, 495e12, 80 * _GIB, 3352e9, 900e9, 1, _NVIDIA, 50 * 2**20),
}


class Target(NamedTuple):
    """What to compile for.

    Attributes:
      asked: as it was written.
      chip: of which kind all are.
      topology: how they are put together, as JAX's compilers name it.
      slices: how many such; 1 for cards.
      card: the text that describes one to XLA; None for a TPU.
      devices: how many JAX sees.
    """

    asked: str
    chip: Chip
    topology: str
    slices: int
    card: str | None
    devices: int


def target(asked: str) -> Target:
    """What `--compile-for` asks for: v5e:16x16, 2*v5e:16x16, h100:8, h100:4x8 or FILE.txtpb:8.

    Raises:
      UserError: it is none of these, or the compiler is not installed.
    """

    def problem(allowed: str, nearest: object = None) -> UserError:
        return UserError(Problem("compile-for", asked, allowed, nearest))

    parts = _ASKED.fullmatch(asked)
    slices, name, shape = (int(parts[1] or 1), parts[2], parts[3]) if parts else (0, "", "0")
    sizes = [int(size) for size in shape.split("x")]
    if not 1 <= slices * math.prod(sizes) <= MOST_DEVICES:
        raise problem(f"CHIP:SHAPE, such as v5e:16x16 or h100:8, of 1 to {MOST_DEVICES:,} chips")
    card = None
    if name.endswith(".txtpb"):
        try:
            card = Path(name).read_text("utf-8")
            chip = _described(card)
        except (OSError, ValueError) as error:
            raise problem(f"a file that describes a card to XLA ({error})") from error
    elif name in CHIPS:
        chip = CHIPS[name]
        if chip.platform == "cuda":
            card = (_CARDS / f"{name}.txtpb").read_text("utf-8")
    else:
        allowed, nearest = among(name, CHIPS, "before the colon FILE.txtpb, or one of the chips ")
        raise problem(allowed, nearest)
    if not any(map(importlib.util.find_spec, _PACKAGES[chip.platform])):
        extra = chip.platform
        raise problem(f"with the compiler of this chip: pip install 'bigbatch[{extra}]'")
    topology = f"{name}:{shape}"
    if card is not None:
        if len(sizes) > 2 or slices > 1:
            raise problem("CARD:COUNT or CARD:HOSTSxCOUNT", f"{name}:{math.prod(sizes)}")
        # Slices, hosts and cards a host.
        topology = "x".join(map(str, [1, *[1] * (2 - len(sizes)), *sizes]))
    return Target(asked, chip, topology, slices, card, slices * math.prod(sizes) * chip.devices)


# Dense bfloat16 operations of a core in a cycle, by the major compute capability.
_CORE_FLOPS = {8: 2048, 9: 4096, 10: 8192}


def _described(card: str) -> Chip:
    """The peaks of a card, from the text that describes it to XLA."""

    def number(name: str) -> float:
        found = re.search(rf"\b{name}: *([\d.]+)", card)
        if found is None or not float(found[1]) > 0:
            raise ValueError(f"{name} is {'missing' if found is None else found[1]}")
        return float(found[1])

    known = _CORE_FLOPS.get(int(number("major")))
    if known is None:
        raise ValueError(f"compute_capability.major is none of {', '.join(map(str, _CORE_FLOPS))}")
    flops_s = known * number("core_count") * number("clock_rate_ghz") * 1e9
    memory_bytes_s = number("memory_bandwidth")
    memory_bytes = number("device_memory_size")
    # Of links it says nothing: what leaves a card has passed its memory.
    links = memory_bytes_s
    source, cache = "the file that describes it", int(number("l2_cache_size"))
    return Chip("cuda", flops_s, flops_s / 2, memory_bytes, memory_bytes_s, links, 1, source, cache)
