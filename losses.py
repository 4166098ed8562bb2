"""The losses of both papers. This file imports torch alone, so it can be copied into any project.

    M²IST Eq. (6)          box_loss             smooth L1 and GIoU between two boxes
    HiVG Eq. (14)          box_loss             the same two terms, each with its own weight
    HiVG Eqs. (9)-(11)     contrastive_loss     texts and images of a batch are matched, as in CLIP
    HiVG Eqs. (12)-(13)    RegionText, box_mask, region_text_loss
                                                image tokens in the box are matched to the text
    HiVG Eq. (15)          loss_terms           all terms that a run adds up, each with its weight
    ours, at size tiny     attention_loss       [REG] attends to the box

Symbols (paper = here):
    b (M²IST), B̂ (HiVG) = pred        b̂ (M²IST), B (HiVG) = target        λ_l1 = l1
    λ (M²IST), λ_giou (HiVG) = giou    τ = temperature
    t_i, v_i = rows of text, image (Eqs. 9, 10)     s_i = s     m_d = mask
    λ_focal = focal     λ_dice = dice

Shapes: B samples of a batch, N image tokens, C channels. (N in Eqs. (9), (10) is B here.)

A box is (cx, cy, w, h) in [0, 1] of the padded square image. All losses are computed in float32,
whatever precision the model runs in: half precision keeps two or three digits of the area of a small
box, and IoU divides such areas. Tags such as [D1] mark where a line differs from a paper
or from its released code; assets/deviations.md says how.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The smallest divisor, and the smallest share in a logarithm. It is far below the area of any real
# box: one pixel of a 640 px image has the area 2.4e-6.
EPS = 1e-7


# --- Boxes: M²IST Eq. (6), HiVG Eq. (14) ----------------------------------------------------------


def to_corners(boxes):
    """Turn (cx, cy, w, h) into (x1, y1, x2, y2), in the same unit.

    boxes: (..., 4). Returns (..., 4). A negative width or height counts as 0.
    """
    cx, cy, w, h = boxes.unbind(-1)
    w = w.clamp(min=0)
    h = h.clamp(min=0)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def iou_and_giou(a, b):
    """IoU and generalised IoU of corresponding boxes (Rezatofighi et al., CVPR 2019).

    a, b: (..., 4) as (cx, cy, w, h). Returns two float32 tensors (...): IoU in [0, 1] and GIoU in
    [-1, 1]. Values and gradients are finite for all boxes in [0, 1], also for boxes without area.
    """
    a = to_corners(a.float())
    b = to_corners(b.float())
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)

    # Width and height of the overlap, (..., 2); negative where the boxes are apart.
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    iou = intersection / union.clamp(min=EPS)

    # The hull is the smallest box that holds both. GIoU subtracts the share of the hull outside the
    # union, so that two boxes that do not overlap have a gradient towards each other.
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    giou = iou - (hull - union) / hull.clamp(min=EPS)
    return iou, giou


def clamp_to_square(boxes):
    """Cut off what lies outside of the square [0, 1] x [0, 1]. This is for predictions alone: a box
    loss needs the gradient of the part outside.

    boxes: (..., 4) as (cx, cy, w, h). Returns (..., 4) as (cx, cy, w, h).
    """
    x1, y1, x2, y2 = to_corners(boxes).clamp(0, 1).unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def box_terms(pred, target, l1=1.0, giou=1.0, beta=0.0):
    """The two terms of M²IST Eq. (6) and HiVG Eq. (14), {"l1": l1 · smooth L1, "giou": giou · (1 -
    GIoU)}.

    pred, target: (B, 4) as (cx, cy, w, h) in [0, 1]. beta: β of smooth L1; an error below β costs
    error² / 2β, a larger one costs error - β / 2. Returns float32 scalars. The four coordinates are
    summed and the batch is averaged, as in the released code of both papers.
    """
    pred = pred.float()
    target = target.float()

    # [D1] Both papers write smooth L1 without a β; both released codes have plain L1, which is β = 0.
    smooth_l1 = F.smooth_l1_loss(pred, target, reduction="none", beta=beta).sum(-1).mean()
    _, giou_of_boxes = iou_and_giou(pred, target)    # (B,)
    # [D2] M²IST does not give its λ, which is `giou` here; its released code has 1.
    return {"l1": l1 * smooth_l1, "giou": giou * (1 - giou_of_boxes).mean()}


def box_loss(pred, target, l1=1.0, giou=1.0, beta=0.0):
    """L of M²IST Eq. (6), and L_BOX of HiVG Eq. (14): the sum of `box_terms`, a float32 scalar."""
    return sum(box_terms(pred, target, l1, giou, beta).values())    # M²IST Eq. (6), HiVG Eq. (14)


# --- The contrastive constraint: HiVG Eqs. (9)-(11) -----------------------------------------------


def contrastive_loss(text, image, temperature):
    """L_CLC of HiVG Eq. (11): in a batch, each text must pick its image, and each image its text.

    text, image: (B, C) embeddings; row i of both belongs together. They are normalised here.
    temperature: τ, taken from CLIP (0.01 after CLIP's pretraining). Returns a float32 scalar. As in
    the paper, all other combinations are negatives. An image that occurs twice in the batch is then
    a negative of its own second text.
    """
    text = F.normalize(text.float(), dim=-1)
    image = F.normalize(image.float(), dim=-1)

    # Cosine similarities over τ, (B, B): row i is text i, column j is image j.
    logits = text @ image.T / temperature
    target = torch.arange(len(logits), device=logits.device)    # column i is the image of text i
    t2i = F.cross_entropy(logits, target)      # HiVG Eq. (9)
    i2t = F.cross_entropy(logits.T, target)    # HiVG Eq. (10)
    return (t2i + i2t) / 2                     # HiVG Eq. (11)


# --- The region-text constraint: HiVG Eqs. (12)-(13) ----------------------------------------------


def box_mask(boxes, side):
    """m_d of HiVG Eq. (13): which cells of a grid lie in the box.

    boxes: (B, 4) as (cx, cy, w, h). side: cells along each side of the image, H / P in the paper.
    Returns (B, side * side) bool, one row of the grid after the other.
    """
    boxes = boxes.float()
    x1, y1, x2, y2 = to_corners(boxes).unbind(-1)    # (B,) each

    # [D17] A cell is in the box if its centre is; the released code looks at the cell's corner.
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side         # (side,)
    columns = (centres >= x1[:, None]) & (centres <= x2[:, None])            # (B, side)
    rows = (centres >= y1[:, None]) & (centres <= y2[:, None])               # (B, side)
    mask = (rows[:, :, None] & columns[:, None, :]).flatten(1)               # (B, side * side)

    # A small box may lie between the centres. It takes the cell that holds the centre of the box,
    # as every target needs at least one positive token.
    cell = (boxes[:, :2] * side).long().clamp(0, side - 1)                   # (B, 2): column, row
    nearest = F.one_hot(cell[:, 1] * side + cell[:, 0], side * side).bool()  # (B, side * side)
    return torch.where(mask.any(1, keepdim=True), mask, nearest)


class RegionText(nn.Module):
    """<t_eos, MLP(v_i)> of HiVG Eq. (12): a score for how well each image token matches the text.

    dim: the width C of the grounding encoder. hidden: the width inside the MLP.
    """

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, t, v):
        """Return the scores before the sigmoid of Eq. (12), (B, N).

        t: (B, C), the [EOS] token. v: (B, N, C), the image tokens. Both are outputs of the
        grounding encoder.
        """
        # [D19] As released, the paper's normalization is a LayerNorm of v and the unit length of t:
        # scores of two unit vectors would lie in [-1, 1], where σ is never near 0 or 1.
        h = self.fc1(self.norm(v))                     # (B, N, hidden)
        h = h * torch.sigmoid(1.702 * h)               # QuickGELU, the activation of CLIP
        t = F.normalize(t, dim=-1)[..., None]          # (B, C, 1)
        scores = torch.matmul(self.fc2(h), t)          # HiVG Eq. (12), <t_eos, MLP(v_i)>; (B, N, 1)
        return scores[..., 0]                          # (B, N)


def region_text_loss(scores, mask, padding, focal=20.0, dice=2.0):
    """L_RTCC of HiVG Eq. (13): image tokens in the box must match the text, the others must not.

    scores: (B, N) from RegionText, before the sigmoid of Eq. (12), because the cross-entropy is
    stable for large scores only if it applies the sigmoid itself. mask: (B, N) bool, from box_mask.
    padding: (B, N) bool, True where a token is padding. focal, dice: λ_focal and λ_dice. Returns a
    float32 scalar.

    The focal loss has α = 0.25 and γ = 2 (Lin et al., ICCV 2017) and is averaged over the tokens of
    an image. The dice loss is that of the released code, which adds 1 to the numerator and to the
    denominator. (Milletari et al., 3DV 2016, square the terms of the denominator and add nothing.)
    """
    scores = scores.float()
    target = mask.float()
    # [D18] Padding shows no object, so it has weight 0 in every sum; as released it is a negative.
    real = (~padding).float()
    s = scores.sigmoid()    # HiVG Eq. (12)

    # Focal loss: a cross-entropy in which tokens that are already classified well weigh little.
    p_t = torch.where(mask, s, 1 - s)                       # the probability of the true class
    alpha = torch.where(mask, 0.25, 0.75)
    cross_entropy = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    by_token = alpha * (1 - p_t) ** 2 * cross_entropy       # (B, N)
    tokens = real.sum(1).clamp(min=1)                       # an image may be all padding
    focal_loss = (by_token * real).sum(1) / tokens          # (B,)

    # Dice loss: one minus the overlap of the predicted region with the true one.
    overlap = (s * target * real).sum(1)
    size = (s * real).sum(1) + (target * real).sum(1)
    dice_loss = 1 - (2 * overlap + 1) / (size + 1)          # (B,)

    return (focal * focal_loss + dice * dice_loss).mean()    # HiVG Eq. (13)


# --- Attention to the box: ours -------------------------------------------------------------------


def attention_loss(attention, mask):
    """-log of the share of [REG]'s attention that lies in the box, the mean over the batch.

    attention: (B, N), how much [REG] attends to each image token. A row sums to 1 at most, as [REG]
    attends to the text, too. mask: (B, N) bool, from box_mask. Returns a float32 scalar.
    """
    share = (attention.float() * mask).sum(1)
    return -share.clamp(min=EPS).log().mean()


# --- The sum: HiVG Eq. (15) -----------------------------------------------------------------------


def loss_terms(outputs, boxes, l1, giou, beta=0.0, contrast=0.0, focal=0.0, dice=0.0, attention=0.0):
    """The terms of HiVG Eq. (15), each with its weight: {"l1", "giou", "contrast", "region_text"},
    and "attention", which is ours. The loss of a run is their sum. With the weights from `contrast`
    on at 0 the first two remain, which are M²IST's loss, Eq. (6).

    outputs: what a grounding model returns. `.boxes` is always needed; `.text`, `.image` and
    `.temperature` for the contrastive loss, `.scores` and `.padding` for the region-text loss,
    `.attention` for the attention loss.
    boxes: (B, 4), the true boxes. HiVG's Table 8 has l1 = 2, giou = 2, focal = 20, dice = 2, and
    Eq. (15) has contrast = 1. A term whose weight is 0 is not computed.
    """
    terms = box_terms(outputs.boxes, boxes, l1, giou, beta)    # M²IST Eq. (6), HiVG Eq. (14)

    # [D26] The paper sums three losses; the released code adds that of a segmentation head.
    if contrast:
        loss = contrastive_loss(outputs.text, outputs.image, outputs.temperature)
        terms["contrast"] = contrast * loss

    if focal or dice:
        side = math.isqrt(outputs.scores.shape[1])    # the image tokens form a square grid
        mask = box_mask(boxes, side)
        terms["region_text"] = region_text_loss(outputs.scores, mask, outputs.padding, focal, dice)

    if attention:
        # [D49] With the box loss alone, a run on `shapes` predicts the mean box for hundreds of steps.
        side = math.isqrt(outputs.attention.shape[1])
        mask = box_mask(boxes, side)
        terms["attention"] = attention * attention_loss(outputs.attention, mask)

    return terms
