"""Learned tokens: links next to a chunk, which see all earlier chunks, headers and trailers.

By default they have a table of their own. Their ids are *virtual*, ``vocab_size + slot``, and two
hooks on the input embedding look them up, so vocabulary, tokenizer and tied output head do not
change. `add_link_tokens` makes them real tokens instead.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from blocktune.files import replacing
from blocktune.models.gate import unwrapped
from blocktune.models.sharded import gathered, whole_shape

LINKS_FILE = "links.safetensors"
LINKS_MODULE = "blocktune_links"  # the table is a submodule, so it is trained, moved and synced
NOISE = 0.1  # of new rows around the mean embedding, in standard deviations of the embeddings


def table_of(weight: Tensor) -> nn.Embedding:
    """A table with a copy of ``weight``, ``(num_links, hidden)``.

    If a model scales embeddings inside its lookup (Gemma 3), these rows are stored scaled; if it
    scales them after the lookup (Gemma 2, Granite), it scales these rows, too.
    """
    return nn.Embedding.from_pretrained(weight.detach().clone(), freeze=False)


def link_base(model: PreTrainedModel) -> int:
    """Virtual id of link slot 0: the size of the model's vocabulary."""
    return model.config.get_text_config().vocab_size


def new_links(model: PreTrainedModel, num_links: int, seed: int = 0) -> nn.Embedding:
    """Makes a float32 table on the model's device, with rows near the mean embedding."""
    mean, std = _moments(model.get_input_embeddings(), link_base(model))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_links, mean.numel(), generator=generator).to(mean.device)
    return table_of(mean + NOISE * std * noise)


def links_to_train(model: PreTrainedModel, num_links: int, seed: int = 0) -> nn.Embedding:
    """The table to start from, in float32: the model's (ValueError: of other size) or a new one."""
    table, name = installed_links(model), model.config._name_or_path
    if table is None and not (name and Path(name, LINKS_FILE).is_file()):
        return new_links(model, num_links, seed)
    table = load_links(name) if table is None else table
    if table.num_embeddings != num_links:
        raise ValueError(
            f"the model has {table.num_embeddings} trained link, header and trailer tokens, and "
            f"this layout {num_links}; use its layout, or remove its {LINKS_FILE}"
        )
    return table.float()


def install_links(model: PreTrainedModel, table: nn.Embedding) -> None:
    """Makes ``model`` look up ids ``vocab_size + slot`` in ``table``, a submodule of its base.

    Install links after PEFT has wrapped the model, because PEFT replaces embeddings that it trains.

    Raises ValueError if links are installed already, the width differs, or the model has a second
    embedding table for the same ids (Gemma 3n), which cannot look up virtual ids.
    """
    base, embedding, first = unwrapped(model), model.get_input_embeddings(), link_base(model)
    if hasattr(base, LINKS_MODULE):
        raise ValueError("this model has link tokens installed already; load the base again")
    rows, width = table.weight.shape[1], whole_shape(embedding.weight)[1]
    if rows != width:
        raise ValueError(
            f"link rows are {rows} wide, this model's embeddings {width}; the links were trained "
            "for another base"
        )
    if any(other.num_embeddings >= first for other in _other_tables(base)):
        raise ValueError("this model has several embedding tables; use link_mode 'added_tokens'")
    table.to(embedding.weight.device)
    base.add_module(LINKS_MODULE, table)
    thread = threading.local()  # engines answer in several threads at once

    def hide(module, args):
        thread.ids = args[0]
        return (args[0].masked_fill(args[0] >= first, 0), *args[1:])

    def look_up(module, args, output):
        ids = thread.__dict__.pop("ids")
        is_link = ids >= first
        # torch.where keeps the table in every batch's graph, because DDP needs all gradients.
        rows = table(torch.where(is_link, ids - first, 0)).to(output.dtype)
        return torch.where(is_link.unsqueeze(-1), rows, output)

    embedding.register_forward_pre_hook(hide)
    embedding.register_forward_hook(look_up, prepend=True)


def installed_links(model: nn.Module) -> nn.Embedding | None:
    """The table that was installed by `install_links`, or None."""
    return getattr(unwrapped(model), LINKS_MODULE, None)


def save_links(table: nn.Embedding, folder: str | Path) -> Path:
    """Writes ``links.safetensors`` into ``folder`` atomically. Returns its path."""
    path = Path(folder) / LINKS_FILE
    with replacing(path) as temporary:
        save_file({"weight": table.weight.detach().cpu().contiguous()}, temporary)
    return path


def load_links(folder: str | Path) -> nn.Embedding:
    """Reads the file of `save_links`. Raises ValueError if it is missing, damaged or invalid."""
    path = Path(folder) / LINKS_FILE
    if not path.is_file():
        raise ValueError(f"no {LINKS_FILE} in {folder}; its adapter was trained with link tokens")
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or incomplete ({error}); copy it again") from None
    if [*held] != ["weight"] or held["weight"].ndim != 2:
        raise ValueError(f"{path} must hold one (num_links, hidden) tensor 'weight', got {[*held]}")
    return table_of(held["weight"])


def add_link_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_links: int,
    seed: int = 0,
    rows: Tensor | None = None,
) -> range:
    """Adds real tokens ``<|link_0|>`` ... instead of a table. Call it before PEFT wraps the base.

    Their embeddings are those of `new_links` for ``seed``, or the ``rows`` ``(num_links, hidden)``
    of a trained table. The base is resized if it has no room.

    Returns the ids; the first is the prompt's ``link_base``. ValueError: they are not contiguous.
    """
    tokens = [AddedToken(f"<|link_{slot}|>", special=True) for slot in range(num_links)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([token.content for token in tokens])
    if ids != list(range(ids[0], ids[0] + num_links)):
        raise ValueError(f"link tokens must get contiguous ids, this tokenizer gave {ids}")
    rows = new_links(model, num_links, seed).weight.data if rows is None else rows
    old = link_base(model)
    if ids[-1] >= old:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
        # The other new rows are never trained. They are mean rows, the same at each load.
        for table in (model.get_output_embeddings(), *_other_tables(model)):
            with gathered(table.weight, write=True):
                if len(table.weight) == ids[-1] + 1:
                    table.weight.data[old:] = table.weight.data[:old].float().mean(0)
    weight = model.get_input_embeddings().weight
    # Undo the scaling that the lookup of some models applies (Gemma 3).
    scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
    with gathered(weight, write=True):
        weight.data[ids[0] : ids[-1] + 1] = (rows / scale).to(weight)
    return range(ids[0], ids[-1] + 1)


@torch.no_grad()
def _moments(embedding: nn.Module, vocab_size: int) -> tuple[Tensor, float]:
    """Mean row and overall standard deviation of the looked-up embeddings, in float32."""
    total, square = 0.0, 0.0
    with gathered(embedding.weight):
        for ids in torch.arange(vocab_size, device=embedding.weight.device).split(8192):
            rows = embedding(ids).float()
            total, square = total + rows.sum(0), square + rows.square().mean(1).sum()
    mean = total / vocab_size
    return mean, float((square / vocab_size - mean.square().mean()).clamp(min=0).sqrt())


def _other_tables(base: PreTrainedModel) -> list[nn.Embedding]:
    """Embeddings besides the input embedding, such as that of each layer in Gemma 4."""
    inner = set(base.get_input_embeddings().modules())
    return [m for m in base.modules() if isinstance(m, nn.Embedding) and m not in inner]
