"""Train a grounding model: one command, one loop.

    python train.py                                           m2ist on `shapes`, tiny, on a CPU, in minutes
    python train.py --method hivg                             a warm-up, then HiLoRA stage by stage
    python train.py --row m2ist/V/b                           a row of the papers' tables; --rows lists them
    python train.py --out runs/x --resume                     go on where a run stopped

--out gets args.json, log.jsonl (one object an epoch), last.pt (to resume), val.png (a look at what was learned) and
best.safetensors (the tuned weights of the best epoch on val, for evaluate.py).
"""
import argparse
import functools
import hashlib
import json
import math
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import hilora
import losses
from adapters import ADAPTERS, BRIDGE_WEIGHTS
from model import (METHODS, OPTIONS, SIZES, InputError, architecture, build_encoders, build_model, count_parameters,
                   one_of, read_state, run, save_whole, shapes_weights)

# --- The command line ------------------------------------------------------------------------------------------------
# Defaults of flags: of all rows whose words are among the run's family, size, method and dataset; of two, the later one.
RECIPES = {
    "detr": dict(l1=1.0, giou=1.0, contrast=0.0, focal=0.0, dice=0.0, stages=0, stage_epochs=0, stage_lr=[]),
    # Vanilla LoRA is one stage, all of --epochs long. No rank is given; 96 has about the parameters of Table I [D39].
    "base lora": dict(stages=1, rank=96, alpha=96.0), "tiny lora": dict(stages=1, rank=24, alpha=24.0),
    # M²IST Section IV-B c; batch of Table I. [D12] 1e-5 is the paper's rate for M³ISA; full tuning, given none, takes it.
    "detr base": dict(epochs=90, batch_size=64, lr=1e-4, lr_encoder=1e-5, schedule="step", lr_drop=60, warmup=0),
    "detr base refcoco+": dict(epochs=180, lr_drop=120),
    "detr base refcocog-umd": dict(max_tokens=40), "detr base refcocog-google": dict(max_tokens=40),     # as released
    # Ours, found on `shapes`: 3,000 steps in all, so larger rates, a warm-up and a smooth end.
    "detr tiny": dict(epochs=4, batch_size=32, lr=1e-3, lr_encoder=1e-3, schedule="cosine", lr_drop=3, warmup=200),
    "tiny full": dict(lr_encoder=1e-4),     # adapters, which start from nothing, take the whole rate; encoders a tenth of it
    # HiVG Section 4.1 and Table 8. [D21] The section's batch is 60, the table's 80.
    "clip": dict(l1=2.0, giou=2.0, contrast=1.0, focal=20.0, dice=2.0, epochs=50, lr=2.5e-4, lr_encoder=2.5e-4,
                 schedule="cosine", lr_drop=50, warmup=0, rank=32, alpha=16.0),
    "clip base": dict(batch_size=80, stages=3, stage_epochs=20, stage_lr=[1e-4, 0.5e-4, 0.25e-4]),
    "clip large": dict(batch_size=32, stages=4, stage_epochs=15, stage_lr=[1e-4, 0.75e-4, 0.5e-4, 0.25e-4]),
    "clip tiny": dict(epochs=4, batch_size=32, lr=1e-3, lr_encoder=1e-3, warmup=200, stages=3, stage_epochs=1,
                      stage_lr=[8e-4, 6e-4, 4e-4]),       # ours: seven epochs in all, as plain CLIP and with LoRA
    # HiVG Fig. 4 (d): the box loss alone [D35]; vanilla LoRA is one round, here as long as all of HiLoRA's.
    "clip-frozen": dict(contrast=0.0, focal=0.0, dice=0.0, stages=0),
    "clip-lora": dict(contrast=0.0, focal=0.0, dice=0.0, stages=1, stage_epochs=60),
    "tiny clip-frozen": dict(epochs=7), "tiny clip-lora": dict(stage_epochs=3)}

def by_recipe(add, flag, text, source, **options):           # adds a flag whose default the sizes or the recipes give
    key = flag[2:].replace("-", "_")
    sizes = [(f"{family} {size}", spec) for size, families in SIZES.items() for family, spec in families.items()]
    rows = ", ".join(f"{words} {row[key]}" for words, row in [*sizes, *RECIPES.items()] if key in row)
    add(flag, help=f"{text} ({source}; tiny ours; default: {rows})".strip(), **options)

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="m2ist", help=f"{', '.join(METHODS)} (M²IST Tables I, V a; HiVG Fig. 4 d; default: m2ist)")
    add("--dataset", default="shapes", help=f"{', '.join(data.DATASETS)}, a .jsonl, several by commas (ours; default: shapes)")
    add("--root", help="folder of annotations and pictures (ours; default: data; of a .jsonl its own)")
    add("--size", help=f"{', '.join(SIZES)} (default: tiny for shapes, which is ours, else base, the paper's)")
    add("--weights", help="of the encoders: pretrained, random, shapes (ours; default: shapes for tiny, else pretrained)")
    add("--out", help="folder of the run (ours; default: runs/DATASET-METHOD-SEED)")
    add("--seed", type=int, default=0, help="of new weights, order and transforms (ours; default: 0)")
    add("--row", help="of the papers' tables, say m2ist/V/b (M²IST Tables I-X, HiVG 3-11, Fig. 4 d; default: none)")
    add("--rows", action="store_true", help="list the rows, with what each changes, and stop (ours; default: no)")
    add("--vision-weights", help="DETR R-50: a file, also TransVG's, a folder, a hub name (Section IV-B a; default: official)")
    by_recipe(add, "--text-weights", "hub name or folder of a BERT", "Section IV-B a")
    by_recipe(add, "--clip-weights", "hub name or folder of a CLIP, or a file in HiVG's naming", "HiVG Section 4.1")
    by_recipe(add, "--max-tokens", "text tokens with the first and the last", "released code, HiVG Appendix B", type=int)
    add("--pixels", help="whose mean and deviation: clip, or detr, as HiVG's takes (released code; default: the encoder's)")
    add("--cache", default=OPTIONS["cache"], help="folder of the pretrained tiny encoders (ours; default: .cache)")
    by_recipe(add, "--pretext-steps", "of the tiny encoders' pretraining", "not in the papers", type=int)
    add("--attention-port", help=f"what stands there, {', '.join(ADAPTERS)}, none (Tables V, VI; default: by the method)")
    add("--ffn-port", help="the same at the feed-forward ports (Tables V, VI; default: by the method)")
    add("--insertion", help="side, sequential, parallel (Table VII; default: by the method, M²IST's is side)")
    by_recipe(add, "--bottleneck", "C_d of VEA and LEA", "Section IV-B b", type=int)
    by_recipe(add, "--interaction-dim", "C_i of IEA", "Section IV-B b", type=int)
    by_recipe(add, "--interaction-bottleneck", "C_d of IEA", "Section IV-C a", type=int)
    add("--scale", type=float, help="s of all adapters (Section IV-B b; default: 0.1)")
    add("--residual", action="store_true", help="adapters add their own input, Eqs. 1, 4, 5 (released code; default: no)")
    by_recipe(add, "--text-layers", "M²IST: paired with vision layers 1, 2, ...; HiVG: what bridges see, all if not given; "
              "13: the text as projected", "Table VIII c, HiVG Table 10", type=int, nargs="+")
    by_recipe(add, "--vision-layers", "to ground; the last of plain CLIP's methods", "HiVG Section 4.1", type=int, nargs="+")
    by_recipe(add, "--bridge-layers", "with a cross-modal bridge, none if empty", "HiVG Section 4.1", type=int, nargs="*")
    add("--bridge-weights", help=f"shape of bridges' weights: {', '.join(BRIDGE_WEIGHTS)} (HiVG Tables 4, 10; default: nxLxH)")
    add("--no-cross-attention", action="store_true", help="bridges without it (HiVG Table 4; default: no)")
    add("--layer-to-layer", action="store_true", help="a bridge sees one of --text-layers (HiVG Table 4; default: no)")
    by_recipe(add, "--stages", "G, LoRA's stages and layer groups; 0 is no LoRA", "HiVG Section 4.1", type=int)
    add("--last-stage", type=int, help="stop after this stage (HiVG Table 5; default: --stages)")
    by_recipe(add, "--stage-epochs", "of each stage, after --epochs without; 0: they share --epochs", "HiVG Table 8", type=int)
    by_recipe(add, "--stage-lr", "of each stage, the last for all more", "HiVG Table 8", type=float, nargs="+")
    by_recipe(add, "--rank", "r of LoRA", "HiVG Table 8", type=int)
    by_recipe(add, "--alpha", "α of LoRA", "HiVG Table 8", type=float)
    add("--deep-to-shallow", action="store_true", help="vision's last layers first (HiVG Table 5; default: no)")
    by_recipe(add, "--epochs", "", "Section IV-B c", type=int)
    by_recipe(add, "--batch-size", "", "Table I", type=int)
    add("--micro-batch", type=int, help="samples at once; gradients add up to the batch's (ours; default: the batch)")
    by_recipe(add, "--lr", "of the grounding encoder", "Section IV-B c", type=float)
    by_recipe(add, "--lr-encoder", "of all else that is tuned", "Section IV-B c", type=float)
    by_recipe(add, "--schedule", "step: a tenth after --lr-drop epochs; cosine: to zero", "Section IV-B c")
    by_recipe(add, "--lr-drop", "epochs before the step", "Section IV-B c", type=int)
    by_recipe(add, "--warmup", "steps of linear warm-up", "released code", type=int)
    add("--weight-decay", type=float, default=1e-4, help="of AdamW (Section IV-B c; default: 1e-4)")
    by_recipe(add, "--l1", "weight of smooth L1", "HiVG Table 8, M²IST Eq. 6", type=float)
    by_recipe(add, "--giou", "λ of Eq. (6)", "M²IST's released code, HiVG Table 8", type=float)
    by_recipe(add, "--contrast", "weight of HiVG Eq. (11), 0 is off", "HiVG Eq. 15, Section 4.1", type=float)
    by_recipe(add, "--focal", "λ_focal of HiVG Eq. (13)", "HiVG Table 8", type=float)
    by_recipe(add, "--dice", "λ_dice of HiVG Eq. (13)", "HiVG Table 8", type=float)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1 (ours; default: cuda if any)")
    add("--amp", default="off", help="off, bf16, fp16: mixed precision (released code; default: off)")
    add("--workers", type=int, help="processes that load pictures (ours; default: 0 for shapes, else 2)")
    add("--limit", type=int, help="only the first N expressions of each split (ours; default: all)")
    add("--resume", action="store_true", help="go on with the run in --out, by its own flags (ours; default: no)")
    return parser

LEAST = {             # the least that makes sense, of which flags; 3 tokens are [CLS], a word and [SEP]
    1: "epochs batch_size micro_batch lr_drop limit pretext_steps bottleneck interaction_dim interaction_bottleneck rank "
       "last_stage",
    0: "scale workers warmup lr lr_encoder weight_decay l1 giou contrast focal dice stages stage_epochs stage_lr",
    3: "max_tokens", 1e-6: "alpha"}
NOT_FOR = {           # flags that the methods of a family would ignore, and those without LoRA
    "clip": "attention_port ffn_port insertion bottleneck interaction_dim interaction_bottleneck residual scale vision_weights "
            "text_weights",
    "detr": "vision_layers bridge_layers bridge_weights no_cross_attention layer_to_layer clip_weights contrast",
    "lora": "stages last_stage stage_epochs stage_lr rank alpha deep_to_shallow"}

def check(args):
    """What can be refused before anything is loaded; evaluate.py has some of the same flags."""
    for flag, least in ((flag, least) for least, flags in LEAST.items() for flag in flags.split()):
        value = getattr(args, flag, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number < math.inf:
                raise InputError(f"--{flag.replace('_', '-')} is {number}; it must be {least} or more")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {args.device} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None

def complete(args):
    """Fill in what the command line left open, and refuse what cannot be, or what a family would ignore."""
    args.size = args.size or ("tiny" if args.dataset == "shapes" else "base")
    spec = architecture(**model_arguments(args))
    args.weights = args.weights or ("shapes" if args.size == "tiny" else "pretrained")
    known = {spec["family"], args.size, args.method, args.dataset, *args.method.split("+")}
    recipe = {key: value for words, row in RECIPES.items() if known.issuperset(words.split()) for key, value in row.items()}
    vars(args).update({key: value for key, value in recipe.items() if getattr(args, key) is None})
    one_of("schedule", args.schedule, ("step", "cosine"))
    one_of("amp", args.amp, ("off", "bf16", "fp16"))
    args.micro_batch = args.batch_size if args.micro_batch is None else args.micro_batch
    args.pretext_steps = spec["pretext_steps"]
    args.workers = args.workers if args.workers is not None else 0 if args.dataset == "shapes" else 2
    args.region_hidden = None if args.focal or args.dice else 0             # without its losses there is no MLP of Eq. (12)
    check(args)
    method, layers, clip = f"not for --method {args.method}", spec["vision"]["layers"], spec["family"] == "clip"
    unwanted = NOT_FOR[spec["family"]] + ("" if clip or "lora" in args.method else " " + NOT_FOR["lora"])
    for wrong, message in [
            *((getattr(args, flag), f"--{flag.replace('_', '-')} is {method}") for flag in unwanted.split()),
            ((args.focal or args.dice) and not spec.get("region_hidden"), f"--focal and --dice are {method}"),
            (args.stages > layers, f"--stages is {args.stages}; there are {layers} layers to divide"),
            (not args.stage_epochs and args.epochs < args.stages, "--stages need as many --epochs, or --stage-epochs"),
            (args.residual and spec["insertion"] != "side", "--residual is for side networks; what is inserted always adds"),
            ((args.last_stage or 0) > args.stages, "--last-stage is one of --stages"),
            (args.deep_to_shallow and not args.stages, "--deep-to-shallow is for --stages of 1 or more"),
            (clip and args.text_layers and not spec["bridge_layers"], "--text-layers are for bridges; there is none")]:
        if wrong:
            raise InputError(message)
    return args

def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rows:
        print("\n".join(f"{row:32} {'  '.join(f'{k} {v}' for k, v in row_options(row, 'base').items())}" for row in ROWS))
        sys.exit()
    if args.row:                       # what it sets are defaults: other flags may still change them
        parser.set_defaults(**row_options(args.row, args.size or ("tiny" if args.dataset == "shapes" else "base")))
        args = parser.parse_args(argv)
    datasets, name = ",".join(Path(d).stem for d in args.dataset.split(",")), (args.row or args.method).replace("/", "-")
    out = args.out = args.out or f"runs/{datasets}-{name}-{args.seed}"
    path = Path(out) / "args.json"
    try:
        saved = json.loads(path.read_text())["args"] if args.resume else {}
    except (FileNotFoundError, NotADirectoryError):            # killed before its first write, or never started
        print(f"--resume: nothing to go on with in {out} yet, starting a new run")
        saved = {}
    except (ValueError, KeyError):
        raise InputError(f"{path}: not what train.py writes; start a new run by another --out") from None
    parser.set_defaults(**saved)
    args = complete(parser.parse_args(argv))
    args.out, args.resume = out, bool(saved)
    for key, value in vars(args).items() if saved else ():
        if value != saved.get(key) and key not in ("device", "workers", "resume", "out", "cache"):        # these may change
            raise InputError(f"--{key.replace('_', '-')} is {value}, but the run in {out} has {saved.get(key)}: leave "
                             f"the flag out to resume it, or start a new run by another --out")
    return args

# --- Every row of the papers' tables ---------------------------------------------------------------------------------
def rows(table, *options):                            # M²IST calls its rows (a), (b), ...; HiVG's count from 1
    names = "abcdefgh" if table.startswith("m2ist") else "12345678"
    return {f"{table}/{name}": row for name, row in zip(names, options)}

# row: what it changes of `m2ist` or `hivg` at size base; {} is the default itself. II is by C_d.
ROWS = {
    **{f"m2ist/I/{name}": dict(method=name)
       for name in ("full", "frozen", "adapter", "lora", "adaptformer", "cm-adapter", "mrs-adapter", "m2ist")},
    **{f"m2ist/II/{width}": dict(bottleneck=width) for width in (8, 32, 128)},
    **rows("m2ist/V", dict(method="frozen"), *(dict(attention_port="none", ffn_port=port) for port in ("lea", "vea", "ea")),
           dict(ffn_port="none"), {}),
    **rows("m2ist/VI", dict(attention_port="ea"), dict(ffn_port="iea"), dict(attention_port="ea", ffn_port="iea"), {}),
    **rows("m2ist/VII", dict(insertion="sequential"), dict(insertion="parallel"), {}),
    **rows("m2ist/VIII", dict(text_layers=[1, 2, 3, 4, 5, 6]), dict(text_layers=[1, 3, 5, 7, 9, 11]), {}),
    **rows("m2ist/IX", dict(interaction_bottleneck=32), dict(interaction_bottleneck=64), {}),        # [D41]
    **rows("m2ist/X", dict(method="full"), dict(method="lora"), {}, dict(method="m2ist+lora")),
    **rows("hivg/3", dict(bridge_layers=[], stages=0), dict(stages=0), dict(bridge_layers=[]), {}),
    **rows("hivg/4", dict(bridge_weights="none"), dict(no_cross_attention=True),
           *(dict(bridge_weights=shape) for shape in ("1x1xH", "nx1xH", "nxLx1")), {},
           dict(layer_to_layer=True, bridge_weights="none", text_layers=[4, 8, 12]), dict(text_layers=[12])),
    **rows("hivg/5", dict(last_stage=1), dict(last_stage=2), {}, dict(stages=2), dict(stages=4), dict(rank=16), dict(rank=64),
           dict(deep_to_shallow=True)),
    **rows("hivg/9", dict(contrast=0.0, focal=0.0, dice=0.0), dict(contrast=0.0), dict(focal=0.0, dice=0.0), {}),      # [D42]
    **rows("hivg/10", dict(bridge_weights="aware"), dict(text_layers=[12]), dict(text_layers=[6, 12]),
           dict(text_layers=[1, 4, 8, 12]), {}),
    **rows("hivg/11", *(dict(bridge_layers=[], stages=0, focal=0.0, dice=0.0, vision_layers=list(layers)) for layers in (
        [12], [2, 5, 9], [2, 5, 9, 12], [1, 4, 8, 12], [3, 6, 9, 12], range(6, 13), range(1, 13)))),
    "hivg/fig4d/original-clip": dict(method="clip-frozen"), "hivg/fig4d/clip-vanilla-lora": dict(method="clip-lora"),
    "hivg/fig4d/no-hilora-no-macb": dict(bridge_layers=[], stages=0), "hivg/fig4d/no-hilora": dict(stages=0),
    "hivg/fig4d/vanilla-lora": dict(stages=1, stage_epochs=60), "hivg/fig4d/stage-1": dict(last_stage=1),
    "hivg/fig4d/stage-2": dict(last_stage=2), "hivg/fig4d/stage-3": {}}

def row_options(row, size):
    """What a row sets. Its layers, widths and epochs are those of size base; the tiny size takes a share of them [D43]."""
    if row not in ROWS or size == "large":
        raise InputError(f"no row {row!r} of size {size}: `python train.py --rows` lists the rows; sizes are base and tiny")
    options = {"method": row.partition("/")[0], **ROWS[row]}
    tiny, base = (architecture(options["method"], name) for name in ("tiny", "base"))
    for name, value in options.items() if size == "tiny" else ():
        tower = name.partition("_")[0]
        if name in ("text_layers", "vision_layers"):
            layers = [math.ceil(layer * tiny[tower]["layers"] / base[tower]["layers"]) for layer in value]
            options[name] = layers[2::3] if tiny["family"] == "detr" else sorted(set(layers))      # two pairs in place of six
        elif name.endswith("bottleneck") or name == "stage_epochs":
            options[name] = value // 4 if name.endswith("bottleneck") else value // 20
    return options

# --- The tiny encoders' pretraining --------------------------------------------------------------------------------
# No expression is seen with its picture: vision learns what is where, text its masked words, CLIP a contrast with captions.
SCENES = range(*data.SHAPES_SPLITS["train"][:2])                # its first number is 0

def scene_item(family, number):
    """A scene -> image, padding, owner (Nv,), which of its things covers a cell of the grid of the family's encoder, -1 where
    none does, and things: [(Thing, its box as in a batch), ...]."""
    size, stride, picture = SIZES["tiny"][family]["image_size"], SIZES["tiny"][family]["stride"], data.render(number)
    image, padding, place = data.letterbox(picture, size, data.seeded(0, number), data.PIXELS[family])
    things = [(t, data.to_square(t.box, picture.size, place, size)) for t in data.scene(number)[1]]
    owner = torch.full((size // stride, size // stride), -1)
    for index, (_, (cx, cy, w, h)) in enumerate(things):
        x1, x2, y1, y2 = (round(v * len(owner)) for v in (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2))
        owner[y1:y2, x1:x2] = index                                             # cells whose centre lies in the box
    return image, padding, owner.flatten(), things

def random_batches(task, steps, batch):
    """`steps` times the parts of some items: tensors as one, padded by 0, which is [PAD], to the longest; else a tuple."""
    for _ in range(steps):
        parts = zip(*(task.item(task.keys[i]) for i in torch.randint(len(task.keys), (batch,)).tolist()))
        yield [pad_sequence(part, batch_first=True) if torch.is_tensor(part[0]) else part for part in parts]

def caption(rng, thing, box):
    """A thing and its whereabouts, in words or as on a map: "red circle top left", "blue square c 5". box: as in a batch."""
    cx, cy = box[:2]
    size = rng.choice(data.SIZE_WORDS[thing.size]) if rng.random() < 0.7 else ""
    on_map = "abcdefgh"[int(8 * cx)], str(1 + int(8 * cy))
    in_words = "top" if cy < 0.38 else "bottom" if cy > 0.62 else "", "left" if cx < 0.38 else "right" if cx > 0.62 else ""
    place = on_map if rng.random() < 0.5 else in_words
    return " ".join(word for word in (size, thing.colour, thing.shape, *place) if word)

class PretextVision(nn.Module):
    """What covers a cell (colour, shape: cross entropy) and its box (L1), by a linear that stays as it was drawn: so all is
    written large in the tokens, as a later reader needs it, and not in whatever corner a trained linear finds."""
    keys, item = SCENES, functools.partial(scene_item, "detr")

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.parts = encoder, [len(data.COLOURS) + 1, len(data.SHAPES), 4]
        self.head = nn.Linear(SIZES["tiny"]["detr"]["vision"]["dim"], sum(self.parts)).requires_grad_(False)

    def targets(self, owner, things):
        """Colour (B, Nv), one past the last for none; shape (B, Nv), box (B, Nv, 4)."""
        colours, none = list(data.COLOURS), [len(data.COLOURS), 0, 0, 0, 0, 0]
        rows = ([[colours.index(t.colour), data.SHAPES.index(t.shape), *box] for t, box in inside] for inside in things)
        found = torch.stack([torch.tensor([*some, none])[mine] for some, mine in zip(rows, owner)])   # -1: the last row
        return found[..., 0].long(), found[..., 1].long(), found[..., 2:]

    def forward(self, images, padding, owner, things):
        colour, shape, boxes = self.targets(owner, things)
        says_colour, says_shape, says_box = self.head(self.encoder(images, padding).x).split(self.parts, dim=-1)
        covered = owner >= 0
        return (F.cross_entropy(says_colour.flatten(0, 1), colour.flatten())
                + F.cross_entropy(says_shape[covered], shape[covered])
                + F.l1_loss(says_box[covered], 6 * (boxes[covered] - 0.5)))            # of about unit variance

class PretextText(nn.Module):
    """Masked words, 15% of them as in BERT; texts of `shapes`' train split without their pictures."""
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.tokenizer = encoder, data.Tokenizer("shapes", None, SIZES["tiny"]["detr"]["max_tokens"])
        self.head = nn.Linear(encoder.word.embedding_dim, encoder.word.num_embeddings)
        self.keys, self.item = data.load_samples("shapes", "train"), lambda sample: [torch.tensor(self.tokenizer(sample.text))]

    def forward(self, tokens):
        real = tokens != self.tokenizer.pad
        hidden = (torch.rand(tokens.shape) < 0.15) & real
        out = self.head(self.encoder(tokens.masked_fill(hidden, self.tokenizer.mask), ~real).x)
        return F.cross_entropy(out[real], tokens[real])      # of all, hidden or not: each place must still say its word

class PretextClip(nn.Module):
    """Contrast with captions, HiVG Eqs. (9)-(11), of whole pictures, by [CLS] as in CLIP, which alone is slow, and of crops,
    each of one thing. They are cut from the tokens, which learn what captions say: a picture is encoded once for all."""
    keys, item = SCENES, functools.partial(scene_item, "clip")

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.tokenizer = encoder, data.Tokenizer("shapes", None, SIZES["tiny"]["clip"]["max_tokens"])
        self.rng = data.seeded("captions", 0)

    def embed_texts(self, texts):
        tokens = pad_sequence([torch.tensor(self.tokenizer(text)) for text in texts], batch_first=True)
        return self.encoder.text(tokens, tokens == self.tokenizer.pad).embedding

    def forward(self, images, padding, owner, things):
        image, crops, whole = self.encoder.vision(images, padding), {}, []
        for picture, inside in enumerate(things):
            captions = [caption(self.rng, thing, box) for thing, box in inside]
            whole.append(", ".join(self.rng.sample(captions, len(captions))))
            crops |= {text: (picture, index) for index, text in enumerate(captions)}      # of the same words one will do
        picture, index = torch.tensor(list(crops.values())).T
        cells = (owner[picture] == index[:, None]).float()                                # (crops, Nv)
        pooled = (image.x[picture, 1:] * cells[..., None]).sum(1) / cells.sum(1, keepdim=True)
        temperature = (-self.encoder.logit_scale).exp()
        return (losses.contrastive_loss(self.embed_texts(list(crops)), self.encoder.vision.embed(pooled), temperature)
                + losses.contrastive_loss(self.embed_texts(whole), image.embedding, temperature))

def pretrain_encoders(cache, steps, family, batch=64, lr=2e-3):
    """Pretrain the tiny encoders on the CPU and keep them in the cache, unless they are there already."""
    path = shapes_weights(cache, steps, family)
    if path.exists():
        return
    encoders = build_encoders({"family": family, **SIZES["tiny"][family]})
    for name, encoder in encoders.items():
        torch.manual_seed(0)
        task = {"vision": PretextVision, "text": PretextText, "clip": PretextClip}[name](encoder.train())
        optimizer = torch.optim.AdamW(task.parameters(), lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for inputs in (bar := tqdm(random_batches(task, steps, batch), f"pretraining the tiny {name} encoder", steps)):
            loss = task(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, lambda partial: save_file(nn.ModuleDict(encoders).state_dict(), partial))

# --- Checkpoints: the tuned weights alone, and in their metadata what rebuilds the rest ------------------------------
def frozen_fingerprint(model, held):
    """A hash of everything that a checkpoint with the names `held` does not hold, to tell whether it is the same again."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in held:
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

def tuned_state(model, merged=False):
    """{name: tensor} of what training has changed, LoRA's pairs apart or, if `merged`, in the weights that they are for."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, hilora.LoRALinear) and merged:
            del state[f"{name}.A"], state[f"{name}.B"]
        if isinstance(module, hilora.LoRALinear) or hasattr(module, "hilora_merged"):          # now, or in an earlier stage
            state[f"{name}.weight"] = module.merged() if merged and hasattr(module, "merged") else module.weight.detach()
    return {name: value.cpu().contiguous() for name, value in state.items()}

def load_tuned(model, state, source):
    """Put tuned weights back, every key checked: all that have a gradient, and none that the model has not."""
    wanted = model.state_dict()
    lacking = {name for name, p in model.named_parameters() if p.requires_grad} - set(state)
    bad = sorted(lacking or set(state) - set(wanted)) or [name for name in state if wanted[name].shape != state[name].shape]
    if bad:
        raise InputError(f"{source}: is of another method or size; {len(bad)} weights do not fit, {bad[0]} among them")
    model.load_state_dict(state, strict=False)          # strict=False: the frozen rest is not in it, as checked above

def save_checkpoint(path, model, config):
    """Write the tuned weights and `config`, whose "model" are build_model's arguments."""
    metadata = {"config": json.dumps({**config, "frozen": frozen_fingerprint(model, tuned_state(model))})}
    save_whole(path, lambda partial: save_file(tuned_state(model, merged=True), partial, metadata))

# --- Training --------------------------------------------------------------------------------------------------------
def model_arguments(args):                              # what rebuilds the model: build_model's arguments
    return {key: getattr(args, key, None) for key in ("method", "size", "weights", *OPTIONS)}

make_tokenizer = functools.lru_cache(data.Tokenizer)            # reading its files takes longer than building a loader
INPUTS = ("images", "image_padding", "tokens", "token_padding")        # of the model, in a batch
Phase = namedtuple("Phase", "name stage first last lr lr_encoder")     # epochs first + 1 .. last; stage: LoRA's, 0 for none

def make_loader(samples, args, train, epoch=0):
    """Batches of a dataset. In training the order and the transforms are drawn from the seed and the epoch alone."""
    spec = architecture(**model_arguments(args))
    kind = "text" if spec["family"] == "detr" else "clip"
    name = spec.get(f"{kind}_weights")
    if name and Path(name).is_file():                   # of weights alone: the tokenizer is the hub's
        name = SIZES[args.size][spec["family"]][f"{kind}_weights"]
    tokenizer = make_tokenizer(args.weights, name, spec["max_tokens"], spec["text"]["vocabulary"], f"--{kind}-weights")
    transforms = {"mirror": kind == "text"} if args.size != "tiny" else None
    dataset = data.GroundingDataset(samples, spec["image_size"], tokenizer, train, (args.seed, epoch),
                                    data.PIXELS[spec["pixels"] or spec["family"]], transforms)
    order = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    return DataLoader(dataset, args.batch_size, shuffle=train, generator=order, num_workers=args.workers,
                      collate_fn=functools.partial(data.collate, pad=tokenizer.pad),
                      drop_last=train and len(samples) >= args.batch_size)

def plan(args):
    """The phases of a run: --epochs without LoRA, then its stages (HiVG Section 4.1). [D27] Bridges are trained in all.
    Without --stage-epochs there is no warm-up: the stages share --epochs, as adapters have them from the first."""
    warm = args.epochs if args.stage_epochs or not args.stages else 0
    each = args.stage_epochs or args.epochs // max(1, args.stages)
    phases = [Phase("warm-up" if args.stages else "training", 0, 0, warm, args.lr, args.lr_encoder)]
    for stage in range(1, (args.last_stage or args.stages) + 1):
        rates = args.stage_lr[:stage][-1:] * 2 or (args.lr, args.lr_encoder)              # the last one for all more
        phases.append(Phase(f"stage {stage}", stage, phases[-1].last, phases[-1].last + each, *rates))
    return [phase for phase in phases if phase.last > phase.first]

def to_last_stage(model, args):                         # of its plan, whose pairs count
    for phase in plan(args):
        begin_phase(model, phase, args, {"epoch": 0})
    return model

def make_optimizer(model, args, phase):
    """AdamW with two rates: the grounding encoder's, and that of whatever is tuned in or beside the encoders."""
    tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head, rest = ([p for name, p in tuned if name.startswith("grounding.") is wanted] for wanted in (True, False))
    groups = [dict(params=head, lr=phase.lr, peak=phase.lr), dict(params=rest, lr=phase.lr_encoder, peak=phase.lr_encoder)]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay)

def rate_factor(args, step, steps, epochs):
    """What the learning rates are multiplied by at a step (from 0) of a phase of `epochs` epochs of `steps` steps."""
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
    return warm * (0.1 if step // steps >= args.lr_drop else 1.0)

def autocast(args):
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype is not None)

def weighted_loss(found, boxes, args):
    return losses.total_loss(found, boxes, args.l1, args.giou, args.contrast, args.focal, args.dice)

def train_epoch(model, loader, optimizer, scaler, args, epoch, phase, bar):
    """One pass over the training data. Returns the mean loss and the accuracy on the way."""
    model.train()
    total = right = seen = 0
    for i, batch in enumerate(loader):
        factor = rate_factor(args, (epoch - 1 - phase.first) * len(loader) + i, len(loader), phase.last - phase.first)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        size, loss = len(batch["boxes"]), 0.0
        for part in zip(*(v.split(args.micro_batch) for v in batch.values())):
            *inputs, boxes, _ = (v.to(args.device, non_blocking=True) for v in part)
            with autocast(args):
                found = model(*inputs)
            part_loss = weighted_loss(found, boxes, args) * len(boxes) / size
            scaler.scale(part_loss).backward()
            loss += part_loss.item()
            right += (losses.iou_and_giou(found.boxes.detach(), boxes)[0] >= 0.5).sum().item()
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at epoch {epoch}, step {i + 1}, samples {batch['index'].tolist()}: take a "
                             f"smaller --lr, or --amp off; {args.out}/last.pt holds the last whole epoch")
        scaler.step(optimizer)
        scaler.update()
        total, seen = total + loss * size, seen + size
        bar.set_postfix_str(f"{phase.name}, epoch {epoch}, loss {total / seen:.3f} acc {right / seen:.3f}")
        bar.update()
    return total / seen, right / seen

@torch.no_grad()
def predict(model, loader, args, attention=False):
    """Boxes (N, 4), truths (N, 4) and IoUs (N,) of a whole loader, on the CPU; if asked for, [REG]'s attention (N, Nv) too."""
    model.eval()
    rows = []
    for batch in loader:
        with autocast(args):
            found = model(*(batch[k].to(args.device) for k in INPUTS), attention=attention)
        pred, looks = found.boxes.float().cpu(), [found.attention] if attention else []
        rows.append((pred, batch["boxes"], losses.iou_and_giou(pred, batch["boxes"])[0], *looks))
    return [torch.cat(part) for part in zip(*rows)]

def scores(ious):
    return {"acc@0.5": (ious >= 0.5).float().mean().item(), "mean_iou": ious.mean().item()}

def picture_predictions(model, samples, args, path):
    """Save a sheet of samples with expression, true box (green), predicted box (magenta) and [REG]'s attention."""
    loader, tiles = make_loader(samples, argparse.Namespace(**{**vars(args), "batch_size": 1}), False), []
    for sample, pred, _, iou, looks in zip(samples, *predict(model, loader, args, attention=True)):
        picture = data.load_picture(sample.image)
        boxes = [(sample.box, data.TRUE), (data.from_square(pred, picture.size, loader.dataset.size), data.PREDICTED)]
        tiles.append(data.draw(picture, f"{sample.text} (IoU {iou:.2f})", boxes, looks))
    data.contact_sheet(tiles).save(path)

def read_last(path):                    # last.pt of an earlier start of the run, or what a new run begins with
    if not path.exists():
        return {"epoch": 0, "best": -1.0, "log": []}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("epoch", "best", "log", "model", "frozen", "optimizer", "scaler")}
    except Exception:
        raise InputError(f"{path}: damaged, or not what train.py writes; start a new run by another --out") from None

def begin_phase(model, phase, args, state):
    """Bring the model to the beginning of a phase, or to where in it the run stopped -> its optimizer."""
    hilora.discard(model)                           # of a phase that was over before this start: last.pt has them merged
    if state["epoch"] == phase.first and "model" in state:
        load_tuned(model, state["model"], "last.pt")
    if phase.stage:
        torch.manual_seed(args.seed * 100_003 + 50_000 + phase.stage)                 # A, the same whenever it is drawn
        model.begin_stage(phase.stage, args.stages, args.rank, args.alpha, args.deep_to_shallow)
    optimizer = make_optimizer(model, args, phase)
    if phase.first < state["epoch"] < phase.last:
        load_tuned(model, state["model"], "last.pt")
        optimizer.load_state_dict(state["optimizer"])
    return optimizer

def end_phase(model, phase, best, lines):
    """Go on with the weights that were best on val so far, merged, be they of this phase or of an earlier one [D33]."""
    hilora.discard(model)
    load_tuned(model, read_state(best), best)
    reached = [line.get("val_acc@0.5", 0) for line in lines]
    here, before = max(reached[phase.first:]), max(reached[:phase.first], default=0)
    if here < before:
        tqdm.write(f"{phase.name} ends worse on val ({here:.4f}) than it began ({before:.4f}): what it began with is kept")

def fit(model, args, train_samples, val_samples):
    """The training loop: phases of epochs, each epoch followed by an evaluation on val and by writing everything down."""
    out, phases, state = Path(args.out), plan(args), read_last(Path(args.out) / "last.pt")
    best, lines = state["best"], state["log"]
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
    steps = len(make_loader(train_samples, args, True))
    if state["epoch"]:
        if state["frozen"] != frozen_fingerprint(model, state["model"]):
            raise InputError(f"{out}/last.pt: the run began with other encoder weights than these; give it the same files")
        scaler.load_state_dict(state["scaler"])
        print(f"resumed after epoch {state['epoch']}")
    with tqdm(total=phases[-1].last * steps, initial=state["epoch"] * steps, desc=args.method, unit="step") as bar:
        for phase in phases:
            optimizer = begin_phase(model, phase, args, state)
            for epoch in range(max(phase.first, state["epoch"]) + 1, phase.last + 1):
                torch.manual_seed(args.seed * 100_003 + epoch)         # dropout: an epoch is the same, resumed or not
                loader = make_loader(train_samples, args, True, epoch)
                loss, accuracy = train_epoch(model, loader, optimizer, scaler, args, epoch, phase, bar)
                reached = scores(predict(model, make_loader(val_samples, args, False), args)[2]) if val_samples else {}
                line = {"epoch": epoch, "phase": phase.name, "lr": optimizer.param_groups[0]["lr"], "train_loss": loss,
                        "train_acc@0.5": accuracy, **{f"val_{name}": value for name, value in reached.items()},
                        "leaky_pretraining": data.leaky_pretraining(args)}
                lines.append(line)
                tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
                if line.get("val_acc@0.5", best) >= best:                            # without val the last epoch is the best
                    best = line.get("val_acc@0.5", best)
                    config = {"model": model_arguments(args), "args": vars(args), **line}
                    save_checkpoint(out / "best.safetensors", model, config)
                save_whole(out / "log.jsonl", lambda path: path.write_text("".join(json.dumps(x) + "\n" for x in lines)))
                if epoch == phase.last:
                    end_phase(model, phase, out / "best.safetensors", lines)
                tuned = tuned_state(model)
                now = {"epoch": epoch, "best": best, "log": lines, "model": tuned, "optimizer": optimizer.state_dict(),
                       "frozen": frozen_fingerprint(model, tuned), "scaler": scaler.state_dict()}
                save_whole(out / "last.pt", lambda path: torch.save(now, path))    # last: a killed run writes the rest again

def main(argv=None):
    began, args = time.time(), parse_args(argv)
    out = Path(args.out)
    if blocked := [path for path in (out, *out.parents) if path.exists() and not path.is_dir()]:
        raise InputError(f"--out {out}: {blocked[0]} is a file, not a folder")
    if not args.resume and out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
        raise InputError(f"--out {out} already holds a run: give another --out, or --resume to go on with it")
    splits = data.split_names(args.dataset, args.root)
    listed = data.load_samples(args.dataset, "train", args.root)[:args.limit]
    train_samples = [sample for sample in listed if sample.box[0] < sample.box[2] and sample.box[1] < sample.box[3]]
    val_samples = data.load_samples(args.dataset, "val", args.root)[:args.limit] if "val" in splits else []
    if not val_samples:
        print(f"{args.dataset} has no split 'val': the last epoch is kept as the best")
    with torch.device("meta"):                          # what is wrong with the flags shows now, not after pretraining
        model = to_last_stage(build_model(**{**model_arguments(args), "weights": "random"}), args)
    print(f"{args.method} {args.size} on {args.dataset}: {len(train_samples)} expressions to train on ("
          f"{len(listed) - len(train_samples)} left out, without area), {len(val_samples)} to validate; parameters "
          f"{count_parameters(model)}; leaky pretraining {data.leaky_pretraining(args)}")
    if args.weights == "shapes" and args.size == "tiny":
        pretrain_encoders(args.cache, args.pretext_steps, METHODS[args.method]["family"])
    torch.manual_seed(args.seed)
    model = build_model(**model_arguments(args)).to(args.device)
    make_loader(train_samples + val_samples, args, False)        # and what files are missing, before --out is made
    if not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        environment = {package.__name__: package.__version__ for package in (torch, torchvision, transformers)}
        environment["device"] = torch.cuda.get_device_name(args.device) if "cuda" in args.device else "cpu"
        about = {"args": vars(args), "environment": environment}
        save_whole(out / "args.json", lambda path: path.write_text(json.dumps(about, indent=1)))
    fit(model, args, train_samples, val_samples)
    hilora.discard(model)                                   # where a finished run was resumed
    load_tuned(model, read_state(out / "best.safetensors"), "best.safetensors")
    picture_predictions(model, data.spread(val_samples or train_samples), args, out / "val.png")
    print(f"{(time.time() - began) / 60:.1f} minutes; look at {args.out}/val.png; python evaluate.py {args.out}")

if __name__ == "__main__":
    run(main)
