"""A generated punkt_tab in place of NLTK's, so that no test downloads it.

It has a dozen abbreviations and no statistics, which is enough for the verifiers to count sentences
with the code and rules of NLTK's data.
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
    """Make NLTK search `root` first, in this process and its children."""
    import nltk

    os.environ["NLTK_DATA"] = str(root)
    if str(root) not in nltk.data.path:
        nltk.data.path.insert(0, str(root))
