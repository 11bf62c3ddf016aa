"""Sources of examples: files of public sets, the Hugging Face Hub, generated ones."""

from blocktune.data.sources.catalog import CATALOG, DataSet, data_sets_in
from blocktune.data.sources.load import (
    Loaded,
    load_chunks,
    load_examples,
    load_source,
    training_split,
)
from blocktune.data.sources.options import GENERATORS, Generator, generators, with_fields
from blocktune.data.sources.records import Record, read_records
from blocktune.data.sources.shapes import SHAPES

__all__ = [
    "CATALOG",
    "GENERATORS",
    "SHAPES",
    "DataSet",
    "Generator",
    "Loaded",
    "Record",
    "data_sets_in",
    "generators",
    "load_chunks",
    "load_examples",
    "load_source",
    "read_records",
    "training_split",
    "with_fields",
]
