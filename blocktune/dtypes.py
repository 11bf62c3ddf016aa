"""Number types that a model can be loaded in."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(name: str) -> None:
    """Raises ValueError for a name that is none of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype '{name}'; available: {', '.join(DTYPES)}")
