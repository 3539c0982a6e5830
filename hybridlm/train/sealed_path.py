# SPDX-License-Identifier: Apache-2.0
"""How Orbax makes a checkpoint final here: all of it written, then its manifest, then, where that can be, its name."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from orbax.checkpoint.path import atomicity

from hybridlm import storage
from hybridlm.train.manifest import NAME, seal, seal_part
from hybridlm.train.records import ASIDE

TMP_SUFFIX = atomicity.TMP_DIR_SUFFIX


class SealedPath:
    """What Orbax asks of a `temporary_path_class`: a folder beside the final one, which is renamed when it is whole.

    Orbax uses it for a checkpoint and for each item inside; the folder of a checkpoint, named by its step, is sealed.
    """

    may_finish: Callable[[], None] = staticmethod(lambda: None)
    """Called, in a thread, before anything gets its final name, and does not return where this process may not write
    any more. Of the class: Orbax makes the objects."""

    def __init__(self, renamed: atomicity.AtomicRenameTemporaryPath, in_place: atomicity.CommitFileTemporaryPath):
        """renamed: the folder as Orbax makes it. in_place: the same, to be completed without a change of its name."""
        self._renamed, self._in_place = renamed, in_place

    @classmethod
    async def validate(cls, temporary_path) -> None:
        """ValidationError where a folder is not one that is being written."""
        await atomicity.AtomicRenameTemporaryPath.validate(temporary_path)

    @classmethod
    async def validate_final(cls, final_path) -> None:
        """ValidationError where a folder is not final."""
        await atomicity.AtomicRenameTemporaryPath.validate_final(final_path)

    @classmethod
    def from_temporary(cls, temporary_path, *, file_options=None, snapshot_type=None) -> "SealedPath":
        """One that a process left behind."""
        del snapshot_type
        renamed = atomicity.AtomicRenameTemporaryPath.from_temporary(temporary_path, file_options=file_options)
        return cls(renamed, atomicity.CommitFileTemporaryPath.from_temporary(temporary_path))

    @classmethod
    def from_final(
        cls, final_path, *, checkpoint_metadata_store=None, file_options=None, snapshot_type=None
    ) -> "SealedPath":
        """One to be made."""
        del snapshot_type
        given = {"checkpoint_metadata_store": checkpoint_metadata_store, "file_options": file_options}
        renamed = atomicity.AtomicRenameTemporaryPath.from_final(final_path, **given)
        return cls(renamed, atomicity.CommitFileTemporaryPath.from_final(renamed.get(), **given))

    def get(self):
        """The folder while it is written."""
        return self._renamed.get()

    def get_final(self):
        """The folder once it is whole."""
        return self._renamed.get_final()

    async def create(self):
        """Makes the folder; on the first process alone."""
        return await self._renamed.create()

    async def finalize(self) -> None:
        """Seals a checkpoint and gives it its name; on the first process alone."""
        await asyncio.to_thread(self.may_finish)
        if not self.get_final().name.isdecimal():
            await self._renamed.finalize()
            return
        await self._in_place.finalize()  # the time, and that it is whole
        folder = Path(os.fspath(self.get()))
        await asyncio.to_thread(seal, folder)
        await asyncio.to_thread(self.may_finish)
        await asyncio.to_thread(folder.rename, os.fspath(self.get_final()))


class SealedObjects:
    """The same in a bucket, where nothing is renamed: it is written in its place, and final once it has its manifest,
    which is the last of its objects. What was set aside is neither being written nor final."""

    def __init__(self, in_place: atomicity.CommitFileTemporaryPath):
        """in_place: as Orbax writes to buckets; an item inside of a checkpoint has its own mark of being whole."""
        self._in_place = in_place

    @classmethod
    async def validate(cls, temporary_path) -> None:
        """ValidationError where it is not one that is being written, or that was left unfinished."""
        if set(await _names(temporary_path)) & {NAME, ASIDE}:
            raise atomicity.ValidationError(f"{temporary_path} is whole, or was set aside")

    @classmethod
    async def validate_final(cls, final_path) -> None:
        """ValidationError where it is not final."""
        there = await _names(final_path)
        if NAME not in there or ASIDE in there:
            raise atomicity.ValidationError(f"{final_path} is not whole, or was set aside")

    @classmethod
    def from_temporary(cls, temporary_path, *, file_options=None, snapshot_type=None) -> "SealedObjects":
        """One that a process left behind."""
        del snapshot_type
        return cls(atomicity.CommitFileTemporaryPath.from_temporary(temporary_path, file_options=file_options))

    @classmethod
    def from_final(
        cls, final_path, *, checkpoint_metadata_store=None, file_options=None, snapshot_type=None
    ) -> "SealedObjects":
        """One to be made."""
        del snapshot_type
        given = {"checkpoint_metadata_store": checkpoint_metadata_store, "file_options": file_options}
        return cls(atomicity.CommitFileTemporaryPath.from_final(final_path, **given))

    def get(self):
        """Where it is written."""
        return self._in_place.get()

    def get_final(self):
        """The same."""
        return self._in_place.get_final()

    async def create(self):
        """Begins it; on the first process alone."""
        return await self._in_place.create()

    async def finalize(self) -> None:
        """Makes it final; on the first process alone."""
        await self._in_place.finalize()
        if self.get_final().name.isdecimal():
            await asyncio.to_thread(seal, storage.as_path(self.get_final()))


async def _names(path) -> list[str]:
    return await asyncio.to_thread(storage.names, storage.as_path(path))


def seal_own(folder: Path, process: int) -> None:
    """Leaves the checksums of the arrays that a process of several wrote in an unfinished checkpoint.

    They are in the cache of its own host, and the first process need not read them.
    """
    own = folder.glob(f"*/ocdbt.process_{process}/d/*")
    names = [path.relative_to(folder).as_posix() for path in own if path.is_file()]
    seal_part(folder, {name: name.replace(TMP_SUFFIX, "") for name in names}, process)
