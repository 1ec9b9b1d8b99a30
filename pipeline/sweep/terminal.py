"""The cells of a sweep in the terminal."""

from __future__ import annotations

import pyarrow as pa

from pipeline.sweep.cells import FULL

UNRELIABLE = "unreliable"


def print_table(table: pa.Table) -> None:
    """Prints the cells in a few columns; of a speed-up that can't be relied on, only that."""
    print(f"{'cell':32} {'accuracy':>9} {'interval':>15} {'kept':>7} {'p random':>9} {'speed-up':>10}")
    for row in table.to_pylist():
        if not row["reachable"]:
            print(f"{row['cell']:32} not reachable: {row['reason']}")
            continue
        accuracy = _percent(row["accuracy"])
        interval = f"[{_percent(row['accuracy_low'])}, {_percent(row['accuracy_high'])}]"
        p = "" if row["mcnemar_p_random"] is None or row["method"] == FULL else f"{row['mcnemar_p_random']:.3g}"
        speed = "" if row["speedup_measured"] is None else f"{row['speedup_measured']:.2f}"
        speed = UNRELIABLE if row["speedup_doubt"] else speed
        kept = _percent(row["retention_mean"])
        print(f"{row['cell']:32} {accuracy:>9} {interval:>15} {kept:>7} {p:>9} {speed:>10}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
