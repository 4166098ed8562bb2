"""losses.py against literal loops over the formulas of both papers."""
import math
import random
from types import SimpleNamespace

import pytest
import torch

import losses


# --- Boxes ----------------------------------------------------------------------------------------


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def literal_iou_and_giou(a, b):
    """The definition of Rezatofighi et al., in plain numbers."""
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)

    overlap_width = max(0, min(ax2, bx2) - max(ax1, bx1))
    overlap_height = max(0, min(ay2, by2) - max(ay1, by1))
    intersection = overlap_width * overlap_height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))

    iou = intersection / union
    return iou, iou - (hull - union) / hull


def literal_smooth_l1(x, y, beta=0.0):
    """Smooth L1; with β = 0 it is plain L1."""
    d = abs(x - y)
    if d < beta:
        return 0.5 * d * d / beta
    return d - 0.5 * beta


def random_boxes(count, seed):
    rng = random.Random(seed)
    boxes = []
    for _ in range(count):
        center = [rng.random(), rng.random()]
        size = [rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6)]
        boxes.append(center + size)
    return boxes


def test_iou_and_giou_follow_their_definition():
    """IoU and GIoU of 200 random pairs equal the definition."""
    a = random_boxes(200, seed=1)
    b = random_boxes(200, seed=2)
    iou, giou = losses.iou_and_giou(torch.tensor(a), torch.tensor(b))
    for i in range(200):
        expected_iou, expected_giou = literal_iou_and_giou(a[i], b[i])
        assert iou[i].item() == pytest.approx(expected_iou, abs=1e-5)
        assert giou[i].item() == pytest.approx(expected_giou, abs=1e-5)


@pytest.mark.parametrize("beta", [0, 0.1, 1])
@pytest.mark.parametrize("l1, giou", [(1, 1), (2, 2), (1, 0), (0, 1)])
def test_box_loss_is_m2ist_eq_6(l1, giou, beta):
    """The box loss is the mean over the batch of l1 · smooth L1 + giou · (1 - GIoU)."""
    pred = random_boxes(50, seed=3)
    target = random_boxes(50, seed=4)

    total = 0.0
    for p, t in zip(pred, target):
        for x, y in zip(p, t):
            total += l1 * literal_smooth_l1(x, y, beta)
        _, overlap = literal_iou_and_giou(p, t)
        total += giou * (1 - overlap)

    loss = losses.box_loss(torch.tensor(pred), torch.tensor(target), l1, giou, beta)
    assert loss.item() == pytest.approx(total / 50, rel=1e-5)


def test_smooth_l1_is_plain_l1_by_default():
    """D1: without a β, four errors of 0.05 cost 0.2; with β = 1 they cost 0.005."""
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    pred = target + 0.05
    assert losses.box_loss(pred, target, giou=0).item() == pytest.approx(0.2, rel=1e-5)
    assert losses.box_loss(pred, target, giou=0, beta=1).item() == pytest.approx(0.005, rel=1e-5)


def test_a_prediction_is_cut_off_at_the_border_of_the_square():
    """The part of a box outside of [0, 1] goes, and a box inside stays as it is."""
    boxes = torch.tensor([[0.1, 0.5, 0.4, 0.2], [0.9, 1.0, 0.4, 0.2], [0.5, 0.5, 0.2, 0.4]])
    expected = torch.tensor([[0.15, 0.5, 0.3, 0.2], [0.85, 0.95, 0.3, 0.1], [0.5, 0.5, 0.2, 0.4]])
    assert torch.allclose(losses.clamp_to_square(boxes), expected)


def test_the_loss_takes_a_box_that_reaches_out_of_the_square_whole():
    """What lies outside of the square costs, so that there is a gradient back."""
    target = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    pred = torch.tensor([[0.0, 0.5, 0.4, 0.2]])    # cut off, this box would be the target
    assert torch.allclose(losses.clamp_to_square(pred), target)
    assert losses.box_loss(pred, target).item() > 0.5


def test_a_perfect_box_costs_nothing():
    """The loss of a box against itself is 0."""
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    assert losses.box_loss(box, box).item() == pytest.approx(0, abs=1e-6)


def test_a_box_that_is_half_covered_has_an_iou_of_a_half():
    """A box and its inner half have IoU 0.5, the threshold of both papers' accuracy."""
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    half = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    iou, _ = losses.iou_and_giou(box, half)
    assert iou.item() == pytest.approx(0.5)


STRANGE_BOXES = [
    [0.5, 0.5, 0, 0],
    [0.2, 0.2, 0, 0],
    [0, 0, 1, 1],
    [1, 1, 0, 1],
    [0.5, 0.5, -0.1, -0.1],
    [0.5, 0.5, 1e-30, 1e-30],
]


@pytest.mark.parametrize("pred", STRANGE_BOXES)
@pytest.mark.parametrize("target", [[0.5, 0.5, 0.3, 0.3], [0.2, 0.2, 0, 0]])
def test_any_box_has_a_finite_loss_and_gradient(pred, target):
    """Boxes without area, and boxes of negative size, have finite losses and gradients."""
    pred = torch.tensor([pred], dtype=torch.float32, requires_grad=True)
    target = torch.tensor([target], dtype=torch.float32)
    loss = losses.box_loss(pred, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """A box of 2 x 2 pixels of 640 has an area of 1e-5, whose products underflow in float16."""
    box = torch.tensor([[0.5, 0.5, 2 / 640, 2 / 640]], dtype=dtype)
    iou, giou = losses.iou_and_giou(box, box)
    assert iou.dtype == torch.float32
    assert giou.dtype == torch.float32
    assert losses.box_loss(box, box).dtype == torch.float32
    assert iou.item() == pytest.approx(1, abs=1e-3)


# --- HiVG's contrastive constraint ----------------------------------------------------------------


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    length_a = math.sqrt(sum(x * x for x in a))
    length_b = math.sqrt(sum(y * y for y in b))
    return dot / length_a / length_b


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_contrastive_loss_is_hivg_eqs_9_to_11(temperature):
    """The contrastive loss is the mean of the text-to-image and the image-to-text loss."""
    torch.manual_seed(0)
    N = 5
    text = torch.randn(N, 4).double()
    image = torch.randn(N, 4).double()
    t = text.tolist()
    v = image.tolist()

    t2i = 0.0
    i2t = 0.0
    for i in range(N):
        positive = math.exp(cosine(t[i], v[i]) / temperature)
        images = sum(math.exp(cosine(t[i], v[j]) / temperature) for j in range(N))
        texts = sum(math.exp(cosine(v[i], t[j]) / temperature) for j in range(N))
        t2i += -math.log(positive / images) / N    # Eq. (9)
        i2t += -math.log(positive / texts) / N     # Eq. (10)
    expected = pytest.approx((t2i + i2t) / 2, rel=1e-4)    # Eq. (11)

    assert losses.contrastive_loss(text, image, temperature).item() == expected
    assert losses.contrastive_loss(text, image, torch.tensor(temperature)).item() == expected


def test_contrastive_loss_tells_right_pairs_from_wrong_ones():
    """Embeddings in the right order cost little, and embeddings shifted by one row cost much."""
    torch.manual_seed(0)
    text = torch.randn(6, 8)
    right = losses.contrastive_loss(text, 3 * text, 0.01)
    wrong = losses.contrastive_loss(text, text.roll(1, 0), 0.01)
    assert right < 0.01 < wrong


# --- HiVG's region-text constraint ----------------------------------------------------------------


def literal_focal_and_dice(scores, mask, padding):
    """The two losses of one image; padded tokens are left out of all sums."""
    real = [i for i in range(len(scores)) if not padding[i]]
    focal = 0.0
    overlap = 0.0
    predicted = 0.0
    wanted = 0.0
    for i in real:
        s = 1 / (1 + math.exp(-scores[i]))    # Eq. (12)
        if mask[i]:
            focal += -0.25 * (1 - s) ** 2 * math.log(s) / len(real)
            overlap += s
            wanted += 1
        else:
            focal += -0.75 * s ** 2 * math.log(1 - s) / len(real)
        predicted += s
    dice = 1 - (2 * overlap + 1) / (predicted + wanted + 1)
    return focal, dice


@pytest.mark.parametrize("focal, dice", [(20, 2), (1, 0), (0, 1)])
def test_region_text_loss_is_hivg_eqs_12_and_13(focal, dice):
    """The region-text loss is λ_focal · focal + λ_dice · dice, the mean over the batch."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(3, 6)
    mask = torch.rand(3, 6) < 0.4
    padding = torch.tensor([
        [False, False, False, False, False, False],
        [False, False, False, False, True, True],
        [True, False, False, False, False, False],
    ])

    expected = 0.0
    for b in range(3):
        focal_loss, dice_loss = literal_focal_and_dice(
            scores[b].tolist(), mask[b].tolist(), padding[b].tolist())
        expected += (focal * focal_loss + dice * dice_loss) / 3    # Eq. (13)

    loss = losses.region_text_loss(scores, mask, padding, focal, dice).item()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_region_text_loss_has_the_weights_of_table_8_by_default():
    """λ_focal is 20 and λ_dice is 2."""
    torch.manual_seed(0)
    scores = torch.randn(3, 6)
    mask = torch.rand(3, 6) < 0.4
    padding = torch.zeros(3, 6, dtype=torch.bool)
    default = losses.region_text_loss(scores, mask, padding)
    assert default == losses.region_text_loss(scores, mask, padding, 20.0, 2.0)


def test_region_text_loss_is_finite_for_huge_scores():
    """Scores of ±200 overflow a plain sigmoid's logarithm, and give finite losses and gradients."""
    scores = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    padding = torch.tensor([[False, False, True]])
    loss = losses.region_text_loss(scores, mask, padding)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_region_text_loss_is_finite_where_a_picture_is_all_padding():
    """Such a picture has no focal loss and no gradient, and the other picture has what it has
    beside any other."""
    torch.manual_seed(0)
    scores = torch.randn(2, 6, requires_grad=True)
    mask = torch.rand(2, 6) < 0.5
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0] = True
    loss = losses.region_text_loss(scores, mask, padding)
    loss.backward()
    alone = losses.region_text_loss(scores[1:], mask[1:], padding[1:])
    assert loss.item() == pytest.approx(alone.item() / 2, rel=1e-6)
    assert torch.equal(scores.grad[0], torch.zeros(6))
    assert scores.grad[1].isfinite().all() and scores.grad[1].abs().max() > 0


def test_region_text_loss_ignores_padding():
    """A padded token has no gradient, and neither its score nor its mask changes the loss."""
    padding = torch.tensor([[False, False, True]])
    scores = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = losses.region_text_loss(scores, torch.tensor([[False, True, True]]), padding)
    loss.backward()
    assert scores.grad[0, 2] == 0

    other_scores = torch.tensor([[200.0, -200.0, 9.0]])
    other_mask = torch.tensor([[False, True, False]])
    assert torch.equal(loss, losses.region_text_loss(other_scores, other_mask, padding))


def test_region_text_scores_are_those_of_hivg_eq_12():
    """A score is the dot product of the text at unit length and the MLP of the image token."""
    torch.manual_seed(0)
    region = losses.RegionText(dim=4, hidden=6)
    t = torch.randn(2, 4)
    v = torch.randn(2, 3, 4)
    scores = region(t, v)
    assert scores.shape == (2, 3)
    for b in range(2):
        unit = t[b] / t[b].norm()
        for i in range(3):
            h = region.fc1(region.norm(v[b, i]))
            h = h / (1 + torch.exp(-1.702 * h))    # QuickGELU
            expected = (unit * region.fc2(h)).sum()
            assert scores[b, i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_box_mask_is_the_cells_whose_centre_lies_in_the_box():
    """A cell is positive if its centre is in the box; a box without a centre gets its own cell."""
    side = 7
    torch.manual_seed(0)
    for cx, cy, w, h in torch.rand(60, 4).tolist():
        expected = set()
        for row in range(side):
            for column in range(side):
                inside_x = abs((column + 0.5) / side - cx) <= w / 2
                inside_y = abs((row + 0.5) / side - cy) <= h / 2
                if inside_x and inside_y:
                    expected.add(row * side + column)
        if not expected:
            expected.add(int(cy * side) * side + int(cx * side))

        mask = losses.box_mask(torch.tensor([[cx, cy, w, h]]), side)[0]
        assert set(mask.nonzero()[:, 0].tolist()) == expected


def test_box_mask_of_a_box_in_a_corner_stays_in_the_grid():
    """A box without area at (1, 1) takes the last cell, and one at (0, 0) takes the first."""
    boxes = torch.tensor([[1.0, 1.0, 0.01, 0.01], [0.0, 0.0, 0.0, 0.0]])
    assert losses.box_mask(boxes, 7).nonzero().tolist() == [[0, 48], [1, 0]]


# --- Attention in the box -------------------------------------------------------------------------


def test_the_attention_loss_is_the_logarithm_of_the_share_in_the_box():
    """[D49], as a loop over samples and cells; the mean over the batch."""
    torch.manual_seed(0)
    attention = torch.rand(3, 9).softmax(-1) * 0.8    # the rest is on the text
    mask = torch.rand(3, 9) < 0.4
    mask[:, 0] = True
    expected = 0.0
    for looks, inside in zip(attention.tolist(), mask.tolist()):
        share = 0.0
        for look, is_inside in zip(looks, inside):
            if is_inside:
                share += look
        expected -= math.log(share) / 3
    assert losses.attention_loss(attention, mask).item() == pytest.approx(expected, rel=1e-5)


def test_the_attention_loss_is_finite_where_nothing_looks_into_the_box():
    attention = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = losses.attention_loss(attention, torch.tensor([[True, False]]))
    loss.backward()
    assert loss.isfinite()
    assert attention.grad.isfinite().all()


# --- The sum --------------------------------------------------------------------------------------


def test_total_loss_is_hivg_eqs_14_and_15():
    """The total is the box loss plus the two constraints; a coefficient of 0 leaves a term out."""
    torch.manual_seed(0)
    boxes = torch.rand(4, 4) + 0.1
    target = torch.rand(4, 4) * 0.5 + 0.25
    found = SimpleNamespace(
        boxes=boxes,
        text=torch.randn(4, 8),
        image=torch.randn(4, 8),
        temperature=torch.tensor(0.1),
        scores=torch.randn(4, 9),
        padding=torch.zeros(4, 9, dtype=torch.bool),
    )

    box = 0.0    # Eq. (14) with the weights of Table 8
    for b, t in zip(boxes.tolist(), target.tolist()):
        for x, y in zip(b, t):
            box += 2 * literal_smooth_l1(x, y) / 4
        _, overlap = literal_iou_and_giou(b, t)
        box += 2 * (1 - overlap) / 4
    clc = losses.contrastive_loss(found.text, found.image, 0.1).item()
    mask = losses.box_mask(target, 3)
    rtcc = losses.region_text_loss(found.scores, mask, found.padding, 20, 2).item()

    def total(*coefficients):
        return losses.total_loss(found, target, *coefficients).item()

    assert total(2, 2, 1, 20, 2) == pytest.approx(box + clc + rtcc, rel=1e-4)    # Eq. (15)
    assert total(2, 2, 0, 20, 2) == pytest.approx(box + rtcc, rel=1e-4)
    assert total(2, 2, 1, 0, 0) == pytest.approx(box + clc, rel=1e-4)


def test_the_parts_of_the_loss_are_named_and_sum_to_it():
    """Without a constraint its part is not there, and the total is the sum of the parts."""
    torch.manual_seed(0)
    found = SimpleNamespace(
        boxes=torch.rand(4, 4),
        text=torch.randn(4, 8),
        image=torch.randn(4, 8),
        temperature=torch.tensor(0.1),
        scores=torch.randn(4, 9),
        padding=torch.zeros(4, 9, dtype=torch.bool),
        attention=torch.rand(4, 9).softmax(-1),
    )
    target = torch.rand(4, 4)
    weights = dict(l1=2, giou=3, contrast=0.5, focal=20, dice=2, beta=0.1, attention=0.3)
    parts = losses.loss_parts(found, target, **weights)
    assert list(parts) == ["l1", "giou", "contrast", "region_text", "attention"]
    looks = losses.attention_loss(found.attention, losses.box_mask(target, 3))
    assert parts["attention"] == 0.3 * looks
    assert parts["l1"] == losses.box_loss(found.boxes, target, l1=2, giou=0, beta=0.1)
    assert parts["giou"] == losses.box_loss(found.boxes, target, l1=0, giou=3)
    total = losses.total_loss(found, target, **weights)
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()), rel=1e-6)
    assert list(losses.loss_parts(found, target, 1, 1)) == ["l1", "giou"]


def test_total_loss_without_constraints_needs_boxes_alone():
    """With the last three coefficients at 0 the total is M²IST Eq. (6)."""
    torch.manual_seed(0)
    boxes = torch.rand(4, 4) + 0.1
    target = torch.rand(4, 4) * 0.5 + 0.25
    loss = losses.total_loss(SimpleNamespace(boxes=boxes), target, 2, 2)
    assert torch.equal(loss, losses.box_loss(boxes, target, 2, 2))
