"""What holds for every preset's file, and which presets there must be."""

import ast
from pathlib import Path

import pytest

from blocktune import reuse
from blocktune.reuse import available, build

FILES = sorted((Path(reuse.__file__).parent / "presets").glob("*.py"))
WANTED = [
    "ape",
    "block-attention",
    "cache-craft",
    "cacheblend",
    "cacheblend-lmcache",
    "cacheblend-paper",
    "cacheblend-repo",
    "cacheclip",
    "droidspeak",
    "droidspeak-clc",
    "epic",
    "full-prefill",
    "kv-packet",
    "kvlink",
    "link0",
    "naive",
    "no-context",
    "oracle",
    "p+s+r",
    "prefix-cache",
    "prompt-cache-schema",
    "psr",
    "query-attention",
    "r",
    "random",
    "s",
    "s+p",
    "sel",
    "selective-reconstruction",
    "turborag",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_preset_is_a_few_lines_and_knows_no_other(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("blocktune.reuse.presets")}


def test_the_presets_of_the_field_exist():
    assert not set(WANTED) - set(available())


def test_presets_choose_what_their_sources_say():
    """The papers' defaults, and where released code departs from them."""
    repo = build("cacheblend-repo").selection()
    assert (repo.ratio, repo.by, repo.squared, repo.of) == (0.16, "values", True, "cached")
    assert (repo.check_layer, repo.keeps_keys, repo.sees_future) == (1, True, False)
    lmcache = build("cacheblend-lmcache").selection()
    assert (lmcache.ratio, lmcache.by, lmcache.squared, lmcache.of) == (
        (0.15, "keys", True, "prompt")
    )
    seed = build("cacheblend").selection()
    assert (seed.ratio, seed.by, seed.squared, seed.keeps_keys) == (0.15, "keys", False, False)
    assert build("cacheblend-paper").selection().keeps_keys
    assert build("epic").selection().k == 16
    assert build("cacheclip").selection().ratio == build("query-attention").selection().ratio == 0.2
    again = build("droidspeak-clc").selection()
    assert (again.ratio, again.check_layer, again.restart_layer) == (0.15, 1, 5)
    assert build("droidspeak").selection().ratio == 0.11
