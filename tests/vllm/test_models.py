"""Other models than Llama's: every RoPE type that is moved, windows, hybrid caches, bfloat16."""

from types import SimpleNamespace

import pytest
import torch
from families import LLAMA3, YARN, rope
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
)
from vllm import EngineArgs, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm_cases import SMALL, TINY, close, first_logprobs, make_adapter, questions, worst

from blocktune import Engine
from blocktune.adapter.merge import merge_adapter
from blocktune.prompt import LayoutSpec
from blocktune.vllm import ChunkLLM, guard, launch
from blocktune.vllm.client import transfer_config
from blocktune.vllm.connector import BlocktuneConnector

SHAPE = {"vocab_size": 1152, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SHAPE |= {"initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BY_LAYER = {
    "sliding_attention": LLAMA3,
    "full_attention": rope("linear", factor=8.0),
}
HYBRID = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "hybrid windows, rope by layer: llama3, linear": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=32, sliding_window=48, layer_types=HYBRID, rope_parameters=BY_LAYER
    ),
    "window in every layer, yarn": lambda: MistralConfig(
        **SHAPE, sliding_window=48, rope_parameters=YARN
    ),
    "partial rope": lambda: Phi3Config(
        **SHAPE, rope_parameters=rope("default", partial_rotary_factor=0.5)
    ),
    "llama3, bfloat16": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_engines(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    model = AutoModelForCausalLM.from_config(MODELS[name]()).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    folder, store, examples = str(tmp_path / "model"), tmp_path / "store", questions(21, 3)
    engine = Engine.from_pretrained(folder, store=store, dtype=dtype, device="cpu")
    wanted = engine.answer(examples, "naive", max_new_tokens=8)
    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=20)
    prefixes = not name.startswith("window")  # a cache of prefixes changes nothing
    options = SMALL | {"dtype": dtype, "enable_prefix_caching": prefixes}
    llm = ChunkLLM(folder, store=store, **options)
    try:
        made = llm.answer(examples, sampling=greedy)
        errors = [
            worst(one, first_logprobs(engine, example, "naive"))
            for one, example in zip(made, examples, strict=True)
        ]
        if dtype == "float32":
            assert max(errors) < 1e-4
            assert [one.token_ids for one in made] == [one.token_ids for one in wanted]
        else:  # as far from the engine as vLLM is without chunks
            plain = [llm.client.read(one)._replace(plan=None) for one in examples]
            full = [
                worst(one, first_logprobs(engine, example, "full-prefill"))
                for one, example in zip(llm.generate(plain, greedy), examples, strict=True)
            ]
            assert max(errors) < 3 * max(full)
        assert all(one.cached_tokens > 0.8 * one.prompt_tokens for one in made)
        if name == "partial rope":
            prompt_logprobs_poison_nothing(llm, examples, made, greedy, monkeypatch)
    finally:
        close(llm)


def prompt_logprobs_poison_nothing(llm, examples, wanted, greedy, monkeypatch):
    """Where the guard does not run, such a request is a plain one."""
    monkeypatch.setattr(guard, "require_loadable", lambda *_: None)
    assert llm.llm.reset_prefix_cache()
    asked = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    assert llm.answer(examples, sampling=asked)[0].cached_tokens == 0
    again = llm.answer(examples, sampling=greedy)
    assert [one.token_ids for one in again] == [one.token_ids for one in wanted]
    assert all(one.cached_tokens for one in again)


def test_the_users_adapters_and_servers_are_kept(tmp_path, monkeypatch):
    """vLLM takes the last one only, and `serve` its command, for several API servers."""
    store, folders = tmp_path / "store", {n: tmp_path / n for n in ("tuned", "packet")}
    make_adapter(folders["tuned"], LayoutSpec(), True)
    make_adapter(folders["packet"], LayoutSpec(num_headers=1), False)
    tuned = Engine.from_pretrained(TINY, folders["tuned"], store=store, device="cpu")
    tuned.encode(["A chunk."])
    monkeypatch.setattr(launch, "entry_points", lambda group: [SimpleNamespace(name="blocktune")])
    for name in ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")
    made = []
    monkeypatch.setattr(ServeSubcommand, "cmd", made.append)
    options = ["--lora-modules", "plain=x", "--api-server-count", "2"]
    launch.serve(TINY, folders, str(store), options)
    assert [one.name for one in made[0].lora_modules] == ["plain", "tuned"]
    assert (made[0].model_tag, made[0].api_server_count) == (TINY, 2)


def test_a_merged_adapter_is_a_model_of_its_own(tmp_path):
    adapter = make_adapter(tmp_path / "lora", LayoutSpec(), True)
    merged, store, examples = str(tmp_path / "merged"), tmp_path / "store", questions(22, 2)
    merge_adapter(adapter, merged, dtype="float32", device="cpu")
    engine = Engine.from_pretrained(merged, store=store, dtype="float32", device="cpu")
    wanted = engine.answer(examples, "block-attention", max_new_tokens=8)
    llm = ChunkLLM(merged, store=store, **SMALL)
    try:
        assert llm.client.lora is None
        made = llm.answer(examples, max_new_tokens=8)
        assert [one.token_ids for one in made] == [one.token_ids for one in wanted]
        assert all(one.cached_tokens for one in made)
    finally:
        close(llm)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"kv_load_failure_policy": "recompute"}, {}, "got 'recompute'"),
        ({"kv_connector_extra_config": {}}, {}, "needs kv_connector_extra_config"),
        ({"kv_connector_extra_config": {"store": "x", "host_gib": 4}}, {}, "got host_gib=4"),
        ({"kv_connector_extra_config": {"store": "x", "threads": 0}}, {}, "got threads=0"),
        ({"kv_connector_extra_config": {"store": "x", "host_gb": "a"}}, {}, "got host_gb='a'"),
        ({"kv_connector_extra_config": {"store": 5}}, {}, "got store=5"),
        ({}, {"hf_overrides": {"rope_parameters": YARN}}, "not by hf_overrides"),
        ({}, {"hf_overrides": {"sliding_window": 8}}, "not by hf_overrides"),
        ({}, {"hf_config_path": TINY}, "not by hf_overrides or hf_config_path"),
        ({}, {"context_parallel": 2}, "drop context parallelism"),
        ({}, {"routed_experts": True}, "drop --enable-return-routed-experts"),
        ({}, {"kv_cache_dtype": "fp8"}, "caches, not fp8"),
    ],
)
def test_a_configuration_that_would_mix_is_refused(tmp_path, change, options, reason):
    transfer = KVTransferConfig(**transfer_config(tmp_path) | change)
    ranks = (options := dict(options)).pop("context_parallel", 1)
    routed = options.pop("routed_experts", False)
    made = EngineArgs(TINY, kv_transfer_config=transfer, **SMALL | options).create_engine_config()
    made.parallel_config.decode_context_parallel_size = ranks
    made.aux_output_config.enable_return_routed_experts = routed
    with pytest.raises(ValueError, match=reason):
        BlocktuneConnector(made, KVConnectorRole.SCHEDULER, SimpleNamespace(kv_cache_groups=[]))
