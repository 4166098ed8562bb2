"""Check that a change of the code leaves the numbers of a run's log bitwise as they were.

    python tests/compare_logs.py COMMIT [flags of train.py]

This script runs train.py twice with the same flags, once as the working tree has it and once as
COMMIT has it, and compares the epochs of the two log.jsonl: every number that both have, but for
times. Without flags both are the default run, which takes minutes; `--limit 640 --epochs 2` takes
seconds. Both runs must be on the same machine with the same number of threads, because the order of
float sums depends on them.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


SPEED = {"seconds", "seconds_waiting_for_data", "samples_per_second", "peak_bytes"}


def run(folder, out, flags):
    """Run train.py of a folder -> the lines of its log that are about whole epochs."""
    subprocess.run([sys.executable, "train.py", *flags, "--out", str(out)], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" not in line]


def differences(before, after):
    """The (epoch, name) of all numbers that both logs have and that differ."""
    if len(before) != len(after):
        return [("number of epochs", len(before), len(after))]
    found = []
    for old, new in zip(before, after):
        for name in set(old) & set(new) - SPEED:
            if old[name] != new[name]:
                found.append((old["epoch"], name))
    return sorted(found)


def main():
    commit, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before = scratch / "before"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(before)], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=before, check=True)
        found = differences(run(before, scratch / "a", flags), run(ROOT, scratch / "b", flags))
    print(f"the logs differ: {found}" if found else "the logs are the same")
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main())
