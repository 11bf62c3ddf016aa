"""What holds for every preset's file, and which presets there must be."""

import ast
from dataclasses import replace
from pathlib import Path

import yaml

import blocktune
from blocktune import methods as reuse
from blocktune.methods import Weights, available, build
from blocktune.methods.base import METHODS
from blocktune.methods.repair import REPAIRS
from blocktune.methods.reshape import RESHAPES
from blocktune.methods.select import SELECTORS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((Path(reuse.__file__).parent / "presets").glob("*.py"))
WANTED = [
    "a3",
    "agentkvshift",
    "ape",
    "block-attention",
    "cache-craft",
    "cacheblend",
    "cacheblend-lmcache",
    "cacheblend-lmcache-flash",
    "cacheblend-paper",
    "cacheblend-repo",
    "cacheclip",
    "droidspeak",
    "droidspeak-clc",
    "epic",
    "full-prefill",
    "fusionrag",
    "infoflow",
    "kv-packet",
    "kvlink",
    "link0",
    "naive",
    "no-context",
    "oracle",
    "prefix-cache",
    "prompt-cache-schema",
    "prophetkv",
    "psr",
    "query-attention",
    "random",
    "relaxkv",
    "s+p",
    "sel",
    "selective-reconstruction",
    "turborag",
]


def test_a_preset_is_a_few_lines_and_knows_no_other_file():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("blocktune.methods.presets"), path.name


def test_the_presets_of_the_field_exist():
    assert not set(WANTED) - set(available())


def test_nothing_asks_what_kind_of_method_or_axis_value_it_has():
    tables = (METHODS, SELECTORS, REPAIRS, RESHAPES)
    kinds = {cls.__name__ for table in tables for cls in table.table().values()}
    # `Method` is not listed: the engine checks that what it was given is a method at all.
    kinds |= {"Composition", "Selection", "Scored", "Repair", "Reshape"}
    for path in Path(blocktune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & kinds, f"{path.name}:{node.lineno}"


def test_the_suite_of_all_presets_has_them_all_or_says_why_not():
    text = (ROOT / "eval" / "suites" / "presets.yaml").read_text(encoding="utf-8")
    methods = yaml.safe_load(text)["methods"]
    named = {entry if isinstance(entry, str) else entry["name"] for entry in methods}
    untrained = {name for name in available() if build(name).weights is Weights.ANY}
    assert named == {name for name in untrained if not build(name).select().sees_future}
    _, _, reason = text.partition("# Left out because they need trained weights")
    left_out = reason.partition("\nmodel:")[0]
    assert all(name in left_out for name in set(available()) - named)


def test_presets_choose_what_their_sources_say():
    """The papers' defaults, and where released code departs from them."""
    repo = build("cacheblend-repo").select()
    assert (repo.ratio, repo.by, repo.squared, repo.of) == (0.16, "values", True, "cached")
    assert (repo.check_layer, repo.keeps_keys, repo.sees_future) == (1, True, False)
    lmcache = build("cacheblend-lmcache").select()
    assert (lmcache.ratio, lmcache.by, lmcache.squared) == (0.15, "keys", True)
    assert (lmcache.of, lmcache.sees_future) == ("cached", False)
    flash = build("cacheblend-lmcache-flash").select()
    assert flash == replace(lmcache, sees_future=True)
    seed = build("cacheblend").select()
    assert (seed.ratio, seed.by, seed.squared, seed.keeps_keys) == (0.15, "keys", False, False)
    assert build("cacheblend-paper").select().keeps_keys
    assert build("epic").select().k == 16
    assert build("cacheclip").select().ratio == build("query-attention").select().ratio == 0.2
    again = build("droidspeak-clc").select()
    assert (again.ratio, again.check_layer, again.restart_layer) == (0.15, 1, 5)
    assert build("droidspeak").select().ratio == 0.11
