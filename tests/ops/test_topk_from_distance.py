"""The k nearest by distances against a stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from implementations import IMPLEMENTATIONS, run_as
from mining import examples

from mgn.ops import topk_from_distance
from mgn.ops.arguments import as_ids
from mgn.ops.ranking import reference

FIXTURES = {'deadline': None, 'derandomize': True, 'suppress_health_check': [HealthCheck.function_scoped_fixture]}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return run_as(request.param, 'ranking.keys', monkeypatch, 'cpu')


def sorted_first(dist, k):
    order = torch.as_tensor(dist).double().sort(dim=1, stable=True)[1][:, :k]
    return torch.as_tensor(dist).gather(1, order), order


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('levels', [None, 3])
@pytest.mark.parametrize('G, k', [(1, 1), (17, 5), (33, 33), (129, 500), (2051, 1), (5000, 30), (5000, 700)])
def test_of_distances_the_first_of_a_stable_sort(implementation, dtype, levels, G, k):
    dist = torch.from_numpy(np.random.default_rng(0).standard_normal((4, G)))
    dist = ((dist * levels).round() if levels else dist).to(dtype)
    distances, indices = topk_from_distance(dist, k)
    assert distances.dtype == dtype
    assert all(torch.equal(*pair) for pair in zip((distances, indices), sorted_first(dist, k)))


@settings(**FIXTURES, max_examples=examples(200))
@given(st.data())
def test_of_distances_the_first_of_a_stable_sort_on_anything(implementation, data):
    Q, G = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    if data.draw(st.booleans()):
        dist = np.random.default_rng(data.draw(st.integers(0, 2 ** 32))).integers(-3, 9, (Q, G)).astype(dtype)
    else:
        values = data.draw(st.sampled_from([st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf]),
                                            st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False)]))
        dist = np.array(data.draw(st.lists(st.lists(values, min_size=G % 30, max_size=G % 30), min_size=Q, max_size=Q)),
                        dtype).reshape(Q, G % 30)
    k = data.draw(st.integers(1, 40) | st.just(max(dist.shape[1], 1)))
    distances, indices = topk_from_distance(dist, k)
    expected = np.argsort(dist, 1, kind='stable')[:, :k]
    assert np.array_equal(indices, expected)
    assert distances.dtype == dtype
    assert distances.tobytes() == np.take_along_axis(dist, expected, 1).tobytes()  # −0 stays −0


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('k', [1, 5, 39, 40])
@pytest.mark.parametrize('columns', [40, 5000])
def test_the_reference_takes_the_first_columns_of_ties_at_the_last_place(device, monkeypatch, dtype, k, columns):
    """Rows of one value, of few, of zeros of both signs, of infinities, and of many; it sorts whole those that tie."""
    rng = np.random.default_rng(0)
    levels = ([1], [0.0, -0.0], [-np.inf, np.inf], [-np.inf, -1, -0.0, 0.0, 2, np.inf], rng.standard_normal(60),
              rng.standard_normal(99_999))
    dist = np.stack([rng.choice(values, columns) for values in levels * 4]).astype(dtype)
    dist[-1, :k] = -9.5  # ties before the k-th place, none at it
    dist[-1, k:] = np.abs(dist[-1, k:])
    there, shape = torch.from_numpy(dist).to(device), (len(dist), k)
    values, items = torch.empty(shape, dtype=there.dtype, device=device), torch.empty(shape, dtype=int, device=device)
    split, sorted_whole = reference.split, []
    monkeypatch.setattr(reference, 'split', lambda rows, width: sorted_whole.append(len(rows)) or split(rows, width))
    assert reference.nearest_in_distances(there, values, items) == -1
    ascending = np.sort(dist, 1)
    assert sorted_whole == [(ascending[:, k - 1] == ascending[:, k]).sum() if k < columns else 0]
    expected = np.argsort(dist, 1, kind='stable')[:, :k]
    assert np.array_equal(items.cpu(), expected)
    assert values.cpu().numpy().tobytes() == np.take_along_axis(dist, expected, 1).tobytes()
    assert reference.nearest_in_distances(there[:0], values[:0], items[:0]) == -1
    assert reference.nearest_in_distances(there[:, :0], values[:, :0], items[:, :0]) == -1
    there[[3, 7, 7], [columns - 1, 0, 1]] = torch.nan
    assert reference.nearest_in_distances(there, values, items) == 3
    assert reference.nearest_in_distances(there[4:], values[4:], items[4:]) == 3


def test_of_distances_in_any_layout_order_and_number_of_threads(implementation):
    dist = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (40, 3000)).astype(np.float32))
    expected = sorted_first(dist, 60)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for laid_out in (dist, dist.T.contiguous().T, dist.repeat_interleave(2, 1)[:, ::2], dist.repeat(2, 1)[:40],
                             dist.requires_grad_()):
                result = topk_from_distance(laid_out, 60)
                assert all(torch.equal(*pair) for pair in zip(result, expected)) and not result.distances.requires_grad
            assert np.array_equal(topk_from_distance(dist.detach().numpy()[:, ::-1], 60).distances, expected[0])
    finally:
        torch.set_num_threads(threads)
    for ascending in (torch.arange(9000.0)[None], -torch.arange(9000.0)[None]):
        assert topk_from_distance(ascending, 80).indices.tolist() == sorted_first(ascending, 80)[1].tolist()


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_of_distances_a_nan_is_named(implementation, dtype):
    for place in ((0, 0), (2, 299), (1, 150)):
        dist = np.random.default_rng(0).standard_normal((3, 300)).astype(dtype)
        dist[place] = np.nan
        for laid_out in (dist, np.asfortranarray(dist)):
            with pytest.raises(ValueError, match=f'row {place[0]}, column {place[1]} is NaN'):
                topk_from_distance(laid_out, 5)


@pytest.mark.parametrize('dist, message',
                         [(np.zeros((3, 4), int), 'floating-point'), (np.zeros(4), r'dist \(Q, G\)'),
                          (np.zeros((3, 4), complex), 'complex')])
def test_what_is_no_matrix_of_distances_is_refused(dist, message):
    with pytest.raises(ValueError, match=message):
        topk_from_distance(dist, 2)


def test_what_a_numpy_mask_hides_is_no_value(implementation):
    for masked in np.ma.masked_array([[0, 5, 6.0]], [[1, 0, 0]]), np.ma.masked_array([0, 5], [1, 0]):
        with pytest.raises(ValueError, match='it has masked entries; fill them with .filled|integer type, not masked'):
            topk_from_distance(masked, 1) if masked.ndim == 2 else as_ids(masked, 2, 'query_pids')
    assert topk_from_distance(np.ma.masked_array([[7, 5, 6.0]]), 1).indices.tolist() == [[1]]


def test_more_items_than_32_bits_count_are_refused():
    many, one = torch.zeros(1, 1).expand(1, 2 ** 32), (torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r'fewer than 2\^32 items, not 4294967296; search parts of them'):
        torch.ops.mgn_cpu.nearest_in_distances(many, *one)
    with pytest.raises(RuntimeError, match=r'fewer than 2\^32 items, not 4294967296'):
        torch.ops.mgn_cpu.select_nearest(torch.zeros(1, 1), torch.ones(1), torch.zeros(1), 2 ** 32 - 1, *one)


def test_denormals_are_values_whatever_torch_is_told(implementation):
    dist = torch.tensor([[3e-40, 1e-40, 0, 2e-40]])
    torch.set_flush_denormal(True)
    try:
        assert topk_from_distance(dist, 4).indices.tolist() == [[2, 1, 3, 0]]
    finally:
        torch.set_flush_denormal(False)
