"""Which cells a sweep has."""

import pytest

from pipeline.commandline import from_mapping
from pipeline.config import SweepConfig, SweepJobConfig
from pipeline.errors import ConfigError
from pipeline.sweep.cells import cells_of


def test_cells_are_full_and_each_method_at_each_ratio_with_each_seed() -> None:
    config = SweepConfig(
        methods=("vitcop", "random", "one_frame"), keep_ratios=(0.5, 0.1), frame_counts=(4, 8), seeds=2
    )
    cells = cells_of(config)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 2 * (1 + 2 + 2 * 2 + 1)
    assert {"none-4f", "vitcop-0.5-8f", "random-0.1-4f-s1", "one_frame-8f"} <= set(names)


def test_every_known_method_is_there_by_default() -> None:
    from vitcop.methods import METHODS

    assert {cell.method for cell in cells_of(SweepConfig(keep_ratios=(0.5,)))} == {"none", *METHODS}


def test_what_is_asked_for_twice_is_one_cell() -> None:
    once = cells_of(SweepConfig(keep_ratios=(0.5,), frame_counts=(8,)))
    assert cells_of(SweepConfig(methods=("all", "vitcop"), keep_ratios=(0.5, 0.5), frame_counts=(8, 8))) == once


def test_options_of_a_method_reach_its_settings() -> None:
    (_, cell) = cells_of(SweepConfig(methods=("vitcop:key_score=large,merge=mean",), keep_ratios=(0.25,)))
    assert cell.prune.method == "vitcop" and cell.prune.keep_ratio == 0.25
    assert cell.prune.method_options == {"key_score": "large", "merge": "mean"}


@pytest.mark.parametrize("text", ["unknown", "vitcop:no_such_option=1", "vitcop:key_score=9", "vitcop:oops"])
def test_what_no_method_takes_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        cells_of(SweepConfig(methods=(text,)))


def test_a_yaml_file_may_list_methods_and_ratios() -> None:
    config = from_mapping(SweepJobConfig, {"sweep": {"methods": ["vitcop"], "keep_ratios": [0.5, 0.25]}})
    assert config.sweep.methods == ("vitcop",) and config.sweep.keep_ratios == (0.5, 0.25)
