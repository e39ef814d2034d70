"""The verbs `bigbatch data prepare`, `info` and `bench`."""

import argparse
import logging
import os
import sys
from typing import Any


def add_data(verbs: Any) -> None:
    """Adds the verb `data` and its own verbs to the command's parser."""
    text = "Put data sets on disk, say what is there, measure the input."
    data = verbs.add_parser("data", help=text, description=text)
    parts = data.add_subparsers(metavar="VERB", required=True)
    text = "Put a data set on disk: download it, or make it from files that are there."
    prepare = parts.add_parser("prepare", help=text, description=text)
    prepare.set_defaults(verb=_prepare)
    prepare.add_argument("name", metavar="NAME", help="as tensorflow-datasets calls it")
    prepare.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="files to make it from (imagenet2012: the two tars; fashion_mnist: the four idx gz "
        "files, by default those of Debian's package dataset-fashion-mnist)",
    )
    _add_directory(prepare)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory",
        metavar="DIR",
        help="where prepared data sets are kept, data.directory in a config (default: "
        "tensorflow-datasets' own)",
    )


def _prepare(options: argparse.Namespace) -> None:
    from bigbatch.data.prepare import prepare

    # What TensorFlow and tensorflow-datasets say of themselves would hide what is said here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    path, is_new = prepare(
        options.name,
        data_dir=options.directory,
        source=options.source,
        show_progress=sys.stderr.isatty(),
    )
    print(f"{options.name} is {'now' if is_new else 'already'} prepared in {path}")
