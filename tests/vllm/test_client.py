"""What the client refuses before vLLM is asked; vLLM is not needed."""

import pytest
from transformers import AutoTokenizer, Ministral3Config

from blocktune.engine import Engine
from blocktune.vllm import ChunkClient
from blocktune.vllm.client import open_clients

TINY = "data/tiny"


def test_a_model_that_is_exact_up_to_a_length_is_refused(tmp_path):
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    config = Ministral3Config(hidden_size=64, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="more with positions than a rotation") as error:
        ChunkClient(str(tmp_path), store=tmp_path / "store")
    assert "\n" not in str(error.value)


def test_a_fingerprint_is_chosen_by_its_first_digits(tmp_path):
    """Two dtypes of one model are in the store: neither is taken by chance."""
    for dtype in ("float32", "bfloat16"):
        Engine.from_pretrained(TINY, store=tmp_path, dtype=dtype, device="cpu").encode(["A chunk."])
    base, _ = open_clients(TINY, {}, tmp_path)
    with pytest.raises(ValueError, match="chunks of several models"):
        _ = base.fingerprint
    for manifest in base.store.manifests():
        whole = manifest["fingerprint"]
        for given in (whole, whole[:12]):
            assert open_clients(TINY, {}, tmp_path, given)[0].fingerprint == whole
            assert ChunkClient(TINY, store=tmp_path, fingerprint=given).fingerprint == whole
    with pytest.raises(ValueError, match="no chunks of fingerprint '123456'"):
        open_clients(TINY, {}, tmp_path, "123456")


def test_links_are_refused_as_vllms_limit_and_not_for_want_of_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"vLLM cannot serve 'kvlink'.*blocktune serve"):
        ChunkClient(TINY, store=tmp_path).built("kvlink")
