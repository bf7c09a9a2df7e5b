"""Images → batches: resizing, against Pillow; what replaces an unreadable image; batches made by worker processes."""

import gin
import numpy as np
import pytest
import torch
from conftest import difference, read_image, smooth_pixels, write_image
from PIL import Image

from mgn.data.augmentation import Augmentation
from mgn.data.datasets import Sample
from mgn.data.images import TestBatches as EvaluationBatches  # under its own name pytest would collect it
from mgn.data.images import TrainBatches, to_batch
from mgn.data.loader import load_batches
from mgn.data.sampler import IdentitySampler
from mgn.ops.errors import UserError

CPU = torch.device('cpu')
SIZE = (16, 8)


def write_set(folder, identities=4, images=3, broken=()):
    """Samples of `identities` with `images` files each; those whose index is in `broken` hold text."""
    samples = []
    for i in range(identities * images):
        path = folder / f'{i // images + 1:04d}_c{i % 2 + 1}s1_{i:06d}.jpg'
        write_image(path, i, size=(24, 12))
        if i in broken:
            path.write_text('no image')
        samples.append(Sample(str(path), i // images + 1, i % 2 + 1))
    return samples


def make_train_batches(samples, P=2, K=2, seed=0):
    labels = [sample.pid - 1 for sample in samples]
    sampler = IdentitySampler(labels, [sample.camid for sample in samples], P, K, seed)
    return TrainBatches(samples, labels, sampler, Augmentation(padding=2), SIZE, range(sampler.P * sampler.K))


def same_batch(a, b):
    return (torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.unreadable == b.unreadable
            and all(torch.equal(x, y) for x, y in zip(a.draws, b.draws)))


@pytest.mark.parametrize('source', [(128, 64), (31, 33), (150, 350), (3, 1)])
@pytest.mark.parametrize('target', [(384, 128), (128, 64), (33, 31), (1, 1)])
def test_resizing_equals_pils_antialiased_bicubic_within_two_levels(tmp_path, source, target):
    path = tmp_path / 'image.png'
    Image.fromarray(smooth_pixels(*source, amplitude=60)).save(path)  # where overshoot is clipped the two differ more
    expected = np.asarray(Image.open(path).resize(target[::-1], Image.BICUBIC)).astype(int)
    image = read_image(str(path), target)
    assert image.shape == (3, *target)
    assert difference(image, expected) <= 2


def test_a_batch_holds_what_each_of_its_images_alone_becomes():
    """Of several sizes in turn, and all of one size."""
    sizes = (31, 33), SIZE, (12, 24), (1, 1)
    images = [torch.from_numpy(smooth_pixels(*sizes[i % 4], seed=i)).permute(2, 0, 1) for i in range(35)]
    for part in (images, *(images[i::4] for i in range(4))):
        batch = to_batch(part, SIZE)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, torch.cat([to_batch([image], SIZE) for image in part]))


def test_a_training_batch_holds_the_samplers_images_labels_and_draws(tmp_path):
    samples = write_set(tmp_path)
    train = make_train_batches(samples, P=3, K=2, seed=3)
    for step in (0, 1, 7):
        indices, batch = train.sampler.batch(step), train[step]
        assert torch.equal(batch.images, torch.stack([read_image(samples[i].path, SIZE) for i in indices]))
        assert batch.labels.tolist() == [samples[i].pid - 1 for i in indices]
        assert batch.labels.dtype == torch.int64 and batch.images.dtype == torch.uint8 and batch.unreadable == []
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(batch.draws, train.augmentation.draw(3, step, 6, SIZE)))


@pytest.mark.parametrize('images, broken', [(2, [0]), (2, [1]), (3, [0]), (3, [0, 2]), (5, [0, 1, 2, 4]), (5, [3])])
def test_an_unreadable_image_is_replaced_by_another_of_its_identity_and_reported(tmp_path, images, broken):
    samples = write_set(tmp_path, identities=2, images=images, broken=broken)
    train = make_train_batches(samples, K=1)
    good = [i for i in range(images) if i not in broken]
    met = set()
    for step in range(20):
        batch, indices = train[step], train.sampler.batch(step)
        position = next(p for p, i in enumerate(indices) if i < images)
        readable = [read_image(samples[i].path, SIZE) for i in good]
        assert batch.labels[position] == 0
        assert any(torch.equal(batch.images[position], image) for image in readable)
        names = [samples[i].path for i in broken if any(samples[i].path in text for text in batch.unreadable)]
        assert len(names) == len(batch.unreadable) == len(set(batch.unreadable))
        assert (samples[indices[position]].path in names) == (indices[position] in broken)
        met.add(indices[position])
        assert same_batch(batch, train[step])
    assert met & set(broken)


def test_every_readable_image_serves_as_a_replacement_and_each_position_draws_its_own(tmp_path):
    samples = write_set(tmp_path, identities=2, images=5, broken=[0])
    train = make_train_batches(samples, K=1)
    images = [train.decode(sample.path) for sample in samples[1:5]]

    def replacements(position):
        found = [train.image(0, step, position, {}) for step in range(40)]
        return [next(i for i, image in enumerate(images) if torch.equal(image, f)) for f in found]

    assert set(replacements(0)) == set(range(4))
    assert replacements(0) == replacements(0) != replacements(1)


def test_an_unreadable_image_met_twice_in_a_batch_is_reported_once(tmp_path):
    samples = write_set(tmp_path, identities=2, images=2, broken=[0])
    reports = [make_train_batches(samples, K=6)[step].unreadable for step in range(5)]
    assert [len(report) for report in reports] == [1] * 5


@pytest.mark.parametrize('images', [1, 2, 4])
def test_an_identity_without_a_readable_image_is_an_error_that_names_all(tmp_path, images):
    samples = write_set(tmp_path, identities=2, images=images, broken=range(images))
    with pytest.raises(ValueError, match='No image of identity 1 can be read') as error:
        make_train_batches(samples)[0]
    assert all(sample.path in str(error.value) for sample in samples[:images])


@pytest.mark.parametrize('n, batch_size', [(1, 1), (1, 4), (4, 4), (5, 4), (9, 2)])
def test_evaluation_batches_keep_the_order_and_the_short_tail(tmp_path, n, batch_size):
    samples = write_set(tmp_path, identities=n, images=1)
    dataset = EvaluationBatches(samples, SIZE, batch_size)
    items = [dataset[start] for start in range(0, n, batch_size)]
    assert [len(item.images) for item in items] == [len(samples[i:i + batch_size]) for i in range(0, n, batch_size)]
    assert torch.equal(torch.cat([item.images for item in items]),
                       torch.stack([read_image(sample.path, SIZE) for sample in samples]))
    assert all(item.unreadable == {} for item in items)


def test_evaluation_batches_report_what_is_unreadable(tmp_path):
    samples = write_set(tmp_path, identities=5, images=1, broken=[1, 2, 3])
    items = [EvaluationBatches(samples, SIZE, 2)[start] for start in (0, 2, 4)]
    assert [item.images.shape for item in items] == [(1, 3, *SIZE), (0, 3, *SIZE), (1, 3, *SIZE)]
    assert [[samples[i].path in text for text, i in zip(item.unreadable.values(), broken)] for item, broken in
            zip(items, ([1], [2, 3], []))] == [[True], [True, True], []]


def test_no_samples_make_an_empty_evaluation_batch():
    assert EvaluationBatches([], SIZE, 4)[0].images.shape == (0, 3, *SIZE)


def in_workers(dataset, items, context):
    if context == 'fork':
        return list(load_batches(dataset, items, 2, CPU))
    return list(torch.utils.data.DataLoader(dataset, None, sampler=items, num_workers=2,
                                            multiprocessing_context=context))


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_worker_processes_change_no_training_batch(tmp_path, context):
    gin.parse_config('Augmentation.flip_probability = 1.0')  # spawned processes hold no bindings
    try:
        dataset = make_train_batches(write_set(tmp_path, images=4, broken=[4]))
    finally:
        gin.clear_config()
    expected = list(load_batches(dataset, range(3, 11), 0, CPU))
    got = in_workers(dataset, range(3, 11), context)
    assert len(got) == len(expected) == 8
    assert all(same_batch(a, b) and same_batch(a, dataset[step]) for a, b, step in zip(got, expected, range(3, 11)))
    assert all(batch.draws.flip.all() for batch in got)
    assert any(batch.unreadable for batch in got)


def test_a_bound_limit_of_pixels_reaches_worker_processes(tmp_path):
    gin.parse_config('Decoder.max_pixels = 287')
    try:
        dataset = EvaluationBatches(write_set(tmp_path), SIZE, 12)
        train = make_train_batches(write_set(tmp_path))
    finally:
        gin.clear_config()
    batch, = in_workers(dataset, range(1), 'spawn')
    assert len(batch.unreadable) == 12 and all('more than 287 pixels' in reason for reason in batch.unreadable.values())
    assert 'more than 287 pixels' in pytest.raises(UserError, train.__getitem__, 0).value.message


def test_worker_processes_change_no_evaluation_batch(tmp_path):
    dataset = EvaluationBatches(write_set(tmp_path, broken=[4]), SIZE, 5)
    expected, got = list(load_batches(dataset, range(0, 12, 5), 0, CPU)), in_workers(dataset, range(0, 12, 5), 'fork')
    assert [len(batch.images) for batch in got] == [4, 5, 2]
    assert all(torch.equal(a.images, b.images) and a.unreadable == b.unreadable for a, b in zip(got, expected))


def test_auto_augment_depends_on_seed_step_and_position_alone(tmp_path):
    samples = write_set(tmp_path)
    plain, always = make_train_batches(samples), make_train_batches(samples)
    always.augmentation = Augmentation(padding=2, auto_augment_probability=1.0)
    batches = [always[step] for step in range(6)]
    state = torch.get_rng_state()
    for step in (5, 3, 0):
        assert same_batch(always[step], batches[step])
    assert torch.equal(torch.get_rng_state(), state)
    changed = [not torch.equal(a, b) for step in range(6) for a, b in zip(batches[step].images, plain[step].images)]
    assert np.mean(changed) > 0.7  # some policies leave an image as it is
    for position, index in enumerate(always.sampler.batch(4)):
        image = always.augmentation.auto_augment(always.decode(samples[index].path), 0, 4, position)
        assert torch.equal(batches[4].images[position], to_batch([image], SIZE)[0])
    image = torch.from_numpy(smooth_pixels(24, 12)).permute(2, 0, 1)
    for seed, step, position in np.eye(3, dtype=int).tolist():
        results = [always.augmentation.auto_augment(image, seed * n, step * n, position * n) for n in range(8)]
        assert len({result.numpy().tobytes() for result in results}) > 4
    for workers in (1, 2):
        loader = iter(torch.utils.data.DataLoader(always, None, sampler=range(2, 6), num_workers=workers))
        assert all(same_batch(got, batches[step]) for step, got in zip(range(2, 6), loader))
    sometimes = make_train_batches(samples)
    sometimes.augmentation = Augmentation(padding=2, auto_augment_probability=0.3)
    images = [(step, i) for step in range(30) for i in range(4)]
    share = np.mean([not torch.equal(sometimes[s].images[i], plain[s].images[i]) for s, i in images])
    assert 0.1 < share < 0.45
