"""Checkpoints that outlive kills, damage and full disks: `Checkpoints(folder)`.

A file is written beside its place, flushed to the disk, and moved there at once: whatever happens, what stands under
its name is whole. The last two are kept. If the newest is damaged all the same, the one before it is loaded.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """No checkpoint can be read, though there are some."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: State) -> None:
        """Write a checkpoint, then delete those that are too many.

        Raises:
            OSError: it could not be written; those that were there are as before.
        """
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.folder / f"step-{step:09d}.pt", content.getbuffer())
        for old in self._paths()[self.keep :]:
            old.unlink()

    def load(self) -> State | None:
        """Read the newest checkpoint that is whole; a damaged one is renamed, and a warning says so.

        Raises:
            CheckpointError: all are damaged, or one cannot be read for the moment; nothing is renamed then.
        """
        for interrupted in self.folder.glob("*.tmp"):
            interrupted.unlink()
        paths = self._paths()
        for path in paths:
            try:
                return _read(path)
            except (OSError, MemoryError) as error:  # of the machine, and says nothing of the file
                raise CheckpointError(
                    f"the checkpoint {path} cannot be read for the moment ({type(error).__name__}: {error}). It may be "
                    "whole: mend what is wrong with the machine, and go on with --resume."
                ) from error
            except Exception as error:  # whatever a damaged file makes of its reader
                warnings.warn(f"the checkpoint {path} is damaged and was set aside: {error}", stacklevel=2)
                path.rename(path.with_suffix(".damaged"))
        if paths:
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged. Delete the run's folder to start it anew."
            )
        return None

    def _paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that under its name is the old content or all of the new one, even if the machine stops.

    Raises:
        OSError: the content could not be written; the old one is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; Windows cannot, and does not need it."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> State:
    """Load a checkpoint, after a look at the checksums, which `torch.load` does not compare.

    All of it is read first: an error after that is one of its content.
    """
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        broken = archive.testzip()
    if broken:
        raise CheckpointError(f"the checksum of {broken} is wrong")
    content.seek(0)
    try:
        state: State = torch.load(content, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # PyTorch's allocator has an error of its own
            raise MemoryError(str(error).splitlines()[0]) from error
        raise
    return state
