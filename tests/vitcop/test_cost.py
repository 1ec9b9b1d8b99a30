"""Cost formulas against published figures."""

from types import SimpleNamespace

import pytest

from vitcop.cost import decoder_macs, encoder_macs, kv_bytes

QWEN2_7B = SimpleNamespace(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
)
SIGLIP_SO400M = SimpleNamespace(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14
)


def test_prefill_of_llava_onevision_7b_is_48_8_tera_macs() -> None:
    assert decoder_macs(QWEN2_7B, [6272] * 28) == pytest.approx(48.8e12, rel=2e-3)


def test_cache_of_llava_onevision_7b_is_343_mib() -> None:
    assert kv_bytes(QWEN2_7B, [6272] * 28, 2) == pytest.approx(343 * 2**20)


def test_siglip_so400m_is_333_giga_macs_a_frame() -> None:
    assert encoder_macs(SIGLIP_SO400M, 729) == pytest.approx(332.7e9, rel=5e-3)
