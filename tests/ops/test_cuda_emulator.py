"""The harness that runs CUDA kernels on the host catches what it is there to catch."""

import re

import pytest
from emulation import FLAGS, ROOT, compile_for_emulator, start


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """run(kind, fault, order) → (exit status, wrong results or None, what it said)."""
    folder, built = tmp_path_factory.mktemp('faults'), {}

    def run(kind, fault, order='forward'):
        if kind not in built:
            built[kind] = compile_for_emulator(folder, kind, [ROOT / 'tests/cuda_emulator/faults.cu'], FLAGS[kind])
        process = start(built[kind], fault, order=order)
        out, said = process.communicate()
        return process.returncode, int(out) if out else None, said.decode()
    return run


ORDERS = ['forward', 'reverse', '1', '2', '3']


@pytest.mark.parametrize('kind', ['plain', 'address', 'thread'])
@pytest.mark.parametrize('order', ORDERS)
def test_right_work_passes_everything(run, kind, order):
    assert run(kind, 'none', order) == (0, 0, '')


@pytest.mark.parametrize('fault, message', [
    ('divergent_barrier', 'threads wait at different barriers'),
    ('early_return', 'a barrier that some threads have returned before'),
    ('lane_outside_mask', 'a lane outside its own mask'),
    ('lane_has_returned', 'a mask names a lane that has returned'),
    ('lane_at_barrier', 'a mask names a lane that waits at a barrier'),
    ('read_outside_mask', 'a lane reads one outside the mask'),
    ('different_intrinsics', 'lanes of a mask meet at different calls'),
])
@pytest.mark.parametrize('order', ORDERS)
def test_the_emulator_names_misused_synchronisation(run, fault, message, order):
    status, _, said = run('plain', fault, order)
    assert status != 0 and f'emulator: {message}, in block' in said, said
    assert 'faults.cu:' in said, 'where'


@pytest.mark.parametrize('fault', ['unwritten_output', 'unwritten_shared'])
def test_poison_shows_what_was_never_written(run, fault):
    status, wrong, _ = run('plain', fault)
    assert status == 0 and wrong > 0


def test_a_missing_barrier_gives_wrong_results_in_some_order(run):
    assert any(run('plain', 'missing_barrier', order)[1] for order in ORDERS)


@pytest.mark.parametrize('order', ORDERS)
def test_thread_sanitizer_names_both_sides_of_a_race_in_every_order(run, order):
    status, _, said = run('thread', 'missing_barrier', order)
    assert status != 0 and 'data race' in said and said.count('faults.cu') >= 2


@pytest.mark.parametrize('fault, message', [
    ('read_beyond_global', 'heap-buffer-overflow'), ('write_beyond_global', 'heap-buffer-overflow'),
    ('read_beyond_shared', 'global-buffer-overflow|insufficient space for an object'),
    ('signed_overflow', 'signed integer overflow'), ('misaligned', 'misaligned address'),
])
def test_address_and_undefined_behaviour_sanitizers_name_the_line(run, fault, message):
    status, _, said = run('address', fault)
    assert status != 0 and re.search(message, said) and 'faults.cu:' in said


def test_an_unknown_fault_is_told_from_a_caught_one(run):
    assert run('plain', 'no such fault')[0] == 2
