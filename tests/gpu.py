"""What nobody could run here: checks on a GPU, and a table of what training costs there.

    python tests/gpu.py                     all of it, some minutes on one GPU
    python tests/gpu.py --device cpu        the checks alone, to see that this script works

It prints a line for each check and then one Markdown table, and needs nothing but the repository.
"""
import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))    # the project's modules

import torch    # noqa: E402

import evaluate    # noqa: E402
import train    # noqa: E402

# How far outputs and gradients may be from the CPU's float32, relative to their largest value.
TOLERANCES = {"off": 1e-3, "tf32": 2e-2, "bf16": 2.5e-1, "fp16": 5e-2}
SHORT = ["--limit", "64", "--batch-size", "16", "--epochs", "2", "--warmup", "0", "--log-every", "1",
         "--save-minutes", "0"]


def step(args, device):
    """One forward and backward pass of a run on a device, from the same weights and batch everywhere
    -> boxes, gradient of the grounding encoder's first projection, both float32 on the CPU."""
    local = argparse.Namespace(**{**vars(args), "device": device})
    evaluate.set_precision(local.amp)
    torch.manual_seed(0)
    model = train.last_model(local, "cpu")
    inputs, boxes = train.random_batch(model, 2, "cpu")
    model = model.to(device).eval()    # dropout draws other numbers on another device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with evaluate.autocast(local):
        outputs = model(**inputs)
    train.losses.box_loss(outputs.boxes, boxes.to(device)).backward()
    gradient = model.grounding.vision_projection.weight.grad
    return outputs.boxes.detach().float().cpu(), gradient.float().cpu()


def check(name, passed, detail=""):
    print(f"{'ok    ' if passed else 'FAILED'} {name} {detail}", flush=True)
    return passed


def check_precision(device, size):
    """Forward and one step of both families beside the CPU's."""
    results = []
    for method in ("m2ist", "hivg"):
        flags = ["--method", method, "--size", size, "--weights", "random", "--device", "cpu"]
        expected = step(train.parse_args(flags), "cpu")
        for amp, tolerance in TOLERANCES.items():
            found = step(train.parse_args([*flags, "--amp", amp]), device)
            far = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, found))
            results.append(check(f"{method} {size} {amp}", far < tolerance, f"differs by {far:.1e}"))
    return results


def run(out, device, *flags, launcher=()):
    """A short run of train.py in a process of its own -> exit status and output."""
    words = [sys.executable, *launcher, str(ROOT / "train.py"), "--device", device, "--out", str(out),
             *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def check_runs(device, folder):
    """A run, compiled, stopped and resumed, and under torchrun."""
    results = []
    for name, flags in (("a run", []), ("three steps and more compiled", ["--compile"]),
                        ("hivg compiled", ["--method", "hivg", "--compile"])):
        status, text = run(folder / name.replace(" ", "-"), device, *SHORT, *flags)
        results.append(check(name, status == 0, "" if status == 0 else text[-300:]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    status, text = run(folder / "torchrun", device, *SHORT, launcher=launcher)
    results.append(check("torchrun, one process", status == 0, "" if status == 0 else text[-300:]))

    out = folder / "stopped"
    words = [sys.executable, str(ROOT / "train.py"), "--device", device, "--out", str(out), *SHORT,
             "--limit", "640"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "last.pt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait(60)
    status, text = run(out, device, "--resume")
    passed = stopped == 128 + signal.SIGTERM and status == 0
    results.append(check("stopped by SIGTERM, resumed", passed, "" if passed else text[-300:]))
    return results


def print_table(device):
    """Peak memory, measured beside simulated, and samples a second, by method, batch, precision."""
    print(f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| method | precision | batch | simulated | measured | samples a second, training "
          "| evaluation |")
    print("|---|---|---|---|---|---|---|")
    began = time.time()
    for method, batches in (("m2ist", (8, 64)), ("full", (8, 32)), ("frozen", (64,)),
                            ("hivg", (16, 80))):
        for amp in ("off", "tf32", "bf16", "fp16"):
            for batch in batches:
                if time.time() - began > 240:
                    print("\nstopped after four minutes")
                    return
                args = train.parse_args(["--method", method, "--size", "base", "--weights", "random",
                                         "--device", device, "--amp", amp,
                                         "--batch-size", str(batch)])
                evaluate.set_precision(amp)
                simulated = train.simulate(train.last_model(args, "meta"), args, batch)["peak"]
                found = train.measure(args)
                print(f"| {method} | {amp} | {batch} | {simulated / 2 ** 30:.2f} GiB "
                      f"| {found['peak_bytes'] / 2 ** 30:.2f} GiB "
                      f"| {found['samples_per_second']:.1f} | {evaluation_speed(args, batch):.1f} |",
                      flush=True)
                torch.cuda.empty_cache()


@torch.no_grad()
def evaluation_speed(args, batch):
    """Samples a second of the forward pass alone."""
    model = train.last_model(args, args.device)
    train.hilora.merge(model, discard=True)
    model.eval()
    inputs, _ = train.random_batch(model, batch, args.device)
    for passes in range(6):
        if passes == 2:
            torch.cuda.synchronize()
            began = time.time()
        with evaluate.autocast(args):
            model(**inputs)
    torch.cuda.synchronize()
    return 4 * batch / (time.time() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: cuda)")
    device = parser.parse_args().device
    evaluate.check_device(device)
    size = "base" if "cuda" in device else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        results = check_precision(device, size) + check_runs(device, Path(folder))
    if "cuda" in device:
        print_table(device)
    print(f"\n{sum(results)} of {len(results)} checks passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
