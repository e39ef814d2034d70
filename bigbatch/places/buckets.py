"""Objects of Google Cloud Storage, through gcsfs: whole objects, conditions, leases.

Every failure is an OSError with a file's name and words for the user. gcsfs tries again what may
pass: statuses from 500 on, connections that break or stall. A request may so be carried out twice,
and its first answer be lost; what is done on a condition looks then at what is there.
"""

import contextlib
import errno
import functools
import io
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import fsspec
import fsspec.asyn as asyn
from etils.epath import gpath
from gcsfs.core import GCSFileSystem, UnclosableBytesIO, quote
from gcsfs.retry import HttpError

# A lease that was not renewed for so long is taken over; an old one is, without a look at clocks
# that may differ by minutes.
LEASE_S, OLD_LEASE_S = 30.0, 600.0
_CONNECT_S, _STALLED_S = 20.0, 60.0
_ERRNOS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 412: errno.EEXIST}
_WORDS = {
    401: "no credentials were found, or these are not taken: `gcloud auth application-default "
    "login`, or GOOGLE_APPLICATION_CREDENTIALS",
    404: "there is no such bucket or object",
}
_KINDS: dict[type[Exception], int] = {FileNotFoundError: 404, FileExistsError: 412}
# Of libraries beside gcsfs, which read buckets themselves.
_EMULATOR = "STORAGE_EMULATOR_HOST"
_FOLLOW_EMULATOR = ("TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")


class _Store(GCSFileSystem):
    """gcsfs without a memory of what was listed, since others write too, and with one error."""

    def __init__(self, *args: Any, **options: Any):
        options |= {
            "use_listings_cache": False,
            "token": "anon" if _EMULATOR in os.environ else None,
        }
        # What comes slowly but comes has no limit.
        limits = aiohttp.ClientTimeout(sock_connect=_CONNECT_S, sock_read=_STALLED_S)
        super().__init__(*args, requests_timeout=limits, **options)

    async def _call(self, method: str, path: str, *args: str, **options: Any) -> Any:
        if len(data := options.get("data") or b"") > 2**20:
            # Bytes of that size would hold up all other requests.
            options["data"] = UnclosableBytesIO(data)
        try:
            return await super()._call(method, path, *args, **options)
        except Exception as error:
            raise _told(error, f"gs://{'/'.join(args)}" if args else path) from error

    call = asyn.sync_wrapper(_call)

    def _open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        return _Written(path) if mode == "wb" else super()._open(path, mode, *args, **options)

    async def _mkdir(self, path: str, **options: Any) -> None:
        """Nothing: a bucket has no directories, and none is made by the way."""

    async def _info(self, path: str, *args: Any, **options: Any) -> Any:
        """As of the library; what an old list may hide is looked for twice."""
        try:
            return await super()._info(path, *args, **options)
        except FileNotFoundError:
            return await super()._info(path, *args, **options)

    # Those of the library take every failure for a no.
    async def _isdir(self, path: str) -> bool:
        return await self._kind(path) == "directory"

    async def _isfile(self, path: str) -> bool:
        return await self._kind(path) == "file"

    async def _kind(self, path: str) -> str | None:
        try:
            return str((await self._info(path))["type"])
        except FileNotFoundError:
            return None


class _Written(io.BytesIO):
    """A file to write: an object, of one request, when it is closed.

    The library sends pieces, of which the last cannot be sent again where its answer was lost.
    """

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            _store().pipe_file(self._path, data)


def _told(error: Exception, name: str) -> OSError:
    """A failure in words; 401 and 403 are the status of an HttpError or a text's beginning."""
    status: Any = _KINDS.get(type(error), getattr(error, "code", None))
    text = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
    if str(error).startswith("Forbidden"):
        status, text = 403, f"permission denied: {text}"
    status = int(status) if isinstance(error, HttpError) and status else status
    return OSError(_ERRNOS.get(status, errno.EIO), _WORDS.get(status, text), name)


def path_of(text: str) -> Path:
    """A path in a bucket, whose methods use the one store of this process."""
    _store()
    return gpath.PosixGPath(text)


@functools.cache
def _store() -> _Store:
    """The store, made known to the libraries that find it by name."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Store, clobber=True)
    # epath would else take TensorFlow where that is installed, which has credentials of its own.
    os.environ["EPATH_USE_TF"] = "false"
    gpath._is_tf_installed.cache_clear()
    if url := os.environ.get(_EMULATOR):
        for name in _FOLLOW_EMULATOR:
            os.environ.setdefault(name, url)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
    # It logs tracebacks of what is said in a sentence.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    store: _Store = fsspec.filesystem("gcs", finalize_on_close=True)
    return store


def put(path: Path | str, data: bytes) -> None:
    """Writes an object whole, over what was there."""
    _store().pipe_file(str(path), data)


def put_if(path: Path, data: bytes, generation: str = "0") -> str | None:
    """Writes an object if what is there has that generation; "0": if nothing is there.

    Returns:
      The new generation; None: there is another one.
    """
    store, mark = _store(), secrets.token_hex(16)
    bucket, name, _ = store.split_path(str(path))
    kinds = ("application/json; charset=UTF-8", json.dumps({"name": name}).encode()), ("", data)
    parts = [
        f"--{mark}\r\nContent-Type: {kind or 'application/octet-stream'}\r\n\r\n".encode() + text
        for kind, text in kinds
    ]
    try:
        made: dict[str, str] = store.call(
            "POST",
            f"{store._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="multipart",
            ifGenerationMatch=generation,
            headers={"Content-Type": f"multipart/related; boundary={mark}"},
            data=b"\r\n".join([*parts, f"--{mark}--".encode()]),
            json_out=True,
        )
        return made["generation"]
    except FileExistsError:
        found = look(path)
        # The answer to it was lost.
        return found.generation if found and found.data == data else None


class Object(NamedTuple):
    """What an object is now.

    Attributes:
      generation: of what it holds.
      age_s: since it was written, by the clocks of this machine and the bucket's.
      data: what it holds.
    """

    generation: str
    age_s: float
    data: bytes


def look(path: Path) -> Object | None:
    """What an object is now; None: there is none."""
    try:
        told = _store().info(str(path))
        data = read(path)
    except FileNotFoundError:
        return None
    return Object(told["generation"], time.time() - told["mtime"].timestamp(), data)


def read(path: Path, begin: int | None = None, end: int | None = None) -> bytes:
    """Bytes of an object, of all or of a range."""
    data: bytes = _store().cat_file(str(path), start=begin, end=end)
    return data


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Ranges of an object's bytes, many at a time."""
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    names = [str(path)] * len(ranges)
    found: list[bytes] = _store().cat_ranges(names, begins, ends, on_error="raise")
    return found


def move(source: Path, target: Path) -> None:
    """Moves all objects below a name: each is copied before the first is removed."""
    store = _store()
    for name in store.find(str(source)):
        store.cp_file(name, str(target) + name.removeprefix(str(source).removeprefix("gs://")))
    # Where the answer was lost, all may be removed already.
    with contextlib.suppress(FileNotFoundError):
        store.rm(str(source), recursive=True)


def expect(path: Path) -> None:
    """Makes sure that a path's bucket is there and can be listed."""
    store = _store()
    bucket, *_ = store.split_path(str(path))
    store.call("GET", "b/{}/o", bucket, maxResults=1)


class HeldError(Exception):
    """Somebody else holds a lease; its text says who."""


class Lease:
    """Keeps all others from a directory as long as this process lives: an object, written anew.

    A lock in a bucket does not fall with its holder. So the holder renews its object, and another
    start that has seen no renewal for `LEASE_S` takes it over, on the condition that it is the one
    that was seen. On the same host a holder that is dead is not waited for. One that was only slow
    finds that its lease has gone, and writes no more.

    Attributes:
      path: of the object.
      is_lost: whether another process has taken it over.
    """

    def __init__(self, path: Path, who: str):
        """Waits, at most for `LEASE_S`, for what a dead process has left.

        Raises:
          HeldError: another process renews it.
        """
        self.path, self.is_lost, self._ended = path, False, threading.Event()
        self._data = json.dumps({"who": who, "life": _life(os.getpid())}).encode()
        self._generation = self._taken()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Renews it no more."""
        self._ended.set()

    def release(self) -> None:
        """Lets others take it at once."""
        self.close()
        self._thread.join(LEASE_S)
        if self.is_lost:
            return
        store = _store()
        bucket, name, _ = store.split_path(str(self.path))
        condition = {"ifGenerationMatch": self._generation}
        # Who is not answered has no lease for long.
        with contextlib.suppress(OSError):
            store.call("DELETE", "b/{}/o/{}", bucket, name, **condition, timeout=LEASE_S / 3)

    def _taken(self) -> str:
        watched, since_s = "", time.monotonic()
        while True:
            found, generation = look(self.path), None
            told = _holder(found.data) if found else {}
            who = told.get("who", "another process")
            if found is None:
                generation = put_if(self.path, self._data)
            elif watched not in ("", found.generation):
                raise HeldError(who)
            elif (
                found.age_s > OLD_LEASE_S
                or _is_dead(told.get("life"))
                or (watched and time.monotonic() - since_s > LEASE_S)
            ):
                generation = put_if(self.path, self._data, found.generation)
            elif not watched:
                watched, since_s = found.generation, time.monotonic()
                words = (
                    f"{who} may still train in {self.path.parent}; waiting up to {LEASE_S:.0f} s"
                )
                print(f"bigbatch: {words} for a sign of it", file=sys.stderr)
            if generation is not None:
                return generation
            time.sleep(min(1.0, LEASE_S / 10))

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_S / 3):
            # Where the bucket does not answer for a while nobody else can take it either.
            with contextlib.suppress(OSError):
                generation = put_if(self.path, self._data, self._generation)
                if generation is None:
                    self.is_lost = True
                    return
                self._generation = generation


def _holder(data: bytes) -> dict[str, Any]:
    """What a lease says of its holder; nothing where it is damaged."""
    try:
        told = json.loads(data)
    except ValueError:
        told = {}
    return told if isinstance(told, dict) else {}


def _life(process: int) -> list[str] | None:
    """What tells a process that lives from all others; None: it is dead, or nobody knows."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        own = [boot, os.readlink("/proc/self/ns/pid"), str(process), fields[18]]
    except (OSError, IndexError):
        return None
    return None if state in "ZX" else own


def _is_dead(life: Any) -> bool:
    """Whether a process of this host's was of that life, and is no more."""
    here = _life(os.getpid())
    if not (here and isinstance(life, list) and life[:2] == here[:2]):
        return False
    return _life(int(life[2])) != life
