"""A skipped test is a test that cannot fail: only `gpu` ones may skip, and only without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASES = {
    "a_skip": ("@pytest.mark.skip(reason='later')\ndef test(): pass", "error"),
    "an_unnamed_skip": ("def test(): pytest.skip()", "failure"),
    "a_missing_package": ("pytest.importorskip('no_such_package')", "error"),
    "a_gpu_test": ("@pytest.mark.gpu\ndef test(): pass", "pytest.skip"),
    "a_skip_in_a_gpu_test": ("@pytest.mark.gpu\ndef test(): pytest.skip('later')", "pytest.skip"),
    "an_expected_failure": ("@pytest.mark.xfail\ndef test(): assert False", "pytest.xfail"),
    "a_test": ("def test(): pass", "passed"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """Of every case, from one run over all of them: failure, error, or why it was skipped."""
    folder = tmp_path_factory.mktemp("cases")
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    for case, (source, _) in CASES.items():
        (folder / f"test_{case}.py").write_text(f"import pytest\n{source}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-o",
        "markers=gpu\nalone",
        "--continue-on-collection-errors",
        "--junitxml=junit.xml",
    ]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        command, cwd=folder, env=without_gpu, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stdout + run.stderr
    found = {}
    for test in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        said = next((child for child in test if child.tag != "system-out"), None)
        name = test.get("classname") or test.get("name")  # a file that fails has no tests
        outcome = "passed" if said is None else said.get("type") or said.tag
        found[name.removeprefix("test_")] = outcome
    return found


@pytest.mark.parametrize("case", CASES)
def test_outcome_of(case, outcomes):
    assert outcomes[case] == CASES[case][1]
