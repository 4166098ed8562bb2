"""Check that a change of the code leaves the numbers of a run's log bitwise as they were.

    python tests/compare_logs.py COMMIT [flags of train.py]

This script runs train.py twice with the same flags, once as the working tree has it and once as
COMMIT has it, and compares the epochs of the two log.jsonl: every number that both have, but for
times. Without flags both are the default run, which takes minutes; `--limit 640 --epochs 2` takes
seconds. Both runs must be on the same machine with the same number of threads, because the order of
float sums depends on them.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from short_runs import computed    # noqa: E402


def run(folder, out, flags):
    """Run train.py of a folder -> the lines of its log that are about whole epochs."""
    subprocess.run([sys.executable, "train.py", *flags, "--out", str(out)], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
    return [line for line in computed(out) if "step" not in line]


def main():
    commit, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch, "before")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(before)], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=before, check=True)
        old = run(before, Path(scratch, "a"), flags)
        new = run(ROOT, Path(scratch, "b"), flags)
    if len(old) != len(new):
        sys.exit(f"the logs have {len(old)} and {len(new)} epochs")
    differ = [(line["epoch"], name) for line, other in zip(old, new) for name in line
              if name in other and line[name] != other[name]]
    sys.exit(f"the logs differ: {differ}" if differ else print("the logs are the same"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main()
