"""The collectives of compiled programs, as tests ask for them."""

from collections import Counter
from typing import Any

from bigbatch.commands.compile import read


def collectives(program: Any) -> Counter:
    """How often each collective is called in the compiled program's text."""
    found: Counter = Counter()
    for each in read.collectives(program.as_text()):
        found[each["kind"]] += each["count"]
    return found


def moved(program: Any) -> Counter:
    """The bytes of whole arrays that go over the devices in a call, by what is done to them."""
    found: Counter = Counter()
    for each in read.collectives(program.as_text()):
        # What is scattered was larger by the number of devices in a group.
        size = int(each["groups"].split(" x ")[1]) if each["kind"] == "reduce-scatter" else 1
        found[each["kind"]] += each["bytes"] * size * each["trips"]
    return found
