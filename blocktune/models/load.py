"""Loads a base model by name, from a folder, a GGUF file or the Hub, to a device and dtype."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from transformers.utils import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE as PROCESSOR_TEMPLATE

from blocktune.attention.interface import decoder_of
from blocktune.files import move_folder
from blocktune.models.gate import examine
from blocktune.models.probe import Mixes, Refused
from blocktune.models.quantize import keep_stored_codes, quantization_config
from blocktune.models.small import causal_class
from blocktune.parsing import first_line, load_json
from blocktune.registry import require_one_of

logger = logging.getLogger("blocktune")

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    quantize: str | BitsAndBytesConfig | None = None,
    place: bool = True,
    recurrent: bool = False,
    what: str = "a language model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model without any adapter, and its tokenizer, in evaluation mode.

    Of a multimodal model, only the text model is loaded. Raises `Refused` if chunk reuse would be
    wrong on the model, and ValueError if the model, device, dtype or quantization does not exist,
    its files are damaged or lack weights, or it is saved quantized and ``quantize`` is given.

    Args:
        name: Folder or repository on the Hub, optionally with ``@REVISION``; or a GGUF file, or a
            folder that holds one and no other model, whose weights are dequantised once.
        dtype: One of `DTYPES`; ``auto``: as saved.
        device: Default: CUDA if available, else the CPU.
        revision: Revision of the repository.
        quantize: One of `blocktune.models.quantize.QUANTIZATIONS` or a configuration.
        place: Whether to move the weights to the device; quantised ones are always placed there.
        recurrent: Whether models with recurrent layers are allowed (without chunk reuse).
        what: What is being loaded, for error messages.
    """
    bare, revision = pinned(name, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_one_of("dtype", dtype, DTYPES)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend raises its own kind
        raise ValueError(
            f"no device '{device}' here ({first_line(error)}); use cuda or cpu"
        ) from None
    config = read_config(bare, revision, what)
    try:
        examine(config)
    except Mixes:
        if not recurrent:
            raise
    kwargs = _quantised(config, dtype, device, quantize)
    file = gguf_file(bare)
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    require_readable(bare)
    with _explained(name, what):
        bare = bare if file is None else _dequantised(file, dtype)
        how = {"revision": revision, "dtype": dtype, "trust_remote_code": False} | kwargs
        model, report = auto.from_pretrained(bare, output_loading_info=True, **how)
        _require_all(report, name)
        require_stops(bare, model.generation_config.eos_token_id)
    tokenizer = read_tokenizer(bare, revision)
    if file is not None:
        model.config._name_or_path = name
    model = text_model(model)
    keep_stored_codes(model)
    return (model.to(device) if place and not kwargs else model), tokenizer


def read_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer with its chat template. ValueError: there is none, or it is broken."""
    with _explained(str(name), "a tokenizer"):
        # Mistral's own kind (package mistral-common) has no template, and text does not stay text.
        how = {"revision": revision, "mistral_format": False, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        if tokenizer.chat_template is None:  # multimodal models: in the processor's file
            kinds = ("gated_repo", "missing_entries", "connection_errors")
            quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
            path = cached_file(str(name), PROCESSOR_TEMPLATE, revision=revision, **quiet)
            tokenizer.chat_template = path and load_json(Path(path)).get("chat_template")
    return tokenizer


def _require_all(report: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if weights are missing (and so random), and logs unused ones."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    if unused := sorted(key for key in report["unexpected_keys"] if "inv_freq" not in key):
        logger.warning("%s: %d weights are not used, such as %s", name, len(unused), unused[0])


def require_readable(folder: str | Path) -> None:
    """Raises ValueError if a safetensors file or index in a folder is damaged; names the file."""
    for path in sorted(Path(folder).glob("*.safetensors.index.json")):
        load_json(path)
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is damaged or incomplete ({error})") from None


def require_stops(folder: str, eos: Any) -> None:
    """Raises ValueError for a damaged generation config (which transformers ignores) or EOS."""
    if (path := Path(folder) / GENERATION_CONFIG_NAME).is_file():
        load_json(path)
    if not all(isinstance(i, int | None) for i in (eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"eos_token_id of its generation config must be token ids, got {eos!r}")


def read_config(
    name: str, revision: str | None = None, what: str = "a language model"
) -> PreTrainedConfig:
    """The configuration of a model by name. Raises ValueError if it has none."""
    bare, revision = pinned(name, revision)
    file = gguf_file(bare)
    with _explained(name, what):
        if file is None:
            return AutoConfig.from_pretrained(bare, revision=revision, trust_remote_code=False)
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def gguf_file(name: str) -> Path | None:
    """The GGUF file ``name``, or that in a folder; None: neither. ValueError: it cannot be read."""
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else []
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"'{name}' holds several GGUF files ({names}); name one of them")
    if not files[0].is_file():
        raise ValueError(f"no GGUF file '{name}'")
    if find_spec("gguf") is None:
        raise ValueError(f"'{files[0]}' needs the package gguf; run pip install 'blocktune[gguf]'")
    return files[0]


def _dequantised(file: Path, dtype: str) -> str:
    """Converts a GGUF file to a folder with safetensors, once for each dtype. Returns its path."""
    status = file.stat()
    source = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {dtype}"
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    target = Path(constants.HF_HOME, "blocktune", "gguf", f"{file.stem}-{key}")
    if target.is_dir():
        return str(target)
    logger.warning("dequantizing %s once, into %s", file.name, target)
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
    model.hf_quantizer = None  # its weights are plain now
    vars(model.config).pop("quantization_config", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        move_folder(folder, target)
    return str(target)


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a multimodal model. Other models are returned unchanged."""
    config = model.config.get_text_config(decoder=True)
    cls = causal_class(config)
    if config is model.config or cls is None or isinstance(model, cls):
        return model
    decoder, head = decoder_of(model), model.get_output_embeddings()
    with torch.device("meta"):
        text = cls(config)
    if type(decoder_of(text)) is not type(decoder) or head is None:
        raise Refused(
            f"{type(model).__name__} holds its text model in a non-standard form; save the text "
            f"model as a {cls.__name__} and load that"
        )
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    text.generation_config = model.generation_config
    state = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
    kept = ("_name_or_path", "_commit_hash", "quantization_config")
    for source, target, names in ((model.config, text.config, kept), (model, text, state)):
        for name in (name for name in names if hasattr(source, name)):
            setattr(target, name, getattr(source, name))
    return text.eval()


def sharing(model: PreTrainedModel, own_embeddings: bool = False) -> PreTrainedModel:
    """Copies a model's modules (and ``own_embeddings``), but shares its weights.

    Hooks, LoRA or a link table on one copy do not affect the other; changed weights would.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if own_embeddings:
        shared.pop(id(model.get_input_embeddings().weight))
        shared.pop(id(model.get_output_embeddings().weight), None)  # None: they are tied
    return copy.deepcopy(model, shared)


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (Refused, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # damaged files may raise any type
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        missing = "couldn't connect to|Repo id must|not a valid model identifier"
        if re.search(missing, reason) and not Path(name).exists():
            reason = "there is no such folder, and no repository of that name in the Hub's cache "
            reason += "or, unless this process is offline, on the Hub"
        is_model = any(Path(name).glob("model*.safetensors")) or Path(name, "config.json").exists()
        if what != "a tokenizer" and not is_model and Path(name, "blocktune.json").exists():
            reason = "it is an adapter; name its base, or merge it first (blocktune merge)"
        if "contains custom code" in reason:  # its text asks for an option that nobody can give
            reason = "it needs code from its own repository, which blocktune never runs"
        if "ignore_mismatched_sizes" in reason:
            reason = "weights in its files have other shapes than its configuration says"
        raise ValueError(
            f"cannot load {what} from '{name}': {reason}; give a folder saved by save_pretrained "
            "or a repository name on the Hugging Face Hub"
        ) from None


def _quantised(config: PreTrainedConfig, dtype: str, device: str, quantize) -> dict[str, Any]:
    """Keyword arguments to load a quantised model directly on its device; {} for a plain one."""
    saved = getattr(config, "quantization_config", None)
    if saved is None and quantize is None:
        return {}
    if saved is not None and quantize is not None:
        raise ValueError(
            f"the model is saved quantized ({saved.get('quant_method')}) and cannot be quantized "
            f"again ({quantize!r:.40}); leave quantize out, or name the plain model"
        )
    if isinstance(quantize, str):
        compute = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        quantize = quantization_config(quantize, compute)
    extra = {} if quantize is None else {"quantization_config": quantize}
    return {"device_map": {"": device}} | extra


def pinned(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Splits ``USER/NAME@REVISION``, unless it is a folder; ValueError: two revisions, or none."""
    if Path(name).exists():
        return str(name), revision
    bare, at, inside = str(name).partition("@")
    if not at:
        return bare, revision
    if revision is not None or not inside:
        raise ValueError(f"'{name}': give one revision, as NAME@REVISION or separately")
    return bare, inside


def adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    """The adapter's local folder, downloaded if needed. Raises ValueError if it does not exist."""
    name, revision = pinned(adapter, revision)
    if Path(name).is_dir():
        return Path(name)
    files = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # never a pickle, never code
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise ValueError(
            f"no adapter '{adapter}': it is not a local folder, and the Hub says: {reason}"
        ) from None
