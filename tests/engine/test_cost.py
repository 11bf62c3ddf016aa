"""An answer's usage, against what hooks and wrapped kernels saw executed."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from engine.served import ASK, SHORT, Ask, engine_of
from engine.test_selection import METHODS, deep, label
from families import BASE, FAMILIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DiffLlamaConfig, GPT2Config, GPTNeoXConfig, GptOssConfig

from blocktune.engine import attention_probes
from blocktune.methods import build
from blocktune.prompt import Chunk

PLAIN = [build("naive"), build("epic", k=2), build("cacheblend"), build("full-prefill")]


@pytest.fixture
def executed(monkeypatch):
    """Multiply-adds of matrices and attention, as they happen."""
    counted: Counter = Counter()
    sdpa, scores = F.scaled_dot_product_attention, attention_probes.plain_scores

    def attend(query, key, value, is_causal=False, **more):
        groups, heads, rows, dim = query.shape
        keys = key.shape[2]
        pairs = rows * (rows + 1) // 2 if is_causal else rows * keys
        assert not is_causal or rows == keys
        counted["attention"] += groups * heads * pairs * (dim + value.shape[3])
        return sdpa(query, key, value, is_causal=is_causal, **more)

    def score(query, key, mask, params):
        asks = query.shape[2]
        counted["probes"] += query.shape[0] * query.shape[1] * asks * key.shape[2] * key.shape[3]
        return scores(query, key, mask, params)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(attention_probes, "plain_scores", score)
    return counted


def count_matrices(model, counted) -> None:
    def count(module, args, output):
        rows = args[0].numel() // module.in_features
        counted["matrices"] += rows * module.in_features * module.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)


@pytest.mark.parametrize("method", PLAIN + METHODS, ids=label)
def test_flops_are_what_was_executed(tokenizer, executed, method):
    engine = engine_of(deep("llama"), tokenizer)
    engine.answer([ASK], method, max_new_tokens=1)  # encodes the chunks
    count_matrices(engine.model, executed)
    executed.clear()
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    assert usage.flops == 2 * sum(executed.values())
    assert executed["attention"] > 0


DEEP = {"num_hidden_layers": 4}
UNLIKE_LLAMA = {  # other names; attention twice in each layer
    "gpt_neox": lambda: GPTNeoXConfig(**BASE | DEEP),
    "diffllama": lambda: DiffLlamaConfig(**BASE | DEEP | {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("family", UNLIKE_LLAMA)
def test_flops_are_exact_whatever_attention_is_called_and_however_often(
    tokenizer, executed, family
):
    engine = engine_of(UNLIKE_LLAMA[family](), tokenizer)
    count_matrices(engine.model, executed)
    for method in ("cacheblend", "full-prefill"):
        engine.answer([ASK], method, max_new_tokens=1)  # encodes the chunks
        executed.clear()
        usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
        assert usage.flops == 2 * sum(executed.values())
        assert usage.layer_tokens[0] == usage.context_tokens


def test_flops_of_heads_that_are_only_rotated_in_part_are_exact(tokenizer, executed):
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16}
    shape = BASE | DEEP | heads | {"q_lora_rank": 16, "num_key_value_heads": 4}
    engine = engine_of(DeepseekV3Config(**shape, first_k_dense_replace=4), tokenizer)
    count_matrices(engine.model, executed)
    for method in ("full-prefill", "naive", "cacheblend"):  # cached latents are expanded each time
        engine.answer([ASK], method, max_new_tokens=1)
        executed.clear()
        usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
        assert usage.flops == 2 * sum(executed.values())


def fused(query, key, value, dropout=0.0, is_causal=False, *more, **options):
    batch, heads, rows, dim = query
    pairs = rows * (rows + 1) // 2 if is_causal else rows * key[2]
    return 2 * batch * heads * pairs * (dim + value[3])


def grouped(rows, experts, *more, **options):
    return 2 * rows[0] * rows[1] * experts[-1]


OPERATORS = {  # on a CPU, unknown to PyTorch's counter
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused,
    torch.ops.aten._grouped_mm: grouped,
}
SOME = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16}
COUNTED = {
    "soft-capping": FAMILIES["gemma2"],
    "sinks, experts with biases": lambda: GptOssConfig(
        **BASE | DEEP | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "an expert for all": lambda: DeepseekV3Config(
        **BASE | DEEP | SOME | LATENT | {"num_key_value_heads": 4, "q_lora_rank": 16},
        **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "positions of GPT-2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_that_torch_counts(tokenizer, name):
    engine = engine_of(COUNTED[name](), tokenizer)
    for method in ("full-prefill", "prefix-cache" if "GPT" in name else "cacheblend"):
        engine.answer([ASK], method, max_new_tokens=1)  # fills the caches
        with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
            usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
        assert usage.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ["cache-craft", "cache-craft + first-k 2"])
def test_statistics_of_chunks_are_in_the_flops(tokenizer, executed, name):
    engine, method = engine_of(deep("llama"), tokenizer), build(name)
    engine.answer([SHORT], method, max_new_tokens=1)  # encodes the prefix
    count_matrices(engine.model, executed)
    for ask in (ASK, Ask(ASK.question, ASK.chunks[::-1])):  # in full, then recalled
        executed.clear()
        usage = engine.answer([ask], method, max_new_tokens=1)[0].usage
        assert usage.flops == 2 * sum(executed.values())
        assert executed["probes"] > 0


def test_flops_of_experts_are_those_of_the_ones_that_a_row_is_sent_to(tokenizer):
    config = FAMILIES["qwen3-moe"]()
    few, all_of_them = (
        engine_of(type(config)(**{**config.to_dict(), "num_experts_per_tok": k}), tokenizer)
        for k in (1, 4)
    )
    rows = sum(len(ids) for ids in few.prompts.pieces(ASK, build("naive"))[2:3])
    spent = [
        engine.answer([ASK], "naive", max_new_tokens=1)[0].usage.flops
        for engine in (few, all_of_them)
    ]
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert spent[1] - spent[0] == 2 * 3 * expert * rows * config.num_hidden_layers


def test_bytes_moved_are_those_read_and_those_written(tokenizer):
    engine = engine_of(deep("llama"), tokenizer)
    method = build("epic", k=2)
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    pieces = engine.prompts.pieces(ASK, method)
    config = engine.model.config
    token = 4 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    computed = 2 * len(pieces.chunks) + len(pieces.query)
    assert usage.bytes_moved == 2 * usage.bytes_read + computed * token


def test_stored_states_count_as_read(tokenizer):
    engine = engine_of(deep("llama"), tokenizer)
    plain = engine.answer([ASK], "naive", max_new_tokens=1)[0].usage
    method = build("droidspeak", first_layer=1)
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    pieces = engine.prompts.pieces(ASK, method)
    tokens = len(pieces.prefix) + usage.context_tokens
    states = tokens * (4 * engine.model.config.hidden_size + 8)  # an int64 id each
    assert usage.bytes_read - plain.bytes_read == states


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_prompts_of_a_batch_are_charged_what_they_cost_alone(tokenizer, method):
    """Rows, that is; scores under the mask of a ragged batch are more."""
    engine = engine_of(deep("llama"), tokenizer)
    asks = [ASK, SHORT, Ask("What?", (Chunk("It rained."), *ASK.chunks[:1]))]
    together = [a.usage for a in engine.answer(asks, method, max_new_tokens=1)]
    alone = [engine.answer([ask], method, max_new_tokens=1)[0].usage for ask in asks]
    for one, other in zip(together, alone, strict=True):
        assert one.layer_tokens == other.layer_tokens
        assert one.probed_tokens == other.probed_tokens
        assert one.bytes_moved == other.bytes_moved
        assert one.flops >= other.flops


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_method_spends_what_its_selector_says(tokenizer, method):
    engine = engine_of(deep("llama"), tokenizer)
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    said = method.select().spends(4)
    # Whole tokens, whole windows; a share of the prompt is not one of the context.
    if said is not None and method.name != "cacheblend-lmcache":
        assert usage.recompute_ratio == pytest.approx(said, abs=0.05)
