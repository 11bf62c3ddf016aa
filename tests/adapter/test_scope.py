"""Adapters that act on some rows only, against two stock models: one writes, one reads."""

import copy
import threading

import pytest
import torch
from families import build
from models.test_gate import FORMS
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from training.runs import losses, make_trainer
from training.toy import toy_config, toy_examples, toy_model
from transformers import DynamicCache

from blocktune import Engine
from blocktune.adapter import AdapterInfo, attach_links, scope_adapter, scope_of
from blocktune.adapter.load import _with_peft
from blocktune.adapter.merge import merge_adapter
from blocktune.attention import attach, make_plan
from blocktune.attention.interface import cache_argument
from blocktune.cache import ChunkStore, stored_key
from blocktune.check import check_adapter, check_model
from blocktune.engine.encode import Piece
from blocktune.hub.card import CardFacts, card
from blocktune.layout import Kind
from blocktune.prompt import LayoutSpec, Pieces, PromptFormat, lay_out
from blocktune.vllm.client import ChunkClient

PIECES = Pieces(prefix=(5, 6), chunks=((11, 12, 13), (21, 22, 23, 24), (31, 32)), query=(41, 42))
FAMILY = {"q_proj", "v_proj", "o_proj", "down_proj"}


def with_lora(scope: str = "both", **options):
    """The toy model with LoRA whose second matrix is not zero; the same weights for each scope."""
    config = LoraConfig(r=4, target_modules=sorted(FAMILY), **options)
    torch.manual_seed(0)
    model = get_peft_model(toy_model(), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    attach(model)
    scope_adapter(model, scope)
    return model.eval()


def one_forward(model, execution: str = "split", block: bool = True) -> torch.Tensor:
    """Logits of the question's rows, ``(Q, V)``, as a training step computes them."""
    prompt = lay_out(PIECES, LayoutSpec(block=block))
    plan, asks = make_plan(execution, prompt.layout), prompt.layout.kind[0] == Kind.QUERY
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        out = model(ids, position_ids=prompt.layout.position, plan=plan, use_cache=False)
    return out.logits[0, asks]


@torch.no_grad()
def by_two_models(writer, reader) -> torch.Tensor:
    """The same logits: ``writer`` encodes each chunk alone, ``reader`` all else, stock models."""
    cache, at = DynamicCache(), 0
    for model, ids in [(reader, PIECES.prefix), *((writer, chunk) for chunk in PIECES.chunks)]:
        own, positions = DynamicCache(), torch.arange(at, at + len(ids))[None]
        model(torch.tensor([ids]), position_ids=positions, past_key_values=own)
        for index, layer in enumerate(own.layers):
            cache.update(layer.keys, layer.values, index)
        at += len(ids)
    positions = torch.arange(at, at + len(PIECES.query))[None]
    ids = torch.tensor([PIECES.query])
    return reader(ids, position_ids=positions, past_key_values=cache).logits[0]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("execution", ["split", "dense", "flex"])
@pytest.mark.parametrize("scope", ["encode", "read"])
def test_one_forward_is_one_model_that_writes_and_one_that_reads(scope, execution, options):
    tuned, base = with_lora(**options), toy_model()
    writer, reader = (tuned, base) if scope == "encode" else (base, tuned)
    expected = by_two_models(writer, reader)
    got = one_forward(with_lora(scope, **options), execution)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for other in (tuned, base):  # neither model alone does that
        assert (by_two_models(other, other) - expected).abs().max() > 1e-2


def test_full_attention_of_a_writer_is_the_base_bit_for_bit():
    ids = torch.tensor([[5, 6, 11, 12, 13, 41, 42]])
    with torch.no_grad():
        wanted = toy_model()(ids).logits
        assert torch.equal(with_lora("encode")(ids).logits, wanted)
        assert torch.equal(with_lora("read")(ids).logits, with_lora()(ids).logits)
        assert not torch.equal(with_lora("read")(ids).logits, wanted)
    base = toy_model()
    attach(base)
    assert torch.equal(
        one_forward(with_lora("encode"), block=False), one_forward(base, block=False)
    )


def gradients(model, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    prompt = lay_out(PIECES, LayoutSpec())
    plan = make_plan("split", prompt.layout)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.tensor([prompt.ids])
    logits = model(ids, position_ids=prompt.layout.position, plan=plan, use_cache=False).logits
    one_forward(model, block=False)  # a pass between, which other rows act in
    logits[0, -1].log_softmax(-1)[7].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_layers_find_their_rows_again():
    plain, again = gradients(with_lora("encode")), gradients(with_lora("encode"), True)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)
    whole = gradients(with_lora())
    assert max((whole[name] - grad).abs().max() for name, grad in plain.items()) > 1e-3


def test_rows_in_full_attention_leave_gradients_of_zero():
    """DDP waits for the gradient of every weight, also where no row of a batch needs one."""
    model = with_lora("encode").train()
    ids = torch.tensor([[5, 6, 11]])
    model(ids).logits.sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_the_first_matrix_sees_gradients_of_chunk_rows_alone():
    """By hand: with B = 0 nothing is learnt in A, and B's gradient is that of the masked rows."""
    prompt, names = lay_out(PIECES, LayoutSpec()), {}
    written = prompt.layout.written[0]
    assert written.tolist() == [False] * 2 + [True] * 9 + [False] * 2
    model = with_lora("encode")
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda m, args, out: names.update(x=args[0], out=out))
    plan = make_plan("split", prompt.layout)
    ids = torch.tensor([prompt.ids])
    logits = model(ids, position_ids=prompt.layout.position, plan=plan, use_cache=False).logits
    names["out"].retain_grad()
    logits[0, -1, 7].backward()
    low = names["x"][0] @ layer.lora_A["default"].weight.T
    by_hand = names["out"].grad[0].T @ (low * written[:, None]) * layer.scaling["default"]
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, by_hand)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A writer, distilled for a few steps."""
    folder = tmp_path_factory.mktemp("writer")
    how = {"scope": "encode", "distill_weight": 1.0, "max_steps": 60}
    trainer = make_trainer(folder, **how, per_device_train_batch_size=8)
    trainer.train()
    trainer.save_model()
    loss = losses(trainer)
    assert sum(loss[-8:]) < 0.7 * sum(loss[:8])
    return folder


@pytest.fixture
def engine(run):
    return Engine.from_pretrained(str(run / "base"), run / "out", device="cpu")


def test_a_served_writer_reads_with_the_base(run, engine):
    base = Engine.from_pretrained(str(run / "base"), device="cpu")
    asks = toy_examples(3)
    assert engine.adapter.scope == scope_of(engine.model) == "encode"
    own = engine.next_logits(asks, "full-prefill")
    with engine.model.disable_adapter():
        assert torch.equal(engine.next_logits(asks, "full-prefill"), own)
    wanted = base.next_logits(asks, "full-prefill")  # another copy of the weights: rounding
    torch.testing.assert_close(own, wanted, rtol=0, atol=2e-6)
    assert (engine.next_logits(asks, "naive") - base.next_logits(asks, "naive")).abs().max() > 1e-2
    # What is computed at answering time is the base's: a chunk from the writer's store, asked of
    # the base, is the same answer.
    context = engine.cache(asks[0].chunks, "block-attention")
    inputs = context.inputs(asks[0].question)
    width = inputs[cache_argument(engine.model)].get_seq_length()
    rest = inputs["input_ids"][:, width:], inputs["position_ids"][:, width:]
    with torch.no_grad():
        logits = base.model(
            rest[0], position_ids=rest[1], past_key_values=inputs[cache_argument(engine.model)]
        ).logits[0, -1]
    wanted = engine.next_logits(asks[:1], "block-attention")[0]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


def test_its_chunks_are_not_the_base_s_and_its_prefix_is_no_chunk(run):
    store = ChunkStore()
    base = Engine.from_pretrained(str(run / "base"), device="cpu", store=store)
    engine = Engine.from_pretrained(str(run / "base"), run / "out", device="cpu", store=store)
    assert base.fingerprint != engine.fingerprint
    prefix, [chunk] = engine.prompts.encodable(toy_examples(1)[0].chunks[:1])
    encoder = engine.state.encoder
    same = Piece(prefix.ids)
    assert encoder.key(prefix) == stored_key(engine.fingerprint, prefix.ids, (), True)
    assert encoder.key(prefix) != encoder.key(same)
    assert base.state.encoder.key(prefix) == base.state.encoder.key(same)
    base.encode(toy_examples(1)[0].chunks)
    assert engine.encode(toy_examples(1)[0].chunks).num_encoded == 3
    with torch.no_grad():
        wanted = base.model(torch.tensor([prefix.ids]), past_key_values=DynamicCache())
    stored = store.lookup(encoder.key(prefix), prefix.ids, engine.fingerprint).kv
    torch.testing.assert_close(stored.keys[-1], wanted.past_key_values.layers[-1].keys[0])
    assert chunk.is_prefix is False


def test_every_claim_of_the_checks_holds(engine):
    checks = {one.name: one for one in check_model(engine)}
    assert [one for one in checks.values() if not one.passed] == []
    assert checks["full attention = its adapter switched off"].max_abs_diff == 0
    assert "ratio 1 = full prefill" in checks


def test_a_writer_is_compared_with_the_base_and_not_with_itself(run, monkeypatch):
    name, how = "full attention = the base, bit for bit", {"device": "cpu", "dtype": "float32"}
    [first, *others] = check_adapter(None, run / "out", **how)
    assert (first.name, first.max_abs_diff) == (name, 0)
    monkeypatch.setattr("blocktune.adapter.load._with_peft", _on_another_base(_with_peft))
    broken = check_adapter(None, run / "out", **how)
    assert [one.name for one in broken if not one.passed] == [name]
    assert len(broken) == len(others) + 1


def _on_another_base(load):
    def loaded(model, folder, merge):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.001)
        return load(model, folder, merge)

    return loaded


def test_threads_do_not_see_each_other_s_rows(engine):
    asks, wrong = toy_examples(6), []
    wanted = [engine.next_logits([ask], "naive") for ask in asks]

    def ask_often(index: int) -> None:
        own = copy.copy(engine).salted(str(index))  # every thread encodes, the others read
        for _ in range(5):
            if not torch.equal(own.next_logits([asks[index]], "naive"), wanted[index]):
                wrong.append(index)
            own.store.clear()

    threads = [threading.Thread(target=ask_often, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stock_peft_needs_one_more_call(run, engine):
    stock = AutoPeftModelForCausalLM.from_pretrained(run / "out").eval()
    info = AdapterInfo.load(run / "out")
    with pytest.raises(ValueError, match="has scope 'encode' and the model 'both'; call"):
        Engine(stock, engine.tokenizer, adapter=info, adapter_folder=run / "out")
    assert attach_links(stock, run / "out") == info
    other = Engine(stock, engine.tokenizer, adapter=info, adapter_folder=run / "out")
    asks = toy_examples(2)
    assert torch.equal(other.next_logits(asks, "naive"), engine.next_logits(asks, "naive"))


def test_vllm_serves_the_base_and_finds_all_that_was_encoded(run, tmp_path):
    ask = toy_examples(1)[0]
    engine = Engine.from_pretrained(str(run / "base"), run / "out", device="cpu", store=tmp_path)
    engine.encode(ask.chunks)
    client = ChunkClient(str(run / "base"), run / "out", store=tmp_path)
    assert client.lora is None
    plan = client.read(ask).plan
    assert len(plan.segments) == 1 + len(ask.chunks)
    assert client.missing(plan) == []
    [first, *_] = plan.missing(lambda key: False)
    assert first.prefix


def test_it_is_not_merged(run, tmp_path):
    with pytest.raises(ValueError, match="scope 'encode' acts on rows of chunks only, but merged"):
        merge_adapter(run / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_card_says_what_it_acts_on(run):
    info = AdapterInfo.load(run / "out")
    text = card("me/mine", info, "org/base", CardFacts(license="mit"), [])
    assert "LoRA acts on rows of chunks only; PEFT alone would apply it to all" in text
    plain = AdapterInfo("org/base", "a", "b", LayoutSpec(), PromptFormat())
    assert "LoRA acts on" not in card("me/mine", plain, "org/base", CardFacts(license="mit"), [])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"use_dora": True}, "a variant of LoRA in"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save acts on others too"),
        ({"lora_bias": True}, "lora_bias acts on others too"),
        ({"bias": "all"}, "but bias acts on others too"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights acts on others too"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices acts on others"),
        ({"target_modules": ["q_proj", "lm_head"]}, "whose rows are not in the prompt's order"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "whose rows are not in the prompt's"),
    ],
)
def test_what_would_act_on_other_rows_is_refused(options, line):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options)
    model = get_peft_model(toy_model(config=toy_config(tie_word_embeddings=False)), config)
    with pytest.raises(ValueError, match=line):
        scope_adapter(model, "encode")
    assert scope_of(model) == "both"
    scope_adapter(model, "both")


def test_latents_that_every_answer_expands_again_are_refused():
    model = build(FORMS["deepseek"][0]())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="kv_b_proj', which expands cached latents in every"):
        scope_adapter(model, "encode")


def test_a_scope_is_given_once():
    model = with_lora("encode")
    scope_adapter(model, "encode")
    with pytest.raises(ValueError, match="has scope 'encode'; load the base again"):
        scope_adapter(model, "read")
    with pytest.raises(ValueError, match="one of both, encode, read, got 'write'"):
        scope_adapter(model, "write")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"use_peft": False}, "but the model has none; set use_peft"),
        ({"use_peft": False, "freeze_base": True, "num_links": 1}, "but the model has none"),
        ({"both_modes": True}, "64 examples in full attention lack; set block_share"),
        ({"use_dora": True}, "a variant of LoRA"),
        ({"num_links": 1, "link_mode": "added_tokens"}, "trainable_token_indices acts"),
        ({"scope": "write"}, "invalid choice: 'write'"),
    ],
)
def test_a_run_that_cannot_keep_its_scope_is_refused(tmp_path, options, line):
    with pytest.raises(ValueError, match=line):
        make_trainer(tmp_path, **{"scope": "encode"} | options)
