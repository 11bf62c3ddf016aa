"""What the client refuses before vLLM is asked; vLLM is not needed."""

import pytest
from transformers import AutoTokenizer, Ministral3Config

from blocktune.vllm import ChunkClient

TINY = "data/tiny"


def test_a_model_that_is_exact_up_to_a_length_is_refused(tmp_path):
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    config = Ministral3Config(hidden_size=64, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="more with positions than a rotation") as error:
        ChunkClient(str(tmp_path), store=tmp_path / "store")
    assert "\n" not in str(error.value)
