"""Where the project keeps what it can make again: compiled programs, indexes, read programs."""

import os
from pathlib import Path


def cache_directory(name: str) -> Path | None:
    """A directory below the user's cache directory, made or not; None: the user has no home.

    Args:
      name: what is kept in it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home) / "bigbatch" / name
