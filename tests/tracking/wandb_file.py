"""What W&B wrote to disk while offline, as a test wants it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Records in blocks, as LevelDB's log has them.
BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The logged points, without W&B's own keys."""
    return [
        values
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
        if (values := _items(record.history.item))
    ]


def summary(path: Path) -> dict[str, Any]:
    """What was put into the summary by hand."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            found |= _items(record.summary.update)
    return found


def run_record(path: Path) -> Any:
    """Id, name, group, job type and config of the run."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")


def _items(items: Any) -> dict[str, Any]:
    pairs = [("/".join(item.nested_key) or item.key, item.value_json) for item in items]
    return {key: json.loads(value) for key, value in pairs if not key.startswith("_")}


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
