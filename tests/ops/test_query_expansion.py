"""α query expansion against a naive float64 loop; ties, limits, and what stops it."""

import numpy as np
import pytest
import torch
from rankings import extremes, naive_expansion, problem

from mgn.ops import expand_queries, query_expansion


def tensors(device, *arrays):
    return tuple(torch.as_tensor(np.asarray(array, np.float32), device=device) for array in arrays)


def unit(features):
    return torch.nn.functional.normalize(features.double()).float()


@pytest.mark.parametrize('k, alpha', [(1, 3.0), (3, 0.0), (3, 3), (4, 0.5), (30, 1.0), (31, 2.5), (4096, 3.0)])
@pytest.mark.parametrize('make',
                         [lambda: problem(7, 30, 5), lambda: problem(4, 30, 33, levels=2), lambda: extremes(9, 30, 6),
                                  lambda: problem(1, 30, 1, seed=1)],
                                  ids=['random', 'few levels', 'extremes', 'one number'])
def test_it_is_what_the_naive_loop_computes(make, k, alpha, device):
    query, gallery = make()[:2]
    got = expand_queries(*tensors(device, query, gallery), k=k, alpha=alpha)
    assert got.dtype == torch.float32 and got.shape == query.shape and got.device.type == torch.device(device).type
    np.testing.assert_allclose(got.cpu().numpy(), naive_expansion(query, gallery, k, alpha), rtol=0, atol=2e-7)


def test_alpha_is_3_unless_given(device):
    query, gallery = tensors(device, *problem(5, 9, 4)[:2])
    assert torch.equal(expand_queries(query, gallery, 4), expand_queries(query, gallery, 4, alpha=3.0))
    assert not torch.equal(expand_queries(query, gallery, 4), expand_queries(query, gallery, 4, alpha=2.0))


def test_of_equal_similarities_the_first_items_count(device):
    query, gallery = tensors(device, [[2, 0, 0, 0]], [[1, 0, 0, -1], [1, 1, 0, 0], [1, 0, 1, 0], [1, -1, 0, 0]])
    one, two = (expand_queries(query, gallery, k, alpha=2)[0] for k in (1, 2))  # each weighs ½
    root = 0.5 ** 0.5
    torch.testing.assert_close(one, unit(torch.tensor([[1 + root / 2, 0, 0, -root / 2]], device=device))[0])
    torch.testing.assert_close(two, unit(torch.tensor([[1 + root, root / 2, 0, -root / 2]], device=device))[0])


def test_items_of_negative_similarity_count_without_weights_alone(device):
    query, gallery = tensors(device, [[3, 4], [0, 2]], [[-3, -3.5], [0, -1]])
    assert torch.equal(expand_queries(query, gallery, 2), unit(query))
    assert torch.equal(expand_queries(query, gallery, 2, alpha=0.0)[1], unit(unit(query)[1:] + unit(gallery).sum(0))[0])


def test_rows_of_zeros(device):
    query, gallery = tensors(device, [[0, 0], [3, 4]], [[0, 0], [3, 4], [0, 0]])
    assert torch.equal(expand_queries(query, gallery, 3), tensors(device, [[0, 0], [0.6, 0.8]])[0])


def test_the_lengths_of_rows_do_not_matter(device):
    query, gallery = tensors(device, *problem(6, 20, 8)[:2])
    factors = 2.0 ** torch.arange(-10, 10, device=device)[:, None]
    assert torch.equal(expand_queries(query * factors[:6], gallery * factors, 5), expand_queries(query, gallery, 5))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_halves_are_taken_as_they_are(dtype, device):
    query, gallery = (features.to(dtype) for features in tensors(device, *problem(5, 12, 7)[:2]))
    got = expand_queries(query, gallery, 4)
    assert got.dtype == torch.float32 and torch.equal(got, expand_queries(query.float(), gallery.float(), 4))


def test_blocks_of_queries_change_nothing(monkeypatch, device):
    query, gallery = tensors(device, *problem(23, 40, 6)[:2])
    whole = expand_queries(query, gallery, 7)
    for numbers in (1, 12, 24, 30):
        monkeypatch.setattr(query_expansion, 'BLOCK', numbers)
        assert torch.equal(expand_queries(query, gallery, 7), whole)


def test_another_default_type_of_torch_changes_nothing(device):
    query, gallery = tensors(device, *problem(5, 12, 7)[:2])
    expected = expand_queries(query, gallery, 4)
    torch.set_default_dtype(torch.float64)
    try:
        got = expand_queries(query, gallery, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_the_inputs_stay_as_they_were_and_the_result_has_no_gradient(device):
    query, gallery = (features.requires_grad_() for features in tensors(device, *problem(4, 6, 3)[:2]))
    before = query.clone(), gallery.clone()
    assert not expand_queries(query, gallery, 2).requires_grad
    assert torch.equal(query, before[0]) and torch.equal(gallery, before[1])


def test_without_gallery_queries_are_normalised_and_without_queries_nothing_is(device):
    query, gallery = tensors(device, *problem(4, 6, 3)[:2])
    assert torch.equal(expand_queries(query, gallery[:0], 2), unit(query))
    assert expand_queries(query[:0], gallery, 2).shape == (0, 3)
    assert expand_queries(query[:, :0], gallery[:, :0], 2).shape == (4, 0)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_named(value, device):
    for name, row in (('query', 1), ('gallery', 3)):
        query, gallery = tensors(device, *problem(4, 6, 3)[:2])
        {'query': query, 'gallery': gallery}[name][row, 2] = value
        with pytest.raises(ValueError, match=f'{name} features must be finite, but row {row} has NaN or infinity'):
            expand_queries(query, gallery, 2)


def test_a_compiled_caller_gets_the_same_bits(device):
    query, gallery = tensors(device, *problem(5, 20, 8)[:2])
    compiled = torch.compile(lambda q, g: expand_queries(q, g, 4) * 2, backend='aot_eager')
    assert torch.equal(compiled(query, gallery), expand_queries(query, gallery, 4) * 2)


@pytest.mark.parametrize('alpha', [-0.1, float('nan'), float('inf')])
def test_alpha_out_of_range_is_an_error(alpha, device):
    with pytest.raises(ValueError, match=f'alpha must be a finite number from 0, not {alpha}; 3 is usual'):
        expand_queries(*tensors(device, *problem(2, 3, 2)[:2]), 2, alpha)


@pytest.mark.parametrize('k', [0, -1, 4097, True, 2.0])
def test_k_out_of_range_is_an_error(k, device):
    with pytest.raises(ValueError, match=f'k must be an integer from 1 to 4096, not {k}'):
        expand_queries(*tensors(device, *problem(2, 3, 2)[:2]), k)


def test_features_that_do_not_fit_are_an_error(device):
    query, gallery = tensors(device, *problem(2, 3, 4)[:2])
    with pytest.raises(ValueError, match='query and gallery must have rows of one width'):
        expand_queries(query, gallery[:, :3], 2)
    with pytest.raises(ValueError, match='query features must .* float32 or half precision, not .*float64'):
        expand_queries(query.double(), gallery, 2)


def test_denormals_are_values_whatever_torch_is_told():
    query, gallery = torch.full((1, 4), 1e-40), torch.eye(4)[:2]
    query[0, 1] *= -1
    expected = expand_queries(query, gallery, 1)
    torch.set_flush_denormal(True)
    try:
        got = expand_queries(query, gallery, 1)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, expected) and (got != 0).all()
