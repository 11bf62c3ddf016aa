"""Small models with recurrent layers, one of each family."""

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Mamba2Config,
    Qwen3NextConfig,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS = {
    "mamba2": lambda: Mamba2Config(
        **SIZES, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 4},  # the fourth attends
        **HEADS,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "falcon-h1": lambda: FalconH1Config(
        **SIZES, **HEADS, **MAMBA, head_dim=8, mamba_d_ssm=32, mamba_d_head=8
    ),
    "jamba": lambda: JambaConfig(
        **SIZES,
        **HEADS,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "granite-4": lambda: GraniteMoeHybridConfig(
        **SIZES,
        **HEADS,
        **MAMBA,
        mamba_d_head=16,
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=32,
    ),
    "lfm2-moe": lambda: Lfm2MoeConfig(
        **SIZES,
        **HEADS,
        layer_types=["conv", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        num_dense_layers=1,
        moe_intermediate_size=16,
    ),
    "lfm2": lambda: Lfm2Config(**SIZES, **HEADS, full_attn_idxs=[1]),
}


def build_hybrid(family: str, vocab_size: int = 101):
    """A model of random weights; its tokens depend on all before them."""
    torch.manual_seed(0)
    config = HYBRIDS[family]()
    config.vocab_size = vocab_size
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            # Logits of gated delta rules grow fastest, and with them the rounding.
            weights.data.normal_(0, 0.1 if family == "qwen3-next" else 0.15)
    return model
