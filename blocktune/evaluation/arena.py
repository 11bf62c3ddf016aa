"""Answers the frozen questions of KVShareArena (arXiv:2609.10266) and writes its result files.

Questions, prompts and checksums come from a clone of its repository, whose ``kva validate`` and
``kva score`` read the result files. Only the track of retrieved evidence is supported: the other
track replays token ids of reports that one particular model wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocktune.engine import Engine, Sampling
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.usage import Stopwatch
from blocktune.evaluation.metrics import qa_f1
from blocktune.evaluation.rows import code_digest
from blocktune.files import append_lines, replace_json, resumed
from blocktune.methods import Method
from blocktune.prompt import Pieces, encode
from blocktune.prompt.special_tokens import UserText, with_bos
from blocktune.prompt.template import render_frame
from blocktune.provenance import provenance, public
from blocktune.registry import require_one_of

SUBSETS = ("qasper", "multifieldqa_en", "hotpotqa")
QUESTIONS, ASSETS = Path("data/queryset"), Path("kvsharearena/assets")
SCHEMA, PROMPT_KEY = "kva.result.v1", "P_c"
PORTS = ("official", "port", "reference")
COSTS = (
    "recomputed and dense layer-tokens: payload tokens computed in each layer, counted during "
    "execution; kv_bytes: keys and values of the payload as stored in the cache; ttft_ms: from "
    "request to first token, with lookup, join and rotation; chunks were encoded before"
)


@dataclass(frozen=True)
class Exam:
    """One subset of the arena: its questions and its prompt template."""

    subset: str  # one of `SUBSETS`
    rows: tuple[Mapping[str, Any], ...]  # questions: ``_id``, ``input``, ``answers``, ``chunks``
    sha256: str  # digest of the question file
    system: str  # system message
    around: tuple[str, str, str]  # text before the chunks, before the question, and after it
    max_new_tokens: int  # largest number of tokens to decode

    def pieces(self, row: Mapping[str, Any], engine: Engine) -> Pieces:
        """The tokens of a prompt; each chunk is tokenised separately, as in the arena."""
        tokenizer, (before, between, after) = engine.tokenizer, self.around
        texts = UserText(tokenizer)
        tail = between + texts.safe(row["input"]) + after
        frame = render_frame(tokenizer, self.system, before, tail)
        prefix = with_bos(tokenizer, encode(tokenizer, frame.before))
        chunks = [encode(tokenizer, text, split_special_tokens=True) for text in row["chunks"]]
        return Pieces(prefix, tuple(filter(None, chunks)), texts.encode(frame.after))


def load_exam(folder: Path, subset: str) -> Exam:
    """Reads a subset from a clone; ValueError if it is unknown, incomplete or was changed."""
    require_one_of("subset", subset, SUBSETS)
    name = f"{subset}_n100.jsonl"
    raw = _read(folder / QUESTIONS / name)
    digest = hashlib.sha256(raw).hexdigest()
    wanted = json.loads(_read(folder / QUESTIONS / "sha256.json")).get(name)
    if digest != wanted:
        found = f"its SHA-256 is {digest}, sha256.json says {wanted}; clone the arena again"
        raise ValueError(f"{folder / QUESTIONS / name} is not the frozen file: {found}")
    rows = tuple(map(json.loads, raw.splitlines()))
    prompts = json.loads(_read(folder / ASSETS / "prompts.json"))
    longbench = json.loads(_read(folder / ASSETS / "longbench_config.json"))
    before, _, rest = longbench["dataset2prompt"][subset].partition("{context}")
    between, _, after = rest.partition("{input}")
    max_new_tokens = int(longbench["dataset2maxlen"][subset])
    return Exam(subset, rows, digest, prompts[PROMPT_KEY], (before, between, after), max_new_tokens)


def _read(path: Path) -> bytes:
    if not path.is_file():
        fix = "--questions is a clone of github.com/xishi404/KVShareArena"
        raise ValueError(f"no file '{path}'; {fix}")
    return path.read_bytes()


def run_exam(
    engine: Engine, method: Method, exam: Exam, output: Path, limit: int | None, port: str
) -> Path:
    """Answers an exam, writes its result file and returns the path. An interrupted run resumes.

    The engine's caches are emptied after every question. With a ``limit``, ``kva validate`` rejects
    the file. ``port``, one of `PORTS`, is the provenance of the method's code. Raises ValueError if
    the method takes chunks from earlier prompts, ``port`` is another text, a prompt is too long, or
    ``output`` has answers of other weights, methods, questions or code.
    """
    if method.history is not None:
        wanted = "but the arena wants each encoded by itself; choose another method"
        raise ValueError(f"method '{method.name}' takes chunks out of earlier prompts, {wanted}")
    require_one_of("provenance", port, PORTS)
    slug = re.sub(r"[^a-z0-9_.-]+", "-", method.name.lower()).strip("-")
    rows_file = output / f"{slug}_re_{exam.subset}.rows.jsonl"
    about = {"fingerprint": engine.fingerprint, "method": repr(method), "sha256": exam.sha256}
    head, questions = json.dumps(about | {"code": code_digest(method)}), exam.rows[:limit]
    with resumed(rows_file) as lines:
        if lines[:1] not in ([], [head]):
            others = "of other weights, method, questions or code"
            raise ValueError(f"{rows_file} is {others}; give another folder")
        if not lines:
            append_lines(rows_file, [head])
        answers = {row["_id"]: row for row in map(json.loads, lines[1:])}
        for row in questions:
            if row["_id"] not in answers:
                answers[row["_id"]] = answered(engine, method, exam, row)
                append_lines(rows_file, [json.dumps(answers[row["_id"]])])
    results = [answers[row["_id"]] for row in questions]
    path = output / f"{slug}_re_{exam.subset}.json"
    replace_json(path, _document(engine, method, exam, results, slug, port))
    return path


def answered(engine: Engine, method: Method, exam: Exam, row: Mapping[str, Any]) -> dict[str, Any]:
    """Answers one question after encoding its chunks; returns the answer with its cost."""
    pieces = exam.pieces(row, engine)
    if not method.keeps_context:
        pieces = pieces._replace(chunks=())
    prompt, state = engine.lay_out(pieces, method, exam.max_new_tokens), engine.state
    wanted = wanted_pieces(prompt) if method.reuses_chunks else []
    state.encoder.find(wanted, Stopwatch(engine.model.device), state.inputs_of(method))
    run = engine.start([pieces], method)
    [answer] = run.answers(Sampling(), exam.max_new_tokens, streams=[0])
    usage, payload = answer.usage, sum(map(len, pieces.chunks))
    held = sum(run.cache.bytes_per_column(layer) for layer in range(state.num_layers))
    engine.forget()  # the chunks of one prompt may take as much memory as the model
    return {
        "_id": row["_id"],
        "golds": row["answers"],
        "n_chunks": len(row["chunks"]),
        "pred": answer.text,
        "f1_raw": qa_f1(answer.text, row["answers"]),
        "recomputed_layer_tokens": sum(usage.layer_tokens),
        "dense_payload_layer_tokens": payload * state.num_layers,
        "kv_bytes": payload * held,
        "ttft_ms": 1000 * usage.ttft.total_s,
        "aux": {"prompt_tokens": usage.prompt_tokens, "payload_tokens": payload},
    }


def _document(engine, method, exam: Exam, results: Sequence[dict], slug, port) -> dict[str, Any]:
    origin, info = provenance(), engine.adapter
    fields = ("f1_raw", "recomputed_layer_tokens", "dense_payload_layer_tokens")
    f1, recomputed, dense = (sum(row[key] for row in results) for key in fields)
    version = f"blocktune {origin['versions']['blocktune']}"
    shared = {"backend": version, "versions": origin["versions"]}
    summary = {
        **{"method": slug, "track": "re", "subset": exam.subset},
        "model": info.base_model if info else engine.model.config._name_or_path,
        "n": len(results),
        **shared,
        "git_rev": origin["commit"],
        **{"prompt_key": PROMPT_KEY, "max_new_tokens": exam.max_new_tokens},
        "queryset": {"file": f"{exam.subset}_n100.jsonl", "sha256": exam.sha256},
        "f1_raw": f1 / len(results),
        "recompute_fraction": recomputed / max(1, dense),
        **{key: origin[key] for key in ("command", "hardware")},
    }
    card = {"name": method.name, "provenance": port, **shared}
    card["training_data"] = info.training.get("data") if info else None
    card |= {"cost_notes": COSTS, "source": method.source}
    summary, card = public(summary), public(card)
    return {"schema": SCHEMA, "summary": summary, "results": results, "method_card": card}
