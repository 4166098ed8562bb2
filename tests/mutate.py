"""Break the code in many small ways, one at a time, and see whether a test notices.

    python tests/mutate.py                      all mutants, one after the other
    python tests/mutate.py --only losses.py     those that have this text in any field
    python tests/mutate.py --jobs 2             two at a time

A mutant is a change that a slip of the pen could make: a sign, an index, a mask that is dropped.
The script copies the repository to a temporary folder. First, all test files that it needs must
pass there. Then, for each mutant, the old text is replaced by the new one, and the test files of
the mutant run until the first failure. A mutant without a failure SURVIVED: a test is missing,
unless `equivalent` says why no test can notice.

Last result, on two cores of an AMD EPYC server: 129 of the mutants were run (20 of losses.py, 28 of
adapters.py, 12 of hilora.py, 42 of model.py, 26 of train.py, one of data.py) and none survived. One,
of a folded batch norm, had survived at first, and its test was mended. Those run in about an hour.
Later the seven of --claims and of the attention loss, the nine of dropout and of an expert's norm,
and the three of letterbox were run; none survived. Nor did any of QuickGELU, of a wide pair, of
--draft, of the end of a text, of fused convolutions, of what --cost and --claims are asked, and of
--rates.
"""
import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900    # seconds for one call of pytest; a mutant may make a loop endless


class Mutant(NamedTuple):
    file: str               # of the code
    what: str               # what the mutant does
    old: str                # a text that the file has exactly once
    new: str                # what replaces it
    tests: str              # names of test files, those first that should notice
    equivalent: str = ""    # why no test can notice


MUTANTS = [
    # --- Losses -----------------------------------------------------------------------------------
    Mutant("losses.py", "GIoU rewards an empty hull", "iou - (hull - union)",
           "iou + (hull - union)", "test_losses.py"),
    Mutant("losses.py", "the union counts the intersection twice",
           "union = area_a + area_b - intersection", "union = area_a + area_b", "test_losses.py"),
    Mutant("losses.py", "boxes that are apart on both axes intersect", "overlap.clamp(min=0).prod(",
           "overlap.prod(", "test_losses.py"),
    Mutant("losses.py", "the attention loss rewards looking past the box",
           "share = (attention.float() * mask).sum(1)", "share = (attention.float() * ~mask).sum(1)",
           "test_losses.py"),
    Mutant("losses.py", "the box loss is GIoU, not 1 - GIoU", "(1 - giou_of_pairs).mean()",
           "giou_of_pairs.mean()", "test_losses.py"),
    Mutant("losses.py", "L1 is the mean of the coordinates", ".sum(-1).mean()",
           ".mean(-1).mean()", "test_losses.py"),
    Mutant("losses.py", "β is not handed on to smooth L1", 'reduction="none", beta=beta',
           'reduction="none", beta=1.0', "test_losses.py"),
    Mutant("losses.py", "L1 is computed in half precision",
           "    pred = pred.float()\n    target = target.float()\n", "",
           "test_losses.py test_parity.py"),
    Mutant("losses.py", "areas are computed in half precision",
           "    a = to_corners(a.float())\n    b = to_corners(b.float())\n",
           "    a = to_corners(a)\n    b = to_corners(b)\n", "test_losses.py test_parity.py"),
    Mutant("losses.py", "predictions keep what is outside of the square", ".clamp(0, 1).unbind",
           ".unbind", "test_losses.py"),
    Mutant("losses.py", "logits are multiplied by the temperature", "image.T / temperature",
           "image.T * temperature", "test_losses.py"),
    Mutant("losses.py", "both contrastive losses are text to image",
           "cross_entropy(logits.T, pair)", "cross_entropy(logits, pair)", "test_losses.py"),
    Mutant("losses.py", "cells count by their corner", "device) + 0.5) / side",
           "device)) / side", "test_losses.py"),
    Mutant("losses.py", "rows and columns of the mask are exchanged",
           "rows[:, :, None] & columns[:, None, :]", "columns[:, :, None] & rows[:, None, :]",
           "test_losses.py"),
    Mutant("losses.py", "row and column of the nearest cell are exchanged",
           "cell[:, 1] * side + cell[:, 0]", "cell[:, 0] * side + cell[:, 1]", "test_losses.py"),
    Mutant("losses.py", "the text of Eq. (12) is not normalised",
           "t = F.normalize(t, dim=-1)[..., None]", "t = t[..., None]",
           "test_losses.py test_model.py"),
    Mutant("losses.py", "the LayerNorm of Eq. (12) is gone", "self.fc1(self.norm(v))",
           "self.fc1(v)", "test_losses.py test_model.py"),
    Mutant("losses.py", "α of the focal loss is exchanged", "torch.where(mask, 0.25, 0.75)",
           "torch.where(mask, 0.75, 0.25)", "test_losses.py"),
    Mutant("losses.py", "the focal loss weighs what is right", "alpha * (1 - right) ** 2",
           "alpha * right ** 2", "test_losses.py"),
    Mutant("losses.py", "padded tokens count", "real = (~padding).float()",
           "real = torch.ones_like(scores)", "test_losses.py"),
    Mutant("losses.py", "the dice loss lacks the 1 above the line",
           "(2 * overlap + 1) / (size + 1)", "(2 * overlap) / (size + 1)", "test_losses.py"),
    Mutant("losses.py", "a box of a few pixels has no area", "EPS = 1e-7", "EPS = 1e-4",
           "test_losses.py test_parity.py"),
    Mutant("losses.py", "the embedding of the picture is not normalised",
           "image = F.normalize(image.float(), dim=-1)", "image = image.float()", "test_losses.py"),

    # --- Adapters ---------------------------------------------------------------------------------
    Mutant("adapters.py", "VEA has no LayerNorm", "n = F.layer_norm(x, x.shape[-1:], eps=self.norm.eps)",
           "n = x", "test_adapters.py"),
    Mutant("adapters.py", "s is missing in VEA", "out = self.scale * self.up(z)",
           "out = self.up(z)", "test_adapters.py"),
    Mutant("adapters.py", "s is missing in IEA", "out = self.scale * f ", "out = f ",
           "test_adapters.py"),
    Mutant("adapters.py", "IEA has no ReLU", "z = F.relu(down(x))", "z = down(x)",
           "test_adapters.py"),
    Mutant("adapters.py", "the shared channels come first", "torch.cat([own_up(z), shared]",
           "torch.cat([shared, own_up(z)]", "test_adapters.py"),
    Mutant("adapters.py", "no gradient passes the shared projection", "self.shared_up(z)    #",
           "self.shared_up(z.detach())    #", "test_adapters.py test_model.py"),
    Mutant("adapters.py", "vision and text are exchanged",
           'if modality == "vision":\n            return self.vision',
           'if modality == "text":\n            return self.vision', "test_adapters.py"),
    Mutant("adapters.py", "adapters start with Xavier", "nn.init.kaiming_normal_(module.weight)",
           "nn.init.xavier_normal_(module.weight)", "test_adapters.py"),
    Mutant("adapters.py", "text layers are counted from the first",
           '"text": list(text_layers), ', '"text": list(range(1, len(text_layers) + 1)), ',
           "test_adapters.py"),
    Mutant("adapters.py", "a side network reads the layer before", "read = ports[layer - 1]",
           "read = ports[layer - 2]", "test_adapters.py"),
    Mutant("adapters.py", "a side network starts at 0", "s = x0    #", "s = 0 * x0    #",
           "test_adapters.py"),
    Mutant("adapters.py", "a side network keeps its last layer alone", "s = s + terms", "s = terms",
           "test_adapters.py"),
    Mutant("adapters.py", "adapters are inserted a layer too early",
           "layers[layer - 1].plugs[port] =", "layers[layer - 2].plugs[port] =",
           "test_rows.py"),
    Mutant("adapters.py", "inserted adapters start with noise", "nn.init.zeros_(parameter)",
           "parameter.requires_grad_(True)", "test_adapters.py"),
    Mutant("adapters.py", "a sequential adapter reads the stream", "return out + self.adapt(out)",
           "return out + self.adapt(x)", "test_adapters.py"),
    Mutant("adapters.py", "keys under padding are seen", "mask = ~padding[:, None, None, :]",
           "mask = None", "test_parity.py test_model.py"),
    Mutant("adapters.py", "the mask of keys is inverted", "mask = ~padding[:, None, None, :]",
           "mask = padding[:, None, None, :]", "test_parity.py test_model.py"),
    Mutant("adapters.py", "attention has no dropout",
           "out = scaled_dot_product(q, k, v, mask, dropout, causal)",
           "out = scaled_dot_product(q, k, v, mask, 0.0, causal)", "test_parity.py"),
    Mutant("adapters.py", "the gradient of QuickGELU is that of SiLU",
           "silu_backward(gradient, 1.702 * x)", "silu_backward(gradient, x)", "test_adapters.py"),
    Mutant("adapters.py", "no attention is causal",
           "out = scaled_dot_product(q, k, v, mask, dropout, causal)",
           "out = scaled_dot_product(q, k, v, mask, dropout, False)", "test_model.py"),
    Mutant("adapters.py", "Eq. (3) has no residual", "w * f + f)    # HiVG Eq. (3)",
           "w * f)    # HiVG Eq. (3)", "test_adapters.py"),
    Mutant("adapters.py", "a trimmed text takes the last weights", "w = w[:f.shape[1]]",
           "w = w[-f.shape[1]:]", "test_adapters.py"),
    Mutant("adapters.py", "the bridge's query has no norm", "self.q(self.norm(vision))",
           "self.q(vision)", "test_adapters.py"),
    Mutant("adapters.py", "the bridge sees padded text",
           "self.v(text), self.heads, padding)", "self.v(text), self.heads, None)",
           "test_adapters.py"),
    Mutant("adapters.py", "the bridge's query lacks the self-attention",
           "self.semantic(x + out, texts, padding)", "self.semantic(x, texts, padding)",
           "test_adapters.py"),
    Mutant("adapters.py", "the mean of the text counts padding",
           "(text * real).sum(1, True) / real.sum(1, True)", "text.mean(1, True)",
           "test_adapters.py"),
    Mutant("adapters.py", "a bridge of one layer reads the layer before", "[texts[self.only]]",
           "[texts[self.only - 1]]", "test_adapters.py"),

    # --- HiLoRA -----------------------------------------------------------------------------------
    Mutant("hilora.py", "pairs are scaled by α alone", "self.scale = alpha / rank",
           "self.scale = alpha", "test_hilora.py"),
    Mutant("hilora.py", "A depends on the rank", "normal_(std=1 / math.sqrt(3 * k))",
           "normal_(std=1 / rank)", "test_hilora.py"),
    Mutant("hilora.py", "B does not start at 0", "new_zeros(linear.out_features",
           "new_ones(linear.out_features", "test_hilora.py"),
    Mutant("hilora.py", "W is trained beside its pair",
           "        linear.requires_grad_(False)\n", "        linear.requires_grad_(True)\n",
           "test_hilora.py"),
    Mutant("hilora.py", "the pair is subtracted", "return h + self.scale * delta",
           "return h - self.scale * delta", "test_hilora.py"),
    Mutant("hilora.py", "a wide pair is subtracted", "self.weight + self.scale * self.B @ self.A, self",
           "self.weight - self.scale * self.B @ self.A, self", "test_hilora.py"),
    Mutant("hilora.py", "a stage lacks its deepest group",
           "layer_group(number, len(layers), groups) > stage",
           "layer_group(number, len(layers), groups) >= max(stage, 2)", "test_hilora.py"),
    Mutant("hilora.py", "groups are rounded, not rounded up",
           "math.ceil(layer * groups / layers)", "max(1, round(layer * groups / layers))",
           "test_hilora.py"),
    Mutant("hilora.py", "pairs are not merged", "pair, pair.merged())",
           "pair, pair.weight.detach())", "test_hilora.py"),
    Mutant("hilora.py", "pairs are merged without their scale",
           "self.weight.float() + self.scale * self.B.float()",
           "self.weight.float() + self.B.float()", "test_hilora.py"),
    Mutant("hilora.py", "discarded pairs are merged", "pair, pair.weight.detach())",
           "pair, pair.merged())", "test_hilora.py"),
    Mutant("hilora.py", "a stage is not counted",
           "rank, alpha))\n    set_stages_done(layers, stage)\n", "rank, alpha))\n",
           "test_hilora.py"),
    Mutant("hilora.py", "a merged linear loses its bias", "    linear.bias = pair.bias\n",
           "    linear.bias = None\n", "test_hilora.py"),

    # --- The layer and the encoders ---------------------------------------------------------------
    Mutant("model.py", "attention replaces the stream", "x = x + self.dropout(a)",
           "x = self.dropout(a)", "test_parity.py"),
    Mutant("model.py", "positions are not added to queries and keys",
           "placed = h if position is None else h + position", "placed = h", "test_parity.py"),
    Mutant("model.py", "positions are added to values",
           "self.k(placed), self.v(h), self.heads,",
           "self.k(placed), self.v(placed), self.heads,", "test_parity.py"),
    Mutant("model.py", "the rate of attention dropout is 0",
           "self.dropout.p if self.training else 0.0", "0.0", "test_parity.py"),
    Mutant("model.py", "attention dropout is on in evaluation, too",
           "self.dropout.p if self.training else 0.0", "self.dropout.p", "test_parity.py"),
    Mutant("model.py", "a plug reads the output for the stream",
           "self.plugs[name](output, x, context)", "self.plugs[name](output, output, context)",
           "test_model.py"),
    Mutant("model.py", "attention begins peaked at full size",
           "gain = 1 / math.sqrt(2) if packed_start else 1.0", "gain = 1.0", "test_model.py"),
    Mutant("model.py", "the picture of attention shows padding",
           'scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))',
           "scores = scores + 0", "test_parity.py"),
    Mutant("model.py", "x and y are exchanged in DETR's positions", "for coordinate in (y, x):",
           "for coordinate in (x, y):", "test_weights.py"),
    Mutant("model.py", "sine and cosine are exchanged", "[angle.sin(), angle.cos()]",
           "[angle.cos(), angle.sin()]", "test_weights.py"),
    Mutant("model.py", "DETR's positions ignore padding", "real = ~padding\n",
           "real = torch.ones_like(padding)\n", "test_weights.py"),
    Mutant("model.py", "DETR's feed-forward network has no dropout",
           "dropout=dropout,\n                            ffn_dropout=dropout)", "dropout=dropout)",
           "test_parity.py"),
    Mutant("model.py", "BERT lacks the embedding of its token type",
           " + self.token_type.weight[0]", "", "test_weights.py"),
    Mutant("model.py", "BERT's norms have PyTorch's eps", "dropout=dropout, eps=1e-12)",
           "dropout=dropout)", "test_parity.py"),
    Mutant("model.py", "CLIP's positions come after the norm",
           "self.pre_norm(x + self.position)", "self.pre_norm(x) + self.position",
           "test_weights.py"),
    Mutant("model.py", "a patch with one padded pixel is masked",
           "return (share == 1).flatten(1)", "return (share > 0).flatten(1)", "test_model.py"),
    Mutant("model.py", "CLIP's text sees what follows", "pre_norm=True, causal=True)",
           "pre_norm=True)", "test_model.py test_weights.py"),
    Mutant("model.py", "CLIP's text embedding is the last word",
           "eos = (~padding).sum(1) - 1 ", "eos = (~padding).sum(1) - 2 ", "test_weights.py"),
    Mutant("model.py", "rows of a packed projection are k, q, v", 'zip("qkv", value.chunk(3))',
           'zip("kqv", value.chunk(3))', "test_weights.py"),
    Mutant("model.py", "pairs in HiVG's files are merged without α / r", "+ 16 / 32 * B @ A",
           "+ B @ A", "test_weights.py"),
    Mutant("model.py", "random encoders differ from run to run",
           "torch.random.fork_rng(devices=[]):\n        torch.manual_seed(0)",
           "torch.random.fork_rng(devices=[]):\n        torch.seed()", "test_model.py"),
    Mutant("model.py", "the ResNet trains its batch norms", "norm_layer=FrozenBatchNorm2d)",
           "norm_layer=nn.BatchNorm2d)", "test_weights.py"),
    Mutant("model.py", "a fused convolution leaves out ReLU",
           'last = "relu" if relu else None', "last = None", "test_weights.py"),
    Mutant("model.py", "a fused convolution without a residual leaves out ReLU",
           'last = "relu" if relu else "none"', 'last = "none"', "test_weights.py"),
    Mutant("model.py", "convolutions are fused under autocast, too",
           "            and not torch.is_autocast_enabled(\"cpu\")\n", "", "test_weights.py"),
    Mutant("model.py", "convolutions are never fused", "if fuses_convolutions(x):", "if False:",
           "test_weights.py"),
    Mutant("model.py", "convolutions are fused where autograd is on, too",
           "            and not torch.is_grad_enabled()\n", "", "test_weights.py"),
    Mutant("model.py", "a folded batch norm forgets its mean", "norm.bias - norm.running_mean * scale",
           "norm.bias + 0 * scale", "test_weights.py"),

    # --- The grounding encoder and the models -----------------------------------------------------
    Mutant("model.py", "the V-L encoder of M²IST has four heads",
           "grounding=dict(dim=256, heads=8", "grounding=dict(dim=256, heads=4", "test_parity.py"),
    Mutant("model.py", "positions start small",
           "nn.Parameter(position_std * torch.randn(tokens, dim))",
           "nn.Parameter(0.02 * torch.randn(tokens, dim))", "test_parity.py"),
    Mutant("model.py", "HiVG's grounding encoder lacks its last norm",
           "self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()",
           "self.norm = nn.Identity()", "test_parity.py"),
    Mutant("model.py", "M²IST's positions move with the length of the text",
           "self.position[1 + self.max_tokens:]])", "self.position[1 + T:1 + T + V]])",
           "test_model.py"),
    Mutant("model.py", "padded text is seen in M²IST's sequence",
           "torch.cat([reg_padding, text.padding, vision.padding], dim=1)",
           "torch.cat([reg_padding, torch.zeros_like(text.padding), vision.padding], dim=1)",
           "test_parity.py"),
    Mutant("model.py", "padded cells are seen in HiVG's sequence",
           "torch.cat([reg_padding, vision.padding, text.padding], dim=1)",
           "torch.cat([reg_padding, torch.zeros_like(vision.padding), text.padding], dim=1)",
           "test_parity.py"),
    Mutant("model.py", "HiVG's cells begin with [CLS]", "cells = slice(2, 1 + V)",
           "cells = slice(1, V)", "test_model.py"),
    Mutant("model.py", "M²IST's cells begin with the last word", "cells = slice(1 + T, None)",
           "cells = slice(T, -1)", "test_model.py"),
    Mutant("model.py", "Eq. (12) takes the word before [EOS]",
           "vision.padding.shape[1] + (~text.padding).sum(1)",
           "vision.padding.shape[1] + (~text.padding).sum(1) - 1", "test_model.py"),
    Mutant("model.py", "boxes are rounded to half precision", "self.head(reg).float().sigmoid()",
           "self.head(reg).sigmoid()", "test_loop.py"),
    Mutant("model.py", "frozen encoders run with autograd",
           "torch.set_grad_enabled(trains_inside and torch.is_grad_enabled())",
           "torch.set_grad_enabled(torch.is_grad_enabled())", "test_model.py test_evaluate.py"),
    Mutant("model.py", "frozen encoders leave eval mode", "self.vision.train(mode and self.tuned)",
           "self.vision.train(mode)", "test_model.py"),
    Mutant("model.py", "encoders that are trained stay in eval mode",
           "self.vision.train(mode and self.tuned)", "self.vision.train(False)", "test_loop.py"),
    Mutant("model.py", "the side network replaces the encoder's output",
           "x = x + self.adapters.side(", "x = self.adapters.side(", "test_model.py"),
    Mutant("model.py", "a side network starts a layer late", "encoded.states[first - 2]",
           "encoded.states[first - 1]", "test_model.py"),
    Mutant("model.py", "bridges see the text layer after", "states[layer - 1] for layer in self.t",
           "states[layer] for layer in self.t", "test_model.py"),
    Mutant("model.py", "levels are a layer too low", "vision.states[level - 1]",
           "vision.states[level - 2]", "test_model.py"),
    Mutant("model.py", "the temperature is inverted", "(-self.clip.logit_scale).exp()",
           "self.clip.logit_scale.exp()", "test_model.py"),
    Mutant("model.py", "bridges of released files mask padding",
           "masked = torch.zeros_like(text.padding)    # [D47]", "masked = text.padding    # [D47]",
           "test_evaluate.py"),
    Mutant("model.py", "LoRA adapts q and k on DETR and BERT", 'lora_targets=("q", "v")',
           'lora_targets=("q", "k")', "test_model.py test_rows.py"),
    Mutant("model.py", "a bridge is a layer too deep",
           'self.clip.vision.layers[layer - 1].plugs["attention"] = bridge',
           'self.clip.vision.layers[layer % len(self.clip.vision.layers)].plugs["attention"] = '
           "bridge", "test_model.py"),

    # --- The loop ---------------------------------------------------------------------------------
    Mutant("train.py", "the claims are run on a GPU", 'given.setdefault("device", "cpu")',
           'given.setdefault("device", "cuda")', "test_claims.py"),
    Mutant("train.py", "the interval of a claim does not shrink with the seeds",
           "math.sqrt(variance / seeds)", "math.sqrt(variance)", "test_claims.py"),
    Mutant("train.py", "a claim compares runs of different seeds",
           "- accuracies[claim.lower, seed])", "- accuracies[claim.lower, seeds - 1 - seed])",
           "test_claims.py"),
    Mutant("train.py", "the worst rate of a row is taken", "highest = max(reached.values())",
           "highest = min(reached.values())", "test_claims.py"),
    Mutant("train.py", "rates are tried with a seed of the table",
           "SEED_OF_TRIES = 100", "SEED_OF_TRIES = 0", "test_claims.py"),
    Mutant("train.py", "a worker prints that its process is gone",
           "    sys.excepthook = tell_unless_disconnected\n", "    pass\n", "test_resume.py"),
    Mutant("train.py", "a worker hides every error", "(ConnectionError, EOFError)", "Exception",
           "test_resume.py"),
    Mutant("train.py", "a lucky try decides on the rates of a row",
           "highest - error]", "highest]", "test_claims.py"),
    Mutant("train.py", "the rates farthest from the recipe are taken",
           "(max(factor, 1 / factor), -reached[factor])", "-factor", "test_claims.py"),
    Mutant("train.py", "of equally near rates the worse one is taken",
           "1 / factor), -reached[factor])", "1 / factor), reached[factor])", "test_claims.py"),
    Mutant("train.py", "a factor of rates may be nan",
           "if not 0 < factor < math.inf:", "if factor <= 0 or factor == math.inf:", "test_claims.py"),
    Mutant("train.py", "the standard error is that of the training samples",
           'return len(data.load_samples(args.dataset, "val",',
           'return len(data.load_samples(args.dataset, "train",', "test_claims.py"),
    Mutant("train.py", "folders of another recipe are looked for after the tries",
           "            check_is_run_of(flags)\n", "            pass\n", "test_claims.py"),
    Mutant("train.py", "rows without rates of stages are given an empty list of them",
           "        if rate == []:\n", "        if rate is None:\n", "test_claims.py"),
    Mutant("train.py", "a factor leaves the rates of the stages",
           "[part * factor for part in rate]", "[part for part in rate]", "test_claims.py"),
    Mutant("train.py", "a rate is judged by the last epoch",
           'best_of(log, 1, log[-1]["epoch"])', 'log[-1]["val_acc@0.5"]', "test_claims.py"),
    Mutant("train.py", "args.json of an older version lacks options",
           "return {**all_defaults(), **saved}", "return saved", "test_claims.py test_resume.py"),
    Mutant("train.py", "rows with fewer stages are trained for fewer epochs",
           'return {"epochs": epochs} if epochs != args.epochs else {}', "return {}",
           "test_claims.py"),
    Mutant("train.py", "a claim takes the runs of an older recipe",
           "if name not in MAY_CHANGE and saved.get(name) != value:", "if False:",
           "test_claims.py"),
    Mutant("train.py", "after a run that fails the next one begins",
           "    if process.returncode != 0:\n        stopping.set()\n",
           "    if process.returncode != 0:\n", "test_claims.py"),
    Mutant("train.py", "a run goes on when the command is stopped",
           "            process.terminate()    # the run writes last.pt and ends\n", "",
           "test_claims.py"),
    Mutant("train.py", "the cosine rises", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(",
           "test_train.py"),
    Mutant("train.py", "the step comes an epoch late", "step // steps >= args.lr_drop",
           "step // steps > args.lr_drop", "test_train.py"),
    Mutant("train.py", "the warm-up begins at 0", "(step + 1) / args.warmup", "step / args.warmup",
           "test_train.py"),
    Mutant("train.py", "all stages have the first rate",
           "args.stage_lr[min(stage, len(args.stage_lr)) - 1]", "args.stage_lr[0]",
           "test_train.py"),
    Mutant("train.py", "a schedule begins with the run", "(epoch - 1 - phase.first) * len(loader)",
           "(epoch - 1) * len(loader)", "test_train.py"),
    Mutant("train.py", "epochs after the first train in eval mode",
           "    run.parallel.train()\n",
           "", "test_loop.py"),
    Mutant("train.py", "validation is in training mode",
           "    model.eval()\n    count = len",
           "    count = len", "test_loop.py"),
    Mutant("train.py", "validation records gradients", "@torch.no_grad()\ndef predict",
           "def predict", "test_loop.py"),
    Mutant("train.py", "mixed precision is never on", "enabled=dtype is not None)",
           "enabled=False)", "test_loop.py"),
    Mutant("train.py", "training is never in mixed precision",
           "with autocast(args):\n            grounding = model(**micro, attention",
           "if True:\n            grounding = model(**micro, attention", "test_loop.py"),
    Mutant("train.py", "the loss is not scaled",
           "scaler.scale(loss * share).backward()",
           "(loss * share).backward()", "test_loop.py"),
    Mutant("train.py", "gradients stay scaled", "    scaler.unscale_(optimizer)\n", "",
           "test_loop.py"),
    Mutant("train.py", "each micro-batch counts as a batch",
           "scaler.scale(loss * share)",
           "scaler.scale(loss)", "test_train.py"),
    Mutant("train.py", "gradients of the step before are kept",
           "    optimizer.zero_grad(set_to_none=True)\n", "", "test_train.py"),
    Mutant("train.py", "weight decay is AdamW's own",
           "torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)",
           "torch.optim.AdamW(groups, fused=True)", "test_loop.py"),
    Mutant("train.py", "the two rates are exchanged",
           'if name.startswith("grounding."):\n            head', 'if not name.startswith('
           '"grounding."):\n            head', "test_train.py"),
    Mutant("train.py", "each epoch has the order of the first",
           "set_epoch(loader, epoch, first=progress.step)",
           "set_epoch(loader, 1, first=progress.step)", "test_loop.py"),
    Mutant("train.py", "each epoch has the same transforms",
           "    loader.dataset.epoch.fill_(epoch)\n",
           "", "test_loop.py"),
    Mutant("train.py", "each epoch has the same order",
           "    loader.batch_sampler.epoch = epoch\n",
           "", "test_loop.py"),
    Mutant("data.py", "nothing is shuffled",
           "        rng.shuffle(groups)\n",
           "", "test_loop.py"),
    Mutant("data.py", "evaluation drops what fills no batch",
           "range(0, len(order), batch_size)]\n    return batches",
           "range(0, len(order) - batch_size + 1, batch_size)]\n    return batches", "test_train.py"),
    Mutant("train.py", "dropout depends on what was drawn before",
           "            torch.manual_seed(seed_of_step(args, epoch, progress.step))\n",
           "", "test_resume.py"),
    Mutant("train.py", "a resumed run forgets the optimizer",
           '        run.optimizer.load_state_dict(last["optimizer"])\n',
           "", "test_resume.py"),
    Mutant("train.py", "an epoch that was not evaluated is not evaluated after a resume",
           "            return self.evaluated\n",
           "            return True\n", "test_resume.py"),
    Mutant("train.py", "the worst epoch is kept",
           'line["val_acc@0.5"] >= progress.best',
           'line["val_acc@0.5"] <= progress.best', "test_train.py"),
    Mutant("train.py", "a phase goes on with its last weights",
           "    load_tuned(model, read_state(best_path), best_path)\n    here",
           "    hilora.discard(model)\n    here", "test_train.py"),
    Mutant("train.py", "an IoU of one half is wrong", '"acc@0.5": (ious >= 0.5)',
           '"acc@0.5": (ious > 0.5)', "test_train.py"),
    Mutant("train.py", "HiVG mirrors pictures", "mirror = not on_clip(spec)", "mirror = True",
           "test_train.py"),
    Mutant("train.py", "CLIP gets DETR's pixels",
           'data.PIXELS[spec["pixels"] or spec["encoders"]]',
           'data.PIXELS[spec["pixels"] or "detr"]', "test_train.py"),
    Mutant("train.py", "of two equal epochs the first is kept",
           'line["val_acc@0.5"] >= progress.best',
           'line["val_acc@0.5"] > progress.best', "test_train.py"),
    Mutant("train.py", "the rates rise beyond their peak after the warm-up",
           "warm = min(1.0, (step + 1) / args.warmup)", "warm = (step + 1) / args.warmup",
           "test_train.py test_loop.py"),
    Mutant("train.py", "all stages draw the same pairs", "+ 50_000 + phase.stage)", "+ 50_000)",
           "test_train.py"),
    Mutant("train.py", "gradients are never clipped", "args.clip_norm or math.inf", "math.inf",
           "test_train.py"),
    Mutant("train.py", "means are over steps, not over samples",
           "means.add(values, size)",
           "means.add(values, 1)", "test_train.py test_loop.py"),
    Mutant("train.py", "val is evaluated in whole batches",
           "make_loader(val_samples, model, args, batch_size=args.micro_batch)",
           "make_loader(val_samples, model, args)", "test_train.py"),

    # --- The data ---------------------------------------------------------------------------------
    Mutant("data.py", "CLIP's pixels have ImageNet's red", "mean=(0.48145466,", "mean=(0.485,",
           "test_parity.py"),
    Mutant("data.py", "padding is not marked",
           "padding = torch.ones(size, size, dtype=torch.bool)",
           "padding = torch.zeros(size, size, dtype=torch.bool)", "test_data.py"),
    Mutant("data.py", "every picture lies at the top of its square",
           "rows = slice(place.top, place.top + place.height)",
           "rows = slice(0, place.height)", "test_data.py"),
    Mutant("data.py", "a box does not move with its picture",
           "x1 = place.left + clip(box[0], 0, width)", "x1 = clip(box[0], 0, width)",
           "test_data.py"),
    Mutant("data.py", "width and height of a box are exchanged",
           "(x2 - x1) / size, (y2 - y1) / size]", "(y2 - y1) / size, (x2 - x1) / size]",
           "test_data.py"),
    Mutant("data.py", "boxes come back from the square unscaled",
           "y1 = (cy - h / 2 - place.top) * height / place.height", "y1 = cy - h / 2 - place.top",
           "test_data.py test_evaluate.py"),
    Mutant("data.py", "a mirror image keeps its box",
           "boxes = [(picture.width - x2, y1, picture.width - x1, y2) for",
           "boxes = [(x1, y1, x2, y2) for", "test_data.py"),
    Mutant("data.py", "a mirror image keeps its text",
           "texts = [SIDE_WORD.sub(opposite_side, text) for text in texts]",
           "texts = list(texts)", "test_data.py"),
    Mutant("data.py", "texts with places are cropped",
           "if rng.random() < 0.5 and not found_in(PLACE_WORD, texts):",
           "if rng.random() < 0.5:", "test_data.py"),
    Mutant("data.py", "a crop moves its box along the wrong axis",
           "moved = [(x1 - x, y1 - y,",
           "moved = [(x1 - y, y1 - x,", "test_data.py"),
    Mutant("data.py", "a crop may lose the centre",
           "and y < centre_y < y + h for",
           "and True for", "test_data.py"),
    Mutant("data.py", "crops are drawn up to 600 and cut off",
           "longest = min(round(side / scale), 600)", "longest = 600", "test_data.py"),
    Mutant("data.py", "all pictures are as large as the square", "fill = rng.choice(SCALES)",
           "fill = 1.0", "test_data.py"),
    Mutant("data.py", "the last token of a text is padding", "positions >= lengths[:, None]",
           "positions >= lengths[:, None] - 1", "test_data.py"),
    Mutant("data.py", "transforms do not depend on the epoch",
           "seeded(self.seed, self.epoch.item(), indices[0])",
           "seeded(self.seed, indices[0])", "test_loop.py"),
    Mutant("data.py", "CLIP's texts are not mended", "        if self.mends:\n",
           "        if False:\n", "test_data.py"),
    Mutant("data.py", "colours hardly change", "rng.uniform(0.6, 1.4)", "rng.uniform(0.95, 1.05)",
           "test_data.py test_loop.py"),
    Mutant("data.py", "all pictures change their colours", "if rng.random() < 0.8:",
           "if rng.random() < 2:", "test_data.py test_loop.py"),
    Mutant("data.py", "colours always change in the same order",
           "in rng.sample(enhancers, 3):", "in enhancers[:3]:", "test_data.py test_loop.py"),
    Mutant("data.py", "nearly all pictures are mirrored", "if mirror and rng.random() < 0.5",
           "if mirror and rng.random() < 0.95", "test_data.py test_loop.py"),
    Mutant("data.py", "crops are the largest that TransVG has", "rng.choice((400, 500, 600))",
           "400", "test_data.py test_loop.py"),
    Mutant("data.py", "the smallest scale is missing", "0.8, 0.75, 0.7)", "0.8, 0.75)",
           "test_data.py test_loop.py"),
    Mutant("data.py", "pictures are scaled without smoothing",
           "height), Image.Resampling.BILINEAR)", "height), Image.Resampling.NEAREST)",
           "test_data.py test_loop.py"),
    Mutant("data.py", "a text that is too long loses its end token",
           "ids[:self.max_tokens - 1] + ids[-1:]", "ids[:self.max_tokens]", "test_data.py"),
    Mutant("data.py", "--draft leaves boxes in pixels of the stored picture",
           "x = picture.width / width", "x = 1.0", "test_data.py"),
    Mutant("data.py", "--draft blurs crops", "enough = 2 * self.size if augmented",
           "enough = self.size if augmented", "test_data.py"),
    # --- Computed once, or not at all -------------------------------------------------------------
    Mutant("model.py", "the last grounding layer leaves out what HiVG's constraint reads",
           "first=None if reads_regions else 1)", "first=1)", "test_model.py"),
    Mutant("model.py", "all tokens of the last grounding layer are computed",
           "first=None if reads_regions else 1)", "first=None)", "test_model.py"),
    Mutant("model.py", "the queries of a layer's first tokens come without their position",
           "self.q(placed[:, :first])", "self.q(h[:, :first])", "test_model.py"),
    Mutant("model.py", "texts get the pictures in order, not their own",
           "return x if picture is None else x[picture]",
           "return x if picture is None else x[picture.sort(descending=True).values]",
           "test_model.py test_batches.py"),
    Mutant("model.py", "each text's picture is encoded below the first bridge, too",
           "        bridge = self.first_bridge()\n", "        bridge = 0\n", "test_model.py"),

    Mutant("adapters.py", "an attention map is computed again with other random numbers",
           "            torch.set_rng_state(ctx.random_state)\n", "", "test_adapters.py"),
    Mutant("adapters.py", "dropout on the attention map is not scaled",
           "return (x * random_keep(x, dropout)).div_(1 - dropout)",
           "return x * random_keep(x, dropout)", "test_adapters.py"),
    Mutant("adapters.py", "the gradient of dropout is not scaled",
           "return (dy * keep).div_(1 - ctx.dropout), None", "return dy * keep, None",
           "test_adapters.py"),
    Mutant("adapters.py", "dropout keeps eight bytes for each element",
           "keep.to(torch.bool)", "keep.to(torch.int64)", "test_adapters.py"),
    Mutant("adapters.py", "an expert's norm has no gain",
           "weight = self.down.weight * self.norm.weight", "weight = self.down.weight",
           "test_adapters.py"),
    Mutant("adapters.py", "an expert's norm has no shift",
           "bias = self.down.bias + self.down.weight @ self.norm.bias", "bias = self.down.bias",
           "test_adapters.py"),
    Mutant("adapters.py", "dropout keeps what it should drop", "numbers.ge_(", "numbers.lt_(",
           "test_adapters.py"),
    Mutant("adapters.py", "one random number decides over four elements",
           "draws.view(torch.int16)[:x.numel()]",
           "draws.view(torch.int16)[::4].repeat_interleave(4)[:x.numel()]", "test_adapters.py"),
    Mutant("adapters.py", "the gradient of a dropped ReLU is not scaled",
           "return through / (1 - ctx.dropout), None", "return through, None", "test_adapters.py"),
    Mutant("adapters.py", "a dropped ReLU passes the gradient of what was dropped",
           "threshold_backward(dy, y, 0)", "threshold_backward(dy, y, -1)", "test_adapters.py"),
    Mutant("evaluate.py", "--grow tokens changes nothing", 'if what == "tokens":', "if False:",
           "test_evaluate.py"),
    Mutant("evaluate.py", "--cost forgets --checkpointing", "if asked.checkpointing:", "if False:",
           "test_evaluate.py"),

    # --- Runs, their folders and their names ------------------------------------------------------
    Mutant("train.py", "a folder is not locked", "        hold(lock, out)\n", "", "test_resume.py"),
    Mutant("train.py", "a folder that holds a run takes another one",
           "        check_out(out, args.resume)\n", "", "test_resume.py"),
    Mutant("train.py", "half-written files stay", "            partial.unlink()\n        try",
           "            pass\n        try", "test_resume.py"),
    Mutant("train.py", "a folder in which no run was begun stays",
           "                shutil.rmtree(out, ignore_errors=True)\n", "                pass\n",
           "test_resume.py"),
    Mutant("train.py", "a run can be made shorter", "value > saved[name]", "value != saved[name]",
           "test_resume.py"),
    Mutant("train.py", "a run in stages can be made longer",
           'name == "epochs" and not saved.get("stages")', 'name == "epochs"', "test_resume.py"),
    Mutant("train.py", "args.json of a resumed run asks to resume", '"resume": False}', "}",
           "test_resume.py"),
    Mutant("train.py", "seeds of more than 64 bits reach torch", "    return seed % 2 ** 63\n",
           "    return seed\n", "test_train.py"),
    Mutant("train.py", "a row that was changed has the row's name", "if option.group in "
           "CHANGES_A_ROW and departs:", "if False:", "test_options.py"),
    Mutant("train.py", "flags may contradict the row", "        if given.get(name, value) != value:",
           "        if False:", "test_options.py"),
    Mutant("train.py", "any RuntimeError is too little memory",
           "not isinstance(error, MemoryError) and not re.search(words, str(error))", "False",
           "test_train.py"),
    Mutant("losses.py", "a picture that is all padding divides by zero",
           "real.sum(1).clamp(min=1)", "real.sum(1)", "test_losses.py"),
    Mutant("model.py", "weights of any architecture are compared key by key",
           "    refuse_architecture(source, renamed, wanted)\n", "", "test_weights.py"),
    Mutant("data.py", "the hub is asked without a network",
           "return not Path(name).exists() and hub_answers()", "return not Path(name).exists()",
           "test_weights.py"),
    Mutant("evaluate.py", "the file of predictions has the boxes of the square",
           "predicted = data.from_square(box, sizes[sample.image], side)",
           "predicted = box.tolist()", "test_evaluate.py"),
    Mutant("evaluate.py", "the saved bytes count each view of a storage",
           "kept.setdefault(storage_address(tensor), tensor)", "kept.setdefault(id(tensor), tensor)",
           "test_evaluate.py"),
]


def copy_repository(folder):
    """Copy the tracked and the new files of the repository, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


def run_tests(folder, names):
    """Run test files of a copy until the first failure -> the test that failed, or None."""
    # Bytecode is told from its source by time and size, which two mutants may have in common.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    for name in names:
        command.append(f"tests/{name}")
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                              timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"a limit of {LIMIT} seconds"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    sys.exit(f"pytest did not run:\n{done.stdout}{done.stderr}")


def stale(mutant):
    """What is wrong with the old text of a mutant, or None."""
    times = (ROOT / mutant.file).read_text().count(mutant.old)
    if times != 1:
        return f"{mutant.file}: {mutant.what}: {mutant.old!r} occurs {times} times, not once"
    return None


def try_mutant(mutant, copies):
    """Run the tests of one mutant in one of the copies -> the test that noticed, or None."""
    folder = copies.get()
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return run_tests(folder, mutant.tests.split())
    finally:
        path.write_text(text)
        copies.put(folder)


def describe(mutant, noticed):
    """One line about a mutant."""
    name = f"{mutant.file}: {mutant.what}"
    if noticed is not None:
        return f"caught    {name}  [{noticed}]"
    if mutant.equivalent:
        return f"explained {name}  [{mutant.equivalent}]"
    return f"SURVIVED  {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT",
                        help="Only mutants that have this text in any field.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Mutants at a time.")
    asked = parser.parse_args()

    chosen = []
    for mutant in MUTANTS:
        if asked.only in "\n".join(mutant):
            chosen.append(mutant)
    wrong = [stale(mutant) for mutant in chosen if stale(mutant)]
    if wrong:
        sys.exit("\n".join(wrong))
    if not chosen:
        sys.exit(f"no mutant has {asked.only!r}")

    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        copies = queue.Queue()
        for number in range(asked.jobs):
            folder = Path(name) / str(number)
            copy_repository(folder)
            copies.put(folder)

        needed = sorted({test for mutant in chosen for test in mutant.tests.split()})
        print(f"{len(chosen)} mutants; without any, {', '.join(needed)} must pass", flush=True)
        for file in needed:
            failed = run_tests(folder, [file])
            if failed:
                sys.exit(f"{failed} fails without a mutant")

        survived = 0
        with ThreadPoolExecutor(asked.jobs) as pool:
            tried = pool.map(try_mutant, chosen, [copies] * len(chosen))
            for mutant, noticed in zip(chosen, tried):
                print(describe(mutant, noticed), flush=True)
                if noticed is None and not mutant.equivalent:
                    survived += 1
    minutes = (time.time() - began) / 60
    print(f"{survived} of {len(chosen)} mutants survived; {minutes:.0f} minutes")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
