"""Check that a change of the code leaves a run's log bitwise as it was.

    python tests/compare_logs.py COMMIT [flags of train.py]

This script runs train.py twice with the same flags, once as the working tree has it and once as COMMIT
has it, and compares the two log.jsonl byte by byte. Without flags both are the default run, which
takes minutes; `--limit 640 --epochs 2` takes seconds. Both runs must be on the same machine with the
same number of threads, because the order of float sums depends on them.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(folder, out, flags):
    """Run train.py of a folder -> the bytes of its log."""
    subprocess.run([sys.executable, "train.py", *flags, "--out", str(out)], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (out / "log.jsonl").read_bytes()


def main():
    commit, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before = scratch / "before"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(before)], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=before, check=True)
        same = run(before, scratch / "a", flags) == run(ROOT, scratch / "b", flags)
    print("the logs are the same" if same else "the logs differ")
    return 0 if same else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main())
