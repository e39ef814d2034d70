"""Token data against their definition, token by token; files made of texts, and killed."""

import gzip
import hashlib
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bigbatch import cli
from bigbatch.config.config import read_config
from bigbatch.data import random, token_files, tokens
from bigbatch.data.tokens import TokenOptions
from bigbatch.errors import RunError, UserError
from tests import trained

SEPARATOR = 9


def written(directory, train, test=None, **facts):
    """A directory of tokens, its `tokens.json` written by hand."""
    told = {"dtype": "uint16", "vocabulary": 10, "separator": SEPARATOR, **facts}
    parts = {"train": train} | ({} if test is None else {"test": test})
    directory.mkdir(exist_ok=True)
    for part, held in parts.items():
        np.asarray(held, told["dtype"]).tofile(directory / f"{part}.bin")
    counts = {part: len(held) for part, held in parts.items()}
    (directory / "tokens.json").write_text(json.dumps({"tokens": counts, **told}))
    return directory


def one_by_one(held, length, documents):
    """All sequences and which of their tokens have a target, by definition."""
    sequences, masks = [], []
    if documents == "padded":
        texts, text = [], []
        for token in held:
            text.append(token)
            if token == SEPARATOR:
                texts.append(text)
                text = []
        texts.append(text)
        for text in texts:
            for first in range(0, len(text) - 1, length):
                part = text[first : first + length + 1]
                missing = length + 1 - len(part)
                sequences.append(part + [SEPARATOR] * missing)
                masks.append([True] * (len(part) - 1) + [False] * missing)
        return sequences, masks
    for first in range(0, len(held) - length, length):
        part = held[first : first + length + 1]
        sequences.append(part)
        masks.append([documents == "packed" or token != SEPARATOR for token in part[:-1]])
    return sequences, masks


@given(
    held=st.lists(st.integers(0, SEPARATOR), min_size=2, max_size=60),
    length=st.integers(1, 9),
    documents=st.sampled_from(["packed", "masked", "padded"]),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_sequences_are_those_of_the_definition(
    tmp_path_factory, held, length, documents, dtype, seed
):
    expected, masks = one_by_one(held, length, documents)
    directory = written(tmp_path_factory.mktemp("tokens"), held, dtype=dtype)
    if not expected:
        with pytest.raises(UserError, match="sequence_tokens: given"):
            TokenOptions("tokens", length, directory, documents)
        return
    options = TokenOptions("tokens", length, directory, documents)
    part = options.parts["train"]
    assert len(part) == len(expected) == options.info.train_examples
    numbers = np.random.default_rng(seed).integers(0, len(expected), 2 * len(expected))
    found = part.read(numbers)
    assert found["tokens"].dtype == dtype
    assert found["tokens"].tolist() == [expected[n] for n in numbers]
    assert ("mask" in found) == (documents != "packed")
    if "mask" in found:
        assert found["mask"].tolist() == [masks[n] for n in numbers]
    shapes = {name: (array.shape[1:], array.dtype) for name, array in found.items()}
    assert shapes == options.info.example_shapes


def test_positions_are_the_streams(tmp_path):
    """Which sequence a position shows is the permutation's word, wherever a range is cut."""
    held = np.arange(1, 4001)
    directory = written(tmp_path / "t", held, held[:50], vocabulary=5000)
    data = TokenOptions("tokens", 7, directory, train_examples=500).load()
    assert (data.train_examples, data.test_examples, data.tokens_per_example) == (500, 7, 7)
    shown = data.training(3, 400, 1300)["tokens"]
    for row, position in zip(shown, range(400, 1700), strict=True):
        epoch, offset = divmod(position, 500)
        number = int(random.permute(np, offset, 500, random.epoch_key(np, 3, epoch)))
        assert row.tolist() == held[7 * number : 7 * number + 8].tolist()
    pieces = [data.training(3, 400, 10), data.training(3, 410, 1290)]
    np.testing.assert_array_equal(np.concatenate([p["tokens"] for p in pieces]), shown)
    assert data.evaluation(5, 2)["tokens"].tolist() == [[*range(36, 44)], [*range(43, 51)]]


def test_a_file_larger_than_what_stays_in_memory(tmp_path, monkeypatch):
    from bigbatch.data import parts

    held = np.arange(50_000) % SEPARATOR
    directory = written(tmp_path / "t", held)
    whole = TokenOptions("tokens", 100, directory).load().training(0, 0, 499)
    monkeypatch.setattr(parts, "_RESIDENT_BYTES", 1)
    pieces = TokenOptions("tokens", 100, directory).load().training(0, 0, 499)
    np.testing.assert_array_equal(pieces["tokens"], whole["tokens"])


def test_the_bible_is_what_its_licence_says():
    parts = {part: tokens._bible(part) for part in ("train", "test")}
    assert {part: len(text) for part, text in parts.items()} == tokens.BIBLE_FACTS.tokens
    chapters = {part: text.removesuffix(b"\0").split(b"\0") for part, text in parts.items()}
    order = [*chapters["train"]]
    for number, chapter in enumerate(chapters["test"]):
        order.insert(20 * number + 10, chapter)
    text = b"\n\n".join(order)
    licence = (tokens.Path(tokens.__file__).with_name("BIBLE_LICENSE.md")).read_text()
    assert hashlib.sha256(text).hexdigest().startswith(re.search("sha256 (\\w+)", licence)[1])
    assert f"{len(text):,} bytes of ASCII" in licence
    assert len(order) == 1_189
    assert text.isascii()
    verses = [line for line in text.split(b"\n") if re.match(rb"\d+ ", line)]
    names = [line for line in verses if re.fullmatch(rb"\d [A-Z][a-z]+ \d+", line)]
    assert len(verses) - len(names) == 31_102
    assert order[0].startswith(b"Genesis 1\n1 In the beginning God created the heaven")
    assert order[-1].endswith(b"be with you all. Amen.")
    assert not set(chapters["train"]) & set(chapters["test"])


def test_the_bible_as_data():
    data = TokenOptions("bible_kjv", 128, train_examples=1000).load()
    assert data.test_examples == 199_871 // 128
    first = data.evaluation(0, 2)["tokens"]
    assert bytes(first[0]).startswith(b"Genesis 11\n1 And the whole earth was of one language")
    assert first[0, -1] == first[1, 0]
    assert data.description["fingerprint"]["train"] == (
        f"sha256 {hashlib.sha256(tokens._bible('train')).hexdigest()[:16]} of all 4,033,785 "
        "tokens, the source's own word"
    )


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        TokenOptions(*arguments, **options).load()
    return str(caught.value)


def test_what_is_wrong_with_files_is_said(tmp_path):
    directory = written(tmp_path / "t", [1, 2, 3, 70, 5, 6], vocabulary=10)
    path = directory / "train.bin"
    assert f"directory: given 'token 70 at position 3 of {path}'; allowed: tokens from 0 to 9" in (
        refused("tokens", 2, directory)
    )
    assert (
        "sequence_tokens: given 6; nearest: 5; allowed: fewer than the 6 tokens of the train part"
        in (refused("tokens", 6, directory))
    )
    path.write_bytes(path.read_bytes()[:-3])
    assert "train.bin has 9 bytes'; allowed: 12 bytes, the 6 tokens that tokens.json tells of" in (
        refused("tokens", 2, directory)
    )
    path.unlink()
    assert "train.bin is missing" in refused("tokens", 2, directory)
    (directory / "tokens.json").write_text('{"dtype": "uint16", "vocabulary": "many"}')
    assert "vocabulary: 'many' is no int" in refused("tokens", 2, directory)
    assert "bigbatch data prepare tokens --from=FILES" in refused("tokens", 2, tmp_path / "none")
    assert "bigbatch data prepare tokens" in refused("tokens", 2)
    assert "given None; allowed: a directory of" in refused("tokens", 2, train_examples=10)
    nowhere = refused("tokens", 2, tmp_path / "none", train_examples=10)
    assert f"given '{tmp_path}/none'; allowed: a directory of tokens, from" in nowhere
    assert "bible_kjv comes with the package" in refused("bible_kjv", 2, directory)
    assert "a whole number from 1 to 2" in refused(
        "tokens", 2, written(tmp_path / "u", [1] * 5), train_examples=3
    )
    unmarked = written(tmp_path / "v", [1] * 5, separator=None)
    masked = refused("tokens", 2, unmarked, "masked")
    assert "documents: given 'masked'; nearest: 'packed'; allowed: packed, as" in masked


def test_a_wrong_token_of_a_large_file_is_found_where_it_is_read(tmp_path, monkeypatch):
    held = [1] * 20
    held[13] = 12
    directory = written(tmp_path / "t", held)
    monkeypatch.setattr(tokens, "is_read_whole", lambda array: False)
    part = TokenOptions("tokens", 4, directory).parts["train"]
    part.read(np.array([0, 1, 2]))
    with pytest.raises(UserError, match=r"token 12 at position 13 of .*train.bin"):
        part.read(np.array([0, 3]))


LANGUAGE = {
    "data": {"name": "bible_kjv", "sequence_tokens": 16, "train_examples": 400},
    "model": {"name": "transformer", "layers": 1, "width": 8, "heads": 2, "vocabulary": 256},
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model": {**LANGUAGE["model"], "vocabulary": 100}},
            "model.vocabulary: given 100; nearest: 256; allowed: at least 256, the vocabulary",
        ),
        ({"data": {"name": "digits"}}, "model: given 'TransformerConfig'; allowed: data of tokens"),
        ({"model": trained.FLOAT64_MODEL}, "model: given 'WideResNetConfig'; allowed: a bundled"),
        ({"label_smoothing": 0.1}, "label_smoothing: given 0.1; nearest: 0.0; allowed: 0 but"),
        ({"data": {"name": "bible_kjv"}}, "data.sequence_tokens: given 'nothing'"),
        ({"data": {"name": "bible"}}, "nearest: 'bible_kjv'"),
    ],
)
def test_what_does_not_fit_together_in_a_config(changes, problem):
    read_config(trained.tree(**LANGUAGE))
    with pytest.raises(UserError) as caught:
        read_config(trained.tree(**LANGUAGE | changes))
    assert problem in str(caught.value)


def test_a_plan_needs_no_tokens():
    data = {"name": "tokens", "sequence_tokens": 4096, "train_examples": 3_662_109_375}
    for place in ({}, {"directory": "nowhere"}):
        config = read_config(trained.tree(**LANGUAGE | {"data": {**data, **place}}, epochs=1e-8))
        assert config.plan.train_examples * config.data.info.tokens_per_example == 15 * 10**12


TEXTS = ["In the beginning\nwas the Word", "a", "", "β and δ", "x" * 50, "1\n2\n3\n"]


@pytest.fixture
def sources(tmp_path):
    """The same texts in every kind of file, and what they are as bytes."""
    place = tmp_path / "texts"
    place.mkdir()
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS))
    (place / "a.jsonl").write_text(f"\n{lines}\n")
    with gzip.open(place / "b.json.gz", "wt") as file:
        file.write(lines)
    parquet.write_table(pa.table({"text": [*TEXTS, None]}), place / "c.parquet", row_group_size=3)
    (place / "d.txt").write_text(TEXTS[0])
    with gzip.open(place / "e.txt.gz", "wt") as file:
        file.write(TEXTS[5])
    files = [[t for t in TEXTS if t]] * 3 + [[TEXTS[0]], [TEXTS[5]]]
    return str(place / "*"), b"".join(f"{text}\0".encode() for of in files for text in of)


def test_files_of_every_kind_become_tokens(sources, tmp_path):
    pattern, expected = sources
    facts, is_new = token_files.prepare(tmp_path / "out", [pattern], [pattern])
    assert is_new
    assert (facts.vocabulary, facts.dtype, facts.separator) == (256, "uint8", 0)
    for part in ("train", "test"):
        assert (tmp_path / "out" / f"{part}.bin").read_bytes() == expected
        assert facts.tokens[part] == len(expected)
    assert token_files.prepare(tmp_path / "out", [pattern], [pattern]) == (facts, False)
    assert tokens.read_facts(tmp_path / "out") == facts
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".bin", ".bin", ".json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("characters", [1, 30])
def test_a_killed_preparation_goes_on(sources, tmp_path, monkeypatch, characters):
    """Killed after every write in turn, with half of the next tokens on the disk."""
    pattern, expected = sources
    monkeypatch.setattr(token_files, "_BATCH_CHARACTERS", characters)
    monkeypatch.setattr(token_files, "_PIECE_BYTES", 4)
    out, append, kills = tmp_path / "out", token_files._append, 0

    def killed_append(file, pieces, *rest):
        nonlocal left
        left -= 1
        if left < 0:
            append(file, pieces[:1], *rest)
            raise Killed
        return append(file, pieces, *rest)

    monkeypatch.setattr(token_files, "_append", killed_append)
    while True:
        left = 2
        try:
            facts, _ = token_files.prepare(out, [pattern])
            break
        except Killed:
            kills += 1
            assert not (out / "tokens.json").exists()
            with pytest.raises(UserError, match=r"field: given 'other'; allowed: what .* text"):
                token_files.prepare(out, [pattern], field="other")
    assert kills > 4
    assert (out / "train.bin").read_bytes() == expected
    assert facts.tokens == {"train": len(expected)}


def test_what_is_wrong_with_texts_is_said(tmp_path):
    def said(name, content, **options):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            token_files.prepare(tmp_path / "out", [str(tmp_path / name)], **options)
        return str(caught.value)

    found = said("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n')
    assert f"from: given '{tmp_path}/a.jsonl, from byte 14 on'; allowed: JSON objects" in found
    assert "text is missing" in found
    assert "no JSON" in said("a.jsonl", b"[1, 2") or "Expecting" in said("a.jsonl", b"[1, 2")
    assert "text in UTF-8" in said("a.txt", b"\xff\xfe")
    assert "a Parquet file with a column 'text'" in said("a.parquet", b"PAR1 and no more")
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    assert "a Parquet file with a column 'text'" in said("b.parquet", content)
    with pytest.raises(UserError, match="from: given 'none/"):
        token_files.prepare(tmp_path / "out", ["none/*.txt"])
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RunError, match="the same command goes on"):
        token_files.prepare(tmp_path / "file", [str(tmp_path / "a.txt")])


@pytest.fixture
def tokenizer(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "in": 1, "the": 2, "beginning": 3, "was": 4, "word": 5, "</s>": 6}
    made = library.Tokenizer(library.models.WordLevel(words, "<unk>"))
    made.normalizer = library.normalizers.Lowercase()
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_a_tokenizers_file_makes_the_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    prepare = [tmp_path / "out", [str(tmp_path / "a.txt")]]
    facts, _ = token_files.prepare(*prepare, tokenizer=tokenizer)
    assert np.fromfile(tmp_path / "out" / "train.bin", "uint8").tolist() == [1, 2, 3, 4, 2, 5, 6]
    assert (facts.vocabulary, facts.separator) == (7, 6)
    with pytest.raises(UserError, match=r"tokenizer: given 'bytes'; allowed: what .* sha256"):
        token_files.prepare(*prepare)
    with pytest.raises(UserError, match="separator: given '<eos>'"):
        token_files.prepare(*prepare, tokenizer=tokenizer, separator="<eos>")
    with pytest.raises(UserError, match="tokenizer: given"):
        token_files.prepare(*prepare, tokenizer=tmp_path / "a.txt")


def test_numbers_of_two_bytes_are_counted_as_one_token(tokenizer, tmp_path):
    """Two texts, as the second begins where the count says that the first ends."""
    held = json.loads(tokenizer.read_text())
    held["model"]["vocab"] |= {f"word{i}": i for i in range(7, 257)}
    tokenizer.write_text(json.dumps(held))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("in the word256")
    facts, _ = token_files.prepare(
        tmp_path / "out", [str(tmp_path / "[ab].txt")], tokenizer=tokenizer
    )
    found = np.fromfile(tmp_path / "out" / "train.bin", "<u2").tolist()
    assert found == 2 * [1, 2, 256, 6]
    assert (facts.dtype, facts.tokens["train"]) == ("uint16", 8)


def test_the_command(sources, tmp_path, capsys):
    pattern, expected = sources
    out = str(tmp_path / "out")
    command = ["data", "prepare", "tokens", f"--from={pattern}", f"--directory={out}"]
    for word in ("now", "already"):
        assert cli.main(command) == 0
        assert capsys.readouterr().out == (
            f"tokens are {word} prepared in {out}: {len(expected)} in train; "
            "vocabulary 256, separator 0, uint8\n"
        )
    assert cli.main(["data", "info", "tokens", f"--directory={out}"]) == 0
    assert f"{len(expected)} tokens in the train part\n" in capsys.readouterr().out
    assert cli.main(["data", "info", "bible_kjv"]) == 0
    assert "4,033,785 tokens in the train part\n" in capsys.readouterr().out
    assert cli.main(["data", "prepare", "tokens"]) == 2
    assert cli.main(["data", "prepare", "digits", "--field=text"]) == 2
    assert "field: given 'text'; allowed: nothing, but for tokens" in capsys.readouterr().err
