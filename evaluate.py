"""Evaluate a checkpoint of train.py, or one that the authors of HiVG have released.

    python evaluate.py runs/shapes-m2ist-0 --json FILE --figures DIR      every split but train, with sheets of predictions
    python evaluate.py runs/refcoco-m2ist-0 --image a.jpg --text "the red cup" --save a.png
    python evaluate.py best_checkpoint.pth --dataset refcoco --root data
    python evaluate.py --cost full m2ist m2ist/VII/a                      what methods and rows cost, of random weights

Acc@0.5: IoU >= 0.5 with the true box (M²IST Section IV-A b, HiVG Section 4.1), of all and by length (HiVG Fig. 4 c).
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import data
import hilora
import train
from model import (CLIP_IGNORED, CLIP_TABLE, DETR_TABLE, InputError, architecture, build_model, count_parameters,
                   import_weights, plain, read_state)

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="the --out folder of a run, its best.safetensors, or a released .pth of HiVG")
    add("--cost", nargs="+", help="methods or rows (train.py --rows) to compare, in place of a checkpoint")
    add("--size", help="of the models that --cost compares (default: base)")
    add("--dataset", help="as in train.py (default: that of the training)")
    add("--root", help="folder of annotations and pictures (default: that of the training)")
    add("--split", action="append", help="only this split; may be given more than once (default: all but train)")
    add("--image", help="a picture to find --text in, instead of a dataset (default: none)")
    add("--text", action="append", help="an expression; may be given more than once (default: none)")
    add("--save", help="FILE.png: the picture with box and attention (default: none)")
    add("--json", help="file to write the results to (default: none)")
    add("--figures", help="folder for a sheet of predictions of each split (default: none)")
    add("--clip-weights", help="hub name or folder of a CLIP, whose tokenizer a released .pth needs (default: OpenAI's)")
    add("--batch-size", type=int, help="samples at once (default: 64; of --cost the recipe's, on a CPU 1)")
    add("--workers", type=int, help="processes that load pictures (default: as in training)")
    add("--limit", type=int, help="only the first N expressions of each split (default: as in training)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1 (default: cuda if any)")
    asked = parser.parse_args(argv)
    asked.text = asked.text and [text.encode(errors="replace").decode() for text in asked.text]  # what a shell may let through
    odd = asked.image or asked.dataset or asked.split or asked.figures if asked.cost else asked.size
    if bool(asked.checkpoint) == bool(asked.cost) or odd:
        raise InputError("give a checkpoint to evaluate, or --cost METHOD ... [--size] to compare what methods cost")
    if bool(asked.image) != bool(asked.text) or asked.save and not asked.image or "" in map(str.strip, asked.text or ()):
        raise InputError("--image and --text, which must not be empty, go together; --save is for them")
    return asked

# --- Checkpoints -----------------------------------------------------------------------------------------------------
def read_config(path):
    """The config of a checkpoint: a file, or the --out folder of a run, of which best.safetensors is taken."""
    path = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give the --out folder of a finished epoch, or its best.safetensors")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        return path, {key: config[key] for key in ("model", "frozen", "args", "epoch")} | config
    except Exception:
        raise InputError(f"{path}: not a checkpoint of this project (best.safetensors of an --out folder)") from None

def load_checkpoint(path):
    """A checkpoint -> (model in eval mode, config). The encoders behind it must be the ones it was trained on."""
    path, config = read_config(path)
    model = build_model(**config["model"])
    state = load_file(path)
    train.load_tuned(model, state, path)
    if train.frozen_fingerprint(model, state) != config["frozen"]:
        raise InputError(f"{path}: was trained on other encoder weights than these ({config['model']['weights']}); "
                         f"its boxes would be meaningless")
    return model.eval(), config

# HiVG's released checkpoints, when `plain` has taken PEFT out of them -> ClipGrounding.
BRIDGE = r"clip\.vision_model\.encoder\.layers\.(\d+)\.cross_", r"clip.vision.layers.\1.plugs.attention."
RELEASED_TABLE = [
    *((r"clip\." + theirs, "clip." + ours) for theirs, ours in CLIP_TABLE),
    *((r"vl_" + theirs, "grounding." + ours) for theirs, ours in DETR_TABLE if r"\.encoder\." in theirs),
    (BRIDGE[0] + r"attn\.(q|k|v|out)_proj\.(.+)", BRIDGE[1] + r"\2.\3"),
    (BRIDGE[0] + r"(?:mlp\.)?(fc[12]|norm|weights)(.*)", BRIDGE[1] + r"\2\3"),
    (BRIDGE[0] + r"gate\.(.+)", BRIDGE[1] + r"projection.\2"),
    *((rf"bbox_embed\.layers\.{i}\.(.+)", rf"grounding.head.{2 * i}.\1") for i in range(3)),
    (r"(vision|text)_proj\.(.+)", r"grounding.\1_projection.\2"),
    (r"reg_token\.weight", "grounding.reg"),
    (r"vl_pos_embed\.weight", "grounding.position"),
    (r"vl_transformer\.encoder\.norm\.(.+)", r"grounding.norm.\1"),
    (r"visu_token_(?:mlp\.)?(fc[12]|norm)\.(.+)", r"grounding.region.\1.\2")]
# What no box of theirs depends on: what their forward never calls, and the head of a loss that is not in the paper [D26].
UNUSED = r"ml_text_feat_perceiver\.|reg_pos_embed\.|condition_text_pos_embed\.|condition_text_proj\.|seg_conv\d\."

def load_released(path, clip_weights):
    """A checkpoint of HiVG's authors -> (model in eval mode, config); what it was built with is read off its keys. [D37] Here a
    sample attends to its own text, and not to padding; its authors' figures were made otherwise."""
    file = read_state(path, whole=True)
    state = plain(file.get("model", file), path)
    if getattr(file.get("args"), "mixup_pretrain", False):                    # its gates and weights are there and never called
        state = {key: value for key, value in state.items() if ".cross_gate." not in key and ".cross_adaptive_" not in key}
    bridges = sorted({int(found[1]) for key in state if (found := re.search(r"layers\.(\d+)\.cross_norm", key))})
    texts = sum(f"layers.{layer}.cross_adaptive_weights." in key for key in state for layer in bridges[:1])
    try:
        # Trained on mixed data there are no weights, and one projection of the text as CLIP puts it out.
        gate = {} if texts else {kind: state.pop(f"condition_text_proj.{kind}") for kind in ("weight", "bias")}
        for layer in bridges:
            name = f"clip.vision_model.encoder.layers.{layer}.cross_"
            weights = [state.pop(f"{name}adaptive_weights.{i}.weight") for i in range(texts)] or [
                torch.zeros_like(state["clip.text_model.embeddings.position_embedding.weight"])]
            state |= {f"{name}weights": torch.stack(weights), **{f"{name}gate.{kind}": value for kind, value in gate.items()}}
        (W1, b1), (W2, b2) = ((state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))
                              for name in ("ml_visual_projection", "visu_proj"))
        state |= {"vision_proj.weight": W2 @ W1, "vision_proj.bias": W2 @ b1 + b2}       # two linears in a row are one [D28]
        size = {768: "base", 1024: "large"}[len(state["clip.vision_model.embeddings.class_embedding"])]
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing") from None
    options = dict(bridge_layers=[layer + 1 for layer in bridges], pixels="detr",
                   text_layers={0: [13] if bridges else None, 1: [12], 2: [6, 12]}.get(texts))      # more are all
    model = build_model("hivg", size, "random", **options)
    import_weights(model, state, RELEASED_TABLE, f"{CLIP_IGNORED}|{UNUSED}", path)
    print(f"{path}: not used, {', '.join(key for key in state if re.match(UNUSED, key))}", file=sys.stderr)
    args = argparse.Namespace(**{**vars(train.build_parser().parse_args([])), **options, "method": "hivg", "size": size,
                                 "clip_weights": clip_weights, "dataset": "refcoco"})
    return model.eval(), {"epoch": "released", "args": vars(train.complete(args))}

# --- Accuracy --------------------------------------------------------------------------------------------------------
def by_length(samples, ious):
    """Acc@0.5 by number of words, HiVG Fig. 4 (c), as a line; the bounds are ours."""
    parts = []
    for least, most in ((1, 5), (6, 10), (11, 20), (21, 1000)):
        if right := [iou >= 0.5 for s, iou in zip(samples, ious.tolist()) if least <= len(s.text.split()) <= most]:
            parts.append(f"{least}-{most if most < 1000 else ''} words {sum(right) / len(right):.4f} of {len(right)}")
    return ", ".join(parts)

def evaluate_dataset(model, args, asked):
    """Print and return the results of the splits that are asked for, and draw their figures."""
    names, splits = data.split_names(args.dataset, args.root), {}
    for split in asked.split or [name for name in names if name != "train"] or names:
        samples, began = data.load_samples(args.dataset, split, args.root)[:args.limit], time.time()
        ious = train.predict(model, train.make_loader(samples, args, False), args)[2]
        row = splits[split] = {**train.scores(ious), "expressions": len(samples), "images": len({s.image_id for s in samples}),
                               "seconds": time.time() - began}                    # the whole pass, pictures loaded and all
        print(f"{split:8}  Acc@0.5 {row['acc@0.5']:.4f}  mean IoU {row['mean_iou']:.4f}  {row['expressions']:6} expressions "
              f"of {row['images']} images in {row['seconds']:.1f} s\n{'':8}  {by_length(samples, ious)}")
        if args.figures:
            path = Path(args.figures) / f"{split.replace('/', '-')}.png"
            train.picture_predictions(model, data.spread(samples), args, path)
            print(f"{'':8}  {path}")
    leaky = data.leaky_pretraining(args)
    return {"dataset": args.dataset, "method": args.row or args.method, "leaky_pretraining": leaky, "splits": splits}

@torch.no_grad()
def evaluate_image(model, args, asked):
    """Print and return [{"text", "box": (x1, y1, x2, y2) in pixels of the picture as it is seen}, ...] of one's own."""
    args = argparse.Namespace(**{**vars(args), "batch_size": 1, "workers": 0})
    picture, image, results, tiles = data.load_picture(Path(asked.image), upright=True), None, [], []
    samples = [data.Sample(picture, text, (0, 0, *picture.size), asked.image) for text in asked.text]
    for text, batch in zip(asked.text, train.make_loader(samples, args, False)):
        images, padding, *tokens = (batch[name].to(args.device) for name in train.INPUTS)
        with train.autocast(args):
            said = model.encode_text(*tokens)
            if hasattr(model, "clip"):                         # HiVG sees a picture through its text
                image = model.encode_image(images, padding, said)
            elif image is None:                                # M²IST does not: it is encoded once for all texts
                image = model.encode_image(images, padding)
            found = model.ground(image, said, attention=True)
        box = data.from_square(found.boxes[0].cpu(), picture.size, images.shape[-1])
        results.append({"text": text, "box": [round(v, 1) for v in box]})
        print(json.dumps(results[-1], ensure_ascii=False))
        tiles.append(data.draw(picture, text, [(box, data.PREDICTED)], found.attention[0], side=512))
    if asked.save:
        data.contact_sheet(tiles, min(len(tiles), 2)).save(asked.save)
    return results

# --- What a method costs ---------------------------------------------------------------------------------------------
# The paper's own "Params." in millions and "Mem." in GB at batch 64: M²IST Tables I, V, VI, VII, IX, X.
PAPER = {"full": (151, 38.95), "frozen": (0, 14.32), "adapter": (3.27, 28.52), "lora": (2.37, 20.37),
         "adaptformer": (2.38, 20.37), "cm-adapter": (3.27, 27.19), "mrs-adapter": (1.58, 20.07), "m2ist": (3.19, 15.44),
         **train.rows("m2ist/V", (0, 14.32), (0.59, 14.90), (1.02, 14.52), (1.61, 15.09), (1.58, 14.84), (3.19, 15.44)),
         **train.rows("m2ist/VI", (3.22, 15.65), (3.17, 14.84), (3.19, 15.38), (3.19, 15.44)),
         **train.rows("m2ist/VII", (3.19, 27.19), (3.19, 20.37), (3.19, 15.44)),
         **train.rows("m2ist/IX", (2.00, 15.34), (2.40, 15.35), (3.19, 15.44)),
         **train.rows("m2ist/X", (151, 38.95), (2.37, 20.37), (3.19, 15.44), (6.46, 21.68)), "m2ist+lora": (6.46, 21.68)}

def saved_bytes(model, step):
    """What autograd keeps for the backward of `step`: distinct storages, those of the model's own tensors apart."""
    address = lambda tensor: tensor.untyped_storage()._cdata
    kept = {}                                                   # the tensors too, or an address might be given a second time
    keep = lambda tensor: (tensor, kept.setdefault(address(tensor), tensor))[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    own = {address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)

def set_up(args, device, batch):
    """(model at its last stage, what evaluates a random batch, what gives its loss in training), all on the device."""
    spec = architecture(**train.model_arguments(args))
    with torch.device(device):
        model = train.to_last_stage(build_model(**train.model_arguments(args)), args)
        images = torch.randn(batch, 3, spec["image_size"], spec["image_size"])       # zeros would be slow: denormal gradients
        tokens, boxes = torch.randint(100, 200, (batch, spec["max_tokens"])), torch.full((batch, 4), 0.5)
    inputs = images, torch.zeros_like(images[:, 0], dtype=torch.bool), tokens, torch.zeros_like(tokens, dtype=torch.bool)
    evaluate = lambda: hilora.discard(model) or model.eval()(*inputs)            # without pairs, as a checkpoint is
    return model, evaluate, lambda: train.weighted_loss(model.train()(*inputs), boxes, args)

def count_cost(args):
    """Parameters, and of one sample MACs of a forward and saved_bytes of a training step, on the meta device, where
    attention is computed unfused: the same on every machine."""
    model, evaluate, loss = set_up(args, "meta", 1)
    found = {**count_parameters(model), "saved_bytes": saved_bytes(model, loss)}
    evaluate()                                           # the first time takes LoRA's pairs out, as merging does
    with FlopCounterMode(display=False) as flops:
        evaluate()
    return {**found, "macs": flops.get_total_flops() // 2}

def time_cost(args, batch):
    """Median seconds of a training and of an evaluation step; on a GPU peak memory. batch: None is the recipe's, on a CPU 1."""
    from torch.utils.benchmark import Timer          # here, as it may speak up about CUDA where there is none
    gpu, batch = "cuda" in args.device, batch or (args.batch_size if "cuda" in args.device else 1)
    torch.cuda.reset_peak_memory_stats(args.device) if gpu else None
    model, evaluate, loss = set_up(args, args.device, batch)
    optimizer = train.make_optimizer(model, args, train.plan(args)[-1])
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
    timer = lambda work: Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    seconds = lambda work: timer(work).blocked_autorange(min_run_time=1).median
    found = {"batch": batch, "train_step_s": seconds(step), "eval_s": seconds(torch.no_grad()(evaluate))}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(args.device)} if gpu else {})

def compare_costs(asked):
    """Print and return what methods and rows cost, their shares of `full` where it is among them, and the paper's beside."""
    flags = ["--size", asked.size or "base", "--weights", "random", "--device", asked.device]
    runs = {name: train.parse_args(["--row" if "/" in name else "--method", name, *flags]) for name in asked.cost}
    results = [{"method": n, "size": a.size, **count_cost(a), **time_cost(a, asked.batch_size)} for n, a in runs.items()]
    whole = next((row for row in results if row["method"] in ("full", "m2ist/I/full", "m2ist/X/a")), None)
    for r in results:
        share = lambda key: f" ({r[key] / whole[key]:.1%})" if whole and r["method"][:4] not in ("hivg", "clip") else ""
        print(f"{r['method']}: {r['encoder_tunable']:,} tuned in or beside the encoders{share('encoder_tunable')}, "
              f"{r['trainable']:,} trainable, {r['total']:,} in all; {r['macs'] / 1e9:.2f} GMACs; "
              f"{r['saved_bytes'] / 2 ** 20:.1f} MiB saved{share('saved_bytes')}; of {r['batch']}: "
              f"step {r['train_step_s']:.3f} s, evaluation {r['eval_s']:.3f} s"
              + (f", peak {r['peak_bytes'] / 2 ** 30:.2f} GiB" if "peak_bytes" in r else ""))
        if whole and (paper := PAPER.get(r["method"].removeprefix("m2ist/I/"))):
            print(f"    the paper: {paper[0]} M ({paper[0] / 151:.2%}), {paper[1]} GB ({paper[1] / 38.95:.2%})")
    return results

def make_folders(asked):                # before minutes are spent on what could not be written
    for path in filter(None, (asked.json, asked.save)):
        if Path(path).is_dir() or path == asked.save and Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise InputError(f"--json and --save take a file, --save a .png or .jpg; {path} is none")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(asked.figures or ".").mkdir(parents=True, exist_ok=True)

def evaluate_checkpoint(asked):
    released = asked.checkpoint.endswith(".pth")
    model, config = load_released(asked.checkpoint, asked.clip_weights) if released else load_checkpoint(asked.checkpoint)
    # The flags of the training, with what was asked here in their place; an older run lacks the newest flags.
    said, new = {flag: v for flag, v in vars(asked).items() if v is not None}, vars(train.build_parser().parse_args([]))
    args = argparse.Namespace(**{**new, **vars(asked), **config["args"], "batch_size": 64, **said})
    if asked.dataset:
        args.root = asked.root                            # the training's folder is not another dataset's
    model.to(args.device)
    if asked.image:
        return evaluate_image(model, args, asked)
    name, leaky = args.row or args.method, data.leaky_pretraining(args)
    print(f"{name} {args.size} on {args.dataset}, epoch {config['epoch']}; leaky pretraining {leaky}")
    return evaluate_dataset(model, args, asked)

def main(argv=None):
    asked = parse_args(argv)
    train.check(asked)
    make_folders(asked)
    result = compare_costs(asked) if asked.cost else evaluate_checkpoint(asked)
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=1) + "\n")
    return result

if __name__ == "__main__":
    train.run(main)
