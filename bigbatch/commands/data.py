"""The verbs `bigbatch data prepare`, `info` and `bench`."""

import argparse
import logging
import os
import sys
from typing import Any

from bigbatch.checks import Checks
from bigbatch.errors import Problem, UserError
from bigbatch.places.paths import is_bucket, to_prepare


def add_data(verbs: Any) -> None:
    """Adds the verb `data` and its own verbs to the command's parser."""
    text = "Put data sets on disk, say what is there, measure the input."
    data = verbs.add_parser("data", help=text, description=text)
    parts = data.add_subparsers(metavar="VERB", required=True)
    text = "Put a data set on disk: download it, or make it from files that are there."
    prepare = parts.add_parser("prepare", help=text, description=text)
    prepare.set_defaults(verb=_prepare)
    prepare.add_argument(
        "name", metavar="NAME", help="as tensorflow-datasets calls it; or tokens, of files of text"
    )
    prepare.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        nargs="+",
        help="files to make it from (imagenet2012: the two tars; fashion_mnist: the four idx gz "
        "files, by default those of Debian's package dataset-fashion-mnist; tokens: files or "
        "patterns of them, Parquet, JSON lines or plain text)",
    )
    _add_directory(prepare)
    for name, many, text in (
        ("test-from", "+", "files to evaluate on"),
        ("tokenizer", None, "a file of the library tokenizers (default: bytes are tokens)"),
        ("separator", None, "its token for the end of a document (default: a usual one)"),
        ("field", None, "with the text, in Parquet and JSON (default text)"),
    ):
        prepare.add_argument(f"--{name}", nargs=many, help=f"of tokens: {text}")
    text = "Say what is known of a data set, where its files are and what is missing."
    info = parts.add_parser("info", help=text, description=text)
    info.set_defaults(verb=_info)
    info.add_argument("name", metavar="NAME", help="of the data set, data.name in a config")
    _add_directory(info)
    info.add_argument("--path", metavar="FILE.npz", help="of the data set named arrays")
    text = "Measure a config's own input alone, in examples a second."
    bench = parts.add_parser("bench", help=text, description=text)
    bench.set_defaults(verb=_bench)
    bench.add_argument("--config", required=True, metavar="FILE.py[:EXPERIMENT]")
    bench.add_argument("--seconds", type=float, default=3.0, help="for each batch size (default 3)")


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory",
        metavar="DIR",
        help="where prepared data sets are kept, data.directory in a config (default: "
        "tensorflow-datasets' own)",
    )


def _prepare(options: argparse.Namespace) -> None:
    if is_bucket(options.directory or ""):
        allowed = f"a directory on this machine: {to_prepare(options.directory)}"
        raise UserError(Problem("directory", options.directory, allowed))
    names = ("test_from", "tokenizer", "separator", "field")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.name == "tokens":
        _prepare_tokens(options, given)
        return
    checks = Checks()
    for name, value in given.items():
        checks.require(False, name.replace("_", "-"), value, "nothing, but for tokens")
    many = len(options.source or ()) > 1
    checks.require(not many, "from", options.source, "one directory")
    checks.done()
    from bigbatch.data.tfds.prepare import prepare

    # What TensorFlow and tensorflow-datasets say of themselves would hide what is said here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    path, is_new = prepare(
        options.name,
        data_dir=options.directory,
        source=options.source and options.source[0],
        show_progress=sys.stderr.isatty(),
    )
    print(f"{options.name} is {'now' if is_new else 'already'} prepared in {path}")


def _prepare_tokens(options: argparse.Namespace, given: dict[str, Any]) -> None:
    checks = Checks()
    for name, value in (("from", options.source), ("directory", options.directory)):
        checks.require(bool(value), name, value, "needed for tokens: bigbatch data prepare --help")
    checks.done()
    from bigbatch.data.token_files import prepare

    tests = given.pop("test_from", ())
    show = sys.stderr.isatty()
    facts, is_new = prepare(options.directory, options.source, tests, **given, show_progress=show)
    counts = ", ".join(f"{count:,} in {part}" for part, count in facts.tokens.items())
    print(
        f"tokens are {'now' if is_new else 'already'} prepared in {options.directory}: {counts}; "
        f"vocabulary {facts.vocabulary:,}, separator {facts.separator}, {facts.dtype}"
    )


def _info(options: argparse.Namespace) -> None:
    from bigbatch.commands.data_info import describe

    print(describe(options.name, options.directory, options.path))


def _bench(options: argparse.Namespace) -> None:
    from bigbatch.config.file import load_config

    config = load_config(options.config, options.overrides)
    checks = Checks()
    checks.number("seconds", options.seconds, "a number of seconds above 0", above=0)
    checks.done()
    from bigbatch.commands.input_bench import StageRate, measure

    heads: list[str] = ["batch size", "microbatch", "examples/s", "examples"]

    def say(rate: StageRate) -> None:
        if heads:
            print(f"{config.data.name}: microbatches on the devices, as a run makes them, alone")
            print(" ".join(f"{head:>14}" for head in heads))
            heads.clear()
        print(
            f"{rate.batch_size:>14,} {rate.microbatch_examples:>14,} "
            f"{rate.examples_per_s:>14,.0f} {rate.examples:>14,}",
            flush=True,
        )

    measure(config, seconds=options.seconds, say=say)
