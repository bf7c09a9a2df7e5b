"""What ranking asks of a GPU, seen without one: launches for each tile, whom the host waits for, the order of copies.

Fake tensors of torch compute no values, but have devices, types and shapes, and raise where the host asks for a value.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rankings import METRICS, by_torch, clustered
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import roofline
from mgn.ops.arguments import Ids, all_ids
from mgn.ops.ranking import keys, nearest, product, ranks, tiles
from mgn.ops.ranking.keys import Comparison, finite_norms, keys_of_pairs

PRECISIONS = ['float32', 'tf32']
NO_LAUNCH = ('aten::empty', 'aten::new_empty', 'aten::detach', 'prim::device')


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel: all on a GPU but views and allocations. A product counts as one.

    waits: the names of those whose result the host waits for.
    """
    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in (*args, result))
        leaves = isinstance(result, torch.Tensor) and not result.is_cuda
        if on_gpu and (leaves or name in ('aten::nonzero', 'aten::_local_scalar_dense')):
            self.waits.append(name)
        self.count += on_gpu and not operator.is_view and name not in NO_LAUNCH
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """fake_gpu(precision): an H200 whose tensors have no values."""
    @contextlib.contextmanager
    def fake_gpu(precision):
        with FakeTensorMode(), Launches() as launches:
            def launch(*args):
                assert all(x.is_cuda for x in args if isinstance(x, torch.Tensor))
                launches.count += 1
            fakes = SimpleNamespace(canonical_norms=launch, canonical_keys=launch, select_nearest=launch,
                                    round_to_tf32=launch)
            for module in (keys, product):
                monkeypatch.setattr(module, 'ranking_kernels', lambda device: fakes)
            monkeypatch.setattr(product, 'available', lambda asked, device, width: precision if width else 'float32')
            monkeypatch.setattr(product, 'keeps_operands', lambda device: True)
            monkeypatch.setattr(product, 'rounds_sums', lambda device: True)
            yield launches
    return fake_gpu


OF_COUNTING = 3  # launches of count_nonmatches: the list is emptied, counting, deciding (ranking_cuda.cu)


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('dtype', [torch.float32, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_a_tile_of_msmt17_takes_four_launches_and_waits_for_nothing(fake_gpu, precision, metric, dtype):
    seen, launched = [], []
    with fake_gpu(precision) as launches:
        query, gallery = (torch.empty(n, 2048, device='cuda', dtype=dtype) for n in (11_659, 82_161))
        query_norms = torch.empty(11_659, dtype=torch.float64, device='cuda')
        comparison = Comparison(query, gallery, metric == 'cosine', precision)
        blocks = tiles.spans(len(query), tiles.tile_of(query)[1])
        with product.exact_float32(), pytest.raises(DataDependentOutputException):  # at the end: were all finite?
            for block, part, tile, terms in ranks.filtered_tiles(comparison, query_norms, blocks):
                assert terms.dots.shape == (block.stop - block.start, part.stop - part.start)
                assert (len(tile.query), len(tile.gallery)) == terms.dots.shape
                assert tile.query.dtype == tile.gallery.dtype == terms.dots.dtype == torch.float32
                assert launches.waits == []
                seen.append((block.start, part.start, part.stop))
                launched.append(launches.count)
    assert [block.stop - block.start for block in blocks] == [5888, 5771]  # no thin product
    parts = [(first, last) for start, first, last in seen if start == 0]
    assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])] and parts[-1][1] == len(gallery)
    assert sorted(seen) == [(block.start, *part) for block in blocks for part in parts]
    assert np.median(np.diff(launched)) == 1  # the product
    assert 1 + OF_COUNTING == roofline.LAUNCHES['match_ranks, a tile']
    beside = launched[-1] - len(launched)  # made once for many tiles
    assert beside < roofline.LAUNCHES['beside the tiles'] * (1 if dtype == torch.float32 else 2)


@pytest.mark.parametrize('metric', METRICS)
def test_the_keys_of_all_matches_take_one_launch_where_the_features_lie(fake_gpu, monkeypatch, metric):
    """The whole of match_ranks, with sizes made up where they follow from values, on tensors of one device."""
    called = []

    def canonical_keys(query, gallery, queries, items, cosine, keys):
        called.append(len(keys))
        assert query.is_cuda and gallery.is_cuda and queries.is_cuda and items.is_cuda and keys.is_cuda

    def count_nonmatches(tile, cosine, first, terms, matches, excluded, steps, redecided):
        called.append('tile')
        assert all(x.is_cuda and x.is_contiguous() for x in (*tile, *terms, *matches, *excluded, steps, redecided))
        assert len(matches.offsets) - 1 == len(excluded.begin) == len(tile.query) and len(matches.keys) == len(steps)
    with fake_gpu('float32') as launches:
        norms = keys.ranking_kernels('cuda').canonical_norms
        kernels = SimpleNamespace(canonical_norms=norms, canonical_keys=canonical_keys,
                                  count_nonmatches=count_nonmatches)
        for module in (keys, ranks):
            monkeypatch.setattr(module, 'ranking_kernels', lambda device: kernels)
        monkeypatch.setattr(torch, 'repeat_interleave', lambda counts, *_: counts.new_empty(300_000))
        monkeypatch.setattr(torch.Tensor, 'nonzero', lambda x: x.new_empty(290_000, 1, dtype=torch.int64))
        monkeypatch.setattr(torch.Tensor, 'numpy', lambda x: np.linspace(0, 300_000, len(x)).astype(int))
        monkeypatch.setattr(torch.Tensor, '__bool__', lambda x: True)
        monkeypatch.setattr(torch.Tensor, 'item', lambda x: 0)
        query, gallery = (torch.empty(n, 64, device='cuda') for n in (11_659, 82_161))
        monkeypatch.setattr(torch.Tensor, 'sub_', lambda x, other: x)  # its sizes are made up
        monkeypatch.setattr(ranks, 'all_ids', lambda *_, device: Ids(
            *(torch.empty(n, dtype=torch.int64, device=device) for n in (11_659, 82_161, 11_659, 82_161))))
        ranks.match_ranks(query, gallery, None, None, None, None, metric=metric)
    assert called[0] == 290_000 and set(called[1:]) == {'tile'} and len(launches.waits) <= 4


@pytest.mark.parametrize('precision', PRECISIONS)
def test_neighbours_round_each_row_once(fake_gpu, monkeypatch, precision):
    rounded = []
    monkeypatch.setattr(nearest, 'is_one_tensor', lambda comparison: True)
    with fake_gpu(precision):
        product.ranking_kernels('cuda').round_to_tf32 = lambda features, *_: rounded.append(len(features))
        features = torch.empty(93_820, 2048, device='cuda')
        norms = torch.empty(93_820, dtype=torch.float64, device='cuda')
        comparison = Comparison(features, features, True, precision)
        with contextlib.suppress(DataDependentOutputException):
            nearest.nearest(comparison, norms, norms, 21)
    assert sum(rounded) == (0 if precision == 'float32' else 93_820)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_tile_of_neighbours_takes_two_launches_and_waits_for_nothing(fake_gpu, monkeypatch, precision):
    seen, by_torch = [], product.by_torch
    monkeypatch.setattr(nearest, 'is_one_tensor', lambda comparison: False)
    with fake_gpu(precision) as launches:
        monkeypatch.setattr(product, 'by_torch', lambda *args: seen.append(launches.count) or by_torch(*args))
        query, gallery = (torch.empty(n, 2048, device='cuda') for n in (11_659, 82_161))
        norms = (torch.empty(n, dtype=torch.float64, device='cuda') for n in (11_659, 82_161))
        with pytest.raises(DataDependentOutputException):  # after the tiles of a block
            nearest.nearest(Comparison(query, gallery, True, precision), *norms, 30)
    launched = np.diff(seen)
    assert len(seen) == 15 and launched[0] == 4 and set(launched[1:]) == {2}  # the first tile fills the selection


@pytest.mark.parametrize('precision', PRECISIONS)
def test_neighbours_are_settled_where_the_features_lie(fake_gpu, monkeypatch, precision):
    """Candidates, and those of crowded queries, with sizes made up where they follow from values."""
    crowded, settle_crowded = [], nearest.settle_crowded
    monkeypatch.setattr(nearest, 'settle_crowded', lambda *args: crowded.append(len(args[3])) or settle_crowded(*args))
    monkeypatch.setattr(nearest, 'is_one_tensor', lambda comparison: False)
    with fake_gpu(precision) as launches:
        monkeypatch.setattr(torch.Tensor, 'nonzero', lambda x: x.new_empty(300, x.dim(), dtype=torch.int64))
        monkeypatch.setattr(torch.Tensor, 'bincount', lambda x, minlength: x.new_empty(minlength))
        monkeypatch.setattr(torch.Tensor, '__int__', lambda x: 40)
        query, gallery = (torch.empty(n, 64, device='cuda') for n in (600, 9000))
        norms = (torch.empty(n, dtype=torch.float64, device='cuda') for n in (600, 9000))
        found = nearest.nearest(Comparison(query, gallery, False, precision), *norms, 30, farthest=True)
    assert [(x.is_cuda, x.dtype, tuple(x.shape)) for x in found] == [
        (True, torch.float64, (600, 30)), (True, torch.int64, (600, 30)), (True, torch.float64, (600,))]
    assert crowded == 2 * [256, 44] and launches.waits == []


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_tile_of_re_rankings_neighbours_takes_six_launches_and_waits_for_nothing(fake_gpu, monkeypatch, precision):
    """Each product serves two tiles: it is turned over, and the nearest and the farthest of both are selected."""
    seen, by_torch = [], product.by_torch

    def settle(comparison, search, block, candidates, error, exclude_self):  # the host waits for keys once a block
        assert launches.waits == []
        found = torch.empty(block.stop - block.start, search.count, dtype=torch.float64, device='cuda')
        return found, found.long(), torch.empty(0, dtype=torch.int64), None
    monkeypatch.setattr(nearest, 'settle', settle)
    monkeypatch.setattr(nearest, 'is_one_tensor', lambda comparison: True)
    with fake_gpu(precision) as launches:
        monkeypatch.setattr(product, 'by_torch', lambda *args: seen.append(launches.count) or by_torch(*args))
        features = torch.empty(93_820, 2048, device='cuda')
        norms = torch.empty(len(features), dtype=torch.float64, device='cuda')
        nearest.nearest(Comparison(features, features, False, precision), norms, norms, 21, farthest=True)
    assert len(seen) == 17 * 18 // 2
    first, *others = np.split(np.diff(seen), np.cumsum(range(17, 1, -1)))  # rows of tiles, from the diagonal on
    settled = 6 + 6  # by the stub: two conversions, four results
    assert first.tolist() == [3 + 4, *[6 + 4] * 15, 4 + settled]  # a block's first tile fills four tensors
    assert [row.tolist() for row in others] == [[3, *[6] * count, settled] for count in range(14, -1, -1)] + [[]]
    assert roofline.LAUNCHES['re-ranking, a tile'] == 6


class OnGpu(torch.Tensor):
    """A tensor of the CPU that stands for one of a GPU."""
    def record_stream(self, stream):
        LOG.append('kept until it was computed with')


LOG = []


@pytest.fixture
def stubs(monkeypatch):
    """Streams, events and pinned memory that write into LOG what is asked of them."""
    class Pinned:
        def __init__(self, tensor, part):
            self.tensor = in_pinned_memory(tensor, part).clone()
            LOG.append(f'pinned {len(self.tensor)}')

        def to(self, device, non_blocking):
            assert non_blocking
            LOG.append(f'copied {len(self.tensor)}')
            return self.tensor.as_subclass(OnGpu)

    def event():
        number = sum(entry.startswith('event') for entry in LOG) + 1
        LOG.append(f'event {number}')
        return SimpleNamespace(synchronize=lambda: LOG.append(f'host waits for event {number}'))
    empty, in_pinned_memory = torch.empty, tiles.in_pinned_memory
    computing = SimpleNamespace(record_event=event, wait_stream=lambda stream: LOG.append('computing waits for copies'))

    @contextlib.contextmanager
    def stream(stream):
        LOG.append('copies {')
        yield
        LOG.append('}')
    LOG.clear()
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: 'copies')
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: computing)
    monkeypatch.setattr(torch, 'empty', lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(tiles, 'in_pinned_memory', Pinned)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_a_part_of_the_gallery_is_copied_while_the_one_before_is_computed_with(stubs, dtype):
    gallery = torch.arange(50).reshape(10, 5).to(dtype)
    parts = [slice(0, 3), slice(3, 7), torch.tensor([2, 2, 9, 9, 9])]
    copy = [*'copies {,copied,},computing waits for copies,kept until it was computed with'.split(',')]
    for part, rows in zip(parts, tiles.on_device(gallery, parts, torch.device('cuda', 0))):
        assert rows.dtype == torch.float32 and torch.equal(rows.as_subclass(torch.Tensor), gallery[part].float())
        LOG.append(f'computes {len(rows)}')

    def steps(n):
        return [copy[0], f'pinned {n}', f'copied {n}', *copy[2:], f'computes {n}']
    # The third part takes the place of the first: by then that has been computed with, but perhaps not the second.
    assert LOG == [*steps(3), 'event 1', *steps(4), 'event 2', 'host waits for event 1', *steps(5)]


def test_re_ranking_counts_a_tile_while_the_next_is_computed_and_copied(stubs, monkeypatch):
    monkeypatch.setattr(ranks, 'tile_of', lambda query: (100, 1000))
    monkeypatch.setattr(ranks, 'in_pinned_memory', torch.clone)
    query, gallery, *ids = clustered(9, 300)
    features = tuple(map(torch.from_numpy, (query, gallery)))
    comparison, ids = Comparison(*features, True, 'float32'), all_ids(9, 300, *ids)
    norms, excluded = finite_norms(features[0], 'query'), ranks.identities(ids, -1)
    matches = ranks.sorted_matches(excluded, ids, lambda queries, items: keys_of_pairs(comparison, queries, items))
    by_torch(monkeypatch, lambda query, items: LOG.append('product') or query @ items.T)
    expected = ranks.nonmatches_between(comparison, norms, matches, excluded)
    LOG.clear()
    got = ranks.nonmatches_between(comparison, norms, matches, excluded, host=features)
    assert torch.equal(got[0], expected[0]) and got[1] == expected[1] and expected[0].sum() > 0
    assert LOG == ['product', 'event 1', 'product', 'event 2', 'host waits for event 1', 'product', 'event 3',
                   'host waits for event 2', 'host waits for event 3']


@pytest.mark.parametrize('capability, proven, expected', [
    ((8, 0), (), 'float32'), ((9, 0), (), 'float32'), ((9, 0), ((9, 0),), 'tf32'), ((8, 9), ((8, 9),), 'float32'),
    ((9, 0), ((8, 0),), 'float32'), ((7, 5), ((7, 5),), 'float32')])
def test_auto_is_the_fastest_precision_where_it_is_proven(monkeypatch, capability, proven, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(product, 'PROVEN', proven)
    gpu = torch.device('cuda', 0)
    assert product.available('auto', gpu, 2048) == expected
    for precision in PRECISIONS:
        assert product.available(precision, gpu, 2048) == (precision if capability >= (8, 0) else 'float32')


@pytest.mark.parametrize('fastest', ['bfloat16', 'int16', 'float32'])
def test_auto_on_a_cpu_is_what_its_units_are_for(monkeypatch, fastest):
    def available(precision, kernels, width=2048):
        monkeypatch.setattr(product, 'own_kernels', lambda device: kernels)
        return product.available(precision, torch.device('cpu'), width)
    kernels = SimpleNamespace(fastest_precision=lambda: fastest)
    assert available('auto', kernels) == fastest and available('auto', None) == 'float32'
    assert {available('auto', kernels, width) for width in (0, 1, 127)} == {'float32'}
    assert available('auto', kernels, 128) == ('float32' if fastest == 'int16' else fastest)
    assert {available(precision, kernels) for precision in PRECISIONS} == {'float32'}
