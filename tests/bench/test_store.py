"""`blocktune bench store`: it runs, and its look-ups hit and miss as they should."""

import json

from typer.testing import CliRunner

from blocktune.bench.store import _lookups
from blocktune.commands import app


def test_a_small_run_reports_every_number(small_benches):
    done = CliRunner().invoke(app, ["bench", "store", "--tiny", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ratios"].keys() == {"disk_over_copy", "memory_over_copy"}
    assert found["lookup"]["keys"] == 1000
    assert found["codecs"]["as-is"]["key_error"] == 0
    sizes = {codec: one["bytes_per_token"] for codec, one in found["codecs"].items()}
    assert sizes["int4"] < sizes["int8"] < sizes["as-is"]
    assert sizes["fp8"] < 0.27 * sizes["as-is"]  # of float32


def test_lookups_are_told_apart(tmp_path):
    found = _lookups(tmp_path, 100, timed=20)
    assert 0 < found["miss_p50_s"] <= found["miss_p99_s"] < 0.5
    assert 0 < found["hit_p50_s"] <= found["hit_p99_s"] < 0.5
