"""What a run under torchrun hands to its steps and evaluations: its part of each batch, groups, losses, checks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from together_training import data, thin_run

from mgn import training
from mgn.data.datasets import Dataset, Sample
from mgn.evaluation import evaluate
from mgn.ops.errors import UserError
from mgn.runs import processes


def check_a_run_takes_its_part_of_each_batch_and_mines_as_bound(folder):
    own, _, _ = data(folder, 2 * processes.count())
    for mining, group in ('all', dist.group.WORLD), ('process', None):
        seen, real = [], training.train_step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, 'train_step', lambda *args: (seen.append(args), real(*args))[1])
            thin_run(folder, f'mining {mining}', 'total_steps = 1', 'seed = 5', f"train.mining = '{mining}'")
        batch = seen[0][3]
        assert torch.equal(batch.images, own[0].images) and torch.equal(batch.labels, own[0].labels)
        assert seen[0][7] is group


def check_parameters_of_losses_stay_equal_in_all_processes_of_a_run(folder):
    seen, real = [], training.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'train_step', lambda *args: (seen.append(args[9]), real(*args))[1])
        thin_run(folder, 'centres', 'train.losses = @CentreLoss', 'total_steps = 2')
    values = processes.gather([parameter.detach() for parameter in seen[0].parameters()])
    assert all(torch.equal(one, other) for its in values for one, other in zip(values[0], its, strict=True))


def check_unreadable_images_of_all_processes_count_together(folder):
    N = processes.count()
    run = SimpleNamespace(unreadable={f'{dist.get_rank()}.jpg: cut off': True},
                          dataset=SimpleNamespace(train=range(100 * (N - 1))))  # N - 1 of them may be unreadable
    with pytest.raises(UserError, match=f'may be unreadable, but {N} are:'):
        training.Training.report(run)


def check_machines_that_differ_in_precision_or_images_do_not_train(folder):
    last, real = dist.get_rank() == dist.get_world_size() - 1, training.check_trainable
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match='same kind of device, and prec'):
        patch.setattr(training, 'resolve_precision', lambda *_: 'bfloat16' if last else 'float32')
        thin_run(folder, 'other precision')

    def swapped(dataset):
        real(dataset)
        if last:
            dataset.train[0] = dataset.train[0]._replace(camid=99)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match='need the same images'):
        patch.setattr(training, 'check_trainable', swapped)
        thin_run(folder, 'other images')


def check_an_evaluation_needs_the_same_weights_in_all_processes(folder):
    query, gallery = [Sample(str(folder / 'a.jpg'), 1, 1)], [Sample(str(folder / 'b.jpg'), 1, 2)]
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, dist.get_rank())
    torch.nn.init.zeros_(model.bias)
    with pytest.raises(UserError, match=f'All {processes.count()} processes need the same weights'):
        evaluate(model, Dataset('own', str(folder), [], query, gallery), None)


def check_what_is_reduced_and_gradients_that_come_in_stay_as_they_are(folder):
    rank, N = dist.get_rank(), dist.get_world_size()
    number, own, whole = torch.tensor(rank), torch.ones(2, requires_grad=True), torch.ones(2 * N, requires_grad=True)
    assert processes.reduced(number, 'SUM') == N * (N - 1) // 2 and number == rank
    shifted = 1 * whole  # its gradient is the very tensor that the gathered ones get
    ((processes.gather_with_gradient(own, 0, dist.group.WORLD) + shifted) * (rank + 1)).sum().backward()
    assert whole.grad.tolist() == [rank + 1] * 2 * N and own.grad.tolist() == [N * (N + 1) / 2] * 2
