"""From an adapter's folder to a repository on the Hub: checked first, sent in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from rich.console import Console

from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, PEFT_FILE, AdapterInfo
from blocktune.check import check_adapter
from blocktune.hub.card import CardFacts, card, results_of, served_by
from blocktune.parsing import load_json
from blocktune.prompt import LayoutSpec
from blocktune.provenance import public

PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", PEFT_FILE, INFO_FILE, "config.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
"""Names of what is published; checkpoints, logs and optimizer states stay at home."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OF_THE_RUN = ("training_args.bin",)
_OF_A_CHECKPOINT = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")

Source = Path | bytes


def files_of(folder: Path, info: AdapterInfo, base: str) -> dict[str, Source]:
    """What is sent of a folder, by name; JSON that names the base gets its name on the Hub."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in names:
        if any(fnmatch(name, pattern) for pattern in _OF_A_CHECKPOINT):
            raise ValueError(
                f"'{folder}' is a checkpoint to resume from (it holds '{name}'); push "
                f"the finished adapter, '{folder.parent}', or a copy of this folder without "
                "*.pt and *.pth"
            )
        if any(fnmatch(name, pattern) for pattern in PICKLES) and name not in _OF_THE_RUN:
            raise ValueError(
                f"'{folder}' holds '{name}', a pickle, which can run code where it is loaded; "
                "save its weights as safetensors and remove it"
            )
    kept: dict[str, Source] = {name: folder / name for name in names if is_published(name)}
    if not any(name.endswith(".safetensors") for name in kept):
        raise ValueError(f"'{folder}' holds no weights (*.safetensors); nothing to publish")
    training, whole = public(info.training), info.base_model == OWN_WEIGHTS
    if "started_from" in training:
        training["started_from"] = base
    named = replace(info, base_model=OWN_WEIGHTS if whole else base, training=training)
    kept[INFO_FILE] = _json(named.to_dict())
    if PEFT_FILE in kept:
        own = {"base_model_name_or_path": base, "revision": info.base_revision}
        kept[PEFT_FILE] = _json(load_json(folder / PEFT_FILE) | own)
    return kept


def is_published(name: str) -> bool:
    """Whether a file of this name is one that `files_of` publishes."""
    return any(fnmatch(name, pattern) for pattern in PUBLISHED)


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


CARD_FILE = "README.md"


@dataclass(frozen=True)
class Publication:
    """All that a repository ``USER/NAME`` will hold: name -> a file's path, or its content."""

    repo: str
    files: dict[str, Source]

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD_FILE].decode()


def prepare(
    adapter: str | Path,
    repo: str,
    facts: CardFacts,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    token: str | None = None,
) -> Publication:
    """Checks an adapter's folder and gathers what is published of it; nothing is sent.

    The check runs on the base ``model`` (default: the adapter's own). ``token`` is to ask the Hub
    for the base's licence.

    Raises:
        ValueError: In one line, if a check fails, others cannot load the base, the licence is
            unknown, the folder is not an adapter or holds pickled weights, or the results are of
            another adapter.
    """
    folder = Path(adapter)
    info = AdapterInfo.load(folder)
    check_repo(repo)
    named = info.training.get("started_from", "") if info.base_model == OWN_WEIGHTS else None
    base = on_the_hub(facts.base_model or (info.base_model if named is None else named))
    files = files_of(folder, info, base)
    measured = [results_of(facts.results, folder, info)] if facts.results else []
    facts = replace(facts, license=facts.license or license_of(base, token))
    settings = {"dtype": dtype, "device": device, "quantize": info.quantization}
    checks = check_adapter(model, folder, **settings)
    if failed := [one for one in checks if not one.passed]:
        first = failed[0]
        raise ValueError(
            f"'{folder}' is not pushed: {len(failed)} of {len(checks)} checks fail, first "
            f"'{first.name}' ({first.max_abs_diff:.1e}, tolerance {first.tolerance:.1e}); see "
            "`blocktune check`"
        )
    text = card(repo, info, base, facts, checks, *measured)
    return Publication(repo, files | {CARD_FILE: text.encode()})


def send(publication: Publication, private: bool = False, token: str | None = None) -> CommitInfo:
    """Creates the repository if needed and commits all files at once; raises ValueError if refused.

    Files of an earlier push that this one does not have are deleted: weights left over would be
    loaded with the new ones. ``private`` is for a new repository; without a ``token``, that of ``hf
    auth login`` or ``HF_TOKEN`` is taken.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(publication.repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(n, source) for n, source in publication.files.items()]
        there = api.list_repo_files(publication.repo)
        gone = [n for n in there if is_published(n) and n not in publication.files]
        operations += [CommitOperationDelete(name) for name in gone]
        return api.create_commit(publication.repo, operations, commit_message="Push with blocktune")
    except (httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Hub refused '{publication.repo}': {reason}; log in with `hf auth login` or set "
            "HF_TOKEN to a token that may write there"
        ) from None


def show(publication: Publication, console: Console) -> None:
    """Prints every file with its size, and the card."""
    console.print(f"{publication.repo}: {len(publication.files)} files, nothing sent", style="bold")
    for name, source in sorted(publication.files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        console.print(f"  {size:>13,} bytes  {name}", highlight=False)
    console.print(f"\n{publication.card}", highlight=False, markup=False, soft_wrap=True)


def check_repo(repo: str) -> None:
    """Refuses a name that is not USER/NAME."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo must be USER/NAME: {str(error).splitlines()[0]}") from None
    if "/" not in repo:
        raise ValueError(f"--repo must be USER/NAME, got '{repo}'")


def on_the_hub(name: str) -> str:
    """The base's name, if it can be one on the Hub."""
    if not name or Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/")):
        raise ValueError(
            f"the base is the local folder '{name}', which nobody else can load; give its name on "
            "the Hub: --base-model ORG/NAME"
        )
    return name


def license_of(base: str, token: str | None = None) -> str:
    """The licence that the card of a base on the Hub states."""
    try:
        data = HfApi(token=token).model_info(base).card_data
    except (httpx.HTTPError, HFValidationError, OSError):
        data = None
    if data is None or not data.license:
        raise ValueError(f"the licence of '{base}' is not known; give one: --license apache-2.0")
    return data.license


class Publisher:
    """What ``push_to_hub`` of a training run asks; see `blocktune.training.run`."""

    def check(self, repo: str, base_model: str, layout: LayoutSpec, token: str | None) -> None:
        """Refuses before the run what could not be published after it."""
        check_repo(repo)
        served_by(layout)
        license_of(on_the_hub(base_model), token)

    def publish(self, folder: Path, repo: str, private: bool, token: str | None) -> None:
        """Checks and pushes in one of a run's processes, when the others may be gone."""
        with alone():
            publication = prepare(folder, repo, CardFacts(), token=token)
        sent = send(publication, private=private, token=token)
        Console().print(f"pushed to {sent.repo_url}, commit {sent.oid}", soft_wrap=True)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block, models load whole into this process, whatever trained before.

    After a run under ZeRO-3, transformers would split every model that it loads over the run's
    processes, and wait for those that do not load it.
    """
    from transformers.integrations import deepspeed  # only after a training run

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None and (config := config()) is not None:
            deepspeed.set_hf_deepspeed_config(config)
