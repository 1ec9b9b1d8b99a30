"""What the terminal says of the cells."""

import pyarrow as pa
import pytest

from pipeline.sweep.summary import CELL_SCHEMA
from pipeline.sweep.terminal import print_table


def test_a_speedup_that_cannot_be_relied_on_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"method": "m", "reachable": True, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}
    rows = [
        shared | {"cell": "steady", "speedup_measured": 1.25},
        shared | {"cell": "noisy", "speedup_measured": 8.85, "speedup_doubt": "rounds disagree"},
        {"cell": "far", "method": "m", "reachable": False, "reason": "too few layers"},
    ]
    print_table(pa.Table.from_pylist(rows, schema=CELL_SCHEMA))
    _, steady, noisy, far = capsys.readouterr().out.splitlines()
    assert steady.split()[-1] == "1.25" and noisy.split()[-1] == "unreliable" and "8.85" not in noisy
    assert far.endswith("not reachable: too few layers")
