"""Steps of training that several processes share: batches, losses and gradients are those of one process with the whole batch."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import write_market
from thin import ThinResNet
from torch import nn

from mgn import training
from mgn.runs import processes
from mgn.data.augmentation import Augmentation
from mgn.data.datasets import Dataset, Sample, market_layout, train_labels
from mgn.feature_files import check_shared
from mgn.features import check_alike
from mgn.data.images import TrainBatches
from mgn.runs.interruption import Interruption
from mgn.losses import mgn_losses
from mgn.runs.meter import Meter
from mgn.model import MGN
from mgn.data.sampler import IdentitySampler

CPU, SIZE, K = torch.device('cpu'), (64, 32), 2


def data(folder, P):
    """The data set's batches: those of this process and the whole ones."""
    if dist.get_rank() == 0 and not (folder / 'own').exists():
        write_market(folder / 'own', identities=13)
    dist.barrier()
    samples = market_layout(str(folder / 'own')).train
    labels, classes = train_labels(samples)
    sampler = IdentitySampler(labels, [sample.camid for sample in samples], P, K, seed=5)
    own, whole = (TrainBatches(samples, labels, sampler, Augmentation(), SIZE, positions)
                  for positions in (processes.part(range(P * K)), None))
    return own, whole, classes


class InPrecision(nn.Module):
    """MGN over a thin ResNet, batch normalisation in evaluation mode, computing in `dtype` whatever the images are."""

    def __init__(self, classes, dtype):
        super().__init__()
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('mgn.model.make_resnet', lambda backbone, pretrained: ThinResNet())
            self.model = MGN(classes, embedding_dim=16).to(dtype).train()
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.eval()

    def forward(self, images):
        return self.model(images.to(self.dtype))


def apart(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-300)).item()


def steps_apart(folder, dtype, clip=None):
    """The largest relative distance of a loss, gradient or weight from one process's, in three steps."""
    P = 2 * processes.count()
    own, whole, classes = data(folder, P)
    alone = InPrecision(classes, dtype)
    together = copy.deepcopy(alone)
    network = training.distributed(together, CPU, processes.group_of(CPU), sync_bn=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (alone, together)]
    worst = 0
    for step in range(3):
        want = training.train_step(alone, optimizers[0], Augmentation(), whole[step], CPU, 'float32', clip)
        got = training.train_step(network, optimizers[1], Augmentation(), own[step], CPU, 'float32', clip, processes.group_of(CPU))
        distances = [apart(processes.mean(got[name]), want[name]) for name in want]
        for mine, its in zip(together.parameters(), alone.parameters()):
            if mine.requires_grad:
                distances += [apart(mine.grad, its.grad), apart(mine.detach(), its.detach())]
        worst = max(worst, *distances)
    assert want['triplet'] > 0.1 and any(p.grad.norm() > 1e-3 for p in alone.parameters() if p.requires_grad)
    return worst


def check_steps_in_float64_are_those_of_one_process(folder):
    assert steps_apart(folder, torch.float64) < 1e-8
    assert steps_apart(folder, torch.float64, clip=0.5) < 1e-8


def check_steps_in_float32_are_near_those_of_one_process(folder):
    worst = steps_apart(folder, torch.float32)
    if dist.get_rank() == 0:
        print(f'float32, {processes.count()} processes: losses, gradients and weights within a relative {worst:.1e} of one process')
    assert worst < 1e-3


def check_with_mining_in_each_process_the_loss_is_the_mean_of_those_of_the_parts(folder):
    P = 2 * processes.count()
    own, whole, classes = data(folder, P)
    model = InPrecision(classes, torch.float64)
    network = training.distributed(copy.deepcopy(model), CPU, processes.group_of(CPU), sync_bn=False)
    got = training.train_step(network, torch.optim.SGD(network.parameters(), lr=0.1), Augmentation(), own[0], CPU, 'float32', None)
    batch = whole[0]
    with torch.no_grad():
        output = model(Augmentation()(batch.images, batch.draws))
    parts = torch.arange(P * K).chunk(processes.count())
    means = {name: sum(mgn_losses(output._replace(logits=[x[part] for x in output.logits], embeddings=output.embeddings[:, part]),
                                  batch.labels[part])[name] for part in parts) / len(parts) for name in ('cross_entropy', 'triplet')}
    for name, want in means.items():
        torch.testing.assert_close(processes.mean(got[name]), want, rtol=1e-9, atol=0)
    assert apart(mgn_losses(output, batch.labels)['triplet'], means['triplet']) > 1e-3


def check_the_parts_of_a_batch_are_the_batch_of_one_process(folder):
    own, whole, _ = data(folder, 2 * processes.count())
    for step in (0, 1, 7):
        want = whole[step]
        parts = processes.gather(own[step])
        assert torch.equal(torch.cat([part.images for part in parts]), want.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), want.labels)
        assert all(torch.equal(torch.cat(mine), its) for mine, its in zip(zip(*(part.draws for part in parts)), want.draws))
        assert len(set(want.labels.tolist())) == 2 * processes.count()
        assert not set(parts[0].labels.tolist()) & set(parts[1].labels.tolist())


def check_running_statistics_become_the_mean_and_equal_ones_stay(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    norm = nn.BatchNorm1d(3)
    norm.running_mean.copy_(torch.tensor([0.1, rank, 1e30]))
    norm.num_batches_tracked.fill_(9)
    training.average_statistics(norm)
    assert torch.equal(norm.running_mean, torch.tensor([0.1, (N - 1) / 2, 1e30]))
    assert torch.equal(norm.running_var, torch.ones(3)) and norm.num_batches_tracked == 9


def check_the_meter_tells_means_of_all_and_the_first_bad_step_of_any(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    meter = Meter()
    meter.add({'loss': torch.tensor(1.0 + rank), 'triplet': torch.tensor(2.0)}, 0)
    meter.add({'loss': torch.tensor(3.0 + rank), 'triplet': torch.tensor(2.0)}, 1)
    assert meter.read('nowhere') == {'loss': 2 + (N - 1) / 2, 'triplet': 2}
    for step in (2, 3):
        meter.add({'loss': torch.tensor(1.0), 'triplet': torch.tensor(float('nan') if rank == N - 1 else 1.0)}, step)
    with pytest.raises(ValueError, match='in triplet at step 2'):
        meter.read('nowhere')


def check_what_cannot_be_split_is_refused(folder):
    N = processes.count()
    with pytest.raises(ValueError, match=rf'as a multiple of the processes, got P = {N + 1} and {N} processes'):
        training.check_split(N + 1, 'all', False, CPU)
    with pytest.raises(ValueError, match=rf'want 2 identities in each process to mine there, got P = {N}'):
        training.check_split(N, 'process', False, CPU)
    with pytest.raises(ValueError, match='want GPUs for train.sync_bn = True.*got cpu'):
        training.check_split(N, 'all', True, CPU)
    with pytest.raises(ValueError, match="want train.mining to be 'all' or 'process', got 'none'"):
        training.check_split(N, 'none', False, CPU)


def check_values_and_rows_travel(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    assert processes.share({'of': rank}) == {'of': 0}
    assert processes.gather(rank) == list(range(N))
    whole = processes.to_first(torch.full((rank % 2, 3), rank))
    assert whole is None if rank else whole.tolist() == [[r] * 3 for r in range(N) if r % 2]
    assert sum(processes.gather(list(processes.part(range(7)))), []) == list(range(7))


def check_a_signal_to_any_is_known_to_all(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    with Interruption() as interruption:
        assert not interruption.asked()
        if rank == N - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what its group has had already
        assert interruption.asked()


def check_copies_that_differ_are_refused_in_all(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    dataset = Dataset('own', str(folder), [], [Sample(str(folder / 'a.jpg'), 1, 1)], [Sample(str(folder / 'b.jpg'), 1, 2)])
    check_alike(dataset, ('query', 'gallery'))
    odd = dataset._replace(gallery=[Sample(str(folder / 'b.jpg'), 2, 2)]) if rank == N - 1 else dataset
    check_alike(odd, ('query',))
    with pytest.raises(ValueError, match=f'want the same images of own in all {N} processes, got another in {N - 1} than in 0; give all machines'):
        check_alike(odd, ('query', 'gallery'))


def check_a_folder_that_not_all_see_is_refused_in_all(folder):
    rank = dist.get_rank()
    check_shared(str(folder))
    (folder / f'own{rank}').mkdir()
    (folder / f'own{rank}' / 'shared').write_text('of another time')
    with pytest.raises(ValueError, match='All processes must share the features_dir, but what process 0 writes to .*own. is not seen by process 1'):
        check_shared(str(folder / f'own{rank}'))
