"""Every parameter of every public function of mgn.ops is given everything that anybody may pass by mistake.

Each outcome is a UserError, or the result of the usual arguments. Whatever else is taken is listed in TAKEN.
"""

import decimal
import fractions
import inspect
import warnings

import numpy as np
import pytest
import torch

from mgn import ops
from mgn.ops.errors import UserError

generator = torch.Generator().manual_seed(0)
QUERY, GALLERY = torch.randn(4, 6, generator=generator), torch.randn(7, 6, generator=generator)
FEATURES = {'query': QUERY, 'gallery': GALLERY}
IDS = {'query_pids': torch.arange(4) % 3, 'gallery_pids': torch.arange(7) % 3,
       'query_camids': torch.zeros(4, dtype=torch.int64), 'gallery_camids': torch.arange(7) // 4 + 1}
HOW = {'metric': 'cosine', 'precision': 'float32'}
DIST = torch.cdist(QUERY, GALLERY)
OFFSETS, RANKS, _ = ops.match_ranks(QUERY, GALLERY, *IDS.values())
LABELLED = {'anchors': QUERY, 'labels': IDS['query_pids'], 'candidates': GALLERY,
            'candidate_labels': IDS['gallery_pids']}
RERANKING = {'k1': 3, 'k2': 2, 'lambda_value': 0.3}

CALLS = {  # function → all its parameters, as they should be
    'batch_hard': LABELLED,
    'batch_hard_triplet_loss': {**LABELLED, 'margin': 0.3},
    'evaluate_rank': {'distmat': DIST, 'q_pids': IDS['query_pids'], 'g_pids': IDS['gallery_pids'],
                      'q_camids': IDS['query_camids'], 'g_camids': IDS['gallery_camids'], 'max_rank': 5,
                      'use_metric_cuhk03': False, 'use_cython': True},
    'expand_queries': {**FEATURES, 'k': 3, 'alpha': 2.0},
    'implementation': {'device': 'cpu'},
    'k_reciprocal_ranks': {**FEATURES, **IDS, **RERANKING, 'junk_pid': -1, **HOW},
    'match_ranks': {**FEATURES, **IDS, 'junk_pid': -1, **HOW},
    'match_ranks_from_distance': {'dist': DIST, **IDS, 'junk_pid': -1},
    'pairwise_distance': {'x': QUERY, 'y': GALLERY, 'metric': 'cosine'},
    'retrieval_metrics': {'offsets': torch.from_numpy(OFFSETS), 'ranks': torch.from_numpy(RANKS)},
    'topk': {**FEATURES, 'k': 3, **HOW, 'exclude_self': False},
    'topk_from_distance': {'dist': DIST, 'k': 3},
}
PLACES = [(function, parameter) for function, usual in CALLS.items() for parameter in usual]
TENSORS = [(function, name) for function, name in PLACES if isinstance(CALLS[function][name], torch.Tensor)]

VALUES = {repr(value): value for value in (
    None, 'a', '', b'a', True, False, -1, 0, 1, 3, 2.5, -0.5, float('nan'), float('inf'), -float('inf'), 1e400, 1j,
    2 ** 31, 2 ** 63, -2 ** 63 - 1, 10 ** 30, [], (), {}, [1], [[1], [1, 2]], ['a'], [None], {'a': 1}, {1}, range(3),
    ..., NotImplemented, int, len, decimal.Decimal(1), fractions.Fraction(1, 3), np.float32(0.5), np.float64('nan'),
    np.int64(3), np.int8(3), np.bool_(True), np.array(3), np.array(2.5), np.array('a'), np.array([3, 3]),
    np.array([None]), np.datetime64(1, 's'), np.zeros((0, 0)), torch.tensor(0.3), torch.tensor(3), torch.tensor([3, 3]),
    torch.float32, torch.device('cpu'), torch.empty(0), torch.nan)}
VALUES['thousands of digits'] = 10 ** 5000
VALUES['an object'] = object()
VALUES['what has no word for itself'] = type('Silent', (), {'__repr__': lambda self: 1 / 0})()
INTEGERS = {'-1', '0', '1', '3', '2147483648', 'np.int64(3)', 'np.int8(3)', 'array(3)', 'tensor(3)'}
POSITIVE = INTEGERS - {'-1', '0', '2147483648'}
REAL = {'0', '1', '3', '2.5', 'np.float32(0.5)', 'np.int64(3)', 'np.int8(3)', '2147483648', '9223372036854775808',
        str(10 ** 30)}
ANY_REAL = REAL | {'-1', '-0.5', str(-2 ** 63 - 1)}
ONE = {'0', '1', 'np.float32(0.5)', 'Fraction(1, 3)'}
TAKEN = {  # parameter → values that it can take, in range; what they give is tested elsewhere
    'margin': ANY_REAL | {'None', 'Fraction(1, 3)'}, 'alpha': REAL | {'Fraction(1, 3)'}, 'lambda_value': ONE,
    'k': POSITIVE, 'k1': POSITIVE, 'k2': POSITIVE, 'max_rank': POSITIVE | {'2147483648'},
    'junk_pid': INTEGERS | {'None'}, 'use_metric_cuhk03': {'False'}, 'use_cython': set(VALUES),
    'exclude_self': {'False'}, 'dist': {'array([], shape=(0, 0), dtype=float64)'},
    'device': {"device(type='cpu')", '0', '1', '3', '2147483648', 'np.int64(3)', 'np.int8(3)'},
}


def outcome(function, **changed):
    """What the call returns, or the UserError that it raises; every other exception fails the test."""
    try:
        return getattr(ops, function)(**{**CALLS[function], **changed})
    except UserError as error:
        message = error.message
        assert 40 < len(message) < 600 and '; ' in message, message  # what is wrong; what to do
        return error


def test_the_table_has_every_public_function_and_all_its_parameters():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(CALLS) == functions
    for name, usual in CALLS.items():
        assert set(usual) == set(inspect.signature(getattr(ops, name)).parameters), name
        assert not isinstance(outcome(name), UserError)


@pytest.mark.parametrize('function, parameter', PLACES)
def test_a_value_of_any_kind_is_taken_where_it_may_be_and_refused_elsewhere(function, parameter):
    for name, value in VALUES.items():
        refused = isinstance(outcome(function, **{parameter: value}), UserError)
        assert refused or name in TAKEN.get(parameter, ()), f'{function}({parameter}={name}) was taken'


def test_a_narrow_integer_does_not_overflow():
    for a, b in zip(*(parts(outcome('k_reciprocal_ranks', k1=k1)) for k1 in (np.int8(127), 127)), strict=True):
        np.testing.assert_array_equal(a, b)


def big_endian(tensor):
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder('>'))


def read_only(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def negated(tensor):
    """A view that torch shows with the other sign than the memory has."""
    view = torch.complex(torch.zeros(tensor.shape), -tensor.float()).conj().imag
    assert view.is_neg()
    return view.to(tensor.dtype)


def spread(tensor):
    wider = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
    wider[..., 1] = tensor
    return wider[..., 1]


def field(tensor):
    """Of records: its strides are no multiples of a number's size."""
    array = tensor.numpy()
    records = np.zeros(array.shape, [('flag', np.int8), ('number', array.dtype)])
    records['number'] = array
    return records['number']


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


SAME = {  # forms of one and the same tensor, which may be refused but give no other result
    'array': lambda t: t.numpy(), 'list': lambda t: t.tolist(), 'tuple': lambda t: tuple(t.tolist()),
    'list of tensors': list, 'big-endian': big_endian, 'read-only': read_only, 'spread': spread,
    'field': field,
    'backwards': lambda t: np.ascontiguousarray(t.numpy()[::-1])[::-1],
    'column order': lambda t: np.asfortranarray(t.numpy()), 'objects': lambda t: t.numpy().astype(object),
    'texts': lambda t: t.numpy().astype(str),
    'requires_grad': lambda t: t.clone().requires_grad_(t.is_floating_point()),
    'parameter': lambda t: torch.nn.Parameter(t, t.is_floating_point()), 'inference': inference, 'negated': negated,
    'sparse': lambda t: t.to_sparse(), 'sparse rows': lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    'float64': lambda t: t.double() if t.is_floating_point() else t, 'complex': lambda t: t.to(torch.complex64),
    'long double': lambda t: t.numpy().astype(np.longdouble),
    'int32': lambda t: t if t.is_floating_point() else t.int(),
    'uint64': lambda t: t if t.is_floating_point() else t.to(torch.uint64),
    'nested': lambda t: torch.nested.nested_tensor(list(t)) if t.dim() == 2 else t.to(torch.complex64),
    'grad list': lambda t: [row.clone().requires_grad_(row.is_floating_point()) for row in t],
    'meta': lambda t: t.to('meta'),
    'quantized': lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    'matrix': lambda t: np.matrix(t.numpy()) if t.dim() == 2 else t.numpy(),
}
OTHER = {  # tensors of another shape or content, to be refused
    'NaN': lambda t: t.float().index_fill(0, torch.tensor(1), torch.nan), 'one dimension more': lambda t: t[None],
    'one dimension less': lambda t: t[0], 'a row less': lambda t: t[:-1], 'empty': lambda t: t[:0],
    'float8': lambda t: t.to(torch.float8_e4m3fn), 'bool': lambda t: t > 0, 'a number': lambda t: t.flatten()[0],
}
ROWS = {'query', 'gallery', 'x', 'y', 'dist'}
HARMLESS = {'NaN': {'x', 'y'}, 'a row less': ROWS, 'empty': ROWS}  # where such a tensor is as good as any


@pytest.mark.parametrize('function, parameter', TENSORS)
def test_every_form_of_a_tensor_gives_the_same_result_or_is_refused(function, parameter):
    expected = outcome(function)
    for name, form in SAME.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's own, of nested and sparse tensors
            given = form(CALLS[function][parameter])
        got = outcome(function, **{parameter: given})
        if not isinstance(got, UserError):
            for a, b in zip(parts(got), parts(expected), strict=True):
                np.testing.assert_array_equal(a, b, f'{function}, {parameter}: {name}')


def parts(result):
    """Whatever an operation returns, as a list of arrays."""
    if isinstance(result, (tuple, dict)):
        return [part for value in (result.values() if isinstance(result, dict) else result) for part in parts(value)]
    return [result.detach().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)]


@pytest.mark.parametrize('function, parameter', TENSORS)
def test_a_tensor_of_another_shape_or_content_is_refused(function, parameter):
    for name, change in OTHER.items():
        got = outcome(function, **{parameter: change(CALLS[function][parameter])})
        assert isinstance(got, UserError) or parameter in HARMLESS.get(name, ()), f'{function}({parameter}: {name})'


@pytest.mark.parametrize('function', CALLS)
def test_read_only_arrays_leave_the_callers_warnings_told_once(function):
    """warnings.catch_warnings, in whatever an operation calls, would make what is told once be told again."""
    takes_arrays = function not in ('batch_hard', 'batch_hard_triplet_loss', 'pairwise_distance')
    given = {name: read_only(value) if takes_arrays and isinstance(value, torch.Tensor) else value
             for name, value in CALLS[function].items()}
    getattr(ops, function)(**given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            warnings.warn('told once')
            getattr(ops, function)(**given)
    assert [str(warning.message) for warning in caught] == ['told once']
