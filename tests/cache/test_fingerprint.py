"""Whatever changes a chunk's keys and values changes its name; nothing else does."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama
from training.toy import toy_config, toy_model, toy_tokenizer

from blocktune import attach, detach
from blocktune.cache import ChunkStore, chunk_key, model_fingerprint, weights_hash
from blocktune.engine import Engine
from blocktune.prompt import PromptFormat

FORMAT = asdict(PromptFormat())


def fingerprint(
    model=None, adapter=None, tokenizer=None, prompt_format=FORMAT, dtype=torch.float32
):
    return model_fingerprint(
        model or toy_model(), adapter, tokenizer or toy_tokenizer(), prompt_format, dtype
    )


def with_one_weight_moved(model):
    # A weight between the samples, by the least step there is.
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[-1, -2] = torch.nextafter(weight[-1, -2], torch.tensor(torch.inf))
    return model


def with_config(**fields):
    model = toy_model(config=toy_config(**fields))
    model.load_state_dict(toy_model().state_dict())
    return model


def with_token(token):
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([token])
    return tokenizer


def with_template(template):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


ROPE = {"rope_type": "default", "rope_theta": 20_000.0}
SCALED = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


CHANGES = {
    "weights": lambda: {"model": toy_model(seed=1)},
    "weight": lambda: {"model": with_one_weight_moved(toy_model())},
    "theta": lambda: {"model": with_config(rope_parameters=ROPE)},
    "scaling": lambda: {"model": with_config(rope_parameters=SCALED)},
    "eps": lambda: {"model": with_config(rms_norm_eps=1e-5)},
    "cast": lambda: {"model": toy_model().to(torch.bfloat16)},
    "dtype": lambda: {"dtype": torch.bfloat16},
    "token": lambda: {"tokenizer": with_token("<extra>")},
    "template": lambda: {"tokenizer": with_template("{{ messages[0]['content'] }}")},
    "system": lambda: {"prompt_format": asdict(replace(PromptFormat(), system="Be brief."))},
    "separator": lambda: {"prompt_format": asdict(replace(PromptFormat(), untitled="{text}\n"))},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_every_part_changes_the_fingerprint(changed):
    assert fingerprint(**changed()) != fingerprint()


def test_the_same_model_agrees_with_itself_across_loads_and_processes(tmp_path):
    model, tokenizer = toy_model(), toy_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "import torch; from dataclasses import asdict\n"
        "from blocktune.cache import model_fingerprint; from blocktune.prompt import PromptFormat\n"
        "m, t = (c.from_pretrained(sys.argv[1]) for c in (M, T))\n"
        "print(model_fingerprint(m, None, t, asdict(PromptFormat()), torch.float32))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == fingerprint() + "\n"
    assert len(printed) == 64 + 1


def test_what_does_not_matter_does_not_change_it():
    model, tokenizer = toy_model(), toy_tokenizer()
    before = fingerprint(model, tokenizer=tokenizer)
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
    model.config.use_cache = False
    model.config._attn_implementation = "eager"
    model(torch.tensor([[1, 2, 3]]))
    assert fingerprint(model, tokenizer=tokenizer) == before


def lora(model, **fields):
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **fields)
    return get_peft_model(model, config)


def test_an_adapter_changes_it_attached_merged_scaled_or_switched_off():
    base = toy_model()
    adapted = lora(copy.deepcopy(base), r=4, lora_alpha=8)
    scaled = lora(copy.deepcopy(base), r=4, lora_alpha=16)
    other = lora(copy.deepcopy(base), r=4, lora_alpha=8)
    other.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] += 1
    seen = {weights_hash(m) for m in (base, adapted, scaled, other)}
    with adapted.disable_adapter():
        seen.add(weights_hash(adapted))
    seen.add(weights_hash(adapted.merge_and_unload()))
    assert len(seen) == 6


def test_the_adapter_folder_counts_by_content_not_by_name(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, alpha in ((one, 8), (same, 8), (other, 16)):
        lora(toy_model(), r=4, lora_alpha=alpha).save_pretrained(folder)
    (same / "README.md").write_text("another card")
    assert fingerprint(adapter=one) == fingerprint(adapter=str(same))
    assert fingerprint(adapter=one) != fingerprint(adapter=other)
    assert fingerprint(adapter=one) != fingerprint()
    with pytest.raises(ValueError, match="no adapter in"):
        fingerprint(adapter=tmp_path)


class Quantised(torch.nn.Parameter):
    """Stands for a 4-bit weight: codes that mean nothing without their scales."""

    def __new__(cls, codes, scales):
        self = super().__new__(cls, codes, requires_grad=False)
        self.quant_state = self
        self.scales = scales
        return self

    def as_dict(self, packed):
        return {"absmax": self.scales}


@pytest.mark.parametrize("changed", [(1, 1.0), (0, 2.0)], ids=["codes", "scales"])
def test_quantised_weights_count_with_their_scales(changed):
    def model(code, scale):
        module = torch.nn.Module()
        codes = torch.full((8, 1), code, dtype=torch.uint8)
        module.weight = Quantised(codes, torch.full((2,), scale))
        return module

    assert weights_hash(model(0, 1.0)) == weights_hash(model(0, 1.0))
    assert weights_hash(model(*changed)) != weights_hash(model(0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("size", [1, 3, 4097, 70_001])
def test_any_single_element_changes_the_hash(dtype, size):
    module = torch.nn.Module()
    module.register_buffer("weight", torch.zeros(size + 1, dtype=dtype)[1:])
    before = weights_hash(module)
    for index in {0, size // 2, size - 1}:
        module.weight[index] = 1
        assert weights_hash(module) != before
        module.weight[index] = 0
    assert weights_hash(module) == before


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(ValueError, match=r"'0.weight': its weights are not in memory"):
        weights_hash(torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")))


def test_the_chunk_key_depends_on_model_tokens_and_encoding():
    keys = [
        chunk_key("ab", [1, 2, 3]),
        chunk_key("ac", [1, 2, 3]),
        chunk_key("ab", [1, 2, 4]),
        chunk_key("ab", [1, 2]),
        chunk_key("ab", [12, 3]),
        chunk_key("ab", [1, 2, 3], {"num_blanks": 1, "blank_id": 5}),
        chunk_key("ab", [1, 2, 3], {"num_blanks": 2, "blank_id": 5}),
        chunk_key("ab", [1, 2, 3], {"shared_prefix": (7, 8)}),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)
    assert chunk_key("ab", torch.tensor([1, 2, 3]), {}) == keys[0]
    reordered = chunk_key("ab", (1, 2, 3), {"blank_id": 5, "num_blanks": 1})
    assert reordered == keys[5]


@pytest.mark.parametrize("value", [torch.tensor(1), {1, 2}, object()])
def test_an_encoding_that_is_not_plain_is_refused(value):
    with pytest.raises(ValueError, match="plain JSON values"):
        chunk_key("ab", [1], {"blanks": value})


QUESTION = {"question": "Where was she born?", "chunks": ["She was born there.", "He was not."]}


def trained(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


AFTERWARDS = {
    "half": (lambda model: model.half(), "changed after its engine was made"),
    "bfloat16": (lambda model: model.bfloat16(), "changed after its engine was made"),
    "trained": (trained, "changed after its engine was made"),
    "detached": (detach, "was detached"),
    "training": (lambda model: model.train(), "in training mode"),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_an_engine_refuses_a_model_that_changed_under_it(tmp_path, tokenizer, name):
    """Its chunks would go into the store, and be taken from it, by a wrong fingerprint."""
    change, message = AFTERWARDS[name]
    engine = Engine(tiny_llama(tokenizer, 256), tokenizer, store=ChunkStore(folder=tmp_path))
    other = QUESTION | {"chunks": ["It rained."]}
    engine.answer([QUESTION], max_new_tokens=1)
    change(engine.model)
    for act in (
        lambda: engine.answer([QUESTION]),
        lambda: list(engine.stream(other)),
        lambda: engine.encode(["It rained."]),
        lambda: engine.cache(QUESTION["chunks"]),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    if name in ("detached", "training"):
        attach(engine.model.eval())
        assert engine.answer([other], max_new_tokens=1)[0].usage.chunk_misses
    else:
        assert engine.answer([QUESTION], "full-prefill", max_new_tokens=1)
        again = Engine(engine.model, tokenizer, store=engine.store)
        assert again.answer([QUESTION], max_new_tokens=1)[0].usage.chunk_misses == 2


@contextmanager
def scaled(model):
    layers = [module for module in model.modules() if hasattr(module, "scale_layer")]
    for factor in (5.0, 0.2):
        for layer in layers:
            layer.scale_layer(factor)
        if factor > 1:
            yield


@pytest.mark.parametrize("change", [lambda model: model.disable_adapter(), scaled])
def test_chunks_of_an_adapter_switched_off_or_scaled_are_not_cached_as_its_own(tokenizer, change):
    lora = LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    engine = Engine(get_peft_model(tiny_llama(tokenizer, 256), lora), tokenizer)
    with change(engine.model):
        with pytest.raises(ValueError, match="changed after its engine was made"):
            engine.answer([QUESTION], "naive", max_new_tokens=1)
        assert engine.answer([QUESTION], "full-prefill", max_new_tokens=1)
    engine.model.add_adapter("unused", lora)
    assert engine.answer([QUESTION], "naive", max_new_tokens=1)[0].usage.chunk_misses == 2


@pytest.mark.parametrize("how", ["around the call", "in the model, as a Trainer leaves it"])
def test_states_of_autocast_are_not_cached(tokenizer, how):
    engine = Engine(tiny_llama(tokenizer, 256), tokenizer)
    autocast = torch.autocast("cpu", torch.bfloat16)
    if "model" in how:
        engine.model.forward, autocast = autocast(engine.model.forward), nullcontext()
    for method in ("naive", "prefix-cache"):
        with autocast, pytest.raises(ValueError, match="runs under autocast"):
            engine.answer([QUESTION], method)
    assert not len(engine.store)
