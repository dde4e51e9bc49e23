"""The soak's short form: kills, a full disk, spoiled files, flags and options at random."""

import re

from conftest import script


def test_a_short_soak_finds_nothing():
    """Every run that was killed ends with the weights of one in peace; nothing ends in a
    traceback."""
    done = script("experiments/soak.py", "short")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(\d+) .*: 0 failures", done.stdout, re.MULTILINE)
    assert len(counts) == 7, done.stdout
    kills, disks, _, _, files, flags, options = map(int, counts)
    assert kills >= 8 and disks >= 2 and files >= 250 and flags >= 120 and options >= 150
