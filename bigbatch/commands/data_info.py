"""What is known of a data set, where its files are, and what is missing of them."""

from pathlib import Path

from bigbatch.data import own_arrays, sets, tokens
from bigbatch.data.tfds import metadata as tfds_metadata
from bigbatch.errors import UserError
from bigbatch.places.paths import place, size_bytes


def describe(name: str, data_dir: str | Path | None = None, path: str | Path | None = None) -> str:
    """A data set in a few lines for the user. Images are not read.

    Args:
      name: see `sets.info`.
      data_dir: where tensorflow-datasets keeps its files; None: its default directory.
      path: of the npz file, for the data set `arrays`.

    Raises:
      UserError: there is no such data set.
    """
    if name in tokens.NAMES:
        return _of_tokens(name, data_dir)
    prepared = None
    if name not in ("digits", own_arrays.NAME):
        prepared = tfds_metadata.find(name, data_dir)
    lines = [name]
    try:
        facts = sets.info(name, directory=data_dir, path=path)
    except UserError:
        # Files that are there may be of no use as arrays, and are described all the same.
        if prepared is None:
            raise
        lines += [f"  {split}: {prepared.num_examples(split):,}" for split in prepared.templates]
        lines.append(f"  images {prepared.image_shape}, {prepared.num_classes} classes")
    else:
        lines.append(
            f"  {facts.train_examples:,} training examples, {facts.test_examples:,} to test on"
        )
        lines.append(f"  images {facts.image_shape}, {facts.num_classes} classes")
        if facts.mean:
            mean, std = (", ".join(f"{v:g}" for v in values) for values in (facts.mean, facts.std))
            lines.append(f"  pixels: mean {mean}; standard deviation {std}")
        else:
            lines.append("  pixels: mean and standard deviation are taken when it is loaded")
    if name == "digits":
        lines.append("  comes with bigbatch")
    elif path is not None:
        lines.append(f"  in {path}")
    elif prepared is None:
        from bigbatch.data.tfds import files as tfds_files

        lines.append(f"  not on disk; to get it: {tfds_files.prepare_command(name, data_dir)}")
    else:
        lines += _files(prepared)
    return "\n".join(lines)


def _of_tokens(name: str, directory: str | Path | None) -> str:
    """Token data in a few lines."""
    if name == tokens.BIBLE:
        facts, where = tokens.BIBLE_FACTS, "comes with bigbatch; bytes are tokens"
    else:
        facts, where = tokens.read_facts(place(directory or "", "directory")), f"in {directory}"
    lines = [f"  {count:,} tokens in the {part} part" for part, count in facts.tokens.items()]
    end = "unknown" if facts.separator is None else f"{facts.separator}, at a document's end"
    lines.append(f"  {facts.dtype}, vocabulary {facts.vocabulary:,}, separator {end}")
    return "\n".join([name, *lines, f"  {where}"])


def _files(prepared: tfds_metadata.Prepared) -> list[str]:
    """Where a prepared data set is, how large, and which files are missing."""
    lines = [f"  {prepared.file_format} files in {prepared.directory}"]
    num_bytes = 0
    for split in prepared.shard_examples:
        files = prepared.files(split)
        lines.append(f"  {split}: {prepared.num_examples(split):,} examples")
        absent = [file for file in files if not file.exists()]
        num_bytes += sum(size_bytes(file) for file in files if file.exists())
        if absent:
            lines.append(f"  missing of {split}: {len(absent)} of {len(files)} files")
            lines += [f"    {file.name}" for file in absent[:5]]
            lines.append("  to get them, remove the directory and prepare the data set again")
    lines.append(f"  {num_bytes / 1e6:,.1f} MB")
    return lines
