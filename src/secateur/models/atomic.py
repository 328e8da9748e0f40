"""Writing a folder so that at every moment either the old one or the new one is there, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import FormatError, InputError

MARK, TENSORS, GRAPH = "plan.json", "model.safetensors", "graph.json"
REPORT_FACTS, REPORT_PAGE = "report.json", "report.html"  # beside the model, not part of it
MARKS = {MARK: "secateur/1", REPORT_FACTS: "secateur-report/1"}  # files that say what in a folder is ours, each with a format that it has
PATIENCE = 10.0  # seconds that a swap waits for another one, which takes milliseconds; somebody else may lock the folder above for longer


def replace_folder(folder: Path, fill: Callable[[Path], None], marks: Mapping[str, str] = MARKS) -> None:
    """Let `fill` write into a new folder beside `folder`, then put it in `folder`'s place.

    Until `fill` has returned and everything is on the disk, `folder` is not touched. Between the two renames that follow an
    interruption puts the old folder back; a kill leaves it complete under the name that `backup` gives. Of several threads or processes
    that write the same folder the last one's stays, whole. `marks`: as `refuse_foreign` takes them.

    Raises:
        InputError: `folder` is a file, or holds something this package did not write.
        FormatError: the disk is full or not writable; the old folder is unchanged.
    """
    try:
        folder = folder.resolve() if folder.is_symlink() else folder  # a link stays a link
        refuse_foreign(folder, marks)
    except OSError as error:  # a name that no folder can have
        raise FormatError(f"{str(folder)[:200]} could not be written: {error.strerror}.\n  Nothing was left behind. Choose another name.") from error
    fresh = _beside(folder, "new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        fill(fresh)
        for path in [*fresh.iterdir(), fresh]:
            sync(path)
        with _one_at_a_time(folder.parent):
            _refuse_foreign(folder, marks)  # it may have come while `fill` was at work
            _swap(fresh, folder)
            sync(folder.parent)
    except OSError as error:
        raise FormatError(_cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def backup(folder: Path) -> Path:
    """Where the previous folder lies if a replacement was interrupted between its two renames."""
    return folder.parent / f".{folder.name}.old"


def _beside(folder: Path, kind: str) -> Path:
    """A name beside the folder that nobody else has, no other thread either."""
    return folder.parent / f".{folder.name}.{kind}-{secrets.token_hex(6)}"


def sync(path: Path) -> None:
    """Force a file's or a folder's contents onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- what is ours
def refuse_foreign(folder: Path, marks: Mapping[str, str] = MARKS) -> None:
    """
    Args:
        marks: name of a file -> format. Ours are such files that are JSON of that format, of whatever version, and the files they list;
            a name alone says nothing.

    Raises:
        InputError: `folder`, or what lies where the older one will be put meanwhile, is a file or holds something this package did not write.
    """
    with _one_at_a_time(folder.parent):
        _refuse_foreign(folder, marks)


def _refuse_foreign(folder: Path, marks: Mapping[str, str]) -> None:
    for place in (folder, backup(folder)):
        if place.is_dir():
            if foreign := list(_foreign(place, _listed(place, marks))):
                raise InputError(
                    f"{place} holds {len(foreign)} files that secateur did not write ({', '.join(foreign[:3])}), going by "
                    f"{' and '.join(marks)} in it: replacing the folder would lose them.\n  Choose another folder, or move them away."
                )
        elif place.exists():
            raise InputError(f"{place} is a file; the result is a folder.\n  Choose another name.")


def _listed(folder: Path, marks: Mapping[str, str]) -> set[str]:
    """The marks of ours in a folder, and what they list."""
    found: set[str] = set()
    for mark, format in marks.items():
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not there, or somebody else's
            document = json.loads((folder / mark).read_text(encoding="utf-8"))
            if document["format"].split("/")[0] == format.split("/")[0]:
                found |= {mark, *map(str, document.get("files", ()))}
    return found | ({REPORT_PAGE} if REPORT_FACTS in found else set())  # which lists no files


def _foreign(folder: Path, ours: Collection[str], above: str = "") -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        name = above + path.name
        if path.is_dir() and not path.is_symlink() and any(one.startswith(f"{name}/") for one in ours):
            yield from _foreign(path, ours, f"{name}/")
        elif name not in ours:
            yield name


# ---------------------------------------------------------------- the swap
@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """A lock of the folder above, for threads and processes; it goes with the process that holds it. Where there are no locks, or somebody
    keeps this one, it is gone on without: names of one's own see to it that nothing is mixed even so."""
    try:
        import fcntl

        handle = os.open(place, os.O_RDONLY)
    except (ImportError, OSError):  # on Windows; of a folder that is not there yet
        yield
        return
    until = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile has the handle too
        os.close(handle)


def _swap(fresh: Path, folder: Path) -> None:
    old = backup(folder)
    try:
        if folder.exists():
            _away(old)
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:  # interrupted between the two: the old one goes back
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        if folder.exists():
            _away(old)


def _away(folder: Path) -> None:
    """Remove a folder of ours, under another name: a kill leaves nothing under its own that could no longer be told from somebody else's."""
    if folder.exists():
        gone = _beside(folder, "gone")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _cannot_write(folder: Path, error: OSError) -> str:
    kept = f"The old {folder} is unchanged." if folder.exists() else "Nothing was left behind."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        free = shutil.disk_usage(place).free
        return (
            f"{folder} could not be written: {error.strerror} ({free / 2**20:,.0f} MiB free on that disk).\n  {kept}\n"
            "  Make room, or choose a folder on another disk."
        )
    return (
        f"{folder} could not be written: {error.strerror or error}.\n  {kept}\n"
        "  Check that the folder above it exists and may be written to."
    )
