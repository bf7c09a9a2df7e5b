"""mgn.ops.pairwise_distance, as compiled for every instruction set here and as a reference, against the formula in
float64."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, run_as
from memory import only_linux, printed
from mining import TYPES, examples, random_features
from torch.fx.experimental.proxy_tensor import make_fx

from mgn.ops import pairwise_distance
from mgn.ops.distance import DISTANCES as METRICS

@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch, device):
    """Each way to run the operation on the device that is tested."""
    return run_as(request.param, 'distance', monkeypatch, device)


def naive(x, y, metric):
    """The formula in float64; squares that leave its range are taken of ratios."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()

    def norm(rows):
        largest = rows.abs().sum(-1, keepdim=True)
        ratios = rows / largest
        return torch.where((largest > 0) & largest.isfinite(),
                           ratios.nan_to_num(0).square().sum(-1, keepdim=True).sqrt() * largest, largest)

    def unit(rows):
        return torch.where(norm(rows) == 0, 0, rows / norm(rows))
    if metric == 'cosine':
        x, y = unit(x), unit(y)
    dist = norm(x[:, None] - y)[..., 0]
    return {'euclidean': dist, 'sqeuclidean': dist.square(), 'cosine': dist.square() / 2}[metric]


def assert_right(got, x, y, metric, tolerance=1e-5):
    """To a relative error, but for what the type rounds to 0 or near it, and for the rounding of unit vectors in
    float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == (len(x), len(y))
    expected = naive(x, y, metric)
    same = (x[:, None] == y).all(-1).cpu() & x.isfinite().all(-1, keepdim=True).cpu()
    assert (got.cpu()[same] == 0).all()
    expected[same] = 0
    smallest = {torch.float32: 1.5e-45, torch.float64: 5e-324}[wide]
    torch.testing.assert_close(got.cpu().double(), expected.to(wide).double(), rtol=tolerance,
                               atol=1e-21 if metric == 'cosine' else smallest,
                               equal_nan=True)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('n, m, width', [(1, 1, 1), (2, 31, 33), (33, 129, 64), (257, 33, 7)])
def test_distances_equal_the_formula(implementation, device, metric, dtype, n, m, width):
    x, y = (random_features(rows, width, dtype=dtype, seed=rows, device=device) for rows in (n, m))
    y[:min(n, m) // 2] = x[:min(n, m) // 2]
    assert_right(pairwise_distance(x, y, metric), x, y, metric)


@pytest.mark.long
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('n', [1, 8, 9, 32, 64, 256, 300])
def test_many_sizes_equal_the_formula(implementation, device, metric, dtype, n):
    for m, width in itertools.product([1, 15, 17, 63, 65, 1100], [1, 31, 65, 300]):
        if n * m * width > 2 ** 24:
            continue  # the naive float64 differences take seconds; a smaller n has this m and width
        x, y = (random_features(rows, width, dtype=dtype, seed=rows, device=device) for rows in (n, m))
        assert_right(pairwise_distance(x, y, metric), x, y, metric)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('width', [1, 40, 2048])
def test_near_duplicates_far_from_the_origin_keep_their_distances(implementation, device, metric, dtype, width):
    """Distances down to one last place: x² + y² − 2xy would leave nothing of them."""
    x = 1e3 + random_features(8, width, dtype=torch.float64, device=device)
    apart = torch.tensor([0, 1e-6, 1e-4, 1e-2, 1], dtype=torch.float64, device=device).repeat_interleave(8)[:, None]
    y = x.repeat(5, 1) + apart * random_features(40, width, dtype=torch.float64, seed=1, device=device)
    x, y = x.to(dtype), y.to(dtype)
    got = pairwise_distance(x, y, metric)
    assert_right(got, x, y, metric)
    assert (got.diagonal() == 0).all()


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('width, angle', [*itertools.product([2048, 3072, 16384], [0.12, 0.13, 0.2, 0.7, 1.5])])
def test_the_error_of_long_sums_stays_within_1e_5(implementation, device, metric, width, angle):
    """Equal terms, so that roundings of a running sum would add up instead of cancelling; around the angle from which
    the cosine is measured in float32."""
    width = width if device == 'cpu' else min(width, 3072)
    x = torch.ones(1, width, device=device)
    sides = torch.tensor([1.0, -1.0], device=device).repeat(width // 2)
    y = (1 + torch.linspace(0.98, 1.02, 9, device=device)[:, None] * torch.tensor(angle).tan().item() * sides)
    assert_right(pairwise_distance(x, y, metric), x, y, metric)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype, scale',
                         [(torch.float32, 1e20), (torch.float32, 1e-20), (torch.float32, 1e-30), (torch.float32, 1e-42),
                                          (torch.float64, 1e200), (torch.float64, 1e-200), (torch.bfloat16, 1e20),
                                          (torch.float16, 1e-6)])
def test_squares_beyond_the_range_of_their_type(implementation, device, metric, dtype, scale):
    """With rows of ordinary size beside them."""
    x, y = (random_features(30, 9, dtype=torch.float64, seed=seed, device=device) for seed in (0, 1))
    x[:20] *= scale
    y[10:] *= scale
    y[5] = x[5]
    x, y = x.to(dtype), y.to(dtype)
    got = pairwise_distance(x, y, metric)
    assert_right(got, x, y, metric)
    assert metric != 'euclidean' or (got.isfinite().all() and (got[10:20, 10:] > 0).all())


def test_a_distance_beyond_its_type_is_infinite(implementation, device):
    x = torch.tensor([[3e38], [-3e38]], device=device)
    assert pairwise_distance(x, x).tolist() == [[0, torch.inf], [torch.inf, 0]]
    assert pairwise_distance(x, x, 'cosine').tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', TYPES)
def test_what_is_not_finite_goes_where_the_formula_says(implementation, device, metric, dtype):
    x = random_features(6, 3, dtype=dtype, device=device)
    x[0, 0], x[1, 1], x[2, 1], x[3, 2] = torch.nan, torch.inf, -torch.inf, torch.inf
    for y in (x, x[2:4].clone(), x[4:] * 2):
        plain = x.cpu().double()[:, None] - y.cpu().double()
        expected = {'euclidean': plain.square().sum(-1).sqrt(), 'sqeuclidean': plain.square().sum(-1)}.get(metric)
        if metric == 'cosine':
            unit = [rows.cpu().double() / rows.cpu().double().norm(dim=-1, keepdim=True) for rows in (x, y)]
            expected = (unit[0][:, None] - unit[1]).square().sum(-1) / 2
        torch.testing.assert_close(pairwise_distance(x, y, metric).cpu().double(), expected, rtol=1e-5, atol=1e-14,
                                   equal_nan=True)


@pytest.mark.parametrize('metric', METRICS)
def test_zero_vectors(implementation, device, metric):
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device), torch.tensor([[0.0, 0.0], [0.0, 5.0]], device=device)
    expected = {'euclidean': [[0, 5], [5, 10**0.5]], 'sqeuclidean': [[0, 25], [25, 10]],
                'cosine': [[0, 0.5], [0.5, 0.2]]}[metric]
    torch.testing.assert_close(pairwise_distance(x, y, metric).cpu(), torch.tensor(expected, dtype=torch.float32),
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n, m, width', [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 4, 0), (0, 4, 0)])
def test_empty_operands(implementation, device, metric, n, m, width):
    x, y = torch.ones(n, width, device=device, requires_grad=True), torch.ones(m, width, device=device,
                                                                               requires_grad=True)
    got = pairwise_distance(x, y, metric)
    assert got.shape == (n, m) and (got == 0).all()
    got.sum().backward()
    assert x.grad.shape == x.shape and (x.grad == 0).all() and y.grad.shape == y.shape and (y.grad == 0).all()


@pytest.mark.parametrize('metric, dtype',
                         [('euclidean', torch.float32), ('sqeuclidean', torch.bfloat16), ('cosine', torch.float64),
                                           ('cosine', torch.float16)])
def test_strided_rows_are_taken_and_tiles_join(implementation, device, metric, dtype):
    """More rows than a tile of those that have to be copied."""
    whole = random_features(6, 1100, dtype=dtype, device=device)
    x, y = whole.T, whole[:, 1000:1040].T
    got = pairwise_distance(x, y, metric)
    assert_right(got, x, y, metric)
    assert torch.equal(pairwise_distance(y, x, metric), got.T)
    for one, other in ((x.contiguous(), y), (x, y.contiguous())):
        assert torch.equal(pairwise_distance(one, other, metric), got)
    assert_right(pairwise_distance(x[::50, ::2], y[::3, ::2], metric), x[::50, ::2], y[::3, ::2], metric)
    assert_right(pairwise_distance(x[:1].expand(5, -1), y[:, :1].expand(-1, 6), metric), x[:1].expand(5, -1),
                 y[:, :1].expand(-1, 6), metric)


@pytest.mark.parametrize('metric', METRICS)
def test_the_number_of_threads_and_the_settings_for_products_change_no_bit(metric):
    x, y, before, results = random_features(70, 300), random_features(3000, 300, seed=1), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pairwise_distance(x, y, metric))
    finally:
        torch.set_num_threads(before)
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', torch.bfloat16):
            results.append(pairwise_distance(x, y, metric))
    finally:
        torch.set_float32_matmul_precision('highest')
    assert all(torch.equal(results[0], other) for other in results) and results[-1].dtype == torch.float32


@st.composite
def cases(draw):
    """(x, y, metric): sizes, types, ties, duplicates, scales, offsets."""
    dtype, metric = draw(st.sampled_from(TYPES)), draw(st.sampled_from(METRICS))
    n, m, width = draw(st.integers(0, 70)), draw(st.integers(0, 70)), draw(st.sampled_from([0, 1, 3, 31, 33, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(n + m, width, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(['normal', 'small integers', 'duplicates', 'far', 'tiny', 'huge', 'mixed',
                                 'collapsed']))
    exponent = {torch.float64: 150, torch.float16: 3}.get(dtype, 30)
    if kind == 'small integers':
        rows = rows.round().clamp(-1, 1)
    elif kind == 'duplicates' and n + m:
        rows = rows[torch.randint(n + m, (n + m,), generator=generator)]
    elif kind == 'far':
        rows = 1e3 + 1e-2 * rows
    elif kind in ('tiny', 'huge', 'mixed'):
        powers = {'tiny': torch.tensor([-exponent]),
                  'huge': torch.tensor([exponent])}.get(kind, torch.randint(-exponent, exponent, (n + m, 1)))
        rows = rows * 10.0 ** powers.double()
    elif kind == 'collapsed':
        rows = torch.ones_like(rows)
    rows = rows.to(dtype)
    return rows[:n], rows[n:], metric


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_random_cases(device, case):
    x, y, metric = (value if isinstance(value, str) else value.to(device) for value in case)
    assert_right(pairwise_distance(x, y, metric), x, y, metric)


# Gradients

def gradients(x, y, metric, upstream):
    """Of Σ upstream · distance by autograd through the formula in float64, differences as they are, 0 at distance 0."""
    x, y = (rows.detach().cpu().double().requires_grad_() for rows in (x, y))
    a, b = (torch.nn.functional.normalize(rows, eps=1e-300) if metric == 'cosine' else rows for rows in (x, y))
    squares = (a[:, None] - b).square().sum(-1)
    if metric == 'euclidean':
        squares = torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())
    return torch.autograd.grad((squares * upstream.cpu().double() / (2 if metric == 'cosine' else 1)).sum(), (x, y))


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype, far',
                         [(torch.float32, 0), (torch.float32, 1e2), (torch.float64, 1e2), (torch.bfloat16, 0)])
@pytest.mark.parametrize('implementation', ['compiled'], indirect=True)
def test_gradients_equal_those_of_the_formula(implementation, device, metric, dtype, far):
    x, y = (far + random_features(rows, 33, seed=rows, device=device) for rows in (20, 730))
    y[:20] = x + 1e-3 * y[:20]
    y[20:40] = x
    x, y, upstream = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), random_features(20, 730, device=device)
    (pairwise_distance(x, y, metric) * upstream).sum().backward()
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, want in zip((x.grad, y.grad), gradients(x, y, metric, upstream)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance,
                                   atol=tolerance * 1e-1 * want.abs().max().item())


@pytest.mark.parametrize('metric', METRICS)
def test_finite_differences_agree(implementation, device, metric):
    x, y = (random_features(rows, 4, dtype=torch.float64, seed=rows, device=device).requires_grad_() for rows in (5, 7))
    assert torch.autograd.gradcheck(lambda x, y: pairwise_distance(x, y, metric), (x, y))
    assert torch.autograd.gradcheck(lambda x: pairwise_distance(x, y.detach(), metric), (x,))
    assert torch.autograd.gradcheck(lambda y: pairwise_distance(x.detach(), y, metric), (y,))


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('value', [0.0, 3.0])
def test_gradient_is_0_at_distance_0_and_of_zero_vectors(implementation, device, metric, value):
    x, y = torch.full((3, 5), value, device=device, requires_grad=True), torch.full((4, 5), value, device=device)
    pairwise_distance(x, y, metric).sum().backward()
    assert (x.grad == 0).all()
    if metric == 'cosine':
        zero = torch.zeros(3, 5, device=device, requires_grad=True)
        pairwise_distance(zero, torch.ones(4, 5, device=device), metric).sum().backward()
        assert (zero.grad == 0).all()


def test_a_second_derivative_is_refused(device):
    x = random_features(3, 4, device=device).requires_grad_()
    grad, = torch.autograd.grad(pairwise_distance(x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='Distances and batch-hard mining have first derivatives only, but a second '
                                           'was asked for by create_graph=True'):
        grad.sum().backward()


# What is refused, and what torch knows

X = torch.ones(3, 4)


@pytest.mark.parametrize('arguments, message', [
    (([1], X), 'x must be a tensor, not list; torch.as_tensor makes one'),
    ((X, X[0]), r'y must have the shape \(rows, D\) and a real floating type, not \(4,\) and torch.float32; reshape'),
    ((X[None], X), r'x must have the shape \(rows, D\) and a real floating type, not \(1, 3, 4\)'),
    ((X.long(), X), r'x must have the shape \(rows, D\) and a real floating type, not \(3, 4\) and torch.int64'),
    ((X, X.to(torch.complex64)), 'y must have .* not .* torch.complex64'),
    ((X, X.to('meta')), 'y must be on cpu like x, not on meta; move'),
    ((X, X.double()), r'y must be like x, \(3, 4\) of torch.float32, in all but the number of rows, '
                      r'not \(3, 4\) of torch.float64; cast'),
    ((X, X[:, :3]), r'y must be like x, .* not \(3, 3\)'),
    ((X, X, 'manhattan'), "metric must be 'euclidean' or 'sqeuclidean' or 'cosine', not 'manhattan'"),
])
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pairwise_distance(*arguments)


@pytest.mark.parametrize('metric', METRICS)
def test_torch_knows_the_operators(device, metric):
    x, y = (random_features(rows, 5, dtype=torch.float64, seed=rows, device=device) for rows in (6, 8))
    dist = pairwise_distance(x, y) if metric == 'euclidean' else None
    for pair in ((x, y), (x.clone().requires_grad_(), y.clone().requires_grad_())):
        torch.library.opcheck(torch.ops.mgn.pairwise_distance.default, (*pair, metric))
    gradient = torch.ops.mgn.pairwise_distance_gradient.default
    torch.library.opcheck(gradient, (x, y, dist, x.new_ones(6, 8), metric))
    traced = make_fx(lambda x, y: pairwise_distance(x, y, metric), tracing_mode='symbolic')(x, y)
    assert torch.equal(traced(y, x), pairwise_distance(y, x, metric))


def test_torch_compile_keeps_the_operator_whole(device):
    x, y = random_features(6, 5, device=device).requires_grad_(), random_features(8, 5, device=device)

    def loss(x, y):
        return pairwise_distance(2 * x, y, 'cosine').sum()
    eager, = torch.autograd.grad(loss(x, y), x)
    compiled, = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend='aot_eager')(x, y), x)
    torch.testing.assert_close(compiled, eager)


@only_linux
def test_half_precision_needs_no_copy_of_everything():
    """100,000 × 64 bfloat16 from 300: float32 copies would be 26 MB, a matrix in float64 240."""
    program = '''
import torch
from mgn.ops import pairwise_distance
x, y = torch.randn(300, 64).bfloat16(), torch.randn(100_000, 64).bfloat16()
pairwise_distance(x, y[:2000])
before = high_water(anew=True)
dist = pairwise_distance(x, y, 'cosine')
print(high_water() - before - dist.nbytes)
'''
    assert printed(program)[0] < 13 * 2 ** 20


def test_forward_mode_is_refused():
    x, y = torch.ones(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match='reverse mode'):
        torch.func.jvp(lambda a: pairwise_distance(a, y), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match='reverse mode'):
        pairwise_distance(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), y)
