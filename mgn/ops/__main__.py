"""python -m mgn.ops: what is compiled, and which implementation each operation takes on each device, and why."""

import torch

from mgn.ops.native import implementation, missing


def main():
    print(f'torch {torch.__version__}, CUDA {torch.version.cuda}')
    print(f'mgn._C     {missing("_C") or "instruction sets here: " + torch.ops.mgn_cpu.instruction_sets()}')
    print(f'mgn._cuda  {missing("_cuda") or torch.ops.mgn_cuda.build()}')
    devices = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    devices += ['mps'] * torch.backends.mps.is_available()
    if torch.cuda.device_count() == 0:
        print('cuda: no device here')
    for device in devices:
        name = f' ({torch.cuda.get_device_name(device)})' if device.startswith('cuda') else ''
        print(f'{device}{name}:')
        print(f'  batch_hard, batch_hard_triplet_loss, forward and backward: {implementation(device)}')
        on_cpu, ranking = implementation('cpu'), implementation('cpu' if device == 'mps' else device)
        selection = 'torch.topk' if device.startswith('cuda') else on_cpu
        print(f'  match_ranks, products and counting: {ranking}')
        print(f'  topk, products and keys: {ranking}; selection, topk_from_distance: {selection}')
        print(f'  k_reciprocal_ranks: neighbours as topk; encodings, counting on the CPU, {on_cpu}')
        print(f'  match_ranks_from_distance, evaluate_rank: on the CPU, {on_cpu}')
        print(f'  pairwise_distance, forward: {implementation(device)}; backward: PyTorch')


if __name__ == '__main__':
    main()
