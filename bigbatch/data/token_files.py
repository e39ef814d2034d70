"""Makes a directory of tokens of files of text, for `bigbatch.data.tokens`.

Tokens are appended as they come; a file beside them says how far the preparation is. One that was
killed goes on from there, and leaves what an undisturbed one does.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigbatch.bars import Bar
from bigbatch.checks import parsed, text_of
from bigbatch.data.tokens import FACTS_FILE, Facts
from bigbatch.errors import Problem, RunError, UserError
from bigbatch.places.replacing import replacing

_PARTIAL_FILE = "tokens.partial.json"
_BYTES = "bytes"
# Texts of so many characters are made tokens together; more of a plain text is cut at a line's end.
_BATCH_CHARACTERS, _PIECE_BYTES = 2**20, 2**24
# What ends a document, in tokenizers of others.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|end▁of▁sentence|>")


class Piece(NamedTuple):
    """A text of a file.

    Attributes:
      text: a document, or a part of a long one.
      ends: whether the document ends with it.
      position: where the file is read on from when this piece is done: a byte, or a row.
      read_bytes: how much of the file has been read, for the progress bar.
    """

    text: str
    ends: bool
    position: int
    read_bytes: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What makes tokens of texts.

    Attributes:
      name: tells it from others.
      vocabulary: its tokens are 0 .. vocabulary - 1.
      separator: the token that ends a document.
      encode: texts -> the tokens of each.
    """

    name: str
    vocabulary: int
    separator: int
    encode: Callable[[list[str]], list[Any]]


def prepare(
    directory: str | Path,
    sources: Sequence[str],
    test_sources: Sequence[str] = (),
    *,
    tokenizer: str | Path | None = None,
    separator: str | None = None,
    field: str = "text",
    show_progress: bool = False,
) -> tuple[Facts, bool]:
    """Prepares a directory of tokens, unless it is prepared.

    Args:
      directory: where the files are to be; it is made.
      sources: files to train on, or patterns of them: Parquet; JSON lines, of which each is a
        document; anything else is plain text, each file a document. JSON lines and text may be
        compressed by gzip.
      test_sources: files to evaluate on.
      tokenizer: a file of the library `tokenizers`; None: bytes are tokens, and 0 is the separator.
      separator: the tokenizer's token for the end of a document; None: a usual one.
      field: of JSON and Parquet, the one with the text.
      show_progress: whether to show a progress bar on standard error.

    Returns:
      What was prepared, and whether it was now.

    Raises:
      UserError: files that are missing or of no use, or the directory holds other tokens.
      RunError: a library is missing, or the directory cannot be written.
    """
    encoder, place = encoder_of(tokenizer, separator), Path(directory)
    files = {"train": _found("from", sources), "test": _found("test-from", test_sources)}
    names = {part: [[file.name, file.stat().st_size] for file in files[part]] for part in files}
    asked = {"tokenizer": encoder.name, "separator": encoder.separator, "field": field, **names}
    dtype = np.min_scalar_type(encoder.vocabulary - 1).newbyteorder("<")
    counts = {part: 0 for part, of in files.items() if of}
    done = _state(place / FACTS_FILE, asked)
    if done is not None:
        return Facts(dtype.name, encoder.vocabulary, done["tokens"], encoder.separator), False
    state: dict[str, Any] = {"number": 0, "position": 0, "tokens": counts}
    state = _state(place / _PARTIAL_FILE, asked) or state
    work = [(part, file) for part in counts for file in files[part]]
    total = sum(file.stat().st_size for _, file in work)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with Bar(total, "bytes", show=show_progress) as bar:
            shown_bytes = 0
            for number in range(state["number"], len(work)):
                (part, path), start = work[number], state["position"]
                before = sum(file.stat().st_size for _, file in work[:number])
                with (place / f"{part}.bin").open("ab") as out:
                    out.truncate(state["tokens"][part] * dtype.itemsize)
                    for batch in _batches(_pieces(path, start, field)):
                        tokens = state["tokens"][part] + _append(out, batch, encoder, dtype)
                        state["tokens"][part] = tokens
                        out.flush()
                        state |= {"number": number, "position": batch[-1].position}
                        _write(place / _PARTIAL_FILE, {"asked": asked, **state})
                        bar.move(before + batch[-1].read_bytes - shown_bytes)
                        shown_bytes = before + batch[-1].read_bytes
                state["position"] = 0
        facts = Facts(dtype.name, encoder.vocabulary, state["tokens"], encoder.separator)
        _write(place / FACTS_FILE, {**dataclasses.asdict(facts), "asked": asked})
        (place / _PARTIAL_FILE).unlink()
    except OSError as error:  # Of a file to read, or of one to write.
        words = f"{error.filename or place}: {error.strerror}; the same command goes on from there"
        raise RunError(words) from error
    return facts, True


def encoder_of(tokenizer: str | Path | None, separator: str | None) -> Encoder:
    """What makes tokens; see `prepare`."""
    if tokenizer is None:
        return Encoder(
            _BYTES, 256, 0, lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts]
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        words = "a tokenizer's file needs a library that is not installed: pip install tokenizers"
        raise RunError(words) from error
    try:
        held = Tokenizer.from_file(str(tokenizer))
        sha256 = hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    except Exception as error:  # The library has no better one.
        allowed = f"a file of the library tokenizers ({error})"
        raise UserError(Problem("tokenizer", str(tokenizer), allowed)) from error
    names = _SEPARATORS if separator is None else (separator,)
    numbers = (held.token_to_id(name) for name in names)
    end = next((number for number in numbers if number is not None), None)
    if end is None:
        allowed = "the tokenizer's token for the end of a document, by --separator=TOKEN"
        raise UserError(Problem("separator", separator, allowed))

    def encode(texts: list[str]) -> list[Any]:
        return [made.ids for made in held.encode_batch(texts, add_special_tokens=False)]

    vocabulary = max(held.get_vocab(with_added_tokens=True).values()) + 1
    return Encoder(f"sha256 {sha256[:16]}", vocabulary, end, encode)


def _found(field: str, patterns: Sequence[str]) -> list[Path]:
    """The files of some patterns, those of each in the order of their names."""
    found: list[Path] = []
    for pattern in patterns:
        files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(Problem(field, pattern, "files that are there, or a pattern of them"))
        found += files
    return found


def _state(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a file says of a preparation, of the same; None where there is none."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = parsed(text_of(path), {"tokens": dict, "asked": dict})
    except (OSError, ValueError) as error:
        raise UserError(Problem("directory", str(path), f"its own file ({error})")) from error
    names = {"train": "from", "test": "test-from"}
    other = [name for name in asked if state["asked"].get(name) != asked[name]]
    if other:
        allowed = "what {} was prepared with: {}; or another directory"
        raise UserError(
            Problem(names.get(n, n), asked[n], allowed.format(path.parent, state["asked"].get(n)))
            for n in other
        )
    return state


def _write(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def _append(out: Any, pieces: list[Piece], encoder: Encoder, dtype: np.dtype) -> int:
    """Writes the pieces' tokens; how many they are."""
    count = 0
    for piece, tokens in zip(pieces, encoder.encode([p.text for p in pieces]), strict=True):
        end = np.full(int(piece.ends), encoder.separator, dtype)
        count += out.write(np.asarray(tokens, dtype).tobytes() + end.tobytes()) // dtype.itemsize
    return count


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are made tokens together."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(path: Path, start: int, field: str) -> Iterator[Piece]:
    """The texts of a file from a position on."""
    with path.open("rb") as raw:
        if path.suffix == ".parquet":
            yield from _of_parquet(raw, path, start, field)
            return
        is_json = {".jsonl", ".json", ".ndjson"} & {*path.suffixes}
        opened: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        opened.seek(start)
        while True:
            at = opened.tell()
            data = opened.readline() if is_json else opened.read(_PIECE_BYTES) + opened.readline()
            if not data:
                return
            try:
                text = data.decode()
                if is_json:
                    text = parsed(text, {field: str})[field] if text.strip() else ""
            except ValueError as error:
                allowed = f"JSON objects with a text {field!r}" if is_json else "text in UTF-8"
                given = f"{path}, from byte {at:,} on"
                raise UserError(Problem("from", given, f"{allowed} ({error})")) from error
            if text:
                ends = bool(is_json) or not opened.peek(1)
                yield Piece(text, ends, opened.tell(), raw.tell())


def _of_parquet(raw: Any, path: Path, start: int, field: str) -> Iterator[Piece]:
    """The texts of a Parquet file from a row on."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        words = "Parquet needs a library that is not installed: pip install pyarrow"
        raise RunError(words) from error
    try:
        file, row = parquet.ParquetFile(raw), 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            for batch in file.iter_batches(row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text and row > start:
                        read = path.stat().st_size * row // file.metadata.num_rows
                        yield Piece(text, True, row, read)
    except (ArrowException, IndexError) as error:
        allowed = f"a Parquet file with a column {field!r} ({error})"
        raise UserError(Problem("from", str(path), allowed)) from error
