"""Archives of golden runs, and files that a report has written."""

import hashlib
import json
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def unpacked(root: str, path: Path) -> Path:
    """`path`, with the content of `<root>.tar.gz` in it."""
    with tarfile.open(HERE / f"{root}.tar.gz") as archive:
        archive.extractall(path, filter="fully_trusted")
    return path


def collected(directory: Path, file: Path) -> dict[str, str]:
    """The text of each file of a report, by name; Parquet files as schema and rows, PNG files as nothing.

    Args:
        file: the directory that holds runs/; its path is not the same on every machine.
    """
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".parquet":
            found[f"{path.name}.txt"] = parquet(path)
        elif path.suffix != ".png":
            found[path.name] = path.read_text().replace(str(file.resolve()), "<place>")
    return found


def parquet(path: Path) -> str:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    rows = json.dumps(table.to_pylist(), sort_keys=True)
    schema = table.schema.remove_metadata()
    return f"{schema}\n{table.num_rows} rows, sha256 {hashlib.sha256(rows.encode()).hexdigest()}\n"


def processor() -> dict[str, str]:
    """Properties of the processor that affect the bits of training."""
    from importlib.metadata import version

    cpu = dict(
        line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    record = {key.strip(): value.strip() for key, value in cpu.items()}
    flags = hashlib.sha256(record.get("flags", "").encode()).hexdigest()[:16]
    return {
        "model": record.get("model name", ""),
        "flags": flags,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
    }
