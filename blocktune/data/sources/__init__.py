"""Sources of examples: files of public sets, the Hugging Face Hub, generated worlds."""

from blocktune.data.sources.files import Record, read_records
from blocktune.data.sources.hub import SHORT_NAMES
from blocktune.data.sources.load import Loaded, load_chunks, load_examples, load_source
from blocktune.data.sources.schemas import SCHEMAS

__all__ = [
    "SCHEMAS",
    "SHORT_NAMES",
    "Loaded",
    "Record",
    "load_chunks",
    "load_examples",
    "load_source",
    "read_records",
]
