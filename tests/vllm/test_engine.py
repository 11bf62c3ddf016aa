"""vLLM over cached chunks gives the answers of blocktune's own engine, and never a mixture."""

import copy
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMValidationError
from vllm_cases import SMALL, TINY, close, first_logprobs, forget, make_adapter, questions, worst

from blocktune import Engine
from blocktune.bench import vllm as bench
from blocktune.bench.vllm import VllmBench
from blocktune.cache.store.shelf import MissQueue, StoreView
from blocktune.prompt import LayoutSpec
from blocktune.vllm import ChunkLLM, guard
from blocktune.vllm.plan import LoadPlan
from blocktune.vllm.worker import Missing, _use_one_core

TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=20)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(store):
    return Engine.from_pretrained(TINY, store=store, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def llm(store, engine):
    # 40 blocks hold six of these prompts: more at once are preempted.
    options = SMALL | {"enable_lora": True, "max_lora_rank": 8, "max_num_batched_tokens": 128}
    llm = ChunkLLM(TINY, store=store, **options | {"num_gpu_blocks_override": 40})
    yield llm
    close(llm)


@pytest.fixture(scope="module")
def packet(tmp_path_factory):
    return make_adapter(
        tmp_path_factory.mktemp("packet"), LayoutSpec(num_headers=2, num_trailers=1), False
    )


def connector(llm):
    """Both halves of the connector, which run in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def plain(llm, example):
    """The same tokens without a plan."""
    made = llm.client.read(example)
    return made._replace(plan=None)


def require_same(completions, engine, examples, method, tokens=TOKENS):
    wanted = engine.answer(examples, method, max_new_tokens=tokens)
    for one, answer, example in zip(completions, wanted, examples, strict=True):
        assert one.token_ids == answer.token_ids
        assert worst(one, first_logprobs(engine, example, method)) < TOLERANCE


@pytest.mark.parametrize(
    "method",
    [
        *("naive", "link0", "link0 blanks=3", "naive + layout shared_prefix=true"),
        *("naive + layout bos=drop", "naive + layout placement=composite"),
    ],
)
def test_answers_are_the_engines(llm, engine, method):
    examples = questions(1)
    require_same(llm.answer(examples, method, sampling=GREEDY), engine, examples, method)


def test_a_repeated_question_is_served_from_vllms_own_cache(llm, engine):
    examples = questions(2, 2)
    for _ in range(2):
        made = llm.answer(examples, sampling=GREEDY)
        require_same(made, engine, examples, "naive")
    before = connector(llm).store.stats().tiers["disk"]
    assert all(one.cached_tokens >= one.prompt_tokens - 48 for one in made)
    llm.answer(examples, sampling=GREEDY)
    assert connector(llm).store.stats().tiers["disk"] == before


@pytest.mark.parametrize("method", ["kv-packet", "turborag", "turborag positions=composite"])
def test_learned_tokens_are_served_by_the_base(llm, store, packet, method):
    engine = Engine.from_pretrained(TINY, packet, store=store, dtype="float32", device="cpu")
    adapted, examples = llm.adapted(packet), questions(3, 2)
    assert adapted.client.lora is None
    made = adapted.answer(examples, method, sampling=GREEDY)
    require_same(made, engine, examples, method)
    assert len(adapted.client.prompts.pieces(examples[0], adapted.client.method).chunks) == 6


@pytest.mark.parametrize("scope", ["both", "encode", "read"])
def test_a_lora_adapter_answers_from_its_own_chunks(llm, engine, store, tmp_path, scope):
    adapter = make_adapter(tmp_path / scope, LayoutSpec(), True, scope)
    tuned = Engine.from_pretrained(TINY, adapter, store=store, dtype="float32", device="cpu")
    adapted, examples = llm.adapted(adapter), questions(4, 2)
    assert (adapted.client.lora is None) == (scope == "encode")
    made = adapted.answer(examples, sampling=GREEDY)
    require_same(made, tuned, examples, "block-attention")
    # The base is asked the same: neither finds the other's chunks or cached blocks.
    base = llm.answer(examples, sampling=GREEDY)
    require_same(base, engine, examples, "naive")
    assert worst(base[0], first_logprobs(tuned, examples[0], "block-attention")) > 0.01


def test_plain_and_chunk_requests_share_a_batch(llm, engine):
    examples = questions(5)
    llm.answer(examples)
    forget(llm)
    rendered = [
        llm.client.read(one) if index % 2 else plain(llm, one) for index, one in enumerate(examples)
    ]
    made = llm.generate(rendered, GREEDY)
    require_same(made[1::2], engine, examples[1::2], "naive")
    require_same(made[::2], engine, examples[::2], "full-prefill")


def test_hazard_1_a_plain_request_never_finds_reused_blocks(llm, engine, monkeypatch):
    examples = questions(6)
    llm.answer(examples)
    require_same(
        llm.generate([plain(llm, e) for e in examples], GREEDY), engine, examples, "full-prefill"
    )
    # Without the salt it does: this test would see it.
    forget(llm)
    monkeypatch.setattr(LoadPlan, "salt", lambda self, own=None: own)
    llm.answer(examples)
    [made] = llm.generate([plain(llm, examples[0])], GREEDY)
    assert worst(made, first_logprobs(engine, examples[0], "full-prefill")) > 0.1
    forget(llm)


def test_hazard_2_prompt_log_probabilities_are_refused(llm):
    asked = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs cannot"):
        llm.answer(questions(1, 1), sampling=asked)
    unread = SamplingParams(temperature=0, max_tokens=4, skip_reading_prefix_cache=True)
    with pytest.raises(VLLMValidationError, match="skip_reading_prefix_cache"):
        llm.answer(questions(1, 1), sampling=unread)


@pytest.mark.parametrize("how", ["missing", "damaged", "damaged, not alone"])
def test_hazard_3_without_a_chunk_nothing_is_answered(llm, engine, store, how, monkeypatch):
    [example] = questions({"missing": 8, "damaged": 9}.get(how, 7), 1)
    llm.answer([example])
    forget(llm)
    made = llm.client.read(example)
    others = [plain(llm, one) for one in questions(1, 2)] if "not alone" in how else []
    key, queue = made.plan.keys[2], MissQueue(store)
    path = store / key[:2] / key[2:4] / f"{key}.safetensors"
    if how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    if how == "missing":
        with pytest.raises(VLLMValidationError, match="segments are not in the store"):
            llm.generate([made], GREEDY)
        monkeypatch.setattr(StoreView, "has", lambda *_: True)  # it vanishes after that check
    with pytest.raises(ValueError, match="could not be loaded"):
        llm.generate([*others, made], GREEDY)
    monkeypatch.undo()
    wanted = queue.take(made.plan.fingerprint)
    assert [one.ids for one in wanted] == [made.plan.segments[2].ids]
    queue.done(made.plan.fingerprint, wanted)
    # `answer` has it encoded again.
    require_same(llm.answer([example], sampling=GREEDY), engine, [example], "naive")


def test_loads_use_one_core_and_leave_other_threads_theirs(llm):
    before = torch.get_num_threads()
    assert connector(llm).pool.submit(torch.get_num_threads).result() == 1

    def in_a_thread(work, *values, **options):
        with ThreadPoolExecutor(1, **options) as pool:
            return pool.submit(work, *values).result()

    alone = {"initializer": _use_one_core, "initargs": (before + 1,)}
    assert in_a_thread(torch.get_num_threads, **alone) == 1
    assert in_a_thread(torch.get_num_threads) == before + 1
    in_a_thread(torch._C.set_num_threads, before)
    assert torch.get_num_threads() == before


def test_a_request_that_is_alone_is_loaded_beside_its_forward_pass(llm, engine, monkeypatch):
    [example] = questions(14, 1)
    llm.answer([example])
    forget(llm)
    worker, order, before = connector(llm), [], counter(llm, "vllm:blocktune_layered")
    fill, waited = worker._fill, worker.wait_for_layer

    alone = True

    def slowly(*args):
        for name in fill(*args):
            order.append(("written", name))
            yield name
            deadline = time.monotonic() + 60
            while alone and ("waited", name) not in order:
                assert time.monotonic() < deadline, "the forward pass never waited for this layer"
                time.sleep(0.001)

    monkeypatch.setattr(worker, "_fill", slowly)
    monkeypatch.setattr(
        worker, "wait_for_layer", lambda name: (waited(name), order.append(("waited", name)))
    )
    require_same(llm.answer([example], sampling=GREEDY), engine, [example], "naive")
    names = list(dict.fromkeys(name for _, name in order))
    assert order[: 2 * len(names)] == [(did, n) for n in names for did in ("written", "waited")]
    forget(llm)
    order.clear()
    alone = False
    llm.answer([example, *questions(15, 1)], max_new_tokens=1)
    assert [did for did, _ in order[: len(names)]] == ["written"] * len(names)
    assert counter(llm, "vllm:blocktune_layered") == before + 1


def test_a_forward_pass_that_waits_for_nothing_answers_nothing(llm, engine, monkeypatch):
    [example] = questions(14, 1)
    forget(llm)
    made = llm.client.read(example)
    with monkeypatch.context() as patch:
        patch.setattr(connector(llm), "wait_for_layer", lambda name: None)
        with pytest.raises(ValueError, match="could not be loaded"):
            llm.generate([made], GREEDY)
    require_same(llm.generate([made], GREEDY), engine, [example], "naive")


@pytest.mark.parametrize("guarded", [True, False])
def test_a_request_that_is_no_plan_fails_alone(llm, engine, monkeypatch, guarded):
    [example] = questions(10, 1)
    llm.answer([example])
    made = llm.client.read(example)
    broken = made._replace(prompt_ids=made.prompt_ids[:40])
    with monkeypatch.context() as patch:
        if not guarded:
            patch.setattr(guard, "require_loadable", lambda *_: None)
        expected = (VLLMValidationError, "longer prompt") if guarded else (ValueError, "loaded")
        with pytest.raises(expected[0], match=expected[1]):
            llm.generate([broken], GREEDY)
    require_same(llm.answer([example], sampling=GREEDY), engine, [example], "naive")


def test_several_choices_are_the_same_prompts(llm, engine):
    [example] = questions(10, 1)
    llm.answer([example])
    forget(llm)
    asked = SamplingParams(n=3, temperature=1, seed=0, max_tokens=2, logprobs=20)
    [made] = llm.answer([example], sampling=asked)
    wanted = first_logprobs(engine, example, "naive")
    assert [worst(made, wanted, choice) < TOLERANCE for choice in range(3)] == [True] * 3


def test_an_answer_of_which_a_choice_failed_is_a_failure(llm, engine, monkeypatch):
    [example] = questions(10, 1)
    llm.answer([example])
    forget(llm)
    worker, made, calls = connector(llm), llm.client.read(example), []
    chunks = worker._chunks

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Missing("gone")
        return chunks(*args)

    monkeypatch.setattr(worker, "_chunks", second_fails)
    with pytest.raises(ValueError, match="could not be loaded"):
        llm.generate([made], SamplingParams(n=3, temperature=1, max_tokens=3))


def test_the_text_ends_before_a_stop_string(llm):
    [example] = questions(10, 1)
    [whole] = llm.answer([example])
    [made] = llm.answer([example], sampling=SamplingParams(temperature=0, stop=[whole.text[2:5]]))
    assert made.text == whole.text[:2]


def test_a_missing_chunk_is_not_called_damaged(llm, store):
    """The reason of an earlier failure is not that of a later one."""
    [example] = questions(17, 1)
    llm.answer([example])
    plan, worker = llm.client.read(example).plan, connector(llm)
    worker.store.clear()
    paths = [store / key[:2] / key[2:4] / f"{key}.safetensors" for key in plan.keys]
    whole = [path.read_bytes() for path in paths]
    paths[1].write_bytes(whole[1][:-9])
    with pytest.raises(Missing, match=rf"1 of \d segments.*{plan.keys[1]}"):
        worker._chunks(plan, 0, Counter())
    paths[1].write_bytes(whole[1])
    paths[2].unlink()
    worker.store.clear()
    with pytest.raises(Missing, match=r"1 of \d segments.*they are not there"):
        worker._chunks(plan, 0, Counter())
    paths[2].write_bytes(whole[2])
    MissQueue(store).done(plan.fingerprint, [segment.wanted for segment in plan.segments])


def over(llm, store):
    """The same vLLM with the chunks of another store."""
    other = copy.copy(llm)
    other._store = store
    return other.adapted(None)


def test_chunks_of_another_dtype_are_not_encoded_in_vain(llm, tmp_path):
    examples = questions(18, 2)
    bfloat = Engine.from_pretrained(TINY, store=tmp_path, dtype="bfloat16", device="cpu")
    bfloat.encode(examples[0].chunks)
    with pytest.raises(ValueError, match=r"dtype \(torch.float32\) or weights differ") as error:
        over(llm, tmp_path).answer(examples)
    assert "\n" not in str(error.value)


def test_a_store_that_is_too_small_for_a_batch_is_named_as_that(llm, tmp_path):
    with pytest.raises(ValueError, match=r"did not keep \d+ of \d+ segments; raise its limits"):
        over(llm, f"{tmp_path},disk=100kB").answer(questions(18, 2))


def test_a_plan_is_refused_where_the_connector_does_not_run(llm, monkeypatch):
    """vLLM's ``kv_offloading_size`` replaces it by another one."""
    [example] = questions(10, 1)
    llm.answer([example])
    config = llm.llm.llm_engine.vllm_config
    for transfer in (None, KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")):
        with monkeypatch.context() as patch:
            patch.setattr(config, "kv_transfer_config", transfer)
            with pytest.raises(VLLMValidationError, match="runs without BlocktuneConnector"):
                llm.generate([llm.client.read(example)], GREEDY)


def test_odd_documents_are_the_engines(llm, engine):
    """The same one twice, and one of a single letter."""
    [one] = questions(16, 1)
    texts = [one.chunks[0], one.chunks[0], "a", one.chunks[1]]
    examples = [{"question": one.question, "chunks": chunks} for chunks in (texts, ["a"])]
    require_same(llm.answer(examples, "naive", sampling=GREEDY), engine, examples, "naive")


def test_a_store_of_another_model_gives_nothing(llm, engine):
    [example] = questions(10, 1)
    made = llm.client.read(example)
    other = LoadPlan("0" * 64, made.plan.segments)
    forget(llm)
    with pytest.raises(VLLMValidationError, match="has no model of fingerprint 0000"):
        llm.generate([made._replace(plan=other)], GREEDY)
    assert llm.client.store.queue.take("0" * 64) == []  # no encoder would ever take them
    require_same(llm.answer([example], sampling=GREEDY), engine, [example], "naive")


def test_preempted_requests_load_again(llm):
    examples = questions(11, 8)
    long = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    before = counter(llm, "vllm:num_preemptions")
    llm.answer(examples, max_new_tokens=1)
    rendered = [llm.client.read(one) for one in examples]
    together = llm.generate(rendered, long)
    assert counter(llm, "vllm:num_preemptions") > before
    forget(llm)
    alone = [llm.generate([one], long)[0] for one in rendered]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_hot_chunks_come_from_memory_in_any_order(llm, engine):
    examples = questions(12, 1)
    llm.answer(examples)
    [example] = examples
    turned = type(example)(example.question, tuple(reversed(example.chunks)))
    disk = connector(llm).store.stats().tiers["disk"]
    require_same(llm.answer([turned], sampling=GREEDY), engine, [turned], "naive")
    assert connector(llm).store.stats().tiers["disk"] == disk
    assert counter(llm, "vllm:blocktune_host_hits") > 0
    assert counter(llm, "vllm:blocktune_failed") > 0
    assert counter(llm, "vllm:external_prefix_cache_hits") > 0


def test_a_method_that_vllm_cannot_serve_is_refused(llm):
    for method in ("cacheblend", "ape"):
        with pytest.raises(ValueError, match="vLLM cannot serve"):
            llm.answer(questions(1), method)


def test_the_documented_python_runs(llm, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/vllm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    [text] = [block for block in blocks if "blocktune.vllm" in block]
    monkeypatch.setattr("blocktune.vllm.ChunkLLM", lambda *args, **options: llm, raising=False)
    exec(compile(text, "vllm.md", "exec"), {})
    assert " of " in capsys.readouterr().out


def test_the_bench_writes_through_the_connectors_layers(llm):
    setting = VllmBench(chunk=8, width=128, heads=2, kv_heads=4)  # of data/tiny
    llm.answer(questions(10, 1))
    assert bench._write_s(2, setting) > 0
    forget(llm)


def counter(llm, name: str) -> float:
    return sum(one.value for one in llm.llm.get_metrics() if one.name == name)


def test_the_queue_is_worked_off(llm, engine, store):
    [example] = questions(13, 1)
    made = llm.client.read(example)
    llm.client.ask_for(llm.client.missing(made.plan))
    assert MissQueue(store).take(engine.fingerprint)
    assert engine.encode_wanted() == len(made.plan.segments) - 1
    assert llm.client.missing(made.plan) == []
    assert MissQueue(store).take(engine.fingerprint) == []
    require_same(llm.generate([made], GREEDY), engine, [example], "naive")
