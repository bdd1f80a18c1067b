"""Tables of 10 M, 100 M and 1 B rows on 1, 8 and 64 GPUs, computed from unit costs that were measured at smaller sizes.

    python experiments/large_tables.py [--width 1024]

Prints the tables of docs/experiments/large-tables.md; where each unit cost comes from is beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

GPU_BYTES, HOST_BYTES = 78 * 2**30, 512 * 2**30  # one H100; a host of eight
INDEX_BYTES = 27.7  # an f-gram on disk and mapped: docs/formats.md (8 of them, the counts, are not read)
COUNT_BYTES = 176  # an f-gram while it is counted, at most: counting/plan.py, N = 5
BUILD_SECONDS = (90 - 14) / 50e6  # ranked and indexed, an f-gram: large_vocabulary.json, less the time of counting
COUNT_RATE = 12.3e6 / 2  # tokens/s a core: bench_counting, 10⁹ tokens
PRECOMPUTE_RATE = 212_766 * 0.91  # f-grams/s a GPU, six layers × 1,024: bench_scaling_gpu.json
TABLE_BYTES = 1056 / 1024  # int8 with a scale for 64 numbers: a number of width
ROWS_A_BATCH = {10**7: 25_600, 10**8: 34_600, 10**9: 34_600}  # distinct, of 16,384 positions of Wikipedia; at most 50 M
TRUNK_BYTES = 15 * 2**30  # of a GPU beside its rows: weights, moments, activations of a trunk as small as GPT-2
# bytes/s that one GPU sends: by what a step with rows takes longer on four GPUs than on one (bench_sharded_rows.json:
# 1.1 ms for 194 MB, with all that is done about it); and what the network card's maker says
NETWORK = {"NVLink": 170e9, "400 Gbit/s a GPU": 40e9}
DISK = 2e9  # bytes/s that one host reads and writes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="numbers of a row")
    width = parser.parse_args(argv).width
    print("| f-grams | index | built in | read in | counting, at most | table, int8 | weight and state | checkpoint |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rows in (10**7, 10**8, 10**9):
        training = rows * (4 * width + 8)
        index = rows * INDEX_BYTES
        cells = [shown(index), f"{rows * BUILD_SECONDS:,.0f} s", f"{index / DISK:,.1f} s", shown(rows * COUNT_BYTES)]
        cells += [shown(rows * width * TABLE_BYTES), shown(training), f"{training / DISK:,.0f} s"]
        print(f"| {rows:,} | {' | '.join(cells)} |")
    print("\n| f-grams | GPUs | rows on a GPU | fits | precompute | sent a step and GPU | NVLink | 400 Gbit/s |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|")
    for rows in (10**7, 10**8, 10**9):
        for gpus in (1, 8, 64):
            share = rows * (4 * width + 8) / gpus
            # rows to those that want them, and gradients back
            sent = 2 * ROWS_A_BATCH[rows] * 4 * width * (gpus - 1) / gpus
            times = [f"{1000 * sent / speed:.1f} ms" for speed in NETWORK.values()]
            minutes = rows / (PRECOMPUTE_RATE * gpus) / 60
            cells = [f"{rows:,}", gpus, shown(share), where(share, gpus), f"{minutes:.1f} min", shown(sent), *times]
            print(f"| {' | '.join(map(str, cells))} |")
    print("\n| corpus | counting on 2 cores |\n|---:|---:|")
    for tokens in (10**9, 10**10, 10**11):
        print(f"| {tokens:,} tokens | {tokens / COUNT_RATE / 2 / 3600:.2f} h |")


def where(share: float, gpus: int) -> str:
    """Whether a share fits a GPU beside the trunk, or the hosts' memory."""
    if share + TRUNK_BYTES <= GPU_BYTES:
        return "GPU"
    return "host" if share * min(gpus, 8) <= 0.8 * HOST_BYTES else "**no**"


def shown(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}"
    return f"{size:,.0f} B"


if __name__ == "__main__":
    main()
