"""Questions, adapters and references for the tests of vLLM."""

import functools

import torch

from blocktune import Engine
from blocktune.adapter import AdapterInfo
from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.links import new_links, save_links
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import load_base
from blocktune.prompt import LayoutSpec, PromptFormat

TINY = "data/tiny"
SMALL = {"enforce_eager": True, "max_model_len": 1024, "block_size": 32, "max_num_seqs": 8}
SMALL |= {"distributed_executor_backend": "uni", "disable_log_stats": False, "dtype": "float32"}
SMALL |= {"num_gpu_blocks_override": 256}  # eight prompts; a GB of zeros takes a second to write
"""Options of vLLM on a CPU."""


@functools.cache
def questions(seed: int, count: int = 4, passages: int = 6) -> list:
    config = WorldConfig("test", seed, count, passages, kinds={"cross-chunk": 1.0})
    return list(generate_examples(config))


def first_logprobs(engine: Engine, example, method: str) -> torch.Tensor:
    return torch.log_softmax(engine.next_logits([example], method)[0].float(), -1)


def worst(completion, reference: torch.Tensor, choice: int = 0) -> float:
    """Largest difference to a reference's log probabilities at the first token."""
    made = completion.output.outputs[choice].logprobs[0]
    return max(abs(one.logprob - float(reference[token])) for token, one in made.items())


def make_adapter(folder, layout: LayoutSpec, lora: bool, scope: str = "both"):
    """An adapter of random weights for data/tiny, large enough to change its answers."""
    base, tokenizer = load_base(TINY, dtype="float32", device="cpu")
    hashes = base_fingerprint(base), tokenizer_hash(tokenizer)
    info = AdapterInfo(TINY, *hashes, layout, PromptFormat(), scope=scope)
    torch.manual_seed(3)
    if layout.num_learned:
        save_links(new_links(base, layout.num_learned), folder)
    if lora:
        from peft import LoraConfig, get_peft_model

        tuned = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        tuned.save_pretrained(folder)
    info.save(folder)
    return folder


def forget(llm):
    """Empties vLLM's cache and the hot chunks."""
    assert llm.llm.reset_prefix_cache(reset_connector=True)


def close(llm):
    """Ends vLLM, so that another may start in this process."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm.llm_engine.engine_core.shutdown()
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()
