"""Training in several processes: batches, losses and gradients equal those of one process with the whole batch."""

import copy
import os
import signal

import gin
import pytest
import torch
import torch.distributed as dist
from centre import CentreLoss
from conftest import write_market
from thin import ThinResNet, train
from torch import nn

from mgn import training
from mgn.runs import checkpoint, processes
from mgn.data.augmentation import Augmentation
from mgn.data.datasets import Dataset, Sample, market_layout, train_labels
from mgn.evaluation import evaluate
from mgn.features import check_same_data
from mgn.data.images import TrainBatches
from mgn.runs.interruption import Interruption
from mgn.losses import make_losses, mgn_losses
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
                  for positions in (processes.part(range(P * K)), range(P * K)))
    return own, whole, classes


class InPrecision(nn.Module):
    """MGN over a thin ResNet, batch normalisation in evaluation mode, computing in `dtype` whatever the images are."""

    def __init__(self, classes, dtype):
        super().__init__()
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
            self.model = MGN(classes, embedding_dim=16).to(dtype).train()
        self.dtype = dtype
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.eval()

    def forward(self, images):
        return self.model(images.to(self.dtype))


def apart(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-300)).item()


def steps_apart(folder, dtype, clip=None, losses=mgn_losses):
    """The largest relative distance of a loss, gradient or weight from one process's, in three steps."""
    P = 2 * processes.count()
    own, whole, classes = data(folder, P)
    alone = nn.ModuleList([InPrecision(classes, dtype), make_losses(losses, classes, 3, 16).to(dtype)])
    together = copy.deepcopy(alone)
    group = processes.group_of(CPU)
    network, network_losses = (training.distributed(module, CPU, group) for module in together)
    optimizers = [torch.optim.SGD(modules.parameters(), lr=0.1) for modules in (alone, together)]
    largest = 0
    for step in range(3):
        expected = training.train_step(alone[0], optimizers[0], Augmentation(), whole[step], CPU, 'float32', clip,
                                       None, None, alone[1])
        got = training.train_step(network, optimizers[1], Augmentation(), own[step], CPU, 'float32', clip, group, None,
                                  network_losses)
        distances = [apart(processes.mean(got[name]), expected[name]) for name in expected]
        for mine, its in zip(together.parameters(), alone.parameters(), strict=True):
            if mine.requires_grad:
                distances += [apart(mine.grad, its.grad), apart(mine.detach(), its.detach())]
        largest = max(largest, *distances)
    assert expected['triplet'] > 0.1
    assert all(any(p.grad.norm() > 1e-3 for p in module.parameters() if p.requires_grad)
               for module in alone if list(module.parameters()))
    return largest


def check_steps_in_float64_are_those_of_one_process(folder):
    assert steps_apart(folder, torch.float64) < 1e-8
    assert steps_apart(folder, torch.float64, clip=0.5) < 1e-8


def check_steps_with_parameters_of_losses_are_those_of_one_process(folder):
    torch.manual_seed(dist.get_rank())  # the first centres are those of process 0
    assert steps_apart(folder, torch.float64, losses=CentreLossOfProcess0) < 1e-8
    assert steps_apart(folder, torch.float64, clip=0.5, losses=CentreLossOfProcess0) < 1e-8


class CentreLossOfProcess0(CentreLoss):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.centres.data = processes.share(self.centres.data)


def check_losses_with_parameters_begin_equal_in_all_processes(folder):
    torch.manual_seed(dist.get_rank())
    losses = CentreLoss(num_classes=4, branches=2, embedding_dim=3)
    before = processes.gather(losses.centres.data)
    assert not torch.equal(before[0], before[1])
    training.distributed(losses, CPU, processes.group_of(CPU))
    assert torch.equal(losses.centres, before[0])


def check_running_statistics_begin_as_those_of_process_0(folder):
    module = nn.BatchNorm1d(3)
    module.running_mean.fill_(dist.get_rank() + 1)
    training.distributed(module, CPU, processes.group_of(CPU))
    assert module.running_mean.tolist() == [1, 1, 1]


def check_running_statistics_are_of_each_process_alone_between_steps(folder):
    module, rank = nn.BatchNorm1d(3, momentum=0.5), dist.get_rank()
    network = training.distributed(module, CPU, processes.group_of(CPU))
    for _ in range(2):
        network(torch.full((4, 3), float(rank))).sum().backward()
    assert module.running_mean.tolist() == [0.75 * rank] * 3


def check_a_run_whose_losses_have_parameters_resumes_with_them(folder):
    thin_run(folder, 'centre', 'train.losses = @CentreLoss', 'total_steps = 4')
    thin_run(folder, 'centre', 'train.losses = @CentreLoss', 'total_steps = 6')
    thin_run(folder, 'centre whole', 'train.losses = @CentreLoss', 'total_steps = 6')
    contents = [checkpoint.load(str(folder / name / 'last.pth')) for name in ('centre', 'centre whole')]
    assert [content['step'] for content in contents] == [6, 6]
    for name, value in contents[0]['losses'].items():
        torch.testing.assert_close(value, contents[1]['losses'][name], rtol=1e-4, atol=1e-5)


def check_machines_that_see_other_checkpoints_do_not_resume(folder):
    thin_run(folder, 'other', 'total_steps = 2')
    load = checkpoint.load

    def other_on_the_last_machine(path, **options):
        content = load(path, **options)
        if dist.get_rank() == dist.get_world_size() - 1:
            next(iter(content['model'].values())).add_(1)
        return content
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match='need the same weights'):
        patch.setattr(checkpoint, 'load', other_on_the_last_machine)
        thin_run(folder, 'other', 'total_steps = 4')


def thin_run(folder, name, *bindings):
    """Trains in all processes at once, in folder/name; returns this process's model."""
    data(folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
        try:
            return train(folder / 'own', folder / name, f'P = {2 * processes.count()}', *bindings)
        finally:
            gin.clear_config()


def check_steps_in_float32_are_near_those_of_one_process(folder):
    largest = steps_apart(folder, torch.float32)
    if dist.get_rank() == 0:
        print(f'float32, {processes.count()} processes: losses, gradients and weights within a relative {largest:.1e} '
              f'of one process')
    assert largest < 1e-3


def check_with_mining_in_each_process_the_loss_is_the_mean_of_those_of_the_parts(folder):
    P = 2 * processes.count()
    own, whole, classes = data(folder, P)
    model = InPrecision(classes, torch.float64)
    network = training.distributed(copy.deepcopy(model), CPU, processes.group_of(CPU))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    got = training.train_step(network, optimizer, Augmentation(), own[0], CPU, 'float32', None)
    batch = whole[0]
    with torch.no_grad():
        output = model(Augmentation()(batch.images, batch.draws))
    parts = torch.arange(P * K).chunk(processes.count())
    outputs = [output._replace(logits=[x[part] for x in output.logits], embeddings=output.embeddings[:, part])
               for part in parts]
    own_losses = [mgn_losses(own, batch.labels[part]) for own, part in zip(outputs, parts)]
    means = {name: sum(losses[name] for losses in own_losses) / len(parts) for name in ('cross_entropy', 'triplet')}
    for name, expected in means.items():
        torch.testing.assert_close(processes.mean(got[name]), expected, rtol=1e-9, atol=0)
    assert apart(mgn_losses(output, batch.labels)['triplet'], means['triplet']) > 1e-3


def check_the_parts_of_a_batch_are_the_batch_of_one_process(folder):
    own, whole, _ = data(folder, 2 * processes.count())
    for step in (0, 1, 7):
        expected = whole[step]
        parts = processes.gather(own[step])
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
        draws = zip(*(part.draws for part in parts))
        assert all(torch.equal(torch.cat(mine), its) for mine, its in zip(draws, expected.draws))
        assert len(set(expected.labels.tolist())) == 2 * processes.count()
        assert not set(parts[0].labels.tolist()) & set(parts[1].labels.tolist())


def check_running_statistics_become_the_mean_and_equal_ones_stay(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    norm = nn.BatchNorm1d(3)
    norm.running_mean.copy_(torch.tensor([0.1, rank, 3e38]))
    norm.num_batches_tracked.fill_(9)
    checkpoint.State(norm, nn.ReLU(), None, None, Meter(), 0, '').join()
    assert torch.equal(norm.running_mean, torch.tensor([0.1, (N - 1) / 2, 3e38]))
    assert torch.equal(norm.running_var, torch.ones(3)) and norm.num_batches_tracked == 9


def check_the_meter_tells_means_of_all_and_the_first_bad_step_of_any(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    meter = Meter()
    meter.add({'loss': torch.tensor(1.0 + rank), 'triplet': torch.tensor(2.0)}, 0)
    meter.add({'loss': torch.tensor(3.0 + rank), 'triplet': torch.tensor(2.0)}, 1)
    assert meter.read('no checkpoint') == {'loss': 2 + (N - 1) / 2, 'triplet': 2}
    for step in (2, 3):
        meter.add({'loss': torch.tensor(1.0), 'triplet': torch.tensor(float('nan') if rank == N - 1 else 1.0)}, step)
    with pytest.raises(ValueError, match='in triplet at step 2'):
        meter.read('no checkpoint')


def check_what_cannot_be_split_is_refused(folder):
    N = processes.count()
    with pytest.raises(ValueError, match=rf'P = {N + 1}, .* is no multiple of the {N} processes'):
        training.check_split(N + 1, 'all')
    with pytest.raises(ValueError, match=rf'in each process needs 2 identities there, but P = {N} is split'):
        training.check_split(N, 'process')


def check_values_and_rows_travel(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    assert processes.share({'rank': rank}) == {'rank': 0}
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
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun forwards what its process group has received already
        assert interruption.asked()


def check_copies_that_differ_are_refused_in_all(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    query, gallery = [Sample(str(folder / 'a.jpg'), 1, 1)], [Sample(str(folder / 'b.jpg'), 1, 2)]
    dataset = Dataset('own', str(folder), [], query, gallery)
    check_same_data(dataset, ('query', 'gallery'))
    other = dataset._replace(gallery=[Sample(str(folder / 'b.jpg'), 2, 2)]) if rank == N - 1 else dataset
    check_same_data(other, ('query',))
    with pytest.raises(ValueError, match=f'All {N} processes need the same images of own, but it differs between '
                                         f'process 0 and {N - 1}. (?i:give all machines)'):
        check_same_data(other, ('query', 'gallery'))
    with pytest.raises(ValueError, match=f'All {N} processes need the same images of own'):
        evaluate(nn.ReLU(), dataset._replace(query=query * (2 if rank == N - 1 else 1)), None)
