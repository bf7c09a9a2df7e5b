"""A sharded evaluation beside that of one process, in time and traffic; a gallery in a file beside one in memory.

    python -m benchmarks.sharding [work …] [--rounds=5]

Works: processes (1 and 2, a thread each, on one machine), file (2 GB). Medians. One process
is measured before two; memory and the cached file alternate.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.machine import cpu_model
from benchmarks.ranking import D, G, alternate, problem
from mgn.ops import match_ranks, match_ranks_sharded
from mgn.runs.processes import part as own_part

QUERIES = 512


def processes(rounds):
    """Each number of processes in a run of torchrun, of one thread each; they hold equal parts of queries and
    gallery."""
    results = {}
    for count in (1, 2):
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc-per-node={count}', '-m',
                   'benchmarks.sharding', 'part', f'--rounds={rounds}']
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        results[count] = json.loads(out.strip().splitlines()[-1])
    assert results[1]['hash'] == results[2]['hash'], 'other ranks'
    one, two = (results[count] for count in (1, 2))
    print(f'{QUERIES} × {G} × {D}: 1 process {one["seconds"]:.3f} s, 2 processes {two["seconds"]:.3f} s, '
          f'{one["seconds"] / two["seconds"]:.2f}×; {two["traffic"] / 1e6:.2f} MB over the loopback interface, of '
          f'query features {QUERIES * D * 4 / 1e6:.2f} MB, of the gallery '
          f'{G * D * 4 / 1e6:.0f} MB; {two["matches"]} matches; exchange alone {two["exchange"]:.3f} s')


def part(rounds):
    """What each of the processes does."""
    dist.init_process_group('gloo')
    mine = [torch.as_tensor(own_part(array)).clone() for array in problem(QUERIES)]
    seconds, exchanges, sent = [], [], []
    for _ in range(rounds + 1):
        dist.barrier()
        before, start = travelled(), time.perf_counter()
        ranks = match_ranks_sharded(*mine)
        seconds.append(time.perf_counter() - start)
        dist.barrier()
        sent.append(travelled() - before)
        start = time.perf_counter()
        match_ranks_sharded(mine[0], mine[1][:0], mine[2], mine[3][:0], mine[4], mine[5][:0])
        exchanges.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        digest = hashlib.sha256(ranks.ranks.tobytes() + ranks.offsets.tobytes()).hexdigest()
        print(json.dumps({'seconds': statistics.median(seconds[1:]), 'traffic': statistics.median(sent[1:]),
                          'matches': len(ranks.ranks), 'exchange': statistics.median(exchanges[1:]), 'hash': digest}))
    dist.destroy_process_group()


def travelled():
    """Bytes that the loopback interface has carried."""
    with open('/proc/net/dev') as lines:
        return int(re.search(r'lo:\s*(\d+)', lines.read())[1])


def file(rounds):
    """2 GB of gallery: in memory, in a file that the system has cached, and in one that it has to read."""
    rows = 2 ** 31 // (4 * D)
    query, gallery, *ids = problem(QUERIES, gallery=rows)
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = os.path.join(folder, 'gallery.npy')
        np.save(path, gallery.numpy())
        in_memory, expected = gallery, match_ranks(query, gallery, *ids)

        def forget():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

        def read():
            """The file alone, as fast as it comes."""
            with open(path, 'rb', buffering=0) as stream:
                buffer = bytearray(2 ** 24)
                while stream.readinto(buffer):
                    pass

        def ranks(features=None):
            features = np.load(path, mmap_mode='r') if features is None else features
            assert np.array_equal(match_ranks(query, features, *ids).ranks, expected.ranks), 'other ranks'
        times = alternate({'memory': lambda: ranks(in_memory), 'cached': ranks}, rounds)
        cold = {'read': [], 'ranks': []}
        for _ in range(rounds):
            for name, run in (('read', read), ('ranks', ranks)):
                forget()
                start = time.perf_counter()
                run()
                cold[name].append(time.perf_counter() - start)
        cold = {name: statistics.median(seconds) for name, seconds in cold.items()}
    print(f'{QUERIES} × {rows} × {D} (2 GB): in memory {times["memory"]:.3f} s, file in the cache '
          f'{times["cached"]:.3f} s '
          f'({times["cached"] / times["memory"]:.2f}×), file on disk {cold["ranks"]:.3f} s; reading the file alone '
          f'{cold["read"]:.3f} s')


WORKS = {'processes': processes, 'file': file}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('works', nargs='*', default=list(WORKS), help='of processes, file')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    if args.works == ['part']:
        part(args.rounds)
        return
    print(f'{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    for name in args.works:
        WORKS[name](args.rounds)


if __name__ == '__main__':
    main()
