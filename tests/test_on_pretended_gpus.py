"""Training, evaluation, reports, searches and mgn.load where the network is on a GPU, without one."""

import json

import numpy as np
import pytest
import torch
from conftest import write_market
from pretended_gpus import OnGPU, pretended_gpus
from reports import bind, data_of, root, weights  # noqa: F401 (fixtures)
from thin import thin, train  # noqa: F401 (a fixture)

import mgn
from mgn import crop_search, evaluation
from mgn.ops.metrics import METRICS
from mgn.runs import checkpoint

pytestmark = [pytest.mark.usefixtures('thin'), pytest.mark.filterwarnings('ignore:mgn.ops runs its PyTorch references')]
STAGES = 'query_expansion = 2', 'rerank = True', 'evaluate.k1 = 3', 'evaluate.k2 = 2'


def test_what_pretends_raises_where_devices_meet_and_counts_as_the_cpu_does():
    x = torch.arange(6.0).view(2, 3)
    with pretended_gpus():
        y = x.to('cuda')
        assert isinstance(y, OnGPU) and y.device == torch.device('cuda:0') and not isinstance(y.cpu(), OnGPU)
        assert torch.equal((2 * y.T @ y + torch.ones(3, device='cuda')).cpu(), 2 * x.T @ x + 1)
        for wrong in lambda: x + y, lambda: y + x.to('cuda:1'), lambda: x[y[0].long()], y.numpy, lambda: np.asarray(y):
            with pytest.raises((RuntimeError, TypeError), match='same device|to numpy'):
                wrong()
        with pytest.raises(RuntimeError, match='invalid device ordinal'):
            x.to('cuda:2')


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
def test_a_run_is_resumed_on_another_device(tmp_path, optimizer):
    market, run = write_market(tmp_path / 'data'), tmp_path / 'run'
    options = (f'make_optimizer.optimizer = @{optimizer}', 'train.clip_gradient_norm = 1.0',
               'train.evaluate_first = False')
    for steps, device in ((1, 'cuda'), (2, 'cuda:1'), (3, 'cpu'), (4, 'auto')):
        with pretended_gpus():
            model = train(market, run, *options, f'total_steps = {steps}', f"device = '{device}'")
        assert next(model.parameters()).is_cuda == (device != 'cpu')
        content = checkpoint.load(str(run / 'last.pth'))
        assert content['step'] == steps
        assert all(torch.equal(content['model'][name], value.cpu()) for name, value in model.state_dict().items())
    assert json.loads((run / 'eval.json').read_text())['step'] == 4


@pytest.mark.parametrize('storage', [None, 'float16'])
def test_every_stage_of_an_evaluation_gives_what_the_cpu_gives(weights, root, tmp_path, storage):
    """From images, or from files, whose gallery stays in main memory."""
    files, results = [], {}
    if storage:
        files = [f"features_dir = '{tmp_path / 'features'}'"]
        with pretended_gpus():
            evaluation.extract_checkpoint(bind(weights, root, tmp_path, "device = 'cuda'", *files,
                                               f"write_features.storage = '{storage}'"))
    for device in 'cpu', 'cuda':
        with pretended_gpus():
            content = bind(weights, root, tmp_path / device, f"device = '{device}'", 'report = True', *STAGES, *files)
            results[device] = evaluation.evaluate_checkpoint(content)
    for one, other in zip(*([each, each['query_expansion'], each['rerank']] for each in results.values())):
        assert [one[name] for name in METRICS] == pytest.approx([other[name] for name in METRICS])
    one, other = (data_of(tmp_path / device / 'report.html') for device in results)
    assert one['queries'] == other['queries'] and one['cameras'] == other['cameras']


def test_a_report_compares_and_a_search_finds_on_a_gpu(weights, root, tmp_path, capsys):
    with pretended_gpus():
        evaluation.report_checkpoint(bind(weights, root, tmp_path / 'out', "device = 'cuda'", f"compare = '{weights}'"))
        crop_search.search(bind(weights, root, tmp_path, "device = 'cuda'", f"query = '{root / 'q' / '1_1.png'}'",
                                f"gallery = '{root / 'q'}'"))
    assert data_of(tmp_path / 'out' / 'report.html')['compare']['lists'] == []  # none has changed
    assert capsys.readouterr().out.splitlines()[-8].split() == ['1.0000', f'{root}/q/1_1.png']


@pytest.mark.parametrize('device', ['cpu', 'cuda', 'cuda:1'])
def test_images_of_any_device_are_embedded_whatever_gpu_is_present(weights, device):
    images = torch.randint(0, 256, (2, 3, 50, 20), dtype=torch.uint8)
    expected = mgn.load(weights, 'cpu').embed(images)
    with pretended_gpus():
        embedder = mgn.load(weights, device)
        torch.cuda.set_device(1)
        got = embedder.embed(images)
        for same in images.to('cuda:0'), [images[0].to('cuda:0'), images[1]]:
            assert torch.equal(embedder.embed(same), got)
    torch.testing.assert_close(got, expected)
