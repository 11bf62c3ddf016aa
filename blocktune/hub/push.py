"""Publishes an adapter's folder on the Hub: checks it first, then sends it in one commit."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, httpx, validate_repo_id
from rich.console import Console

from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, PEFT_FILE, AdapterInfo
from blocktune.adapter.load import quantize_as_trained
from blocktune.check import check_adapter
from blocktune.hub.card import CardFacts, card, results_of, served_by
from blocktune.models.identity import architecture_of
from blocktune.models.load import read_config
from blocktune.models.sharded import loading_whole
from blocktune.parsing import first_line, load_json, mapping
from blocktune.prompt import LayoutSpec
from blocktune.provenance import public

PUBLISHED = [  # names of files; no checkpoints, logs and optimizer states
    *("*.safetensors", "*.safetensors.index.json", PEFT_FILE, INFO_FILE, "config.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
CARD_FILE = "README.md"
_OF_THE_RUN = "training_args.bin"
_OF_A_CHECKPOINT = ["optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth"]

Source = Path | bytes


def files_of(folder: Path, info: AdapterInfo, base: str) -> dict[str, Source]:
    """The files to publish, by name, with the Hub's name of the base; ValueError for pickles."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in filter_repo_objects(names, allow_patterns=_OF_A_CHECKPOINT):
        raise ValueError(
            f"'{folder}' is a checkpoint to resume from (it contains '{name}'); push the "
            f"finished adapter, '{folder.parent}'"
        )
    for name in filter_repo_objects(names, allow_patterns=PICKLES, ignore_patterns=_OF_THE_RUN):
        raise ValueError(f"'{folder}' contains '{name}', a pickle; save safetensors instead")
    published = filter_repo_objects(names, allow_patterns=PUBLISHED)
    files: dict[str, Source] = {name: folder / name for name in published}
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"'{folder}' has no weights (*.safetensors); nothing to publish")
    training, whole = public(info.training), info.base_model == OWN_WEIGHTS
    if "started_from" in training:
        training["started_from"] = base
    public_info = replace(info, base_model=OWN_WEIGHTS if whole else base, training=training)
    changed = {INFO_FILE: public_info.to_dict()}
    if PEFT_FILE in files:
        config = mapping(load_json(folder / PEFT_FILE), str(folder / PEFT_FILE))
        own = {"base_model_name_or_path": base, "revision": info.base_revision}
        changed[PEFT_FILE] = {**config, **own}
    for name, values in changed.items():
        files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def prepare(
    adapter: str | Path,
    repo: str,
    facts: CardFacts,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    token: str | None = None,
) -> dict[str, Source]:
    """Checks an adapter's folder on a base, and collects the files to publish, by name.

    Raises ValueError if the check fails, the base or its licence is unknown, the folder is not an
    adapter or has pickled weights, or the results are of another adapter.
    """
    folder = Path(adapter)
    info = AdapterInfo.load(folder)
    check_repo(repo)
    is_full = info.base_model == OWN_WEIGHTS
    name = info.training.get("started_from", "") if is_full else info.base_model
    base = on_the_hub(facts.base_model or name)
    verify_base(base, info, token)
    files = files_of(folder, info, base)
    results = [results_of(facts.results, folder, info)] if facts.results else []
    facts = replace(facts, license=facts.license or license_of(base, token))
    quantize = quantize_as_trained(info, model)
    checks = check_adapter(model, folder, dtype=dtype, device=device, quantize=quantize)
    if failed := [check for check in checks if not check.passed]:
        first = failed[0]
        raise ValueError(
            f"'{folder}' is not pushed: {len(failed)} of {len(checks)} checks fail, first "
            f"'{first.name}' ({first.max_abs_diff:.1e}, tolerance {first.tolerance:.1e})"
        )
    text = card(repo, replace(info, quantization=quantize), base, facts, checks, *results)
    return files | {CARD_FILE: text.encode()}


def send(
    repo: str, files: dict[str, Source], private: bool = False, token: str | None = None
) -> CommitInfo:
    """Commits all files, to a new (``private``) repository or over an earlier push."""
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, source) for name, source in files.items()]
        for name in filter_repo_objects(api.list_repo_files(repo), allow_patterns=PUBLISHED):
            if name not in files:  # would be loaded, too
                operations.append(CommitOperationDelete(name))
        return api.create_commit(repo, operations, commit_message="Push with blocktune")
    except (httpx.HTTPError, OSError) as error:
        raise ValueError(
            f"the Hub refused '{repo}': {first_line(error)}; log in with `hf auth "
            "login`, or set HF_TOKEN"
        ) from None


def show(repo: str, files: dict[str, Source], console: Console) -> None:
    """Prints all files with their sizes, and the card."""
    console.print(f"{repo}: {len(files)} files, nothing sent", style="bold")
    for name, source in sorted(files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        console.print(f"  {size:>13,} bytes  {name}", highlight=False)
    console.print("\n" + files[CARD_FILE].decode(), highlight=False, markup=False, soft_wrap=True)


def check_repo(repo: str, option: str = "--repo") -> None:
    """Raises ValueError if a name, the value of an ``option``, is not USER/NAME."""
    with suppress(HFValidationError):
        validate_repo_id(repo)
        if "/" in repo:
            return
    raise ValueError(f"{option} must be USER/NAME, got '{repo}'")


def on_the_hub(name: str) -> str:
    """Returns the name of a base; raises ValueError if it cannot be one on the Hub."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        if not Path(name).exists():
            return name
    raise ValueError(f"the base is '{name}', which nobody else can load; use push --base-model")


def verify_base(base: str, info: AdapterInfo, token: str | None = None) -> None:
    """Raises ValueError if the Hub, if in reach, has no such base or one of other architecture."""
    revision = info.base_revision if base == info.base_model else None
    fix = "name its base: --base-model ORG/NAME"
    try:
        file = HfApi(token=token).hf_hub_download(base, "config.json", revision=revision)
        found = architecture_of(read_config(str(Path(file).parent)))
    except (httpx.HTTPError, OSError, ValueError) as error:
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            reason = f"the Hub has no model '{base}', or the token cannot read it"
            raise ValueError(f"{reason}; {fix}") from None
        return  # out of reach, or of another format
    is_whole = info.base_model == OWN_WEIGHTS  # with a vocabulary of its own
    if found != info.base_fingerprint.partition("-")[0] and not is_whole:
        raise ValueError(f"'{base}' has another architecture than '{info.base_model}'; {fix}")


def license_of(base: str, token: str | None = None) -> str:
    """The licence of a base, from its card on the Hub; ValueError if it has none."""
    with suppress(httpx.HTTPError, HFValidationError, OSError):
        data = HfApi(token=token).model_info(base).card_data
        if data is not None and data.license:
            return data.license
    raise ValueError(f"the licence of '{base}' is not known; use push --license")


class Publisher:
    """Publishes for ``push_to_hub`` of a training run, see `blocktune.training.run`."""

    def check(self, repo: str, base_model: str, layout: LayoutSpec, token: str | None) -> None:
        """Raises ValueError before a run if its adapter could not be published."""
        check_repo(repo, "hub_model_id")
        served_by(layout)
        license_of(on_the_hub(base_model), token)

    def publish(self, folder: Path, repo: str, private: bool, token: str | None) -> None:
        """Checks and pushes in one process of a run; the others may have ended."""
        with loading_whole():
            files = prepare(folder, repo, CardFacts(), token=token)
        sent = send(repo, files, private=private, token=token)
        Console().print(f"pushed to {sent.repo_url}, commit {sent.oid}", soft_wrap=True)
