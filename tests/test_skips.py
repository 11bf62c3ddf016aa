"""A skipped test is a test that cannot fail: only `gpu` ones may skip, and only without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "a_skip": ("@pytest.mark.skip(reason='later')\ndef test(): pass", "1 error"),
    "an_unnamed_skip": ("def test(): pytest.skip()", "1 failed"),
    "a_missing_package": ("pytest.importorskip('no_such_package')", "1 error"),
    "a_gpu_test": ("@pytest.mark.gpu\ndef test(): pass", "1 skipped"),
    "a_skip_in_a_gpu_test": ("@pytest.mark.gpu\ndef test(): pytest.skip('later')", "1 skipped"),
    "an_expected_failure": ("@pytest.mark.xfail\ndef test(): assert False", "1 xfailed"),
    "a_test": ("def test(): pass", "1 passed"),
}


@pytest.mark.parametrize("case", CASES)
def test_outcome_of(case, tmp_path):
    source, expected = CASES[case]
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_case.py").write_text(f"import pytest\n{source}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=gpu"]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        command, cwd=tmp_path, env=without_gpu, capture_output=True, text=True, check=False
    )
    assert expected in run.stdout.splitlines()[-1], run.stdout + run.stderr
