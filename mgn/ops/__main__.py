"""python -m mgn.ops: what is compiled, and whether operations take it on each device, or why not."""

import torch

from mgn.ops.native import implementation, missing


def main():
    print(f'torch {torch.__version__}, CUDA {torch.version.cuda}')
    print(f'mgn._C     {missing("_C") or "instruction sets here: " + torch.ops.mgn_cpu.instruction_sets()}')
    print(f'mgn._cuda  {missing("_cuda") or torch.ops.mgn_cuda.build()}')
    devices = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    for device in devices + ['mps'] * torch.backends.mps.is_available():
        name = f' ({torch.cuda.get_device_name(device)})' if device.startswith('cuda') else ''
        print(f'{device}{name}: {implementation(device)}')


if __name__ == '__main__':
    main()
