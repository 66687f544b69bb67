"""Reader of the .wandb files that W&B writes while offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Messages in blocks, in the format of LevelDB's log.
BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def history(path: Path) -> list[dict[str, Any]]:
    """The logged points, without W&B's own keys."""
    return [
        values
        for message in messages(path)
        if message.WhichOneof("record_type") == "history"
        if (values := _items(message.history.item))
    ]


def summary(path: Path) -> dict[str, Any]:
    """The summary values that were set explicitly."""
    found: dict[str, Any] = {}
    for message in messages(path):
        if message.WhichOneof("record_type") == "summary":
            found |= _items(message.summary.update)
    return found


def run_metadata(path: Path) -> Any:
    """Id, name, group, job type and config of the run."""
    return next(r.run for r in messages(path) if r.WhichOneof("record_type") == "run")


def _items(items: Any) -> dict[str, Any]:
    pairs = [("/".join(item.nested_key) or item.key, item.value_json) for item in items]
    return {key: json.loads(value) for key, value in pairs if not key.startswith("_")}


def messages(path: Path) -> Iterator[Any]:
    """The protocol buffers of a .wandb file, up to where a kill may have cut it."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    at, whole = 7, b""  # after the header of the file
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
            message: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                message.ParseFromString(whole)
            except DecodeError:
                return
            yield message
