"""Losses of both papers, each readable alone: this file imports nothing of the project.

    M²IST Eq. (6), HiVG Eq. (14)     box_loss            smooth L1 and GIoU on the box
    HiVG Eqs. (9)-(11)               contrastive_loss    expressions and pictures of a batch find each other
    HiVG Eqs. (12)-(13)              RegionText, box_mask, region_text_loss    the cells of the box answer to it
    HiVG Eq. (15)                    total_loss          their sum

Boxes are (cx, cy, w, h) in [0, 1] of the padded square image. Everything is computed in float32, whatever precision
the model runs in: areas of small boxes are products of small numbers, and half precision rounds them to zero.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

EPS = 1e-7      # below the area of any real box (one pixel of a 640 px image has 2.4e-6), above a division by zero

def to_corners(boxes):
    """(..., 4) boxes as (cx, cy, w, h) -> (x1, y1, x2, y2), in the same unit; a negative width or height counts as 0."""
    cx, cy, w, h = boxes.unbind(-1)
    w, h = w.clamp(min=0), h.clamp(min=0)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)

def iou_and_giou(a, b):
    """IoU and generalised IoU of each pair of boxes.
    a, b: (..., 4) as (cx, cy, w, h). Returns two float32 tensors (...): IoU in [0, 1], GIoU in [-1, 1].
    Any box in [0, 1], one with no area too, gives finite values and gradients. Source: Rezatofighi et al., CVPR 2019."""
    a, b = to_corners(a.float()), to_corners(b.float())
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    iou = intersection / union.clamp(min=EPS)
    return iou, iou - (hull - union) / hull.clamp(min=EPS)

def box_loss(pred, target, l1=1.0, giou=1.0):
    """L = l1 * smooth-L1 + giou * (1 - GIoU), M²IST Eq. (6), whose λ is `giou`; HiVG Eq. (14) weighs both.
    pred, target: (B, 4) as (cx, cy, w, h) in [0, 1]. Returns a float32 scalar. The four coordinates are summed and
    the batch is averaged, as in the released code."""
    pred, target = pred.float(), target.float()
    # M²IST Eq. (6), first term. [D1] both papers write smooth L1; the released code of both has plain L1.
    smooth_l1 = F.smooth_l1_loss(pred, target, reduction="none").sum(-1).mean()
    # M²IST Eq. (6), second term. [D2] λ is never given; the released code adds the two with weight 1.
    return l1 * smooth_l1 + giou * (1 - iou_and_giou(pred, target)[1]).mean()

def contrastive_loss(text, image, temperature):
    """L_CLC, HiVG Eqs. (9)-(11): each expression finds its picture in the batch, and each picture its expression.
    text, image: (N, C) embeddings, row i of both from pair i; they are normalised here. temperature: τ, CLIP's own
    (0.01 after its pretraining). All other pairs count as negatives, as in the paper, a picture that occurs twice too."""
    text, image = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
    logits = text @ image.T / temperature                                # (N, N): row = text, column = picture
    pair = torch.arange(len(logits), device=logits.device)
    t2i, i2t = F.cross_entropy(logits, pair), F.cross_entropy(logits.T, pair)      # HiVG Eqs. (9) and (10)
    return (t2i + i2t) / 2                                                         # HiVG Eq. (11)

def box_mask(boxes, side):
    """m_d of HiVG Eq. (13): which cells of a side x side grid lie in the box. (B, 4) -> (B, side * side) bool, row by row.
    A cell is in if its centre is. [D17] Nearest downsampling, the paper's word, would look at a cell's corner. A box
    that holds no centre takes the cell that holds the box's own centre, so that no target is without a positive."""
    x1, y1, x2, y2 = to_corners(boxes.float()).unbind(-1)
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side
    columns = (centres >= x1[:, None]) & (centres <= x2[:, None])        # (B, side)
    rows = (centres >= y1[:, None]) & (centres <= y2[:, None])
    mask = (rows[:, :, None] & columns[:, None, :]).flatten(1)
    cell = (boxes[:, :2].float() * side).long().clamp(0, side - 1)       # (B, 2): column, row
    nearest = F.one_hot(cell[:, 1] * side + cell[:, 0], side * side).bool()
    return torch.where(mask.any(1, keepdim=True), mask, nearest)

class RegionText(nn.Module):
    """<t_eos, MLP(v_i)> of HiVG Eq. (12): how much each cell of the picture answers to the text.
    forward: t (B, C), v (B, N, C), both out of the grounding encoder -> scores (B, N), before the sigmoid. [D19] "After
    normalization" is a LayerNorm of v and the unit length of t, as released: with both of unit length, scores could not
    leave [-1, 1] and σ not come near 0 or 1."""
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, t, v):
        h = self.fc1(self.norm(v))
        return (self.fc2(h * torch.sigmoid(1.702 * h)) @ F.normalize(t, dim=-1)[..., None])[..., 0]      # QuickGELU

def region_text_loss(scores, mask, padding, focal=20.0, dice=2.0):
    """L_RTCC, HiVG Eqs. (12)-(13): the cells of the box answer to the text, the others do not.
    scores: (B, N), <t_eos, MLP(v_i)> before the sigmoid of Eq. (12), which is in here for its logarithm's sake.
    mask: (B, N) bool, from box_mask. padding: (B, N) bool; padded cells count for nothing. [D18]
    focal, dice: λ_focal and λ_dice. Focal loss with α 0.25 and γ 2 (Lin et al., ICCV 2017), the mean over a picture's
    cells; dice with 1 added above and below (Milletari et al., 3DV 2016)."""
    scores, target, real = scores.float(), mask.float(), (~padding).float()
    s = scores.sigmoid()                                                 # HiVG Eq. (12)
    right = torch.where(mask, s, 1 - s)
    cross_entropy = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    by_cell = torch.where(mask, 0.25, 0.75) * (1 - right) ** 2 * cross_entropy
    focal_loss = (by_cell * real).sum(1) / real.sum(1)
    overlap = (s * target * real).sum(1)
    dice_loss = 1 - (2 * overlap + 1) / ((s * real).sum(1) + (target * real).sum(1) + 1)
    return (focal * focal_loss + dice * dice_loss).mean()                # HiVG Eq. (13)

def total_loss(found, boxes, l1, giou, contrast=0.0, focal=0.0, dice=0.0):
    """L_total, HiVG Eq. (15), each part with its coefficient; with the last three 0 it is M²IST Eq. (6). HiVG's Table 8:
    l1 2, giou 2, focal 20, dice 2. [D26] The released code adds a third, of a segmentation head. boxes: (B, 4), the true
    ones. found: a Grounding (model.py): .boxes, and for the constraints .text, .image, .temperature, .scores, .padding."""
    loss = box_loss(found.boxes, boxes, l1, giou)                                          # HiVG Eq. (14)
    if contrast:
        loss = loss + contrast * contrastive_loss(found.text, found.image, found.temperature)
    if focal or dice:
        mask = box_mask(boxes, math.isqrt(found.scores.shape[1]))
        loss = loss + region_text_loss(found.scores, mask, found.padding, focal, dice)
    return loss
