"""`make gpu` without a GPU: every step as far as a CPU and a stub of torch.cuda go, and the page of its figures."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from cuda_checks import nothing_waits
from data import test_augmentation
from emulation import need
from ops import test_batch_hard_cuda, test_pairwise_distance_cuda
from thin import thin  # noqa: F401 (a fixture)
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode

import test_training_cuda
from benchmarks import gpu, gpu_faults, gpu_profile, gpu_times, roofline

STEPS = gpu.steps(gpu.ROOT / 'build')
PYTEST = {name: step.command[step.command.index('pytest') + 1:] for name, step in STEPS.items()
          if 'pytest' in step.command}


class Waiting(TorchFunctionMode):
    """Raises where a GPU would be waited for: reads of a tensor by the host, copies to a device given by name."""
    READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero,
             torch.nonzero, torch.masked_select, torch.equal, torch.Tensor.__bool__, torch.Tensor.__float__,
             torch.Tensor.__int__, torch.Tensor.__index__}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]
        copies = function in (torch.Tensor.to, torch.tensor, torch.as_tensor) and not kwargs.get('non_blocking')
        if function in self.READS or copies and named:
            raise RuntimeError('called a synchronizing CUDA operation')  # torch's words
        return function(*args, **kwargs)


@pytest.fixture
def stub(monkeypatch):
    """torch.cuda as far as `nothing_waits` uses it: what waits for a GPU raises on the CPU, too."""
    entered = []

    def set_sync_debug_mode(mode):
        if mode == 'error':
            entered.append(Waiting())
            entered[-1].__enter__()
        else:
            entered.pop().__exit__(None, None, None)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', set_sync_debug_mode)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)


@pytest.mark.parametrize('wait', [lambda x: x.to('cpu'), lambda x: x.sum().item(), lambda x: bool(x[0] > 0),
                                  lambda x: torch.tensor([1.0], device='cpu'), lambda x: x.cpu()])
def test_the_stub_tells_what_waits(stub, wait):
    with pytest.raises(RuntimeError, match='synchronizing'), nothing_waits():
        wait(torch.ones(3))
    with nothing_waits():
        assert (torch.ones(3) * 2).to(torch.float64).sum() is not None
    wait(torch.ones(3))


def test_tests_that_nothing_waits_copy_nothing_themselves(stub):
    for n in (64, 5000):
        test_batch_hard_cuda.test_forward_and_backward_wait_for_nothing('cpu', n)
    for metric in test_pairwise_distance_cuda.METRICS:
        test_pairwise_distance_cuda.test_forward_and_backward_wait_for_nothing('cpu', metric, torch.bfloat16)
    test_augmentation.test_a_gpu_gives_the_same_and_is_not_waited_for(None, 'cpu')


def test_training_steps_wait_for_nothing(stub, thin):
    test_training_cuda.test_steps_wait_for_nothing('cpu', 'float32', 5.0)


class Collected:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


@pytest.mark.parametrize('name', [
    name if name in ('test-ranking', 'memcheck-mining') else pytest.param(name, marks=pytest.mark.long)
    for name in PYTEST])
def test_a_step_of_tests_finds_tests_that_take_a_device(name, capsys):
    collected = Collected()
    assert pytest.main(['--collect-only', *PYTEST[name]], plugins=[collected]) == 0, capsys.readouterr().out
    assert len(collected.names) > 4
    files = {argument for argument in PYTEST[name] if argument.endswith('.py')}
    found = {nodeid.split('::')[0] for nodeid in collected.names}
    assert name == 'test-long' or files == found, 'a file without a test'
    graphs = [nodeid for nodeid in collected.names if 'graph' in nodeid]
    assert not graphs or name.startswith('test')


def test_steps_end_in_time_and_sanitizers_but_initcheck_see_our_kernels_alone():
    assert all(0 < step.limit <= 480 for step in STEPS.values())
    sanitizers = {name: step for name, step in STEPS.items() if step.command[0] == 'compute-sanitizer'}
    assert {name.partition('-')[0] for name in sanitizers} == {'memcheck', 'racecheck', 'initcheck', 'synccheck'}
    for name, step in sanitizers.items():
        assert f'--tool={name.partition("-")[0]}' in step.command and '--error-exitcode=1' in step.command
        # namespace mgn, mangled; initcheck has to see what other kernels write
        assert ('--kernel-name=kernel_substring=3mgn' in step.command) == ('initcheck' not in name)
        assert step.environment['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'


@pytest.mark.parametrize('family', [family if family != 'training' else pytest.param(family, marks=pytest.mark.long)
                                    for family in gpu_times.FAMILIES])
def test_a_family_of_times_runs_on_a_cpu(family, capsys):
    gpu_times.main([family, '--device=cpu', '--small'])
    figures = gpu.figures_of(capsys.readouterr().out)
    assert figures and all({'row', 'side'} < figure.keys() for figure in figures)
    rows = roofline.rows()
    named = {figure['row'] for figure in figures if figure['side'] == 'mgn'}
    assert named & set(rows) or family in ('mining', 'peers', 'launches'), 'rows that docs/gpu.md does not have'


def test_launches_and_waits_of_a_call_leave_out_those_of_the_profile(monkeypatch):
    def profiled(run, calls, device):
        def event(name, device_type, microseconds=0):
            time = SimpleNamespace(elapsed_us=lambda: microseconds)
            return SimpleNamespace(name=name, device_type=device_type, time_range=time)
        own = [event('cudaDeviceSynchronize', DeviceType.CPU), event('Memcpy HtoD', DeviceType.CUDA, 9)]
        of_a_call = [event('cudaLaunchKernel', DeviceType.CPU), event('mine', DeviceType.CUDA, 5),
                     event('gather', DeviceType.CUDA, 3), event('cudaStreamSynchronize', DeviceType.CPU)]
        return SimpleNamespace(events=lambda: own + calls * of_a_call)
    monkeypatch.setattr(gpu_profile, 'profiled', profiled)
    launched, waits, seconds = gpu_profile.counted(None, torch.device('cuda'))
    assert (launched, waits) == (2, 1) and seconds == pytest.approx(8e-6)


def test_a_tool_that_misses_its_planted_fault_is_told(monkeypatch, tmp_path, capfd):
    """nvcc is real, so that the faults compile; compute-sanitizer finds one where its arguments are like a pattern."""
    need('nvcc', 'which compiles the planted faults')
    monkeypatch.setattr(gpu, 'PATH', f'{tmp_path}:{gpu.PATH}')
    stub = tmp_path / 'compute-sanitizer'
    for seen, missed in (('*3mgn*|*initcheck*', None), ('*racecheck*3mgn*', 'memcheck, initcheck, synccheck'),
                         ('*', 'none; exit status outside the filter: 1')):
        stub.write_text(f'#!/bin/sh\ncase "$*" in {seen}) exit 1;; esac\n')
        stub.chmod(0o755)
        if missed is None:
            faults = gpu_faults.compiled(tmp_path)
            gpu_faults.check(faults)
            assert 'each tool finds its fault' in capfd.readouterr().out
        else:
            with pytest.raises(SystemExit, match=f'not found: {missed}'):
                gpu_faults.check(faults)


def step_of(program, limit=20):
    return gpu.Step(limit, gpu.python('-c', program))


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """Steps that pass, fail, take too long and lack their tool, instead of the real ones; pages in a folder."""
    for name, value in (('is_available', True), ('get_device_name', 'a stub'), ('get_device_capability', (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    figure = {'row': 'match_ranks, tf32', 'side': 'mgn', 'seconds': 0.0125}
    child = 'import subprocess, sys; subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])'
    monkeypatch.setattr(gpu, 'steps', lambda out: {
        'good': step_of(f'print({json.dumps(figure)!r}); print("all | well")'),
        'bad': step_of('raise SystemExit(3)'),
        'slow': step_of(child, 1), 'absent': gpu.Step(5, ['no-such-sanitizer'])})
    page = tmp_path / 'gpu.md'
    page.write_text(roofline.PAGE.read_text())
    monkeypatch.setattr(roofline, 'PAGE', page)
    monkeypatch.setattr(roofline, 'MEASURED', page.with_suffix('.json'))
    monkeypatch.setattr(roofline, 'ROOT', tmp_path)
    return tmp_path / 'out'


def test_every_step_leaves_a_line_and_the_table_shows_all(few_steps, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([f'--out={few_steps}'])
    assert ended.value.code is True
    records = gpu.read(few_steps / 'steps.jsonl')
    results = {record['step']: record['result'] for record in records}
    assert results == {'good': 'passed', 'bad': 'failed, exit status 3', 'slow': 'stopped after 1 s',
                       'absent': 'not run'}
    assert records[2]['seconds'] < 15 and 'no no-such-sanitizer on PATH' in records[3]['said']
    table = (few_steps / 'table.md').read_text()
    assert '| good | passed | ' in table and 'all \\| well' in table
    assert '| match_ranks, tf32 | mgn | 12.5 |  |  |' in table and table in capsys.readouterr().out
    measured = json.loads((few_steps / 'gpu.json').read_text())
    assert measured['device'] == 'a stub' and measured['seconds'] == {'match_ranks, tf32': 0.0125}
    page = (few_steps / 'gpu.md').read_text()
    row, = (line for line in page.splitlines() if line.startswith('| match_ranks, tf32 '))
    assert row.endswith('| 12.5 |') and 'measured on a stub' in page


def test_a_later_call_keeps_what_the_same_device_has_measured_before(few_steps):
    def measure(row, device='a stub'):
        record = {'step': 'time', 'result': 'passed', 'seconds': 1, 'said': '', 'device': device, 'torch': '2.11',
                  'figures': [{'row': row, 'side': 'mgn', 'seconds': 0.5}]}
        few_steps.mkdir(exist_ok=True)
        gpu.keep([record], few_steps)
        return set(json.loads(roofline.MEASURED.read_text())['seconds'])
    assert measure('match_ranks, tf32') == {'match_ranks, tf32'}
    assert measure('match_ranks, float32') == {'match_ranks, tf32', 'match_ranks, float32'}
    assert measure('match_ranks, float32', 'another') == {'match_ranks, float32'}


def test_steps_named_run_alone_and_unknown_ones_are_told(few_steps, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(['good', f'--out={few_steps}'])
    assert ended.value.code is False and len(gpu.read(few_steps / 'steps.jsonl')) == 1
    with pytest.raises(SystemExit):
        gpu.main(['better', f'--out={few_steps}'])
    assert 'there is no step better; there are: good, bad, slow, absent' in capsys.readouterr().err


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(gpu, 'PACKAGES', {'json': 'json', 'no_such_module': 'gin-config'})
    said = gpu.lacking(step_of(''))
    assert said.startswith('bring these wheels') and 'pip download --no-deps gin-config (' in said
    assert sys.executable in STEPS['loads'].command


def test_the_page_has_the_tables_of_the_formulas():
    page = roofline.PAGE.read_text()
    assert roofline.with_tables(page, roofline.read_measured()) == page, 'python -m benchmarks.roofline writes it anew'


def test_the_formulas_on_devices_where_one_thing_is_slow():
    """The time of what is slow alone, by hand."""
    fast = {unit: 1e30 for unit in roofline.UNITS}
    roof = roofline.Device(1e30, 1e30, fast, '')
    products = roofline.Q * roofline.G * roofline.D
    work = roofline.match_ranks('tf32')
    slow = roof._replace(rates={**fast, 'tf32': 1e12})
    assert work.seconds(slow) == pytest.approx(products / 1e12 / roofline.REACHED)
    assert work.launches == 120 + 4 * 41 * 2  # ⌈82,161 / 2,048⌉ tiles for each of 2 blocks of 8,192 queries at most
    assert work.seconds(roof) == work.launches * roofline.LAUNCH
    link = roof._replace(link=1e9)
    downloaded = 4 * roofline.Q * roofline.G + 4 * (roofline.Q + roofline.G) * roofline.D
    assert roofline.re_ranking('float32').seconds(link) == pytest.approx(downloaded / 1e9 / roofline.REACHED)
    memory = roof._replace(memory=1e9)
    rows = 4 * (64 + 64) * 256 + 4 * 64 * 64
    assert roofline.distance(64, 64, 256, False).seconds(memory) == pytest.approx(rows / 1e9 / roofline.REACHED)
    assert roofline.match_ranks('tf32').seconds(roofline.DEVICES['T4']) is None
    convolution = 64 * 64 * 192 * 64 * 3 * 49  # multiply-adds of the first one, of 64 images
    assert roofline.step(torch.float32)[0] > 200 * convolution
