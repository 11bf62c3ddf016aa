"""blocktune as a model of lm-evaluation-harness, with block attention or full attention.

    python -m blocktune.evaluation.lm_eval_backend --model blocktune \
      --model_args pretrained=MODEL,adapter=ADAPTER,mode=block --tasks mmlu --num_fewshot 5

It measures what tuning for reuse costs on other tasks, in both modes. The parts of a prompt that
the harness separates by blank lines (few-shot examples) are its chunks; the last is the query.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from blocktune.attention import make_plan, planned_forward
from blocktune.engine import Engine, Sampling
from blocktune.methods import build, default_method
from blocktune.prompt import IGNORED, Pieces, stack
from blocktune.registry import require_count, require_one_of

MODES = ("block", "full")
KNOWN = ("pretrained", "adapter", "mode", "separator", "dtype", "device", "max_gen_toks")


@register_model("blocktune")
class BlocktuneLM(LM):
    """The harness's model interface over an `Engine`, loaded by name or passed as ``engine``.

    Args:
        mode: ``block``: the layout that the adapter was trained with (on a base model, each chunk
            attends only to itself); ``full``: full attention.
        separator: The end of each part of a prompt; a backslash and ``n`` are a line break.
        device: None or ``cuda:0`` (the harness's default): a GPU if there is one, else the CPU.
        batch_size: Prompts at a time; ``auto`` and ``auto:N`` are 8.
        max_gen_toks: Longest generation for tasks that set no limit.
        ignored: ``max_batch_size`` and ``trust_remote_code``, which the harness passes to all.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        mode: str = "block",
        separator: str = "\n\n",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        engine: Engine | None = None,
        **ignored: Any,
    ):
        super().__init__()
        require_one_of("mode", mode, MODES)
        if unknown := ignored.keys() - {"max_batch_size", "trust_remote_code"}:
            raise ValueError(f"unknown model argument '{min(unknown)}'; known: {', '.join(KNOWN)}")
        if engine is None:
            device = None if device == "cuda:0" and not torch.cuda.is_available() else device
            engine = Engine.from_pretrained(pretrained, adapter, dtype=dtype, device=device)
        self.engine, self.separator = engine, separator.replace("\\n", "\n")
        trained = default_method(engine.prompts.trained)
        self.method = trained if mode == "block" else build("full-prefill")
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        require_count("batch_size", self.batch_size, 1)
        self.max_gen_toks = max_gen_toks
        bos, eos = engine.tokenizer.bos_token_id, engine.tokenizer.eos_token_id
        self._first = eos if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's request cache."""
        return self.engine.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's chat template."""
        return self.engine.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, without BOS, which is added later."""
        turn = {"add_generation_prompt": add_generation_prompt}
        turn["continue_final_message"] = not add_generation_prompt
        text = self.engine.tokenizer.apply_chat_template(chat_history, tokenize=False, **turn)
        return text.removeprefix(self.engine.tokenizer.bos_token or "")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would produce it."""
        return self._score([self.pieces(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of whole texts without chunks, in windows of the model's context."""
        limits = {"max_seq_len": self.engine.prompts.longest - 1, "context_len": 1}
        sums = []
        for request in requests:
            ids = list(self._ids(request.args[0]))
            windows = get_rolling_token_windows(ids, prefix_token=self._first, **limits)
            pairs = map(make_disjoint_window, windows)
            pieces = [Pieces((), (), tuple(before), tuple(after)) for before, after in pairs]
            sums.append(sum(score for score, _ in self._score(pieces)))
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy continuations, each cut before the first of the task's stop strings."""
        texts = []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            if options["do_sample"] and options.get("temperature", 1.0) > 0:
                fix = "set do_sample: false or temperature: 0"
                raise ValueError(f"this backend generates greedily; {fix}")
            run = self.engine.start([self.pieces(context)], self.method)
            ids = [int(token[0]) for token in run.tokens(Sampling(), options["max_gen_toks"])]
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            for stop in filter(None, options["until"]):
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    def pieces(self, context: str, continuation: str = "") -> Pieces:
        """Chunks, query and continuation as tokens, the same in both modes.

        White space between context and continuation belongs to the latter, as in the harness.
        Without a continuation it belongs to the query: chat templates may end with a separator.
        """
        stripped = context.rstrip()
        space = context[len(stripped) :]
        *parts, last = stripped.split(self.separator)
        last, continuation = (last, space + continuation) if continuation else (last + space, "")
        chunks = tuple(self._ids(part + self.separator) for part in parts if part.strip())
        query = self._ids(last)
        answer = self._ids(last + continuation)[len(query) :]
        if not query:  # the first scored token needs a token before it
            return Pieces((), chunks, (self._first,), answer)
        bos = self.engine.tokenizer.bos_token_id
        return Pieces(() if bos is None else (bos,), chunks, query, answer)

    @torch.no_grad()
    def _score(self, pieces: Sequence[Pieces]) -> list[tuple[float, bool]]:
        make, model, scored = self.engine.prompts, self.engine.model, []
        spec, size = make.spec(self.method), self.batch_size
        for start in range(0, len(pieces), size):
            prompts = [make.prompt(one, spec) for one in pieces[start : start + size]]
            batch = stack(prompts, pad_id=0).to(model.device)
            plan = make_plan("split", batch.layout)
            logits = planned_forward(model, batch.input_ids, batch.layout.position, plan).logits
            for labels, own in zip(batch.labels, logits, strict=True):
                rows = (labels != IGNORED).nonzero().squeeze(1)
                log_probs, wanted = own[rows - 1].float().log_softmax(-1), labels[rows]
                picked = log_probs.gather(1, wanted[:, None]).sum().item()
                scored.append((picked, bool((log_probs.argmax(1) == wanted).all())))
        return scored

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
