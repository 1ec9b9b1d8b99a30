"""Records of prefills."""

import copy
import dataclasses

import pytest

from vitcop.stats import LATEST, PrefillRecord, PruneStats

RECORD = PrefillRecord(
    method="a",
    batch=2,
    grid=(3, 4, 5),
    fixed=3,
    kept_per_layer=(43, 43, 13, 13),
    stages={"vision": 43, "layer 2": 13},
    prompt_tokens=7,
    kv_bytes=1,
    macs_vision=1.0,
    macs_language=1.0,
)


def test_counts_are_of_all_visual_tokens_those_that_cannot_be_pruned_included() -> None:
    assert RECORD.visual_tokens == 63
    assert RECORD.mean_kept == 28
    assert RECORD.retention == pytest.approx(28 / 63)


def test_copies_of_a_cache_share_its_record() -> None:
    assert copy.deepcopy({"record": RECORD})["record"] is RECORD


def test_a_context_remembers_its_latest_prefills() -> None:
    stats = PruneStats()
    assert stats.last is None
    for number in range(LATEST + 3):
        stats.records.append(dataclasses.replace(RECORD, kv_bytes=number))
    assert len(stats.records) == LATEST
    assert stats.records[0].kv_bytes == 3
    assert stats.last is not None
    assert stats.last.kv_bytes == LATEST + 2
