"""Token data: files of tokens mapped into memory and cut into sequences, and a text of the package.

A directory of tokens holds a file a part, `train.bin` and perhaps `test.bin`: whole numbers one
after the other, little-endian, and nothing else. `tokens.json` says what they are:

    {"dtype": "uint16", "vocabulary": 50257, "separator": 50256, "tokens": {"train": 9000000}}

`bigbatch data prepare tokens` writes it; beside files of another origin it is written by hand. The
separator is the token at the end of each document, or null.
"""

import dataclasses
import functools
import hashlib
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bigbatch.checks import HARDWARE, Checks, parsed, text_of
from bigbatch.data.dataset import check_count
from bigbatch.data.fingerprint import is_read_whole
from bigbatch.data.parts import rows_of
from bigbatch.data.source import Data
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import expect_bucket, is_bucket, place, size_bytes, to_prepare

FACTS_FILE = "tokens.json"
BIBLE = "bible_kjv"
NAMES = (BIBLE, "tokens")
_DTYPES = ("uint8", "uint16", "uint32")
# Of so many chapters of the bible one is to test on, and which of them.
_TEST_EVERY, _TEST_CHAPTER = 20, 10
# Documents are looked for in so many tokens at a time.
_SCANNED_TOKENS = 2**24
# Of an object so large parts are read.
_READ_WHOLE_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Facts:
    """What `tokens.json` says.

    Attributes:
      dtype: of the tokens in the files.
      vocabulary: tokens are 0 .. vocabulary - 1; None: not known.
      tokens: how many each part has, by its name.
      separator: ends each document; None: nothing does.
    """

    dtype: str
    vocabulary: int | None
    tokens: Mapping[str, int]
    separator: int | None = None


BIBLE_FACTS = Facts("uint8", 256, {"train": 4_033_785, "test": 199_872}, 0)
_UNKNOWN = Facts("uint32", None, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What is known of token data.

    Attributes:
      name: of the data set.
      vocabulary: tokens are 0 .. vocabulary - 1; None: not known.
      sequence_tokens: how many an example shows; each has the next one for its target.
      documents: see `TokenOptions`.
      dtype: of the tokens.
      train_examples: sequences in the training part.
      test_examples: in the test part; 0: there is none.
    """

    name: str
    vocabulary: int | None
    sequence_tokens: int
    documents: str
    dtype: str
    train_examples: int
    test_examples: int

    @property
    def tokens_per_example(self) -> int | None:
        """What an example counts in tokens; None where they have different numbers of them."""
        return None if self.documents == "padded" else self.sequence_tokens

    @property
    def example_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of one example's entries; see `Sequences.read`."""
        kinds = {"tokens": (self.sequence_tokens + 1, self.dtype)}
        if self.documents != "packed":
            kinds["mask"] = self.sequence_tokens, "bool"
        return {name: ((length,), np.dtype(kind)) for name, (length, kind) in kinds.items()}


class TokenData(Data):
    """Sequences of tokens to train and to evaluate on.

    Attributes:
      info: what is known of them.
      tokens_per_example: see `TokenInfo`.
    """

    def __init__(self, info: TokenInfo, train: "Sequences", test: "Sequences | None"):
        super().__init__(train, test)
        self.info, self.tokens_per_example = info, info.tokens_per_example


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """Token data by name, and how they are cut into sequences.

    Attributes:
      name: `bible_kjv`, the bytes of a text that comes with the package, or `tokens`.
      sequence_tokens: how many an example shows, at least 1.
      directory: of `tokens.json`, for `tokens`. A plan needs no files where `train_examples` is
        given.
      documents: `packed`: they run on, one after the other, and are cut wherever a sequence ends.
        `masked`: likewise, but the first token of a document is no target. `padded`: each begins a
        sequence of its own, and what fills up its last one is no target.
      train_examples: use only the first so many sequences; None: all.
      test_examples: likewise.

    Raises:
      UserError: there is no such data, or not so much of it.
    """

    name: str
    sequence_tokens: int
    directory: str | Path | None = dataclasses.field(default=None, metadata=HARDWARE)
    documents: Literal["packed", "masked", "padded"] = "packed"
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        checks = Checks()
        checks.whole("sequence_tokens", self.sequence_tokens, "a whole number, at least 1")
        comes_along, allowed = self.name == BIBLE, f"None: {BIBLE} comes with the package"
        if comes_along or self.directory is None:
            allowed = allowed if comes_along else f"a directory of tokens, from {prepare_command()}"
            fits = self.directory is None and (comes_along or self.train_examples is not None)
            checks.require(fits, "directory", self.directory and str(self.directory), allowed)
        checks.done()
        facts = self.parts["train"].facts if self.parts else _UNKNOWN
        separated = facts.separator is not None or self.documents == "packed" or not self.parts
        allowed = "packed, as these tokens have no separator"
        checks.require(separated, "documents", self.documents, allowed, "packed")
        checks.done()
        for part in self.parts.values():
            checks.problems += part.problems()
        checks.done()

    @functools.cached_property
    def parts(self) -> dict[str, "Sequences"]:
        """Training and test part, their files not yet opened; none where only a plan is made."""
        facts = BIBLE_FACTS if self.name == BIBLE else _UNKNOWN
        path = None if self.directory is None else place(self.directory, "directory")
        if path is not None and (self.train_examples is None or (path / FACTS_FILE).exists()):
            facts = read_facts(path)
        return {part: Sequences(self, facts, part) for part in facts.tokens}

    @functools.cached_property
    def info(self) -> TokenInfo:
        """What is known of the data. Of padded ones only the files tell it."""
        parts = self.parts
        facts = parts["train"].facts if parts else _UNKNOWN
        return TokenInfo(
            name=self.name,
            vocabulary=facts.vocabulary,
            sequence_tokens=self.sequence_tokens,
            documents=self.documents,
            dtype=facts.dtype,
            train_examples=len(parts["train"]) if parts else int(self.train_examples or 0),
            test_examples=len(parts["test"]) if "test" in parts else 0,
        )

    def load(self, *, show_progress: bool = False) -> TokenData:
        """The data, its files mapped into memory.

        Raises:
          UserError: a file is missing, cut, or holds a token that is none of the vocabulary.
        """
        if not self.parts:
            given, allowed = self.directory, f"a directory of tokens, from {prepare_command()}"
            raise UserError(Problem("directory", given and str(given), allowed))
        return TokenData(self.info, self.parts["train"], self.parts.get("test"))


class Sequences:
    """The sequences of a part, read by their numbers.

    Attributes:
      facts: of the data.
    """

    def __init__(self, options: TokenOptions, facts: Facts, part: str):
        self.facts, self._options, self._part = facts, options, part
        self._asked: int | None = getattr(options, f"{part}_examples")
        self._path = place(options.directory or "", "directory") / f"{part}.bin"

    def __len__(self) -> int:
        return self._available if self._asked is None else self._asked

    def problems(self) -> list[Problem]:
        """What is wrong with the numbers of tokens and of sequences that are asked for."""
        length, tokens = self._options.sequence_tokens, self.facts.tokens[self._part]
        if not self._available:
            allowed = f"fewer than the {tokens:,} tokens of the {self._part} part"
            return [Problem("sequence_tokens", length, allowed, tokens - 1 if tokens > 1 else None)]
        return check_count(f"{self._part}_examples", self._asked, self._available)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Sequences by their numbers.

        Returns:
          `tokens`, [n, sequence_tokens + 1]: those that are shown, and the last one's target. Where
          documents are not packed, `mask`, bool[n, sequence_tokens]: which of them have a target.

        Raises:
          UserError: a token is none of the vocabulary.
        """
        length, documents = self._options.sequence_tokens, self._options.documents
        begins, ends = numbers * length, None
        if documents == "padded":
            first, last, pieces = self._documents
            of = np.searchsorted(pieces, numbers, side="right")
            earlier = pieces[of] - _pieces(last[of] - first[of], length)
            begins, ends = first[of] + (numbers - earlier) * length, last[of]
        places = begins[:, None] + np.arange(length + 1)
        tokens = rows_of(self.tokens, np.minimum(places, len(self.tokens) - 1))
        self._check(tokens, places)
        if documents == "packed":
            return {"tokens": tokens}
        if ends is None:
            return {"tokens": tokens, "mask": tokens[:, :-1] != self.facts.separator}
        shown = places <= ends[:, None]
        return {"tokens": np.where(shown, tokens, self.facts.separator or 0), "mask": shown[:, 1:]}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the part, of a file those that are looked at.

        Raises:
          UserError: the file is missing or has another size, or a small one has a wrong token.
        """
        facts, count = self.facts, self.facts.tokens[self._part]
        if self._options.directory is None:
            return np.frombuffer(_bible(self._part), np.uint8)
        dtype = np.dtype(facts.dtype).newbyteorder("<")
        held = size_bytes(self._path) if self._path.is_file() else None
        if held != count * dtype.itemsize:
            given = f"{self._path}" + (" is missing" if held is None else f" has {held:,} bytes")
            allowed = f"{count * dtype.itemsize:,} bytes, the {count:,} tokens that {FACTS_FILE} "
            raise UserError(Problem("directory", given, allowed + "tells of"))
        if is_bucket(self._path):
            tokens: Any = _in_bucket(self._path, dtype, count)
        else:
            tokens = np.memmap(self._path, dtype, mode="r")
        if is_read_whole(tokens):
            self._check(tokens)
        return tokens

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A hash of a small part, whole; None: of another one some examples tell."""
        tokens = self.tokens
        if not is_read_whole(tokens):
            return None
        return (
            f"sha256 {hashlib.sha256(tokens.data).hexdigest()[:16]} of all {len(tokens):,} tokens"
        )

    @functools.cached_property
    def _available(self) -> int:
        """How many sequences there are."""
        if self._options.documents == "padded":
            pieces = self._documents[2]
            return int(pieces[-1]) if len(pieces) else 0
        return max(0, self.facts.tokens[self._part] - 1) // self._options.sequence_tokens

    @functools.cached_property
    def _documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each document its first and last token's place, and its sequences and all before."""
        tokens = self.tokens
        found = [
            first + np.flatnonzero(tokens[first : first + _SCANNED_TOKENS] == self.facts.separator)
            for first in range(0, len(tokens), _SCANNED_TOKENS)
        ]
        # The last one may have no end.
        last = np.union1d(np.concatenate([*found, []]).astype(np.int64), len(tokens) - 1)
        first = np.concatenate([[0], last[:-1] + 1])
        return first, last, np.cumsum(_pieces(last - first, self._options.sequence_tokens))

    def _check(self, tokens: np.ndarray, places: np.ndarray | None = None) -> None:
        """Refuses tokens that are none of the vocabulary; `places`: where they lie in the file."""
        most = (self.facts.vocabulary or 0) - 1
        if int(tokens.max(initial=0)) > most:
            at = np.unravel_index(np.argmax(tokens > most), tokens.shape)
            place = at[0] if places is None else places[at]
            given = f"token {tokens[at]:,} at position {place:,} of {self._path}"
            raise UserError(Problem("directory", given, f"tokens from 0 to {most:,}"))


def _in_bucket(path: Path, dtype: np.dtype, count: int) -> Any:
    """Tokens of an object: of a small one all, of another one those that are looked at."""
    from bigbatch.places import buckets

    if count * dtype.itemsize > _READ_WHOLE_BYTES:
        return _Object(path, dtype, count)
    return np.frombuffer(buckets.read(path), dtype)


class _Object:
    """An array in a bucket: a range is read, or rows, [n, m], of neighbours, many at a time."""

    def __init__(self, path: Path, dtype: np.dtype, count: int):
        self._path, self._dtype, self._count = path, dtype, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        from bigbatch.places import buckets

        if isinstance(at, slice):
            at = np.arange(*at.indices(self._count))[None]
            return self[at][0] if at.size else np.empty(0, self._dtype)
        first, size = at[:, :1], self._dtype.itemsize
        ranges = np.concatenate([first, at[:, -1:] + 1], axis=1) * size
        pieces = buckets.read_ranges(self._path, ranges.tolist())
        rows = [np.frombuffer(data, self._dtype) for data in pieces]
        return np.array([row[own] for row, own in zip(rows, at - first, strict=True)])


def read_facts(directory: Path) -> Facts:
    """What the file of a directory of tokens says.

    Raises:
      UserError: there is none, or it says something else.
    """
    path = expect_bucket(directory, "directory") / FACTS_FILE
    try:
        told = parsed(text_of(path), {"dtype": str, "vocabulary": int, "tokens": {"train": int}})
        names = {field.name for field in dataclasses.fields(Facts)}
        facts = Facts(**{name: value for name, value in told.items() if name in names})
        fits = facts.tokens.keys() <= {"train", "test"} and facts.dtype in _DTYPES
        if not (fits and isinstance(facts.separator, int | None)):
            raise ValueError(f"it needs parts train and test, and a dtype of {', '.join(_DTYPES)}")
    except (OSError, ValueError) as error:
        allowed = f"a directory of tokens, from {prepare_command(directory)} ({path}: {error})"
        raise UserError(Problem("directory", str(directory), allowed)) from error
    return facts


def prepare_command(directory: str | Path = "DIR") -> str:
    """The command that makes a directory of tokens."""
    return f"bigbatch data prepare tokens --from=FILES {to_prepare(directory)}"


def _pieces(targets: np.ndarray, length: int) -> np.ndarray:
    """How many sequences hold so many targets."""
    return -(-targets // length)


@functools.cache
def _bible(part: str) -> bytes:
    """A part of the text; each chapter ends with a zero byte."""
    file = Path(__file__).with_name(f"{BIBLE}.txt.xz")
    chapters = lzma.decompress(file.read_bytes()).split(b"\n\n")
    test = range(_TEST_CHAPTER, len(chapters), _TEST_EVERY)
    return b"".join(c + b"\0" for i, c in enumerate(chapters) if (i in test) == (part == "test"))
