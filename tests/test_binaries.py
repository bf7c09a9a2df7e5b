"""python -m mgn.train and python -m mgn.eval as a user runs them: one run, its evaluation, a kill, and mistakes."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_market
from forks import run_binary

import mgn
from mgn.ops.metrics import METRICS

PROJECT = Path(mgn.__file__).parent.parent
RECIPE = """
dataset = @market_layout()
data_root = 'data'
input_size = (64, 32)
P = 2
K = 2
total_steps = 5
workers = 1
device = 'cpu'
MGN.backbone = 'resnet18'
MGN.pretrained = False
MGN.parts = (2,)
MGN.last_strides = (2,)
multi_step.warmup_steps = 0
multi_step.milestones = ()
train.log_every = 1
train.checkpoint_every = 3
train.evaluate_every = 100
"""
FLAGS = ('--gin_file=my.gin', '--gin_bindings=seed = 3', '--gin_bindings=lr = 1e-3')


def environment():
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, 'PYTHONPATH': path}


def run(folder, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment(), text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def on_terminal(rows, columns, *command, cwd):
    """What a binary that succeeds shows on a terminal of this size."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack('4H', rows, columns, 0, 0))
    with ThreadPoolExecutor() as pool:
        shown = pool.submit(read_all, terminal)
        done = run_binary(*command, cwd=cwd, stdout=os.ttyname(inner))
        os.close(inner)
    assert done.returncode == 0, done.stderr
    return shown.result()


def read_all(descriptor):
    chunks = []
    while True:
        try:
            chunks.append(os.read(descriptor, 1 << 16))
        except OSError:  # how a terminal says that its last writer is gone
            chunks.append(b'')
        if not chunks[-1]:
            os.close(descriptor)
            return b''.join(chunks).decode()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A user's folder with data and a recipe."""
    home = tmp_path_factory.mktemp('home')
    write_market(home / 'data', identities=4)
    (home / 'my.gin').write_text(RECIPE)
    yield home
    shutil.rmtree(home)  # hundreds of megabytes


@pytest.fixture(scope='module')
def trained(home):
    code, out, err = run(home, '-m', 'mgn.train', *FLAGS)
    assert code == 0, err
    return home / 'runs' / 'my', out, err


def metrics(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_training_writes_a_run_and_plain_lines_off_a_terminal(trained):
    folder, out, err = trained
    assert {'last.pth', 'best.pth', 'config.gin', 'metrics.jsonl', 'eval.json'} <= set(os.listdir(folder))
    assert '\r' not in out + err and '\x1b' not in out + err
    assert not re.search('Traceback|[Ee]rror', out + err)
    for step in range(1, 6):
        assert len(re.findall(rf'^\d\d:\d\d:\d\d I step {step}: loss \d+\.\d+, lr ', out, re.MULTILINE)) == 1
    assert '4 identities and 16 images to train, 3 query, 10 gallery, 2 cameras' in out
    last = metrics(folder)[-1]
    assert re.search(r'^\w+' + ''.join(f' +{100 * last[name]:.2f}' for name in METRICS) + '$', out, re.MULTILINE)
    assert len(re.findall('to train', out + err)) == 1  # nothing is said twice


def test_evaluation_needs_the_checkpoint_and_the_data_alone_from_any_folder(trained, tmp_path):
    folder, _, _ = trained
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    bindings = f"weights='{folder / 'best.pth'}'", f"data_root='{folder.parent.parent / 'data'}'"
    done = run_binary('mgn.eval', *(f'--gin_bindings={binding}' for binding in bindings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'eval.json').read_text())
    best = max((line for line in metrics(folder) if 'mAP' in line), key=lambda line: line['mAP'])
    assert {name: results[name] for name in best} == best
    assert re.search(f'{100 * best["mAP"]:.2f}', done.stdout)
    assert os.listdir(tmp_path) == ['eval.json']
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


def test_a_full_disk_that_output_goes_to_is_told_and_eval_json_is_written(trained, tmp_path):
    folder, _, _ = trained
    bindings = f"weights='{folder / 'best.pth'}'", f"data_root='{folder.parent.parent / 'data'}'"
    done = run_binary('mgn.eval', *(f'--gin_bindings={binding}' for binding in bindings), cwd=tmp_path,
                      stdout='/dev/full')
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    assert 'error: A file cannot be used: [Errno 28] No space left on device. Allow it, free space, or' in done.stderr
    assert json.loads((tmp_path / 'eval.json').read_text())['queries'] == 3


KILLED = """
import os, runpy, signal, sys
from mgn import training
calls, real = [], training.train_step

def step(*args):
    calls.append(0)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

training.train_step = step
sys.argv[0] = 'mgn.train'
runpy.run_module('mgn.train', run_name='__main__', alter_sys=True)
"""


def test_a_killed_run_started_again_ends_as_if_nothing_had_happened_and_a_terminal_shows_a_bar(trained, home):
    folder, _, _ = trained
    flags = (*FLAGS, "--gin_bindings=output_dir = 'again'")
    assert run_binary(*flags, program=KILLED, cwd=home).returncode == -9
    assert torch.load(home / 'again' / 'last.pth')['step'] == 3
    assert [line['step'] for line in metrics(home / 'again')] == [0, 1, 2, 3, 4]

    shown = on_terminal(40, 120, 'mgn.train', *flags, cwd=home)
    assert re.search(r'5/5 \[.*step.*loss=\d+\.\d+.*lr=.*images/s=', shown)
    assert re.search(r'features: 100%.*13/13', shown)

    one, other = (torch.load(run / 'last.pth') for run in (folder, home / 'again'))
    assert one['step'] == other['step'] == 5
    assert all(torch.equal(value, other['model'][name]) for name, value in one['model'].items())
    states = one['optimizer']['state'], other['optimizer']['state']
    assert all(torch.equal(value, states[1][key][name]) for key in states[0] for name, value in states[0][key].items())
    timings = {'images_per_s', 'data_wait'}
    assert [{name: line[name] for name in line.keys() - timings} for line in metrics(home / 'again')] == [
        {name: line[name] for name in line.keys() - timings} for line in metrics(folder)]


def test_on_a_terminal_without_a_size_steps_are_plain_lines(home):
    shown = on_terminal(0, 0, 'mgn.train', *FLAGS, "--gin_bindings=output_dir = 'sizeless'",  # as under script(1)
                        '--gin_bindings=total_steps = 1', '--gin_bindings=workers = 0', cwd=home)
    assert re.search(r'I step 1: loss \d', shown) and 'step/s' not in shown


def test_help_whose_reader_goes_away_leaves_no_traceback(home):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, '-m', 'mgn.train', '--help'], cwd=home, stdout=writer,
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 141 and done.stderr == ''


def test_help_names_the_flags_with_examples(home):
    code, out, err = run(home, '-m', 'mgn.eval', '--help')
    assert '--gin_file=gin/market.gin' in out and '--gin_bindings="data_root=\'datasets\'"' in out


MISTAKES = [
    ('mgn.train', ['--gin_bindings=train.PP = 3'], "PP.*nearest valid name is 'P'"),
    ('mgn.train', ['--gin_bindings=trian.P = 3'], "trian.*nearest valid name is 'train'"),
    ('mgn.train', ["--gin_bindings=data_rot = 'x'"], "data_rot.*nearest valid name is 'data_root'"),
    ('mgn.train', ['--gin_bindings=P ='], 'A gin binding looks like P = 16, and this is none: '),
    ('mgn.train', ['--gin_bindings=P = (3'], 'A gin binding looks like P = 16, and this is none: '),
    ('mgn.train', ['--gin_file=nowhere.gin'], 'nowhere.gin.*Searched'),
    ('mgn.eval', ['--gin_file=/bin/ls'], r'A gin file is UTF-8 text, and one is not .*; give .*weights=\'…\'"'),
    ('mgn.train', ['--gin_file=my.gin', "--gin_bindings=data_root = 'nowhere'"],
     'looked into.*nowhere .no such folder'),
    ('mgn.train', ['--gin_file=my.gin', '--gin_bindings=P = 5'], 'at least P=5 identities, found 4'),
    ('mgn.train', ['--gin_file=my.gin', "--gin_bindings=device = 'cuda:99'"], "device 'cuda:99'"),
    ('mgn.train', ['--gin_file=my.gin', "--gin_bindings=MGN.pretrained = 'nowhere.pth'"], 'no file nowhere.pth'),
    ('mgn.train', ['my.gin'], r"Only flags are understood, found \['my.gin'\]; give --gin_file"),
    ('mgn.eval', [], '--gin_bindings="weights='),
    ('mgn.eval', ["--gin_bindings=weights = 'nowhere.pth'"], 'no file .*nowhere.pth'),
    ('mgn.eval', ["--gin_bindings=weights = 'my.gin'"], 'my.gin is damaged or no file of weights'),
    ('mgn.eval', ["--gin_bindings=weight = 'my.gin'"], 'weights'),
    ('mgn.train', ['--gin_file=my.gin', "--gin_bindings=output_dir = 'bad'", '--gin_bindings=rerank = 20'],
     'rerank must be True or False, found 20'),
    ('mgn.extract', ["--gin_bindings=features_dir = 'features'"], '--gin_bindings="weights='),
    ('mgn.report', ["--gin_bindings=weights = 'nowhere.pth'"], 'no file .*nowhere.pth'),
    ('mgn.report', ["--gin_bindings=weights = 'my.gin'", '--gin_bindings=report.blurred = True'],
     "the nearest valid name is 'blur'"),
]
# Every mistake is made by a process of its own, as by python -m.
MAKE_MISTAKES = """
import json, os, runpy, sys, traceback

def end(error):
    if isinstance(error, SystemExit):  # as Python ends on it, without the seconds that torch takes to be unloaded
        code = error.code if isinstance(error.code, int) else 1
        print(error.code, file=sys.stderr)
    else:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for number, (module, flags, _) in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for stream in (1, 2):
            os.dup2(os.open(f'{number}.{stream}', os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = [module, *flags]
        try:
            runpy.run_module(module, run_name='__main__', alter_sys=True)
        except BaseException as error:
            end(error)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mistakes')
    write_market(folder / 'data', identities=4)
    (folder / 'my.gin').write_text(RECIPE + 'workers = 0\nMGN.embedding_dim = 8\n')
    done = run_binary(json.dumps(MISTAKES), program=MAKE_MISTAKES, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, [int(code) for code in done.stdout.split()]


@pytest.mark.parametrize('number', range(len(MISTAKES)), ids=[' '.join([m[0], *m[1]]) for m in MISTAKES])
def test_a_mistake_ends_with_code_1_and_one_clear_message(mistaken, number):
    folder, codes = mistaken
    out, err = ((folder / f'{number}.{stream}').read_text() for stream in (1, 2))
    assert 'Traceback' not in out + err and 'In call to configurable' not in out + err
    assert len(re.findall('error: ', err)) == 1
    assert re.search(MISTAKES[number][2], err, re.DOTALL)
    assert codes[number] == 1


BUG = """
import runpy, sys
from mgn import model

def forward(self, images):
    raise ValueError('the tensors of a new idea do not fit')

model.MGN.forward = forward
sys.argv[0] = 'mgn.train'
runpy.run_module('mgn.train', run_name='__main__', alter_sys=True)
"""


def test_a_bug_keeps_its_traceback(mistaken):
    folder, _ = mistaken
    done = run_binary('--gin_file=my.gin', "--gin_bindings=output_dir = 'bug'", program=BUG, cwd=folder)
    assert done.returncode == 1 and 'error: ' not in done.stderr.replace('ValueError: ', '')
    message = r'Traceback \(most.*in forward\n.*ValueError: the tensors of a new idea do not fit'
    assert re.search(message, done.stderr, re.DOTALL)


PAPER = """
include 'gin/market_paper.gin'
dataset = @market_layout()
data_root = 'data'
input_size = (64, 32)
P = 2
K = 2
total_steps = 1
multi_step.milestones = ()
workers = 0
device = 'cpu'
MGN.backbone = 'resnet18'
MGN.pretrained = False
MGN.embedding_dim = 8
MGN.parts = (1, 2)
MGN.last_strides = (2, 2)
"""


def test_features_of_a_recipe_with_flip_test_are_extracted_then_evaluated_from_another_folder(mistaken, tmp_path):
    """The commands of the README, one after the other, in one process: each loads its configuration anew."""
    folder, _ = mistaken
    (folder / 'paper.gin').write_text(PAPER)
    program = f"""
import os
from mgn import eval, extract, report, train
train.main(['paper.gin'], [])
os.chdir({str(tmp_path)!r})
bindings = ["weights='{folder}/runs/paper/best.pth'", "data_root='{folder}/data'"]
eval.main([], bindings)
os.rename('eval.json', 'images.json')
extract.main([], [*bindings, "features_dir='features'"])
eval.main([], [*bindings, "features_dir='features'"])
report.main([], bindings)
"""
    done = run_binary(program=program, cwd=folder)
    assert done.returncode == 0, done.stderr
    images, files = (json.loads((tmp_path / name).read_text()) for name in ('images.json', 'eval.json'))
    assert (tmp_path / 'report.html').is_file()
    assert files['flip_test'] and images['flip_test'] and files['features_dir'] == str(tmp_path / 'features')
    assert {name: files[name] for name in METRICS} == {name: images[name] for name in METRICS}
