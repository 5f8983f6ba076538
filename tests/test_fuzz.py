"""A short form of the campaign on the command line; see `fuzz_command_line.py`."""

import subprocess
import sys
from pathlib import Path


def test_broken_input_ends_in_sentences():
    driver = Path(__file__).parent / "fuzz_command_line.py"
    words = ["--cases", "40", "--seed", "1"]
    done = subprocess.run([sys.executable, str(driver), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "0 findings" in done.stdout
