"""A few rounds of `kill_stress.py`."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("kill_stress.py")


def test_killed_writers_leave_whole_entries_and_no_temporary_file(tmp_path):
    done = subprocess.run(  # a process of its own, since it forks
        [sys.executable, str(SCRIPT), "--kills", "10", "--folder", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "'kills': 10" in done.stdout
    assert "'entries': 0," not in done.stdout
