"""A few rounds of `kill_stress.py`."""

from pathlib import Path

import forked

SCRIPT = Path(__file__).with_name("kill_stress.py")


def test_killed_writers_leave_whole_entries_and_no_temporary_file(tmp_path):
    # A process of its own, since it forks.
    done = forked.run([SCRIPT, "--kills", "10", "--folder", tmp_path])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "'kills': 10" in done.stdout
    assert "'entries': 0," not in done.stdout
