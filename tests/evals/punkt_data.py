"""A punkt_tab made by code, in place of NLTK's, which no test downloads.

It has a dozen abbreviations and no statistics: enough for the verifiers to count sentences by the
same rules, with the same code, as with NLTK's own data.
"""

import os
from pathlib import Path

ABBREVIATIONS = {"dr", "mr", "mrs", "ms", "prof", "st", "vs", "etc", "e.g", "i.e", "u.s", "inc", "no"}


def make_punkt_tab(root: Path) -> Path:
    """Write tokenizers/punkt_tab/english below `root`, which becomes NLTK's first data folder."""
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, mode=0o700)
    for name, lines in (
        ("abbrev_types.txt", sorted(ABBREVIATIONS)),
        ("collocations.tab", []),
        ("ortho_context.tab", []),
        ("sent_starters.txt", []),
    ):
        (folder / name).write_text("\n".join(lines))
    return root


def use_punkt_tab(root: Path) -> None:
    """Have NLTK, here and in processes started from here, look below `root` first."""
    import nltk

    os.environ["NLTK_DATA"] = str(root)
    if str(root) not in nltk.data.path:
        nltk.data.path.insert(0, str(root))
