"""Writing a folder so that at every moment either the old one or the new one is there, whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from secateur.errors import FormatError, InputError

MARK, TENSORS, GRAPH = "plan.json", "model.safetensors", "graph.json"
REPORT_FACTS, REPORT_PAGE = "report.json", "report.html"  # beside the model, not part of it
OURS = {MARK, TENSORS, GRAPH, REPORT_FACTS, REPORT_PAGE}  # all that a folder ever holds


def replace_folder(folder: Path, fill: Callable[[Path], None], ours: Collection[str] = OURS) -> None:
    """Let `fill` write into a new folder beside `folder`, then put it in `folder`'s place.

    Until `fill` has returned and everything is on the disk, `folder` is not touched. Between the two renames that follow an
    interruption puts the old folder back; a kill leaves it complete under the name that `backup` gives. `ours`: names of files that an
    older folder may hold.

    Raises:
        InputError: `folder` is a file, or holds something this package did not write.
        FormatError: the disk is full or not writable; the old folder is unchanged.
    """
    try:
        folder = folder.resolve() if folder.is_symlink() else folder  # a link stays a link
        refuse_foreign(folder, ours)
    except OSError as error:  # a name that no folder can have
        raise FormatError(f"{str(folder)[:200]} could not be written: {error.strerror}.\n  Nothing was left behind. Choose another name.") from error
    fresh = folder.parent / f".{folder.name}.new-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        fill(fresh)
        for path in [*fresh.iterdir(), fresh]:
            sync(path)
        _swap(fresh, folder)
        sync(folder.parent)
    except OSError as error:
        raise FormatError(_cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def backup(folder: Path) -> Path:
    """Where the previous folder lies if a replacement was interrupted between its two renames."""
    return folder.parent / f".{folder.name}.old"


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


def refuse_foreign(folder: Path, ours: Collection[str] = OURS) -> None:
    """
    Raises:
        InputError: `folder` is a file, or holds something this package did not write.
    """
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - set(ours))
        if foreign:
            raise InputError(
                f"{folder} holds {len(foreign)} files that secateur did not write ({', '.join(foreign[:3])}): "
                "replacing the folder would lose them.\n  Choose another folder, or move them away."
            )
    elif folder.exists():
        raise InputError(f"{folder} is a file; the result is a folder.\n  Choose another name.")


def _swap(fresh: Path, folder: Path) -> None:
    old = backup(folder)
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:  # interrupted between the two: the old one goes back
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


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
