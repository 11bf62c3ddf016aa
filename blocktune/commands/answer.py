"""`blocktune answer` and `blocktune encode`."""

import time
from dataclasses import replace
from pathlib import Path

import typer

from blocktune.commands import options as opt
from blocktune.commands.application import command
from blocktune.commands.options import option

FOLLOW_S = 0.1  # seconds to wait after the queue of missed chunks was empty
Passages = option(list[str] | None, "Passage; repeatable.", "--chunk -c", panel=opt.PROMPT)
Questions = option(str | None, "JSONL, or `blocktune data` source.", "--input -i", panel=opt.PROMPT)
ShowPrompt = option(bool, "Print the prompt, row by row, first.", "--show-prompt", panel=opt.PROMPT)
Output = opt.to_file("JSONL file; answers already in it are skipped.")
TopK = option(int, "Sample from the K most likely tokens; 0: from all.", panel=opt.DECODING)
PASSAGES = "File of passages or questions; FILE?chunker=sentence cuts passages."
CACHES = "KV cache while decoding: sliding:TOKENS, fp8, quanto, hqq or offloaded (from a GPU)."


@command(
    "blocktune answer -m data/tiny -q 'Where is Anna?' -c 'Anna is in Kirby.'",
    "blocktune answer -m M -i q.jsonl --method cacheblend --param ratio=0.3",
    "blocktune answer -m M -i q.jsonl --adapter A --method 'kvlink + deviation 15 %'",
    "blocktune answer -m M -i q.jsonl --system 'Be brief.' -o answers.jsonl",
    "Encode chunks once, reuse them in later runs, and write the answers to a file:",
    "blocktune answer -m M --adapter out/block --store cache/ -i questions.jsonl -o reused.jsonl",
    "A stopped command that writes to a file continues where it stopped: repeat it.",
)
def answer(
    question: option(str | None, "One question.", "--question -q", panel=opt.PROMPT) = None,
    chunk: Passages = None,
    source: Questions = None,
    limit: opt.Limit = None,
    instruction: opt.Instruction = None,
    system: opt.System = None,
    wording: opt.Format = None,
    show_prompt: ShowPrompt = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    method: opt.MethodName = None,
    param: option(list[str] | None, "Parameter of the method: name=value; repeatable.") = None,
    store: opt.Store = None,
    batch_size: opt.BatchSize = 8,
    output: Output = None,
    stream: option(bool, "Print one answer while it is generated.", "--stream") = False,
    as_json: opt.AsJson = False,
    max_new_tokens: opt.MaxNewTokens = 32,
    temperature: opt.Temperature = 0.0,
    top_k: TopK = 0,
    top_p: opt.TopP = 1.0,
    seed: option(int | None, "Random seed for sampling. Default: 0.", panel=opt.DECODING) = None,
    response_cache: opt.Responses = None,
    decode_cache: option(str | None, CACHES, panel=opt.DECODING) = None,
) -> None:
    """Answer questions from separately cached chunks, and report what each answer cost."""
    from blocktune.cache.decode_cache import DecodeCache
    from blocktune.cache.responses import ResponseCache, read_settings
    from blocktune.commands import answering
    from blocktune.engine import Sampling
    from blocktune.methods import default_method

    examples = answering.read_examples(source, limit, question, chunk or [])
    if stream and (len(examples) > 1 or output or as_json):
        raise ValueError("--stream prints one answer; leave out --output and --json")
    chosen = answering.build_method(method, param or [])
    had_chunks = answering.holds_chunks(store)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if decode_cache is not None:
        DecodeCache.parse(decode_cache)  # a mistake is reported before a model loads
    if response_cache is not None:
        read_settings(response_cache)
    words = opt.wording(instruction, system, wording)
    engine = opt.load_engine(model, adapter, store, dtype, device, quantize, chosen, words)
    if decode_cache is not None:
        engine = engine.decoding_on(decode_cache)
    if response_cache is not None and (seed is not None or not sampling.temperature):
        engine.responses = ResponseCache.parse(response_cache, engine.store)
    used = chosen or default_method(engine.prompts.trained)
    decoding = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    run = answering.Run(engine, used, decoding, batch_size)
    run.lay_out(examples, shown=show_prompt)  # all, before the first answer
    if stream:
        for piece in engine.stream(examples[0], used, **decoding):
            typer.echo(piece, nl=False)
        typer.echo()
    elif output is not None:
        run.write(examples, output, [" ".join((method or used.name).split()), *(param or [])])
    else:
        run.print_answers(examples, as_json)
    answering.report_store(engine.store, had_chunks)


@command(
    "blocktune encode --input docs.jsonl --store cache/ --model data/tiny",
    "blocktune encode --input questions.jsonl --store cache/ --model M --adapter out/block",
    "blocktune encode --follow --store cache/ -m M   # encode what others miss",
    'Lines of docs.jsonl are {"text": "...", "title": "..."}, or questions with "chunks".',
    "Name the --method that will read the chunks: some, such as link0, need other ones.",
    "A stopped command continues where it stopped: repeat it. Several processes or machines "
    "share the work:",
    "    accelerate launch --num_processes 4 --module blocktune.cli encode ...",
)
def encode(
    store: option(str, "Folder or URL, with settings as in `answer`.", metavar=opt.PLACE),
    documents: option(Path | None, PASSAGES, "--input -i", panel=opt.PROMPT) = None,
    follow: option(bool, "Then encode what readers miss, until stopped.", "--follow") = False,
    instruction: opt.Instruction = None,
    system: opt.System = None,
    wording: opt.Format = None,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    method: opt.MethodName = None,
) -> None:
    """Encode chunks ahead of time into a store that `answer --store` reads."""
    from blocktune.adapter import INFO_FILE
    from blocktune.cache import ChunkStore
    from blocktune.cache.store.config import StoreConfig
    from blocktune.commands import answering
    from blocktune.data import load_chunks
    from blocktune.engine.encode import NOT_AHEAD
    from blocktune.evaluation.runner import launched
    from blocktune.models.gate import examine
    from blocktune.models.load import read_config

    if documents is None and not follow:
        raise ValueError("nothing to encode; give --input, or --follow")
    chunks = [] if documents is None else load_chunks(documents)
    words = opt.wording(instruction, system, wording)
    if model is not None and not (Path(model) / INFO_FILE).is_file():
        examine(read_config(model))  # before anything is written
    chosen = answering.build_method(method, [])
    if chosen is not None and (chosen.history is not None or not chosen.reuses_chunks):
        raise ValueError(NOT_AHEAD.format(chosen.name))
    config = StoreConfig.parse(store)
    if config.place is None:
        raise ValueError(f"--store '{store}' names no folder and no URL to keep chunks in")
    config, processes = replace(config, memory=0, cpu=0), launched()  # no chunk is read back
    chunk_store, device = ChunkStore(config=config, must_write=True), device or processes.device
    engine = opt.load_engine(model, adapter, chunk_store, dtype, device, quantize, chosen, words)
    if documents is not None:
        answering.encode(engine, chunks, processes, store, chosen)
    while follow:
        if count := engine.encode_wanted():
            typer.echo(f"encoded {count:,} chunks that readers missed")
        else:
            time.sleep(FOLLOW_S)
