"""The engine's answers, its caches and its usages."""

import copy
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine.served import ASK, SHORT, Ask, engine_of
from engine.test_selection import deep
from families import FAMILIES
from families import build as build_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.store.blobs import Blobs
from blocktune.cache.store.chunk_file import ChunkFile, FileKV
from blocktune.cache.store.folder import ChunkFolder
from blocktune.cache.store.shelf import Shelf
from blocktune.data import RagExample
from blocktune.engine import Engine, Sampling
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.generation import TextStream
from blocktune.engine.state import Auxiliaries
from blocktune.engine.usage import Stopwatch
from blocktune.layout import Kind
from blocktune.methods import Weights, available, build, compose
from blocktune.prompt import Chunk
from blocktune.testing import small_engine


@pytest.fixture
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def layer_rows(engine) -> list[list[int]]:
    """Hooks that record how many rows each layer's feed-forward really computes."""
    counts: list[list[int]] = [[] for _ in engine.model.model.layers]
    for index, layer in enumerate(engine.model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, index=index: counts[index].append(args[0].shape[1])
        )
    return counts


@pytest.mark.parametrize(
    "method", [build("naive"), build("epic", k=2), build("cacheblend"), build("full-prefill")]
)
def test_the_usage_matches_the_rows_that_the_layers_executed(engine, method):
    engine.encode(ASK.chunks)
    counts = layer_rows(engine)
    answer = engine.answer([ASK], method, max_new_tokens=1)[0]
    pieces = engine.prompts.pieces(ASK, method)
    around = len(pieces.query) + (len(pieces.prefix) if method == build("full-prefill") else 0)
    executed = [sum(layer) - around for layer in counts]
    assert list(answer.usage.layer_tokens) == executed
    assert answer.usage.context_tokens == sum(map(len, pieces.chunks))
    share = sum(executed) / (len(executed) * answer.usage.context_tokens)
    assert answer.usage.recompute_ratio == pytest.approx(share)


def test_weights_that_are_no_numbers_answer_nothing(engine):
    engine.model.model.norm.weight.data.fill_(float("nan"))
    for method in ("naive", "full-prefill"):
        with pytest.raises(ValueError, match="logits are not numbers"):
            engine.answer([ASK], method)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decoded_token_that_overflows_is_one_line(engine, temperature):
    def overflow(module, args, output):  # in passes over a single row, not in the prefill
        return output * float("nan") if output.shape[1] == 1 else output

    engine.model.model.norm.register_forward_hook(overflow)
    how = {"max_new_tokens": 3, "sampling": Sampling(temperature=temperature)}
    assert engine.answer([ASK], "naive", max_new_tokens=1)
    with pytest.raises(ValueError, match="logits are not numbers"):
        engine.answer([ASK], "naive", **how)
    with pytest.raises(ValueError, match="logits are not numbers"):
        list(engine.stream(ASK, "naive", **how))


def test_cacheblend_keeps_its_share_and_computes_the_first_layer_in_full(engine):
    usage = engine.answer([ASK], build("cacheblend", ratio=0.5), max_new_tokens=1)[0].usage
    assert usage.layer_tokens[0] == usage.context_tokens == usage.probed_tokens
    assert usage.layer_tokens[1] == -(-usage.context_tokens // 2)


@pytest.mark.parametrize("method", ["cacheblend", "prophetkv"])
def test_an_answer_is_decoded_without_the_masks_of_its_prefill(engine, method):
    run = engine.prefilled([ASK], method)
    plans = [plan for executed in run.executed for plan in executed.plans]
    assert plans
    assert not any(plan._band._masks for plan in plans)


def test_chunks_are_encoded_once_and_their_bytes_are_counted(engine):
    report = engine.encode(ASK.chunks)
    assert (report.num_chunks, report.num_encoded) == (3, 3)
    assert engine.encode(ASK.chunks).num_encoded == 0
    usage = engine.answer([ASK], "naive", max_new_tokens=1)[0].usage
    assert (usage.chunk_hits, usage.chunk_misses) == (3, 0)
    pieces = engine.prompts.pieces(ASK, build("naive"))
    cached = len(pieces.prefix) + sum(map(len, pieces.chunks))
    config = engine.model.config
    states = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert usage.bytes_read == cached * (4 * states + 8)  # float32, and an int64 token id


def test_encoding_a_corpus_holds_one_pass_of_it_at_a_time(engine, monkeypatch):
    encoder, held = engine.state.encoder, []
    monkeypatch.setattr(encoder, "pass_tokens", 40)
    find = encoder.find

    def seen(group, watch, **options):
        held.append(sum(len(piece.ids) for piece in group))
        return find(group, watch, **options)

    monkeypatch.setattr(encoder, "find", seen)
    report = engine.encode([Chunk(f"Anna Belt has {count} films.") for count in range(20)] * 2)
    assert (report.num_chunks, report.num_encoded) == (40, 20)
    assert len(held) > 1
    assert max(held) <= 40


def test_a_chunk_answers_alike_wherever_and_whenever_it_was_encoded(engine, tokenizer):
    expected = engine.next_logits([ASK], "naive")
    other = engine_of(FAMILIES["llama"](), tokenizer)
    other.encode(tuple(reversed(ASK.chunks)) + SHORT.chunks)
    torch.testing.assert_close(other.next_logits([ASK], "naive"), expected, rtol=0, atol=1e-5)


def test_a_folder_of_chunks_serves_the_next_process(tokenizer, tmp_path):
    first = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    expected = first.next_logits([ASK], "naive")
    again = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    usage = again.answer([ASK], "naive", max_new_tokens=1)[0].usage
    assert (usage.chunk_hits, usage.chunk_misses) == (3, 0)
    assert torch.equal(again.next_logits([ASK], "naive"), expected)


def test_encoding_names_the_documents_of_chunks_that_an_answer_stored(tokenizer, tmp_path):
    engine = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    first = engine.answer([ASK], "naive", max_new_tokens=2)[0]
    shelf = Shelf(ChunkFolder(tmp_path))
    named = [dataclasses.replace(c, metadata={"id": n}) for n, c in enumerate(ASK.chunks)]
    for _ in range(2):
        assert engine.encode(named).num_encoded == 0
        assert [len(list(shelf.rows(document=str(n)))) for n in range(4)] == [1, 1, 1, 0]
        written = engine.store.stats().files.bytes_written
    engine.encode(named)
    assert engine.store.stats().files.bytes_written == written
    engine.forget()
    again = engine.answer([ASK], "naive", max_new_tokens=2)[0]
    assert (again.usage.chunk_hits, again.token_ids) == (3, first.token_ids)


@pytest.mark.parametrize("place", ["folder", "remote"])
def test_encoding_again_reads_no_tensors(tokenizer, tmp_path, monkeypatch, place):
    def made():
        text = f"{tmp_path / 'near'}" if place == "folder" else (tmp_path / "far").as_uri()
        return engine_of(deep("llama"), tokenizer, store=ChunkStore.open(text, must_write=True))

    made().encode(ASK.chunks, method="droidspeak")
    engine, fetched, read = made(), [], Blobs.open
    monkeypatch.setattr(ChunkFile, "entry", None)

    def noted(blobs, key, most=None):
        fetched.append(most)
        return read(blobs, key, most)

    monkeypatch.setattr(Blobs, "open", noted)
    assert engine.encode(ASK.chunks, method="droidspeak").num_encoded == 0
    assert None not in fetched
    monkeypatch.undo()
    key = engine.state.encoder.key(engine.prompts.encodable(ASK.chunks[:1])[1][0])
    [path] = tmp_path.rglob(f"{key}.safetensors")
    path.write_bytes(b"damaged" + path.read_bytes()[7:])
    assert engine.encode(ASK.chunks).num_encoded == 1


def test_a_text_of_several_documents_has_all_their_names(tokenizer, tmp_path):
    engine, text = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore.open(tmp_path)), "It."
    for names in (("a", "b"), ("b", "c"), ("a", "c")):
        chunks = [Chunk(text, metadata={"id": name}) for name in names]
        assert engine.encode(chunks).num_encoded == (names == ("a", "b"))
    rows = [[row.key for row in Shelf.open(str(tmp_path)).rows(document=n)] for n in "abcd"]
    assert rows[0] == rows[1] == rows[2]
    assert list(map(len, rows)) == [1, 1, 1, 0]


def test_files_are_read_layer_by_layer_into_cpu_memory_alone(tokenizer, tmp_path, monkeypatch):
    store = ChunkStore.open(f"{tmp_path},memory=0")
    engine = engine_of(FAMILIES["llama"](), tokenizer, store=store)
    engine.encode(ASK.chunks)
    naive = build("naive")
    pieces = wanted_pieces(engine.lay_out(engine.prompts.pieces(ASK, naive), naive))
    watch = Stopwatch(torch.device("cpu"))
    assert len(engine.state.encoder.look_up(pieces, watch, lazy=True).kvs) == len(pieces)
    for device, read in (("cpu", FileKV), ("cuda", ChunkKV)):
        monkeypatch.setattr(type(engine.model), "device", torch.device(device))
        found = engine.state.encoder.look_up(pieces, watch, lazy=True)
        assert {type(kv) for kv in found.kvs.values()} == {read}


def test_the_prefix_cache_reuses_only_what_stands_first(engine):
    first = engine.answer([ASK], "prefix-cache", max_new_tokens=1)[0].usage
    again = engine.answer([ASK], "prefix-cache", max_new_tokens=1)[0].usage
    moved = Ask(ASK.question, ASK.chunks[1:] + ASK.chunks[:1])
    other = engine.answer([moved], "prefix-cache", max_new_tokens=1)[0].usage
    assert [a.chunk_hits for a in (first, again, other)] == [0, 3, 0]
    assert [a.recompute_ratio for a in (first, again, other)] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("turns", [1, 3, 7])
def test_a_history_never_holds_the_prompt_itself(turns, tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    usage = engine.answer([ASK], f"prefix-cache warm_up={turns}", max_new_tokens=1)[0].usage
    assert (len(ASK.chunks), usage.recompute_ratio) == (3, 1.0)


def test_batches_answer_in_the_order_of_the_requests(engine):
    asks = [ASK, SHORT, Ask("What?", ASK.chunks[:1])]
    together = engine.answer(asks, "naive", max_new_tokens=6, batch_size=2)
    alone = [engine.answer([ask], "naive", max_new_tokens=6)[0] for ask in asks]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_nothing_is_served_if_one_prompt_does_not_fit(engine):
    served = []
    engine.encode(ASK.chunks)
    hook = engine.model.register_forward_hook(lambda *_: served.append(True))
    too_long = Ask("word " * engine.prompts.max_tokens, ASK.chunks)
    with pytest.raises(ValueError, match=f"{engine.prompts.max_tokens}"):
        engine.answer([ASK, too_long], "naive", max_new_tokens=1, batch_size=1)
    hook.remove()
    assert not served


def test_a_character_cut_by_the_last_token_spoils_none_before_it():
    """Byte fallback (Llama 2, Gemma) decodes a run of bytes with a broken one as broken bytes."""
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    ids = [1 + byte for byte in "\u6771\U0001f600".encode()[:-2]]
    assert "\u6771" not in tokenizer.decode(ids)
    assert TextStream(tokenizer).whole(ids).startswith("\u6771")


def test_streamed_pieces_join_to_the_answer(engine):
    whole = engine.answer([ASK], "epic", max_new_tokens=12)[0].text
    assert "".join(engine.stream(ASK, "epic", max_new_tokens=12)).strip() == whole


def test_sampling_repeats_by_seed_and_is_not_greedy(engine):
    def draw(seed, of=Sampling):
        sampling = of(temperature=2.0, top_k=50, top_p=0.95, seed=seed)
        return engine.answer([ASK], "naive", max_new_tokens=8, sampling=sampling)[0].token_ids

    assert draw(1) == draw(1) == draw(1, dict)
    assert len({draw(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_p": 0.6}, {0, 1}), ({"top_k": 1}, {0}), ({}, {0, 1, 2, 3})],
)
def test_sampling_draws_from_the_nucleus_and_the_top_tokens_alone(options, kept):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    pick = Sampling(temperature=1.0, **options).picker(logits.device, [0])
    assert {int(pick(logits)) for _ in range(100)} == kept
    tiny = Sampling(temperature=1e-45, **options).picker(logits.device, [0])
    assert int(tiny(logits)) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "1"}, "'temperature' must be a number, got '1'"),
        ({"top_k": 2.5}, "'top_k' must be a whole number, got 2.5"),
        ({"seed": 1.5}, "'seed' must be a whole number or null, got 1.5"),
        ({"top_p": 0}, "top_p must be in"),
    ],
)
def test_sampling_values_that_do_not_fit_are_refused_before_decoding(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
    with pytest.raises(ValueError, match=message):
        Sampling.of(values)


def test_sampling_does_not_depend_on_the_batches_and_draws_anew_for_every_request(engine):
    sampling = Sampling(temperature=2.0, seed=5)
    asks = [ASK, SHORT, ASK, ASK]
    ids = [
        [a.token_ids for a in engine.answer(asks, "naive", sampling=sampling, batch_size=size)]
        for size in (1, 2, 4)
    ]
    assert ids[0] == ids[1] == ids[2]
    assert len({ids[0][index] for index in (0, 2, 3)}) == 3


def test_threads_over_one_engine_do_not_meet(engine):
    """Methods that drop rows on the way, that probe and that do neither, all at once."""
    methods = ["cacheblend", "naive", "cacheblend-repo", "query-attention", "full-prefill"]
    asks = [ASK, SHORT]
    expected = {(m, ask): engine.next_logits([ask], m) for m in methods for ask in asks}
    jobs = list(expected) * 3
    with ThreadPoolExecutor(max_workers=6) as pool:
        served = pool.map(lambda job: engine.next_logits([job[1]], job[0]), jobs)
        for job, logits in zip(jobs, served, strict=True):
            torch.testing.assert_close(logits, expected[job], rtol=0, atol=1e-6)


def test_threads_over_one_engine_do_not_meet_in_learned_tokens():
    engine = small_engine(Weights.LINKS)
    texts = ("Anna Belt lives in Kirby.", "The film was made by Noel Fisher.")
    asks = [RagExample(question, texts) for question in ("Who?", "Who made the film, then?")]
    expected = [engine.next_logits([ask], "kvlink") for ask in asks]
    with ThreadPoolExecutor(max_workers=6) as pool:
        served = list(pool.map(lambda n: engine.next_logits([asks[n % 2]], "kvlink"), range(60)))
    for number, logits in enumerate(served):
        torch.testing.assert_close(logits, expected[number % 2], rtol=0, atol=1e-6)


def test_what_a_generation_config_asks_for_in_vain_is_said(tokenizer, caplog):
    model = build_model(FAMILIES["llama"]())
    model.generation_config.repetition_penalty = 1.1
    model.generation_config.stop_strings = ["\n"]
    Engine(model, tokenizer)
    said = [record.getMessage() for record in caplog.records if "not followed" in record.message]
    assert len(said) == 2
    assert "repetition_penalty=1.1" in said[0]


def test_an_auxiliary_model_must_read_the_served_models_ids_as_the_same_text(tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<|extra|>"])
    model = build_model(FAMILIES["llama"]())
    Auxiliaries(model, tokenizer).add("small", model, larger)
    with pytest.raises(
        ValueError,
        match=rf"'small' has another tokenizer .* 1 of .* differ, such as id {len(tokenizer)}, ",
    ):
        Auxiliaries(model, larger).add("small", model, tokenizer)


def test_an_auxiliary_model_is_asked_by_name(engine):
    other = build_model(engine.model.config, seed=7)
    engine.add_auxiliary("small", other, engine.tokenizer)
    method = build("cacheclip", auxiliary="small", window=2)
    usage = engine.answer([ASK], method)[0].usage
    assert usage.recompute_ratio == pytest.approx(0.2, abs=0.05)
    by_itself, by_other = (
        engine.next_logits([ASK], build("cacheclip", auxiliary=name)) for name in ("self", "small")
    )
    assert not torch.allclose(by_itself, by_other)
    with pytest.raises(ValueError, match="cannot load a language model from 'nowhere'"):
        engine.answer([ASK], build("cacheclip", auxiliary="nowhere"))


def test_a_prompt_too_long_for_the_auxiliary_model_is_refused(engine):
    config = type(engine.model.config)(**engine.model.config.to_dict())
    config.max_position_embeddings = 8
    engine.add_auxiliary("short", build_model(config), engine.tokenizer)
    with pytest.raises(ValueError, match=r"tokens does not fit into auxiliary model 'short', .* 8"):
        engine.answer([ASK], build("cacheclip", auxiliary="short"))


def test_a_chunk_longer_than_the_context_is_refused(engine):
    long = Ask("Who?", (Chunk("Anna Belt was born in Port Alder. " * 200),))
    with pytest.raises(ValueError, match=r"longest chunk has \d+ .* maximum context length is 512"):
        engine.answer([long], "naive")
    with pytest.raises(ValueError, match=r"chunk 0 .* this model's maximum context length is 512"):
        engine.encode(long.chunks)


def test_what_cannot_run_is_refused_before_anything_does(engine):
    with pytest.raises(ValueError, match=r"'cacheblend' needs .* at least 8 layers, .* 2"):
        engine.answer([ASK], build("cacheblend", check_layer=7))
    with pytest.raises(ValueError, match=r"blanks of method .* maximum context length is 512"):
        engine.answer([ASK], f"naive + layout num_blanks={10**12}")
    for name, value in (("max_new_tokens", 0), ("max_new_tokens", 1.5), ("batch_size", -1)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number.*got {value}"):
            engine.answer([ASK], "naive", **{name: value})
    for single in ({"question": "Who?", "chunks": ["Anna."]}, "Who?", ASK, None):
        given = type(single).__name__
        with pytest.raises(ValueError, match=rf"takes a list of questions, got {given}; pass \["):
            engine.answer(single)
    with pytest.raises(ValueError, match=r"got str 'Who\?'; answer takes a list of them, stream"):
        engine.answer(["Who?"])
    with pytest.raises(ValueError, match="method must be a name or a Method, got int"):
        engine.answer([ASK], 3)
    assert not engine.store.held()


def test_time_to_first_token_counts_every_part_of_the_way(engine):
    started = time.perf_counter()
    usage = engine.answer([ASK], "naive", max_new_tokens=1)[0].usage
    spent = time.perf_counter() - started
    parts = dataclasses.asdict(usage.ttft)
    assert all(seconds > 0 for name, seconds in parts.items() if name != "load_s")
    assert sum(parts.values()) == usage.ttft_s <= spent


@pytest.mark.parametrize("name", ["block-attention", "kvlink"])
def test_methods_that_need_an_adapter_say_which(engine, name):
    with pytest.raises(ValueError, match=f"'{name}' needs an adapter trained with .* --adapter"):
        engine.answer([ASK], name)


@pytest.fixture(scope="module")
def tall(tokenizer):
    """Layers enough for every method's defaults."""
    config = deep("llama", layers=8)
    config.max_position_embeddings = 4096
    return engine_of(config, tokenizer)


def untuned() -> list[str]:
    return [name for name in available() if build(name).weights is Weights.ANY]


@pytest.mark.parametrize("name", untuned())
def test_later_text_never_changes_an_earlier_column(tall, name):
    """Which tokens are fresh may depend on what follows them; what is made of them may not."""
    method = build(name)
    if "ratio" in {field.name for field in dataclasses.fields(method.select())}:
        method = compose(name, budget=1.0)
    later = Ask("And who wrote the music of it?", ASK.chunks)
    keys = []
    for ask in (ASK, later):
        run = tall.prefilled([ask], method)
        until = int((run.columns.kind == Kind.QUERY).long().argmax())
        keys.append([layer.keys[0, :, :until].clone() for layer in run.cache.layers])
    for left, right in zip(*keys, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-6)


def test_passages_are_taken_as_people_have_them(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    texts = [chunk.text for chunk in ASK.chunks]
    rows = [
        {"question": ASK.question, "chunks": texts},
        {"question": ASK.question, "chunks": [{"text": text, "score": 0.5} for text in texts]},
    ]
    plain = Ask(ASK.question, tuple(Chunk(text) for text in texts))
    one, scored, same = engine.answer([*rows, plain], "naive", max_new_tokens=3)
    assert one.token_ids == scored.token_ids == same.token_ids
    assert [chunk.metadata for chunk in scored.chunks] == [{"score": 0.5}] * 3
    assert engine.encode(texts).num_encoded == engine.encode(rows[1]["chunks"]).num_encoded == 0
    assert engine.cache(texts).input_ids.tolist() == engine.cache(plain.chunks).input_ids.tolist()
    with pytest.raises(ValueError, match="question"):
        engine.answer([{"chunks": texts}])
