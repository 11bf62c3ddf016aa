"""Two LoRA products folded into one, against the sum worked out whole."""

import json
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from safetensors.torch import save_file

_spec = spec_from_file_location("ship", "eval/real/ship.py")  # beside it lies another `study`
ship = module_from_spec(_spec)
_spec.loader.exec_module(ship)
CONFIG, WEIGHTS, fold, read_lora = ship.CONFIG, ship.WEIGHTS, ship.fold, ship.read_lora
share_out, zeros = ship.share_out, torch.zeros


def products(*ranks):
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(r, 24, generator=draw), torch.randn(40, r, generator=draw)) for r in ranks
    ]
    return pairs, sum(b.double() @ a.double() for a, b in pairs)


def test_a_rank_that_holds_both_loses_only_what_bfloat16_rounds():
    pairs, whole = products(3, 5)
    made = fold(pairs, 10)
    assert made.a.shape == (10, 24)
    assert made.b.shape == (40, 10)
    assert made.a.dtype == made.b.dtype == torch.bfloat16
    assert made.norm == pytest.approx(float(whole.norm()))
    assert 0 < made.lost < 0.01 * made.norm
    off = (made.b.double() @ made.a.double() - whole).norm()
    assert made.lost == pytest.approx(float(off), rel=1e-6)


def test_a_smaller_rank_loses_the_smallest_singular_values():
    pairs, whole = products(3, 5)
    tail = float(torch.linalg.svdvals(whole)[4:].norm())
    assert fold(pairs, 4).lost == pytest.approx(tail, rel=0.01)
    assert tail > 0.1 * float(whole.norm())


def test_ranks_go_where_they_keep_the_most():
    spectra = {"a": torch.tensor([9.0, 8.0, 1.0]), "b": torch.tensor([2.0, 1.0]), "c": zeros(2)}
    assert share_out(spectra, {"a": 10, "b": 10, "c": 10}, 1) == {"a": 2, "b": 1}
    # A rank of a wide module costs more.
    assert share_out(spectra, {"a": 400, "b": 10, "c": 10}, 1) == {"a": 1, "b": 2}


def test_the_scale_is_in_b_and_more_than_plain_lora_is_refused(tmp_path):
    pairs, whole = products(4)
    name = "base_model.model.layers.0.q_proj"
    [(a, b)] = pairs
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / WEIGHTS)
    config = {"r": 4, "lora_alpha": 8}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    found = read_lora(tmp_path)[name]
    torch.testing.assert_close(found[1] @ found[0], 2 * whole.float())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    found = read_lora(tmp_path)[name]
    torch.testing.assert_close(found[1] @ found[0], 4 * whole.float())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match="has modules_to_save; only plain LoRA"):
        read_lora(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file({"base_model.model.norm.weight": a}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="only plain LoRA can be folded"):
        read_lora(tmp_path)
