"""The digest of a model's files: what makes a namespace safe to share. Blocking; off the hot path.

**Which files count**, by name, in the folder and everything below it:

- weights: ``*.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.npz *.npy *.tensors``, but not a
  trainer's state (``optimizer``, ``scheduler``, ``scaler``, ``training_args`` with ``.bin`` or
  ``.pt``, and ``rng_state*.pth``);
- every ``*.json`` (architecture, quantisation, adapter, shard index), but not what shapes only text
  and sampling: ``tokenizer* vocab* merges* added_tokens* special_tokens* chat_template*
  generation_config*``, nor ``trainer_state.json``;
- ``*.py``: remote code computes too;
- nothing whose name, or whose folder's name, starts with a dot.

A file more can only cost a shared hit; a file too few would share wrong bytes. So folders below
count although some engines skip them, and links are followed.

**The digest** of a folder is ``sha256`` over one line ``<sha256>  <relative posix name>`` per file,
sorted by name: what ``sha256sum`` prints for those files. The folder's own name is not identity.
That of a single file is its ``sha256sum``; one of a split set (``-00001-of-00003.gguf``) stands for
the whole set, as engines load it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

from kvlayer.errors import IdentityError
from kvlayer.identity import weights_samples
from kvlayer.identity.own import is_own
from kvlayer.identity.weights_cache import DigestCache
from kvlayer.urls import shown_text

__all__ = ["OnProgress", "counts", "parse_weights", "process_weights", "weights_digest"]

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all). Files that need no reading count as done at once."""

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|npz|npy|tensors)", re.IGNORECASE | re.DOTALL
)
_TRAINER = re.compile(
    r"(optimizer|scheduler|scaler|training_args)\.(bin|pt)|rng_state.*\.pth|trainer_state\.json"
)
_TEXT_ONLY = re.compile(
    r"(tokenizer|vocab|merges|added_tokens|special_tokens|chat_template|generation_config).*"
)
_SPLIT = re.compile(r"(.*-)([0-9]{5})-of-([0-9]{5})(\.[a-z]+)", re.IGNORECASE | re.DOTALL)
_BLOB = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_BUFFER_NBYTES = 4 * 1024 * 1024
_ATTEMPTS = 2
_EXPLICIT = 'or pass a digest: model.weights = "sha256:<64 hex digits>"'


def counts(name: str) -> bool:
    """Whether a file of this name (without its folder) is part of a model's identity."""
    if name.startswith(".") or _TRAINER.fullmatch(name):
        return False
    if name.lower().endswith(".json"):
        return not _TEXT_ONLY.fullmatch(name)
    return name.lower().endswith(".py") or _WEIGHTS.fullmatch(name) is not None


def weights_digest(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    whole: bool = False,
) -> str:
    """``sha256:<64 hex digits>`` over the model files of a folder, or of a single weights file.

    Reads every file once. Later calls find the sha256 of a file of more than 16 MiB in
    ``cache_dir`` (default: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``kvlayer``) while device,
    inode, size, mtime and ctime stay the same, and samples of its bytes do: see
    ``kvlayer.identity.weights_samples`` for what that leaves open. A file of a Hub cache (a link
    into ``blobs/`` named by a sha256) is not read: its name is believed where nobody but the user
    and root can write there, unless the file was changed in any way after it was linked. So is what
    is in ``cache_dir``. ``whole`` reads every byte and believes nothing. A directory that cannot be
    written is not used.

    Raises ``IdentityError`` when there are no weights, when a file cannot be read, and when one
    keeps changing while it is read. Blocks for as long as reading takes.
    """
    root = Path(path)
    try:
        files = _files(root)
        sizes = [file.stat().st_size for file in files.values()]
    except OSError as exc:
        raise _unreadable(exc, root) from None
    cache = DigestCache(cache_dir)
    hasher = _Hasher(cache, sum(sizes), on_progress, whole=whole)
    try:
        found = {
            name: hasher.digest(file, size)
            for (name, file), size in zip(files.items(), sizes, strict=True)
        }
    finally:
        cache.save()  # hours of reading must not be lost to the last file
    return _digest_of(found)


def parse_weights(
    text: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    whole: bool = False,
) -> str:
    """The digest that ``text`` gives, or that the files at the path ``text`` have.

    Raises ``IdentityError`` as :func:`weights_digest`, and for a malformed digest.
    """
    if _DIGEST.fullmatch(text):
        return text
    if text.startswith("sha256:") or not text:
        raise IdentityError(
            f"not a weights digest: {shown_text(text)}",
            hint="expected sha256: and 64 lowercase hex digits, or the path of a model",
        )
    return weights_digest(text, cache_dir=cache_dir, on_progress=on_progress, whole=whole)


def process_weights() -> str:
    """An identity no other process has, for KV of weights that nobody can name."""
    return f"process:{uuid4().hex}"


def _files(root: Path) -> dict[str, Path]:
    """Relative posix name -> file, for all files that count. One single file is named ``""``."""
    try:
        root = root.expanduser()
    except RuntimeError as exc:  # "~nobody"
        raise IdentityError(f"no model at {shown_text(str(root))}: {exc}", hint=_EXPLICIT) from None
    if not root.exists():
        raise IdentityError(
            f"no model at {shown_text(str(root))}", hint=f"check the path, {_EXPLICIT}"
        )
    if not root.is_dir():
        return _single(root)
    files = dict(_walk(root, "", ()))
    if not any(_WEIGHTS.fullmatch(name) for name in files):
        raise IdentityError(
            f"no weights file in {shown_text(str(root))}, only {len(files)} other files",
            hint=f"point at the folder with *.safetensors, *.bin or *.gguf, {_EXPLICIT}",
        )
    if any("\n" in name for name in files):
        raise IdentityError(
            f"a file below {shown_text(str(root))} has a line break in its name",
            hint=f"rename it, {_EXPLICIT}",
        )
    return files


def _single(file: Path) -> dict[str, Path]:
    if not _WEIGHTS.fullmatch(file.name):
        raise IdentityError(
            f"{shown_text(str(file))} is no weights file",
            hint=f"point at the model's folder or at a file such as model.gguf, {_EXPLICIT}",
        )
    split = _SPLIT.fullmatch(file.name)
    if split is None or not 1 <= int(split[2]) <= int(split[3]):
        return {"": file}
    stem, _, last, suffix = split.groups()
    names = [f"{number:05d}-of-{last}{suffix}" for number in range(1, int(last) + 1)]
    return {name: file.with_name(stem + name) for name in names}


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, Path]]:
    """Files that count below ``folder``. Links are followed; a link back up is not entered."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
        elif counts(entry.name):
            yield f"{prefix}{entry.name}", folder / entry.name


def _digest_of(found: dict[str, str]) -> str:
    """The digest of a model from its files' names and sha256s."""
    if list(found) == [""]:
        return f"sha256:{found['']}"
    lines = sorted((os.fsencode(name), digest.encode()) for name, digest in found.items())
    listing = b"".join(b"%s  %s\n" % (digest, name) for name, digest in lines)
    return f"sha256:{sha256(listing).hexdigest()}"


class _Hasher:
    """Hashes files one after the other through one buffer, and counts the bytes."""

    def __init__(
        self, cache: DigestCache, total: int, on_progress: OnProgress | None, *, whole: bool
    ) -> None:
        self._cache = cache
        self._whole = whole
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._buffer = memoryview(bytearray(0))

    def digest(self, file: Path, size: int) -> str:
        """The file's sha256 in hex. ``size`` is what it counts for in the progress."""
        try:
            digest = (None if self._whole else _blob_digest(file)) or self._read(file)
        except OSError as exc:
            raise _unreadable(exc, file) from None
        self._done += size
        self._report(0)
        return digest

    def _read(self, file: Path) -> str:
        for _ in range(_ATTEMPTS):
            with _opened(file) as raw:
                before = os.fstat(raw.fileno())
                known = self._known(raw, before)
                if known is not None:
                    return known
                settled = DigestCache.is_settled(before)
                digest = self._stream(raw, before.st_size)
                is_large = before.st_size > weights_samples.WHOLE_NBYTES
                samples = _samples(raw, before.st_size) if is_large and settled else ""
            if DigestCache.key(before) == DigestCache.key(file.stat()):
                if samples:
                    self._cache.put(before, samples, digest)
                return digest
        raise IdentityError(
            f"{shown_text(str(file))} changed while it was read, {_ATTEMPTS} times",
            hint=f"wait until the download or training has ended, {_EXPLICIT}",
        )

    def _known(self, raw: FileIO, status: os.stat_result) -> str | None:
        """The remembered sha256 of an open file, when its samples are those that had it."""
        if self._whole or status.st_size <= weights_samples.WHOLE_NBYTES:
            return None
        known = self._cache.get(status)
        if known is None or known[0] != _samples(raw, status.st_size):
            return None
        return known[1]

    def _stream(self, raw: FileIO, size: int) -> str:
        """The sha256 of the file's content, which ends early once there is more than ``size``."""
        if not self._buffer:
            self._buffer = memoryview(bytearray(_BUFFER_NBYTES))
        state, inside = sha256(), 0
        # A file that grows as fast as it is read would never end.
        while inside <= size and (count := raw.readinto(self._buffer)):
            state.update(self._buffer[:count])
            inside += count
            self._report(inside)
        return state.hexdigest()

    def _report(self, inside: int) -> None:
        if self._on_progress is not None:
            self._on_progress(min(self._done + inside, self._total), self._total)


def _opened(file: Path) -> FileIO:
    """A model's file, open for reading. A pipe in its place is refused, not waited for."""
    raw = FileIO(file, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    if stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return raw
    raw.close()
    raise IdentityError(
        f"{shown_text(str(file))} is not a regular file", hint=f"remove it, {_EXPLICIT}"
    )


def _samples(raw: FileIO, size: int) -> str:
    return weights_samples.sampled(raw.fileno(), size)


def _blob_digest(file: Path) -> str | None:
    """The sha256 that a Hub cache's blob is named by. Its 40-digit names are git's, not sha256.

    None where somebody else can have written the blob, or the link to it, and where it was written
    to after it was linked, as by a program that saves a model into a snapshot's folder. Times of
    writing can be set back, those of change cannot.
    """
    link = file.lstat()
    if not stat.S_ISLNK(link.st_mode):
        return None
    blob = file.resolve(strict=True)
    if blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
        return None
    status = blob.stat()
    is_as_linked = (
        stat.S_ISREG(status.st_mode)
        and status.st_mtime_ns <= link.st_mtime_ns
        and status.st_ctime_ns <= link.st_ctime_ns
    )
    return blob.name if is_as_linked and is_own(file) else None


def _unreadable(exc: OSError, file: Path) -> IdentityError:
    return IdentityError(
        f"cannot read {shown_text(str(exc.filename or file))}: {exc.strerror or exc}",
        hint=f"make it readable, {_EXPLICIT}",
    )
