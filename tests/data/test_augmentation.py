"""Batched augmentation against a loop over images with the same draws; the statistics of the draws."""

import math

import numpy as np
import pytest
import torch
from cuda_checks import nothing_waits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mining import examples
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from mgn.data import random_streams
from mgn.data.augmentation import MEAN, STD, Augmentation, Draws, normalise

MEAN32, STD32 = (np.array(v, np.float32) for v in (MEAN, STD))


def random_images(batch, height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, 3, height, width)).astype(np.uint8))


def augment_one(image, flip, top, left, box, padding):
    """The definition, for one (3, H, W) uint8 image: flip, pad with black, crop back, normalise, erase."""
    height, width = image.shape[1:]
    if flip:
        image = image[:, :, ::-1]
    padded = np.zeros((3, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, padding:padding + height, padding:padding + width] = image
    crop = padded[:, top:top + height, left:left + width].astype(np.float32)
    result = (crop - MEAN32[:, None, None]) / STD32[:, None, None]
    y1, x1, y2, x2 = (max(edge, 0) for edge in box)
    result[:, y1:y2, x1:x2] = 0
    return result


def augment_each(images, draws, padding):
    return np.stack([augment_one(image.numpy(), bool(draws.flip[i]), int(draws.top[i]), int(draws.left[i]),
                                 draws.erase[i].tolist(), padding) for i, image in enumerate(images)])


def assert_same_bits(got, want):
    """As numbers −0 and 0 would be equal."""
    np.testing.assert_array_equal(got.numpy().view(np.int32), np.asarray(want).view(np.int32))


def all_draws(steps=40, batch=50, size=(384, 128), seed=0, **options):
    augmentation = Augmentation(**options)
    parts = [augmentation.draw(seed, step, batch, size) for step in range(steps)]
    return Draws(*(torch.cat(field) for field in zip(*parts)))


@pytest.mark.parametrize('batch', [1, 31, 33, 129])
@pytest.mark.parametrize('size, padding', [((24, 12), 10), ((24, 12), 0), ((7, 9), 3), ((1, 1), 2)])
def test_a_batch_equals_the_loop_over_its_images(batch, size, padding):
    augmentation = Augmentation(padding=padding)
    images = random_images(batch, *size)
    draws = augmentation.draw(1, 2, batch, size)
    got = augmentation(images, draws)
    assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(got, augment_each(images, draws, padding))


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('top, left', [(0, 0), (0, 6), (6, 0), (6, 6), (3, 1)])
@pytest.mark.parametrize('box', [(0, 0, 0, 0), (0, 0, 8, 5), (2, 1, 3, 4), (7, 4, 8, 5), (5, 0, 5, 3), (5, 3, 8, 3)])
def test_every_corner_of_crop_and_box_is_right(flip, top, left, box):
    images = random_images(1, 8, 5)
    draws = Draws(torch.tensor([flip]), torch.tensor([top]), torch.tensor([left]), torch.tensor([box]))
    got = Augmentation(padding=3)(images, draws)
    assert_same_bits(got, augment_each(images, draws, 3))


def test_each_image_has_its_own_draw():
    images = random_images(1, 16, 8).expand(6, -1, -1, -1)
    draws = Draws(torch.tensor([False, True] * 3), torch.tensor([0, 4, 2, 2, 2, 1]), torch.tensor([4, 0, 2, 2, 3, 1]),
                  torch.tensor([[0, 0, 0, 0]] * 5 + [[1, 1, 9, 5]]))
    got = Augmentation(padding=2)(images, draws)
    assert_same_bits(got, augment_each(images, draws, 2))
    assert len({image.numpy().tobytes() for image in got}) == 6


def test_images_of_any_memory_layout_are_taken_and_left_as_they_were():
    images = random_images(5, 12, 20, seed=4)
    augmentation = Augmentation(padding=2)
    draws = augmentation.draw(0, 0, 5, (12, 20))
    expected = augmentation(images, draws)
    strided = random_images(10, 20, 12)[::2].transpose(2, 3).copy_(images)
    for layout in (images.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(augmentation(layout, draws), expected)
    assert torch.equal(images, random_images(5, 12, 20, seed=4))


def test_the_draws_of_a_part_are_those_of_the_whole_batch():
    whole, part = (Augmentation().draw(3, 5, count, (24, 12), first) for count, first in ((12, 0), (4, 6)))
    assert all(torch.equal(of_part, of_whole[6:10]) for of_part, of_whole in zip(part, whole))


def test_unless_bound_half_of_the_images_are_flipped_half_erased_and_crops_move_by_10():
    draws = all_draws()
    assert draws.top.min() == draws.left.min() == 0 and draws.top.max() == draws.left.max() == 20
    for share in (draws.flip, draws.erase.any(1)):
        assert 0.45 < share.double().mean() < 0.55  # 4 standard deviations


def test_an_empty_batch_stays_empty():
    none = torch.empty(0, dtype=torch.int64)
    draws = Draws(none.bool(), none, none, none.reshape(0, 4))
    assert Augmentation()(random_images(0, 8, 4), draws).shape == (0, 3, 8, 4)
    assert normalise(random_images(0, 8, 4)).shape == (0, 3, 8, 4)


def test_normalising_gives_imagenets_mean_0_and_deviation_1():
    images = random_images(2, 3, 4)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    expected = (images.double() - mean) / std
    assert normalise(images).dtype == torch.float32
    torch.testing.assert_close(normalise(images).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(MEAN) / 255, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(torch.tensor(STD) / 255, torch.tensor([0.229, 0.224, 0.225]))


@st.composite
def cases(draw):
    """(images, Draws, padding): sizes around those of vectors, any layout; boxes empty, whole, reversed, outside."""
    batch, height, width = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 45))
    padding, stride, seed = draw(st.integers(0, 12)), draw(st.sampled_from([1, 2])), draw(st.integers(0, 2**31))
    images = random_images(2 * batch, height, width, seed)[::stride][:batch]
    layout = draw(st.sampled_from([(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)]))  # the dimensions' order in memory
    images = images.permute(layout).contiguous().permute([layout.index(dim) for dim in range(4)])

    def each(numbers, *shape):
        count = batch * math.prod(shape)
        values = draw(st.lists(numbers, min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.int64).reshape(batch, *shape)
    box = st.sampled_from([-3, 0, 1, 4, height, width, 60]) | st.integers(0, max(height, width))
    offset = st.integers(0, 2 * padding)
    return images, Draws(each(st.booleans()).bool(), each(offset), each(offset), each(box, 4)), padding


@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_anything_is_augmented_as_by_the_loop(case):
    images, draws, padding = case
    got = Augmentation(padding=padding)(images, draws)
    if len(images):
        assert_same_bits(got, augment_each(images, draws, padding))
    assert got.shape == images.shape


def test_the_number_of_threads_changes_no_bit():
    images, augmentation, before = random_images(9, 96, 64), Augmentation(), torch.get_num_threads()
    draws, results = augmentation.draw(0, 0, 9, (96, 64)), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(augmentation(images, draws))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


IMAGES = random_images(2, 6, 5)


@pytest.mark.parametrize('wrong, message', [
    (IMAGES.float(), 'Images must .* these are .* torch.float32; mgn.data.images.to_batch'),
    (IMAGES[:, :2], r'Images must be \(B, 3, H, W\) and torch.uint8, but these are \(2, 2, 6, 5\)')])
def test_other_images_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        normalise(wrong)


def test_a_gpu_gives_the_same_and_is_not_waited_for(gpu, device):
    augmentation, images = Augmentation(padding=3), random_images(33, 24, 12)
    draws = augmentation.draw(0, 0, 33, (24, 12))
    moved = images.to(device), Draws(*(field.to(device) for field in draws))
    augmentation(*moved)  # mean and deviation are there from now on
    with nothing_waits():
        got = augmentation(*moved)
    assert_same_bits(got.cpu(), augmentation(images, draws))


def test_draws_are_functions_of_seed_step_and_position_alone():
    augmentation, size = Augmentation(), (384, 128)
    whole = augmentation.draw(3, 5, 129, size)
    np.random.seed(0)
    torch.manual_seed(0)
    for batch in (1, 31, 33, 129):
        part = augmentation.draw(3, 5, batch, size)
        assert all(torch.equal(a, b[:batch]) for a, b in zip(part, whole))
    for other in (augmentation.draw(4, 5, 129, size), augmentation.draw(3, 6, 129, size)):
        assert not any(torch.equal(a, b) for a, b in zip(other, whole))


def test_draws_have_the_documented_types():
    draws = Augmentation().draw(0, 0, 33, (24, 12))
    assert [field.dtype for field in draws] == [torch.bool, torch.int64, torch.int64, torch.int64]
    assert [tuple(field.shape) for field in draws] == [(33,), (33,), (33,), (33, 4)]


@pytest.mark.parametrize('probability', [0.5, 0.2])
def test_flips_and_erasing_happen_as_often_as_bound_and_independently(probability):
    draws = all_draws(flip_probability=probability, erasing_probability=probability)
    erased = draws.erase.any(1)
    for rate, expected in ((draws.flip, probability), (erased, probability), (draws.flip & erased, probability ** 2)):
        assert abs(rate.float().mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / 2000)


@pytest.mark.parametrize('padding', [1, 10])
def test_crops_are_uniform_over_all_offsets(padding):
    n = 2 * padding + 1
    draws = all_draws(padding=padding)
    for offsets in (draws.top, draws.left):
        counts = torch.bincount(offsets, minlength=n)
        assert len(counts) == n
        assert (abs(counts - 2000 / n) < 5 * math.sqrt(2000 / n)).all()
    assert abs(np.corrcoef(draws.top, draws.left)[0, 1]) < 0.1


def test_erasing_covers_2_to_40_percent_with_aspects_of_three_tenths_to_their_inverse():
    height, width = 384, 128
    top, left, bottom, right = all_draws(erasing_probability=1.0).erase.T.double()
    h, w = bottom - top, right - left
    assert (h > 0).all() and (w > 0).all()
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    # Height and width are rounded to pixels: each is half a pixel off at most.
    assert ((h + 0.5) * (w + 0.5) >= 0.02 * height * width).all()
    assert ((h - 0.5) * (w - 0.5) <= 0.4 * height * width).all()
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all() and ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all()
    assert (h * w / height / width).min() < 0.03 and (h * w / height / width).max() > 0.37
    assert (h / w).min() < 0.5 and (h / w).max() > 3.2
    assert top.min() == 0 and left.min() == 0 and bottom.max() == height and right.max() == width


def test_erasing_draws_area_and_aspect_uniformly_where_every_box_fits():
    draws = all_draws(size=(400, 400), erasing_probability=1.0, erasing_area=(0.02, 0.2))
    top, left, bottom, right = draws.erase.T
    area = (bottom - top).double() * (right - left) / 400 / 400
    aspect = (bottom - top).double() / (right - left)
    for values, low, high in ((area, 0.02, 0.2), (aspect, 0.3, 1 / 0.3)):
        standard = (values - low) / (high - low)
        assert abs(standard.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)
        assert abs((standard < 0.25).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 1), (31, 33)])
def test_boxes_stay_inside_tiny_images(size):
    top, left, bottom, right = all_draws(steps=4, size=size, erasing_probability=1.0).erase.T
    assert (top >= 0).all() and (left >= 0).all() and (top <= bottom).all() and (left <= right).all()
    assert (bottom <= size[0]).all() and (right <= size[1]).all()


def test_a_range_whose_ends_are_exchanged_is_the_same_range():
    draws = [all_draws(steps=1, erasing_probability=1.0, erasing_area=area, erasing_aspect=aspect).erase
             for area, aspect in (((0.02, 0.4), (0.3, 3.0)), ((0.4, 0.02), (3.0, 0.3)))]
    assert torch.equal(*draws) and draws[0].any()


def test_a_box_that_can_never_fit_erases_nothing():
    draws = all_draws(steps=1, size=(8, 8), erasing_probability=1.0, erasing_area=(1.0, 1.0), erasing_aspect=(1.0, 1.0))
    assert not draws.erase.any()


def test_probabilities_0_and_padding_0_leave_normalisation_alone():
    augmentation = Augmentation(flip_probability=0.0, padding=0, erasing_probability=0.0)
    images = random_images(33, 16, 8)
    draws = augmentation.draw(0, 0, 33, (16, 8))
    assert not any(field.any() for field in draws)
    assert torch.equal(augmentation(images, draws), normalise(images))


def test_probabilities_1_flip_and_erase_every_image():
    draws = all_draws(steps=4, flip_probability=1.0, erasing_probability=1.0)
    assert draws.flip.all() and draws.erase.any(1).all()


def test_the_ends_of_all_ranges_are_drawn():
    Augmentation(0, 0, 0, (0.1, 0.1), (1, 1)).draw(0, 0, 3, (16, 8))
    Augmentation(1, 1000, 1.0, (1e-9, 1), (1e-3, 1000)).draw(2 ** 64 - 1, 0, 3, (16, 8))


def test_auto_augment_is_that_of_torchvision_with_imagenets_policy():
    image = random_images(1, 24, 12)[0]
    for step in range(8):
        rng = random_streams.generator(3, random_streams.AUTO_AUGMENT, step, 5)
        rng.random()  # whether the image is changed
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2 ** 63)))
            expected = AutoAugment(AutoAugmentPolicy.IMAGENET)(image)
        assert torch.equal(Augmentation(auto_augment_probability=1.0).auto_augment(image, 3, step, 5), expected)
