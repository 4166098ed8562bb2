"""losses.py against literal loops over the formulas."""
import math
import random
from types import SimpleNamespace

import pytest
import torch

import losses


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def giou_by_hand(a, b):
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)
    inter = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inter / union, inter / union - (hull - union) / hull


def random_boxes(n, seed=0):
    rng = random.Random(seed)
    return [[rng.random(), rng.random(), rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6)] for _ in range(n)]


def test_iou_and_giou_are_those_of_the_definition():
    a, b = random_boxes(200, 1), random_boxes(200, 2)
    iou, giou = losses.iou_and_giou(torch.tensor(a), torch.tensor(b))
    for i in range(200):
        by_hand = giou_by_hand(a[i], b[i])
        assert iou[i].item() == pytest.approx(by_hand[0], abs=1e-5)
        assert giou[i].item() == pytest.approx(by_hand[1], abs=1e-5)


@pytest.mark.parametrize("l1, giou", [(1, 1), (2, 2), (1, 0), (0, 1)])
def test_box_loss_is_m2ist_eq_6(l1, giou):
    pred, target = random_boxes(50, 3), random_boxes(50, 4)
    total = 0.0
    for p, t in zip(pred, target):
        for x, y in zip(p, t):
            d = abs(x - y)
            total += l1 * (0.5 * d * d if d < 1 else d - 0.5)
        total += giou * (1 - giou_by_hand(p, t)[1])
    assert losses.box_loss(torch.tensor(pred), torch.tensor(target), l1, giou).item() == pytest.approx(total / 50, rel=1e-5)


def test_a_perfect_box_costs_nothing_and_half_overlap_counts_as_right():
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    assert losses.box_loss(box, box).item() == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert losses.iou_and_giou(box, half)[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("pred", [[0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0.5, 0.5, -0.1, -0.1],
                                  [0.5, 0.5, 1e-30, 1e-30]])
@pytest.mark.parametrize("target", [[0.5, 0.5, 0.3, 0.3], [0.2, 0.2, 0, 0]])
def test_any_box_has_a_finite_loss_and_gradient(pred, target):
    pred = torch.tensor([pred], dtype=torch.float32, requires_grad=True)
    loss = losses.box_loss(pred, torch.tensor([target], dtype=torch.float32))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """A box of 2 x 2 pixels of 640 has an area of 1e-5; in float16 its products underflow."""
    box = torch.tensor([[0.5, 0.5, 2 / 640, 2 / 640]], dtype=dtype)
    iou, giou = losses.iou_and_giou(box, box)
    assert iou.dtype == giou.dtype == losses.box_loss(box, box).dtype == torch.float32
    assert iou.item() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# HiVG's constraints

def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_contrastive_loss_is_equations_9_to_11(temperature):
    torch.manual_seed(0)
    text, image = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    t, v, N = text.tolist(), image.tolist(), 5
    t2i = -sum(math.log(math.exp(cosine(t[i], v[i]) / temperature) / sum(math.exp(cosine(t[i], v[j]) / temperature) for j in range(N)))
               for i in range(N)) / N
    i2t = -sum(math.log(math.exp(cosine(v[i], t[i]) / temperature) / sum(math.exp(cosine(v[i], t[j]) / temperature) for j in range(N)))
               for i in range(N)) / N
    assert losses.contrastive_loss(text, image, temperature).item() == pytest.approx((t2i + i2t) / 2, rel=1e-4)
    assert losses.contrastive_loss(text, image, torch.tensor(temperature)).item() == pytest.approx((t2i + i2t) / 2, rel=1e-4)


def test_contrastive_loss_knows_who_is_whose():
    torch.manual_seed(0)
    text = torch.randn(6, 8)
    assert losses.contrastive_loss(text, 3 * text, 0.01) < 0.01 < losses.contrastive_loss(text, text.roll(1, 0), 0.01)


def test_region_text_loss_is_equations_12_and_13():
    torch.manual_seed(0)
    scores, mask = 2 * torch.randn(3, 6), torch.rand(3, 6) < 0.4
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [True] + [False] * 5])
    focal_total = dice_total = 0.0
    for row in range(3):
        real = [i for i in range(6) if not padding[row, i]]
        focal, overlap, predicted, wanted = 0.0, 0.0, 0.0, 0.0
        for i in real:
            s, m = 1 / (1 + math.exp(-scores[row, i])), float(mask[row, i])
            p, alpha = (s, 0.25) if m else (1 - s, 0.75)
            focal += -alpha * (1 - p) ** 2 * math.log(p) / len(real)
            overlap, predicted, wanted = overlap + s * m, predicted + s, wanted + m
        focal_total, dice_total = focal_total + focal / 3, dice_total + (1 - (2 * overlap + 1) / (predicted + wanted + 1)) / 3
    for focal, dice in ((20, 2), (1, 0), (0, 1)):
        found = losses.region_text_loss(scores, mask, padding, focal, dice).item()
        assert found == pytest.approx(focal * focal_total + dice * dice_total, rel=1e-4)
    assert losses.region_text_loss(scores, mask, padding) == losses.region_text_loss(scores, mask, padding, 20.0, 2.0)


def test_region_text_loss_is_finite_and_ignores_padding():
    scores = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    mask, padding = torch.tensor([[False, True, True]]), torch.tensor([[False, False, True]])
    loss = losses.region_text_loss(scores, mask, padding)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and scores.grad[0, 2] == 0
    other = losses.region_text_loss(torch.tensor([[200.0, -200.0, 9.0]]), torch.tensor([[False, True, False]]), padding)
    assert torch.equal(loss, other)


def test_box_mask_is_the_cells_whose_centre_lies_in_the_box():
    side = 7
    torch.manual_seed(0)
    for cx, cy, w, h in torch.rand(60, 4).tolist():
        found = losses.box_mask(torch.tensor([[cx, cy, w, h]]), side)[0]
        cells = [(row, column) for row in range(side) for column in range(side)
                 if abs((column + 0.5) / side - cx) <= w / 2 and abs((row + 0.5) / side - cy) <= h / 2]
        cells = cells or [(int(cy * side), int(cx * side))]
        assert {divmod(i, side) for i in found.nonzero()[:, 0].tolist()} == set(cells)
    assert losses.box_mask(torch.tensor([[1.0, 1.0, 0.01, 0.01], [0.0, 0.0, 0.0, 0.0]]), side).nonzero().tolist() == [[0, 48], [1, 0]]


def test_total_loss_is_equations_14_and_15():
    torch.manual_seed(0)
    boxes, target = torch.rand(4, 4) + 0.1, torch.rand(4, 4) * 0.5 + 0.25
    found = SimpleNamespace(boxes=boxes, text=torch.randn(4, 8), image=torch.randn(4, 8), temperature=torch.tensor(0.1),
                            scores=torch.randn(4, 9), padding=torch.zeros(4, 9, dtype=torch.bool))
    smooth_l1 = sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (boxes - target).flatten().tolist()) / 4
    giou = sum(1 - giou_by_hand(b, t)[1] for b, t in zip(boxes.tolist(), target.tolist())) / 4
    clc = losses.contrastive_loss(found.text, found.image, 0.1).item()
    rtcc = losses.region_text_loss(found.scores, losses.box_mask(target, 3), found.padding, 20, 2).item()
    box = 2 * smooth_l1 + 2 * giou                                                                    # Eq. (14), Table 8
    assert losses.total_loss(found, target, 2, 2, 1, 20, 2).item() == pytest.approx(box + clc + rtcc, rel=1e-4)
    assert losses.total_loss(found, target, 2, 2, 0, 20, 2).item() == pytest.approx(box + rtcc, rel=1e-4)
    assert losses.total_loss(found, target, 2, 2, 1, 0, 0).item() == pytest.approx(box + clc, rel=1e-4)
    assert losses.total_loss(SimpleNamespace(boxes=boxes), target, 2, 2).item() == pytest.approx(box, rel=1e-4)
