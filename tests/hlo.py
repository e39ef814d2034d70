"""What the tests read in the text of compiled programs."""

import re
from collections import Counter
from typing import Any

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all)"
    r"(?:-start)?\("
)


def collectives(program: Any) -> Counter:
    """How often each collective is called in the compiled program's text."""
    return Counter(COLLECTIVE.findall(program.as_text()))
