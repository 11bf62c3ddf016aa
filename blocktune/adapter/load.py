"""Putting an adapter on a base model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.info import AdapterInfo
from blocktune.fetch import adapter_folder
from blocktune.identity import base_fingerprint, same_base, tokenizer_hash
from blocktune.links import add_link_tokens, install_links, load_links

PEFT_FILE = "adapter_config.json"


def load_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path,
    revision: str | None = None,
    merge: bool = False,
    links: bool = True,
) -> tuple[PreTrainedModel, AdapterInfo]:
    """Puts an adapter on a bare base model: LoRA through PEFT, link table or link tokens.

    Args:
        model: The base, as loaded; its weights are wrapped in place.
        tokenizer: The base's; gets the link tokens where the adapter added some.
        adapter: A local folder, or a repository's name on the Hugging Face Hub.
        revision: Of the repository.
        merge: Merge LoRA weights into the base; links are installed after that, since merging
            replaces an embedding that PEFT trained.
        links: Install the link table, if the adapter has one.

    Returns:
        The model to run and the adapter's info.

    Raises:
        ValueError: If there is no such adapter, it is damaged, or it was made for another base
            or tokenizer; nothing is changed then.
    """
    folder = adapter_folder(adapter, revision)
    info = AdapterInfo.load(folder)
    _check_base(info, model, tokenizer, adapter)
    table = load_links(folder) if links and info.has_table else None
    if info.adds_tokens:
        add_link_tokens(model, tokenizer, info.num_learned, info.link_seed)
    if (folder / PEFT_FILE).is_file():
        from peft import PeftModel  # serving without an adapter needs no PEFT

        model = PeftModel.from_pretrained(model, folder)
        model = model.merge_and_unload() if merge else model
    if table is not None:
        install_links(model, table.to(model.dtype))
    return model.eval(), info


def attach_links(
    model: PreTrainedModel, adapter: str | Path, revision: str | None = None
) -> AdapterInfo:
    """The one call that a model needs which stock PEFT loaded: installs the link table.

    ```python
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    info = attach_links(model, folder)
    engine = Engine(model, tokenizer, adapter=info, adapter_folder=folder)
    ```

    PEFT loads the base by the name in its own configuration, and resizes it itself where the
    adapter's tokenizer has more tokens than the base's.

    Args:
        model: What PEFT returned, or that model merged.
        adapter: Folder or repository that it was loaded from.
        revision: Of the repository.

    Raises:
        ValueError: If there is no such adapter, or its table does not fit the model.
    """
    folder = adapter_folder(adapter, revision)
    info = AdapterInfo.load(folder)
    if info.has_table:
        install_links(model, load_links(folder).to(model.dtype))
    return info


def _check_base(info: AdapterInfo, model, tokenizer, adapter) -> None:
    came = model.config._name_or_path or type(model).__name__
    if not same_base(info.base_fingerprint, base_fingerprint(model)):
        mend = f"load '{info.base_model}', or train an adapter for '{came}'"
        if came == info.base_model:
            mend = "its weights have changed since, or are of another revision; train it anew"
        raise ValueError(
            f"adapter '{adapter}' was made for base '{info.base_model}' "
            f"({info.base_fingerprint}), got '{came}' ({base_fingerprint(model)}); {mend}"
        )
    if info.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"adapter '{adapter}' was trained with the tokenizer and chat template of "
            f"'{info.base_model}' ({info.tokenizer_hash}), got another from "
            f"'{tokenizer.name_or_path}' ({tokenizer_hash(tokenizer)}); use the base's own"
        )
