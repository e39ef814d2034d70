"""The real imagenet2012 of tensorflow-datasets, prepared from tiny tars of generated JPEGs."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_CLASSES, IMAGES_PER_CLASS, TEST_IMAGES = 4, 9, 11
FORMATS = ("array_record", "tfrecord")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Where the data sets are, and what they were made from.

    Attributes:
      directories: data_dir by file format.
      images: encoded train images by file name.
      labels: of them.
    """

    directories: dict[str, Path]
    images: dict[str, bytes]
    labels: dict[str, int]

    def files(self, file_format: str, split: str) -> list[Path]:
        pattern = f"imagenet2012/*/imagenet2012-{split}.{file_format}-*"
        return sorted(self.directories[file_format].glob(pattern))


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8[height, width, 3] with the spectrum of photographs, so that JPEGs have usual sizes."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    shared = rng.normal(size=(height, width))
    planes = []
    for _ in range(3):
        noise = 0.8 * shared + 0.6 * rng.normal(size=(height, width))
        plane = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.2, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std())
    return np.clip(np.stack(planes, axis=-1) * 55 + 120, 0, 255).astype(np.uint8)


def encode(image: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options) -> bytes:
    made = io.BytesIO()
    picture = Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(made, kind, **options)
    return made.getvalue()


def prepare(
    root: Path,
    *,
    images_per_class: int = IMAGES_PER_CLASS,
    test_images: int = TEST_IMAGES,
    size: tuple[int, int] | None = None,
    quality: int = 80,
) -> Prepared:
    """Writes both tars, and both file formats from them.

    Args:
      root: an empty directory.
      images_per_class: of each of the `TRAIN_CLASSES`.
      test_images: in all.
      size: height and width of every train image; None for small ones of many sizes, some grey.
      quality: of the JPEGs.

    Returns:
      What was written.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    words = Path(tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    images, labels = {}, {}
    manual = root / "manual"
    manual.mkdir()
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as tar:
        for label, word in enumerate(words[:TRAIN_CLASSES]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                for k in range(images_per_class):
                    name = f"{word}_{k}.JPEG"
                    sides = rng.integers(40, 160, 2) if size is None else size
                    # The third of each class is grey; ImageNet has such.
                    mode = "L" if k == 2 and size is None else None
                    images[name] = encode(photo(rng, *sides), mode=mode, quality=quality)
                    labels[name] = label
                    _add(part, name, images[name])
            _add(tar, f"{word}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
        for k in range(test_images):
            _add(tar, f"ILSVRC2012_val_{k + 1:08d}.JPEG", encode(photo(rng, 70, 90 + k)))
    tfds.disable_progress_bar()
    directories = {}
    for file_format in FORMATS:
        directories[file_format] = root / file_format
        builder = tfds.builder(
            "imagenet2012", data_dir=directories[file_format], file_format=file_format
        )
        config = tfds.download.DownloadConfig(manual_dir=manual, num_shards=3)
        builder.download_and_prepare(download_config=config)
    return Prepared(directories, images, labels)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
