"""Evaluate a trained model, look at its boxes, or find objects in one's own images.

    python evaluate.py runs/shapes-m2ist-0
        accuracy on every split but train
    python evaluate.py runs/refcoco-m2ist-0 --predictions boxes.jsonl
        the same, and a line with the predicted box of each expression
    python evaluate.py runs/refcoco-m2ist-0 --image a.jpg --text "the red cup"
        the box of an expression in one's own images, or in a folder of them
    python evaluate.py best_checkpoint.pth --dataset refcoco --root data
        accuracy of a checkpoint that HiVG's authors released

From Python, `locate` gives the boxes of any number of expressions in one image:

    model, config = load_checkpoint("runs/refcoco-m2ist-0")
    locate(model, "a.jpg", ["the red cup"])
        [{"text": "the red cup", "box": (x1, y1, x2, y2)}]

The file reads in this order: device and processes, prediction and accuracy (M²IST Section IV-A b,
HiVG Section 4.1 and Fig. 4 c), one's own images, checkpoints of train.py, checkpoints of HiVG's
authors, the command line. train.py uses all but one's own images and HiVG's checkpoints.

    B batch    S side of the padded square image    T text tokens    Nv vision tokens

Tags such as [D37] mark where a line differs from a paper or from its released code;
assets/deviations.md says how.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

import data
import hilora
import losses
from data import InputError, run_command
from model import (CLIP_IGNORED, CLIP_TABLE, DETR_LAYER, DETR_TABLE, DETR_URL, METHODS, SIZES,
                   ModelError, build_model, import_weights, merge_peft, read_file, read_state,
                   state_in)

# --- Device, precision, processes -----------------------------------------------------------------


def check_device(device):
    """Raise InputError if a device cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used ({reason}); try --device cpu") from None


def set_precision(amp):
    """Let matrix products and convolutions of float32 use a GPU's TF32 with --amp tf32, and only
    then."""
    torch.set_float32_matmul_precision("high" if amp == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = amp == "tf32"


def autocast(args):
    """The context of a forward pass in the run's precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype is not None)


def peak_bytes(device):
    """The peak memory so far: of the GPU or, of a run on the CPU, of the process. None where the
    system does not tell."""
    if "cuda" in str(device):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource    # there is no such module on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def memory_explained(device, flag, batch, fitting=None):
    """Turn an out-of-memory error of any device into one line. flag: what sets the batch.
    fitting: a function that finds a batch that fits; else half of the batch is proposed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The words are those of a GPU, of the CPU, and of cuBLAS and cuDNN.
        words = "out of memory|DefaultCPUAllocator|ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not re.search(words, str(error)):
            raise
        reason = str(error).partition("\n")[0]
        smaller = "another device, or"
        if batch > 1:
            smaller = f"{flag} {fitting() if fitting else batch // 2}, or"
        raise InputError(f"out of memory; the peak was {(peak_bytes(device) or 0) / 2 ** 30:.1f} GiB "
                         f"({reason}): try {smaller} --amp bf16") from None


def go_offline_without_hub():
    """Let transformers look for weights and tokenizers on this machine alone, if the hub does not
    answer. Its own retries would take a minute before its error comes."""
    from huggingface_hub import constants
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        pass    # an answer, too
    except OSError:
        constants.HF_HUB_OFFLINE = True


def rank():
    """The number of this process among those that torchrun has started. Plain python is 0 of 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(numbers):
    if processes() > 1:
        dist.all_reduce(numbers)
    return numbers


# --- Prediction and accuracy ----------------------------------------------------------------------


@functools.cache    # reading the files of a tokenizer takes longer than all else before training
def cached_tokenizer(max_tokens, name=None, vocabulary=None, flag=None):
    return data.Tokenizer(max_tokens, name, vocabulary, flag)


def make_tokenizer(spec):
    """The tokenizer that the text encoder of a spec was pretrained with. Random encoders take the
    small vocabulary of `shapes`. Raises InputError if the tokenizer cannot be had."""
    if spec["weights"] != "pretrained":
        return cached_tokenizer(spec["max_tokens"])
    option = "clip_weights" if spec["encoders"] == "clip" else "text_weights"
    name = spec[option]
    if Path(name).is_file():
        # A file holds weights alone. The tokenizer then is that of the hub's encoder of this size.
        for (encoders, _), size in SIZES.items():
            if encoders == spec["encoders"] and size["text"] == spec["text"]:
                name = size[option]
    return cached_tokenizer(spec["max_tokens"], name, spec["text"]["vocabulary"],
                            f"--{option.replace('_', '-')}")


def make_loader(samples, model, args, train=False, batch_size=None):
    """The DataLoader of samples for a model. In training the order and the transforms of an epoch
    are those of `loader.dataset.epoch` and `loader.batch_sampler.epoch`. In evaluation each sample
    comes once, next to the others of its image. Raises InputError if images are missing."""
    spec = model.spec
    tokenizer = make_tokenizer(spec)
    batch_size = batch_size or args.batch_size
    dataset = data.GroundingDataset(
        samples, spec["image_size"], tokenizer, train, args.seed if train else 0,
        augmented=train and args.size != "tiny",
        flip=spec["encoders"] == "detr",    # HiVG Appendix B flips nothing
        shared=train and args.expressions_per_image > 1, draft=args.draft)
    if train:
        batches = data.TrainingBatches(samples, batch_size, args.seed, args.expressions_per_image,
                                       rank(), processes())
    else:
        batches = data.evaluation_batches(samples, batch_size, rank(), processes())
    # A compiled model takes batches of one shape; otherwise texts are trimmed to the longest.
    length = spec["max_tokens"] if train and args.compile else 0
    if args.workers > 0:
        held = batch_size // processes() if train else batch_size    # by one batch of a worker
        check_shared_memory(spec["image_size"], held, args.workers)
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                      collate_fn=functools.partial(data.collate, pad=tokenizer.pad, length=length),
                      pin_memory="cuda" in args.device, worker_init_fn=begin_worker,
                      persistent_workers=args.workers > 0)


def check_shared_memory(side, batch_size, workers):
    """Raise InputError if /dev/shm has no room for the batches that workers hold there: two for each
    worker, of images as uint8 and of their padding. A container has 64 MB by default, and training
    would hang."""
    needed = 2 * workers * batch_size * 4 * side ** 2
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else needed
    if free < needed:
        raise InputError(f"/dev/shm has {free / 2 ** 20:.0f} MiB free, and {workers} workers need "
                         f"{needed / 2 ** 20:.0f}: give --workers 0, or a container with a larger "
                         f"--shm-size")


def begin_worker(worker):
    """Workers of a DataLoader leave Ctrl-C and SIGTERM to the training process, which ends them. A
    second SIGTERM ends a worker that hangs."""
    def allow(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, allow)


def model_inputs(batch, start, end, device):
    """The model's inputs for the samples start .. end of a batch, on the device: {name: tensor}."""
    inputs = {}
    for name in ("tokens", "token_padding"):
        inputs[name] = batch[name][start:end].to(device, non_blocking=True)
    # Samples that share an image are neighbours; see data.collate.
    image_index = batch["image_index"][start:end]
    first, last = image_index[0], image_index[-1]
    for name in ("images", "image_padding"):
        inputs[name] = batch[name][first:last + 1].to(device, non_blocking=True)
    if len(inputs["images"]) < len(image_index):
        inputs["image_index"] = (image_index - first).to(device, non_blocking=True)
    return inputs


class Predictions(NamedTuple):
    """What a model predicts for a whole loader, on the CPU."""
    boxes: Tensor                # (N, 4)   predicted
    ious: Tensor                 # (N,)


@torch.no_grad()
def predict(model, loader, args):
    """Predict the boxes of a whole loader -> Predictions, in the order of the loader's samples,
    whatever the order of its batches. Processes that evaluate together share the batches."""
    model.eval()
    count = len(loader.dataset)
    boxes = torch.zeros(count, 4, device=args.device)
    truths = torch.zeros(count, 4, device=args.device)
    for batch in loader:
        inputs = model_inputs(batch, 0, len(batch["boxes"]), args.device)
        with autocast(args):
            grounding = model(**inputs)
        boxes[batch["index"]] = grounding.boxes.float()
        truths[batch["index"]] = batch["boxes"].to(args.device)
    # A process has zeros for the samples of the others.
    boxes = sum_over_processes(boxes).cpu()
    truths = sum_over_processes(truths).cpu()
    return Predictions(boxes, measured_ious(boxes, truths))


def measured_ious(boxes, truths):
    """The IoU that Acc@0.5 counts, (N,). Predictions are clamped to the square first, as in the
    released code of both papers; the loss takes them whole."""
    ious, _ = losses.iou_and_giou(losses.clamp_to_square(boxes), truths)
    return ious


def scores(ious):
    """Acc@0.5: the share of samples with IoU >= 0.5 (M²IST Section IV-A b, HiVG Section 4.1)."""
    return {"acc@0.5": (ious >= 0.5).float().mean().item(), "mean_iou": ious.mean().item()}


LENGTHS = ((1, 5), (6, 10), (11, 20), (21, None))    # bounds in words, ours; None: no upper bound


def by_length(samples, ious):
    """Acc@0.5 by the number of words of the expressions, as HiVG Fig. 4 (c), in one line.
    ious: (N,), one for each sample."""
    parts = []
    for least, most in LENGTHS:
        chosen = []
        for sample, iou in zip(samples, ious.tolist()):
            words = len(sample.text.split())
            if least <= words and (most is None or words <= most):
                chosen.append(iou)
        if chosen:
            correct = sum(iou >= 0.5 for iou in chosen)
            bounds = f"{least}-{most}" if most else f"{least} or more"
            parts.append(f"{bounds} words {correct / len(chosen):.4f} of {len(chosen)}")
    return ", ".join(parts)


def leaky_pretraining(args):
    """Whether the vision encoder's pretraining has seen images of val or test: True, False, or None
    where nobody knows, as with CLIP, whose images are not listed anywhere."""
    if args.weights != "pretrained":
        return False
    if METHODS[args.method]["encoders"] == "clip":
        return None
    # [D48] The one DETR with an address of its own has seen the images of RefCOCO's val and test.
    leaky = data.leaky_pretraining(args.dataset, args.vision_weights or DETR_URL)
    if vars(args).get("init_from") and not leaky:
        return None    # what the other run has seen may hold images of this val and test
    return leaky


def leaky_in_words(args):
    return {True: "yes", False: "no", None: "unknown"}[leaky_pretraining(args)]


def evaluate_split(model, samples, args, split):
    """Print the results of one split, and return them with the Predictions."""
    loader = make_loader(samples, model, args)
    began = time.time()
    predictions = predict(model, loader, args)
    images = {sample.image_id for sample in samples}
    row = {**scores(predictions.ious), "expressions": len(samples), "images": len(images),
           "seconds": time.time() - began}    # of the whole pass, with the loading of images
    print(f"{split:8}  Acc@0.5 {row['acc@0.5']:.4f}  mean IoU {row['mean_iou']:.4f}  "
          f"{row['expressions']:6} expressions of {row['images']} images in "
          f"{row['seconds']:.1f} s")
    print(f"{'':8}  Acc@0.5 by length: {by_length(samples, predictions.ious)}")
    return row, predictions


def evaluate_dataset(model, args, asked):
    """Print and return the results of the splits that are asked for, and draw their figures. By
    default these are all but train; a dataset that has nothing but train is evaluated on train.

    args: the options of the training, with what is asked here in place of them."""
    names = data.split_names(args.dataset, args.root)
    splits = {}
    lines = []
    for split in asked.split or [name for name in names if name != "train"] or names:
        samples = data.load_samples(args.dataset, split, args.root, args.limit)
        splits[split], predictions = evaluate_split(model, samples, args, split)
        if asked.predictions:
            lines += prediction_lines(split, samples, predictions, model.spec["image_size"],
                                      args.trained_on)
        if asked.figures:
            path = Path(asked.figures) / f"{split.replace('/', '-')}.png"
            draw_predictions(model, data.spread(samples), args, path)
            print(f"{'':8}  {path}")
    if asked.predictions:
        data.write_text(asked.predictions, "".join(lines))
    return {"dataset": args.dataset, "limit": args.limit,
            "leaky_pretraining": leaky_pretraining(args), "splits": splits}


def prediction_lines(split, samples, predictions, side, trained_on):
    """A line of JSON for each sample of a split. Boxes are (x1, y1, x2, y2) in pixels of the image.
    The IoU is the one that accuracy counts, in the padded square. side: of that square, in pixels."""
    sizes = data.image_sizes(samples)
    lines = []
    for sample, box, iou in zip(samples, predictions.boxes, predictions.ious.tolist()):
        line = {"trained_on": trained_on, "split": split, "image": sample.image,
                "text": sample.text, "box": sample.box,
                "predicted": data.from_square(box, sizes[sample.image], side), "iou": iou}
        lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")    # paths as str
    return lines


# --- One's own images -----------------------------------------------------------------------------


class Located(NamedTuple):
    """What a model finds for one expression."""
    text: str
    box: tuple           # (x1, y1, x2, y2) in pixels of the image as it is seen
    attention: Tensor    # (Nv,) how much [REG] attends to the padded square


def locate(model, image, texts):
    """Find each of several expressions in one image.

    model: from build_model or load_checkpoint, on any device; it is put into eval mode.
    image: a path or a PIL image. It is turned upright first if its EXIF data say so.
    texts: a list of expressions.
    Returns [{"text", "box"}, ...], where box is (x1, y1, x2, y2) in pixels of the upright image.
    """
    image = image if isinstance(image, Image.Image) else Path(image)
    located = ground_texts(model, data.load_image(image, upright=True), texts)
    return [{"text": found.text, "box": found.box} for found in located]


def check_texts(texts):
    """Refuse texts that describe nothing, and a single text in place of a list."""
    if isinstance(texts, str):
        raise InputError(f"one text was given: {texts!r}; give a list of texts")
    for text in texts:
        if not text.strip():
            raise InputError("--text must not be empty: describe what to find")


@torch.no_grad()
def ground_texts(model, image, texts):
    """Ground all texts in one RGB image, in one batch -> [Located, ...]."""
    check_texts(texts)
    if not texts:
        return []
    model.eval()
    size = model.spec["image_size"]
    tokenizer = make_tokenizer(model.spec)
    square, padding, _ = data.letterbox(image, size)
    items = []
    for index, text in enumerate(texts):
        no_box = [0.0, 0.0, 0.0, 0.0]    # nobody knows the true box
        items.append(data.Item(square, padding, tokenizer(text), no_box, index))
    batch = data.collate(items, tokenizer.pad)
    device = next(model.parameters()).device
    grounding = model(**model_inputs(batch, 0, len(texts), device), attention=True)

    located = []
    for text, box, attention in zip(texts, grounding.boxes.cpu(), grounding.attention):
        located.append(Located(text, data.from_square(box, image.size, size), attention))
    return located


def evaluate_images(model, args, asked):
    """Print and return the boxes of --text in each image of --image, rounded to a tenth of a pixel.
    Save a drawing of each image if --save is given."""
    paths = find_images(asked.image)
    drawings = drawing_paths(asked, paths)
    for path in paths:
        data.image_size(path)    # a file that is no image is named before minutes have passed

    results = []
    for path, drawing in zip(paths, drawings):
        image = data.load_image(path, upright=True)
        with autocast(args):
            located = ground_texts(model, image, asked.text)
        for found in located:
            line = {"text": found.text, "box": [round(v, 1) for v in found.box]}
            if shows_several(asked.image):
                line = {"image": str(path), **line}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            results.append(line)

        if drawing is not None:
            tiles = []
            for number, found in enumerate(located, start=1):
                caption = data.drawable(found.text, number, drawing)
                boxes = [(found.box, data.PREDICTED)]
                tiles.append(data.draw(image, caption, boxes, found.attention, side=512))
            data.write_sheet(drawing, tiles, ["predicted", "attention"], columns=2)
    return results


def draw_predictions(model, samples, args, path):
    """Save a sheet of samples with expression, IoU, true box, predicted box and [REG]'s attention.
    With several processes, only the first one does."""
    if rank() > 0:
        return
    size = model.spec["image_size"]
    tiles = []
    for i, sample in enumerate(samples):
        image = data.load_image(sample.image)
        with autocast(args):
            [found] = ground_texts(model, image, [sample.text])
        place = data.placement(image.size, size)
        squares = torch.tensor([data.to_square(box, place, size) for box in (found.box, sample.box)])
        iou = measured_ious(*squares).item()
        boxes = [(sample.box, data.TRUE), (found.box, data.PREDICTED)]
        caption = f"IoU {iou:.2f}\n{data.drawable(sample.text, i + 1, path)}"
        tiles.append(data.draw(image, caption, boxes, found.attention))
    data.write_sheet(path, tiles, ["true", "predicted", "attention"])


def shows_several(images):
    """Whether --image is more than one file, and its results then say which image they are of."""
    return len(images) > 1 or Path(images[0]).is_dir()


def find_images(images):
    """The images of --image: files as they are given, and of a folder all images in it, sorted.
    Its other files, hidden files and folders within it are left out."""
    paths = []
    for path in [Path(image) for image in images]:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if is_named_as_image(file))
        if not inside:
            raise InputError(f"--image {path}: there is no image in this folder")
        paths += inside
    return paths


def is_named_as_image(path):
    """Whether a file's name ends as that of an image that Pillow opens. It opens videos, too."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    opens = kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
    return opens and not path.name.startswith(".") and path.is_file()


def drawing_paths(asked, paths):
    """The file that --save writes for each image, [path or None, ...]. A folder may be that of
    the photos, so nothing that is there is overwritten in it."""
    if asked.save is None:
        return [None] * len(paths)
    if not shows_several(asked.image):
        return [Path(asked.save)]
    drawings = []
    for number, path in enumerate(paths, start=1):
        # Images of several folders may have the same name; the number tells them apart.
        drawing = Path(asked.save, f"{number:04}-{path.stem}.png")
        if drawing.exists():
            raise InputError(f"--save would write {drawing}, which is there already: give another "
                             f"folder")
        drawings.append(drawing)
    return drawings


# --- Checkpoints of train.py: the tuned weights alone; the metadata rebuilds the rest -------------


def tuned_state(model, merged=False):
    """{name: tensor} of all weights that differ from a fresh build: those that require a gradient, the
    frozen weights under LoRA, and `model.carried`, into which earlier stages were merged.
    merged: add the present LoRA factors to their weights, in place of keeping them beside."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name in model.carried:
        state[name] = model.get_parameter(name).detach()
    for name, module in hilora.lora_modules(model).items():
        state[f"{name}.weight"] = module.weight.detach()
        if merged:
            del state[f"{name}.A"], state[f"{name}.B"]
            state[f"{name}.weight"] = module.merged()
    return {name: value.cpu().contiguous() for name, value in state.items()}


def load_tuned(model, state, source):
    """Put tuned weights back into a model. If `state` holds no LoRA factors, because they are
    merged, those of the model are taken out first. All that require a gradient must be there, and
    nothing that the model lacks."""
    if not any(name.endswith((".A", ".B")) for name in state):
        hilora.merge(model, discard=True)
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    misfits = sorted(tuned - set(state))
    try:
        misfits += model.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:    # of another shape
        misfits += str(error).splitlines()[1:]
    if misfits:
        raise InputError(f"{source}: is of another method or size; {len(misfits)} weights do not "
                         f"fit: {misfits[0].strip()[:200]}")
    model.carried |= {name for name in state if name not in tuned}


def frozen_fingerprint(model):
    """A hash of all that is frozen in a model as build_model returns it. It tells whether the
    encoders behind a checkpoint are the same again. Hashing takes seconds at full size, so it is
    done once a run."""
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in tuned:
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path, model, config):
    """Write the tuned weights with LoRA merged. config: what rebuilds the model, and more."""
    metadata = {"config": json.dumps(config)}
    state = tuned_state(model, merged=True)
    data.write_atomically(path, lambda partial: save_file(state, partial, metadata))


def load_checkpoint(path):
    """A checkpoint -> (model in eval mode, config). The encoders behind the checkpoint must be the
    ones that it was trained on.

    path: the --out folder of a run, or its best.safetensors."""
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give the --out folder of a run that has "
                         f"finished an epoch, or its best.safetensors")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        for name in ("model", "args", "frozen", "epoch"):
            config[name]
    except Exception:    # a file of another kind may fail in any manner
        raise InputError(f"{path}: not a checkpoint of this project (best.safetensors of an --out "
                         f"folder)") from None
    if config["model"]["weights"] == "pretrained":
        go_offline_without_hub()
    model = build_model(**config["model"])
    if frozen_fingerprint(model) != config["frozen"]:
        raise InputError(f"{path}: was trained on other encoder weights than these "
                         f"({config['model']['weights']}); its boxes would be meaningless; give "
                         f"the encoders the same files as in training")
    load_tuned(model, read_state(path), path)
    return model.eval(), config


# --- Checkpoints that HiVG's authors released -----------------------------------------------------


def released_table():
    """How HiVG's authors name what ClipGrounding holds, once merge_peft has taken PEFT's words out:
    [(regular expression of their name, our name), ...]. The tables of CLIP and of DETR's layers are
    parts of it, with a prefix."""
    layer = r"clip\.vision_model\.encoder\.layers\.(\d+)\.cross_"
    bridge = r"clip.vision.layers.\1.plugs.attention."
    table = [
        (layer + r"attn\.(q|k|v|out)_proj\.(.+)", bridge + r"\2.\3"),
        (layer + r"(?:mlp\.)?(fc[12]|norm|weights)(.*)", bridge + r"\2\3"),
        (layer + r"gate\.(.+)", bridge + r"projection.\2"),
        (r"bbox_embed\.layers\.0\.(.+)", r"grounding.head.0.\1"),    # a ReLU follows each of the
        (r"bbox_embed\.layers\.1\.(.+)", r"grounding.head.2.\1"),    # first two linear layers, so
        (r"bbox_embed\.layers\.2\.(.+)", r"grounding.head.4.\1"),    # ours are 0, 2 and 4
        (r"(vision|text)_proj\.(.+)", r"grounding.\1_projection.\2"),
        (r"reg_token\.weight", "grounding.reg"),
        (r"vl_pos_embed\.weight", "grounding.position"),
        (r"vl_transformer\.encoder\.norm\.(.+)", r"grounding.norm.\1"),
        (r"visu_token_(?:mlp\.)?(fc[12]|norm)\.(.+)", r"grounding.region.\1.\2")]
    for theirs, ours in CLIP_TABLE:
        table.append((r"clip\." + theirs, "clip." + ours))
    for theirs, ours in DETR_TABLE:
        if theirs.startswith(DETR_LAYER):
            table.append((r"vl_" + theirs, "grounding." + ours))
    return table


# The boxes of the authors' model depend on none of these. Its forward calls none of the first four.
# (After training on mixed data it calls condition_text_proj, which join_bridges then takes out.)
# seg_conv is the head of a loss that is not in the paper.
UNUSED = (r"ml_text_feat_perceiver\.|reg_pos_embed\.|condition_text_pos_embed\.|"
          r"condition_text_proj\.|seg_conv\d\.")

# {number of text layers that the bridges have weights for: the layers that they read}. After
# training on mixed data (0) they have no weights and read the projected text, layer 13. With twelve
# they read all layers, which is our default and needs no entry.
RELEASED_TEXT_LAYERS = {0: [13], 1: [12], 2: [6, 12]}

RELEASED_SIZES = {768: "base", 1024: "large"}    # by the width of the vision tower


def load_released(path, clip_weights=None):
    """A checkpoint of HiVG's authors -> (model in eval mode, config). The options of the model are
    read off the names and shapes in the file.

    clip_weights: hub name or folder of the CLIP whose tokenizer is used; None: OpenAI's.
    """
    go_offline_without_hub()    # for the tokenizer
    state = read_released(path)
    bridges = sorted({int(number) for key in state
                      for number in re.findall(r"layers\.(\d+)\.cross_norm", key)})    # from 0
    # How many text layers the bridges have weights for. The first bridge tells it for all.
    texts = 0
    if bridges:
        weights = f"layers.{bridges[0]}.cross_adaptive_weights."
        texts = sum(weights in key for key in state)
    try:
        join_bridges(state, bridges, texts)
        join_projections(state)
        size = RELEASED_SIZES[len(state["clip.vision_model.embeddings.class_embedding"])]
    except KeyError as error:
        raise ModelError(f"{path}: {error} is missing") from None

    options = {"bridge_layers": [layer + 1 for layer in bridges], "pixels": "detr",
               "released_rules": True, "clip_weights": clip_weights}
    if bridges:
        options["text_layers"] = RELEASED_TEXT_LAYERS.get(texts)
    # [D37] Our model has the checkpoint's weights, pixels and rules of padding, but a sample attends
    # to its own text alone: a box must not depend on the other samples of its batch.
    model = build_model("hivg", size, "random", **options)
    import_weights(model, state, released_table(), f"{CLIP_IGNORED}|{UNUSED}", path)
    model.spec["weights"] = "pretrained"    # no longer random: make_tokenizer now takes CLIP's
    unused = [key for key in state if re.match(UNUSED, key)]
    print(f"{path}: not used, {', '.join(unused)}", file=sys.stderr)
    args = {"method": "hivg", "title": "hivg", "size": size, "weights": "pretrained",
            "dataset": "refcoco", "root": None, "limit": None, "amp": "off", "draft": False,
            "workers": default_workers(), "seed": None}
    return model.eval(), {"epoch": "released", "args": args}


def read_released(path):
    """The state dict of a released checkpoint, with LoRA merged and PEFT's words taken out."""
    content = read_file(path)
    state = merge_peft(state_in(content, path), path)
    if getattr(content.get("args"), "mixup_pretrain", False):
        # A model trained on mixed data may hold gates and weights of the bridges, and its forward
        # never calls them.
        for key in list(state):
            if ".cross_gate." in key or ".cross_adaptive_" in key:
                del state[key]
    return state


def join_bridges(state, bridges, texts):
    """Write the weights of each bridge as our CrossModalBridge has them: one tensor `weights`
    (n, T, H_l) for all n text layers, and a projection ("gate"). Changes `state`; raises KeyError
    for what is missing."""
    shared = {}
    if texts == 0:
        # Trained on mixed data the bridges have no weights and share one projection, of the text
        # as CLIP puts it out. Weights of 0 change nothing: w f + f = f.
        positions = state["clip.text_model.embeddings.position_embedding.weight"]    # (T, H_l)
        no_weights = torch.zeros_like(positions)[None]                               # (1, T, H_l)
        for kind in ("weight", "bias"):
            shared[kind] = state.pop(f"condition_text_proj.{kind}")

    for layer in bridges:
        name = f"clip.vision_model.encoder.layers.{layer}.cross_"
        if texts == 0:
            state[f"{name}weights"] = no_weights
            for kind, value in shared.items():
                state[f"{name}gate.{kind}"] = value
        else:
            weights = []
            for i in range(texts):
                weights.append(state.pop(f"{name}adaptive_weights.{i}.weight"))      # (T, H_l)
            state[f"{name}weights"] = torch.stack(weights)                           # (n, T, H_l)


def join_projections(state):
    """The authors project the vision features by two linear layers in a row, which are one linear
    layer: W_2 (W_1 x + b_1) + b_2. Changes `state`; raises KeyError for what is missing."""
    W1 = state.pop("ml_visual_projection.weight")
    b1 = state.pop("ml_visual_projection.bias")
    W2 = state.pop("visu_proj.weight")
    b2 = state.pop("visu_proj.bias")
    state["vision_proj.weight"] = W2 @ W1
    state["vision_proj.bias"] = W2 @ b1 + b2


# --- The command line -----------------------------------------------------------------------------

DEFAULT_BATCH_SIZE = 64    # samples at once, where no gradients need memory


def default_device():
    """cuda, mps, xpu, ..., whatever this machine has; else cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def default_workers():
    """Processes that load images: as many as there are cores, and no more than a GPU needs."""
    return min(8, os.cpu_count())


def at_least(least, kind=int):
    """A type for argparse: a number that is not below `least`."""
    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: it must be {least} or more")
        return value

    parse.__name__ = kind.__name__    # argparse's own message calls the type by its name
    return parse


def text_argument(text):
    """A shell may pass bytes that are no text. Python keeps them as lone surrogates, which neither
    a tokenizer nor a print accepts. Each of them becomes a question mark."""
    return text.encode(errors="replace").decode()


def build_parser():
    """The parser. A flag that is not given is None: the options of the training then hold."""
    parser = argparse.ArgumentParser(
        description=__doc__[:__doc__.index("From Python")].rstrip(),
        usage="python evaluate.py CHECKPOINT [options]",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80))
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="The --out folder of a run, its best.safetensors, or a released .pth of HiVG.")
    add("--dataset", metavar="NAME",
        help="Evaluate on this dataset, named as in train.py (default: that of the training).")
    add("--root", metavar="DIR",
        help="Folder of annotations and images (default: that of the training).")
    add("--split", action="append", metavar="NAME",
        help="Evaluate this split; may be given more than once (default: all but train).")
    add("--limit", type=at_least(1), metavar="N",
        help="Use only the first N expressions of each split (default: as in training).")
    add("--figures", metavar="DIR",
        help="Save a sheet of predictions of each split in this folder (default: none).")
    add("--predictions", metavar="FILE",
        help="Write a line of JSON for each expression to this file: split, image, text, true box, "
             "predicted box, IoU (default: none).")
    add("--image", nargs="+", action="extend", metavar="FILE",
        help="Find --text in this image, or in several, or in all images of a folder, in place of a "
             "dataset (default: none).")
    add("--text", action="append", type=text_argument, metavar="TEXT",
        help="An expression; may be given more than once (default: none).")
    add("--save", metavar="FILE",
        help="Save the image with its boxes and [REG]'s attention as this .png or .jpg; those of "
             "several images in this folder (default: none).")
    add("--amp", choices=("off", "tf32", "bf16", "fp16"),
        help="Mixed precision (default: as in training).")
    add("--json", metavar="FILE",
        help="Write the results to this file (default: none).")
    add("--clip-weights", metavar="NAME",
        help="Hub name or folder of the CLIP whose tokenizer a released .pth needs (default: "
             "OpenAI's).")
    add("--batch-size", type=at_least(1), default=DEFAULT_BATCH_SIZE, metavar="N",
        help=f"Samples at once (default: {DEFAULT_BATCH_SIZE}).")
    add("--workers", type=at_least(0), metavar="N",
        help="Processes that load images (default: as in training).")
    add("--device", metavar="NAME", default=default_device(),
        help="cpu, cuda, cuda:1, mps, ... (default: this machine's accelerator, else cpu).")
    return parser


def parse_args(argv=None):
    """The flags of the command line. What cannot be is refused, and the folders of all results are
    made, before minutes are spent."""
    asked = build_parser().parse_args(argv)
    if asked.clip_weights and not is_released(asked.checkpoint):
        raise InputError("--clip-weights is for a released .pth of HiVG; a checkpoint of train.py "
                         "names the CLIP that it was trained on")
    if bool(asked.image) != bool(asked.text):
        raise InputError("--image and --text go together: give both of them")
    if asked.save and not asked.image:
        raise InputError("--save, --image and --text go together: --save needs the other two")
    if asked.image and (asked.dataset or asked.split or asked.figures or asked.predictions):
        raise InputError("--image takes the place of a dataset: leave out --dataset, --split, "
                         "--figures and --predictions, or leave out --image")
    check_texts(asked.text or [])
    check_device(asked.device)

    files = {"json": asked.json, "predictions": asked.predictions}
    folders = {"figures": asked.figures}
    if asked.save and shows_several(asked.image):
        folders["save"] = asked.save
    elif asked.save:
        files["save"] = asked.save
        if Path(asked.save).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise InputError(f"--save {asked.save}: give the name of a .png or .jpg file")
    taken = [Path(image).resolve() for image in asked.image or []]
    for flag, path in files.items():
        if path is None:
            continue
        path = Path(path)
        if path.resolve() in taken:
            raise InputError(f"--{flag} {path}: would overwrite what another flag names; give another "
                             f"name")
        if path.is_dir():
            raise InputError(f"--{flag} {path}: is a folder; give the name of a file")
        taken.append(path.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
    for flag, path in folders.items():
        if path is None:
            continue
        if Path(path).is_file():
            raise InputError(f"--{flag} {path}: is a file; give the name of a folder")
        Path(path).mkdir(parents=True, exist_ok=True)
    return asked


def is_released(checkpoint):
    """Whether HiVG's authors wrote this checkpoint: theirs are .pth files, and ours never are."""
    return checkpoint.endswith(".pth")


def main(argv=None):
    asked = parse_args(argv)
    with memory_explained(asked.device, "--batch-size", asked.batch_size):
        if is_released(asked.checkpoint):
            model, config = load_released(asked.checkpoint, asked.clip_weights)
        else:
            model, config = load_checkpoint(asked.checkpoint)
        trained = config["args"]
        # The options of the training, and what is asked here in place of them.
        given = {name: value for name, value in vars(asked).items() if value is not None}
        args = argparse.Namespace(**{"draft": False, **trained, **given})
        args.trained_on = None if is_released(asked.checkpoint) else trained["dataset"]
        if asked.dataset:
            args.root = asked.root    # the training's folder is not another dataset's
        set_precision(args.amp)
        model.to(args.device)

        if asked.image:
            result = evaluate_images(model, args, asked)
        else:
            title = trained.get("title") or trained.get("row") or trained["method"]
            started = trained.get("init_from")
            print(f"{title} {args.size}, trained on {args.trained_on or 'what its file does not say'}"
                  f"{f' from {started}' if started else ''}, epoch {config['epoch']}, evaluated on "
                  f"{args.dataset}; leaky pretraining {leaky_in_words(args)}")
            result = {"checkpoint": asked.checkpoint, "method": title, "epoch": config["epoch"],
                      "seed": trained["seed"], "trained_on": args.trained_on, "init_from": started,
                      **evaluate_dataset(model, args, asked)}
    if asked.json:
        data.write_text(asked.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    run_command(main)
