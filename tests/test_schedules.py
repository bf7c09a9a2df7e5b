"""The schedules against the recipes' numbers; one that does not fit into the run is refused."""

import math
from pathlib import Path

import gin
import pytest
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import config, schedules

RECIPES = Path(__file__).parents[1] / 'gin'
pytestmark = pytest.mark.usefixtures('clean_gin')


@pytest.mark.parametrize('recipe, total, warmup, milestones', [
    ('market.gin', 18000, 2000, (8000, 14000)), ('duke.gin', 23000, 2500, (10000, 18000)),
    ('msmt17.gin', 42000, 4700, (19000, 33000))])
def test_the_recipes_warm_up_from_a_hundredth_and_drop_to_a_tenth_at_their_steps(recipe, total, warmup, milestones):
    config.load([str(RECIPES / recipe)], [])
    assert gin.query_parameter('%total_steps') == total
    assert repr(gin.query_parameter('train.schedule')) == '@multi_step'
    for step in {0, 1, warmup // 2, warmup - 1, warmup, *milestones, *(m - 1 for m in milestones), total - 1}:
        expected = 0.01 + 0.99 * step / warmup if step < warmup else 1
        for milestone in milestones:
            if step >= milestone:
                expected *= 0.1
        assert schedules.multi_step(step, total) == pytest.approx(expected, rel=1e-12)


def test_the_default_schedule_is_that_of_market():
    points = {0: 0.01, 1000: 0.505, 2000: 1, 7999: 1, 8000: 0.1, 13999: 0.1, 14000: 0.01, 17999: 0.01}
    assert {step: schedules.multi_step(step, 18000) for step in points} == pytest.approx(points, rel=1e-12)


def test_multi_step_multiplies_by_gamma_at_every_milestone_also_while_warming_up():
    factors = [schedules.multi_step(step, 10, warmup_steps=4, warmup_factor=0.5, milestones=(2, 6, 6, 8), gamma=0.5)
               for step in range(10)]
    assert factors == [0.5, 0.625, 0.375, 0.4375, 0.5, 0.5, 0.125, 0.125, 0.0625, 0.0625]


def test_cosine_stays_at_1_until_its_start_and_falls_to_its_final_factor():
    start, total, final = 40, 130, 0.1
    for step in range(total + 5):
        share = min(max(step - start, 0) / (total - start), 1)
        expected = final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
        assert schedules.cosine(step, total, warmup_steps=0, start=start, final_factor=final) == pytest.approx(expected)
    assert schedules.cosine(start, total, 0, start=start) == 1
    assert schedules.cosine((start + total) // 2, total, 0, start=start) == pytest.approx(0.5)
    assert schedules.cosine(total, total, 0, start=start, final_factor=final) == pytest.approx(final)


def test_cosine_changes_once_a_period_as_fast_reids_does_at_the_end_of_an_epoch():
    epoch, epochs, delay = 7, 12, 5
    options = dict(total_steps=epochs * epoch, warmup_steps=3, warmup_factor=0.1, start=delay * epoch, period=epoch,
                   final_factor=0.002)
    for step in range(epochs * epoch):
        share = max(step // epoch - delay, 0) / (epochs - delay)
        expected = 0.002 + 0.998 * (1 + math.cos(math.pi * share)) / 2 if step >= 3 else 0.1 + 0.9 * step / 3
        assert schedules.cosine(step, **options) == pytest.approx(expected, rel=1e-12)


def test_the_periods_of_a_cosine_are_counted_from_its_start():
    changes = [step for step in range(1, 30) if schedules.cosine(step, 30, 0, start=10, period=7) != schedules.cosine(
        step - 1, 30, 0, start=10, period=7)]
    assert changes == [17, 24]


@pytest.mark.parametrize('recipe, epoch', [('market_ibn.gin', 202), ('duke_ibn.gin', 258), ('msmt17_ibn.gin', 472)])
def test_the_later_recipes_warm_up_from_a_tenth_and_fall_once_an_epoch_from_the_30th_of_60_on(recipe, epoch):
    config.load([str(RECIPES / recipe)], [])
    total, lr = gin.query_parameter('%total_steps'), gin.query_parameter('%lr')
    assert total == 60 * epoch and repr(gin.query_parameter('train.schedule')) == '@cosine'
    for step, share in {31 * epoch - 1: 0, 31 * epoch: 1 / 30, 45 * epoch: 0.5, total - 1: 29 / 30}.items():
        expected = 7e-7 + (3.5e-4 - 7e-7) * (1 + math.cos(math.pi * share)) / 2
        assert lr * schedules.cosine(step, total) == pytest.approx(expected, rel=1e-9)
    rates = [lr * schedules.cosine(step, total) for step in (0, 1000, 1999, 2000, 2001)]
    assert rates == pytest.approx([3.5e-5, 3.5e-4 * 0.55, 3.5e-4 * 0.99955, 3.5e-4, 3.5e-4], rel=1e-9)
    assert gin.query_parameter('train.freeze_steps') == 1000


def test_cosine_is_scaled_by_the_linear_warm_up():
    for step in range(40):
        warmup = min(0.01 + 0.99 * step / 20, 1)
        expected = warmup * (1 + math.cos(math.pi * step / 40)) / 2
        assert schedules.cosine(step, 40, warmup_steps=20) == pytest.approx(expected)


@pytest.mark.parametrize('schedule', [schedules.multi_step, schedules.cosine])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert schedule(0, 14000, warmup_steps=0) == 1


def test_a_cosine_that_starts_at_the_end_stays_at_1():
    assert [schedules.cosine(step, 10, warmup_steps=0, start=10) for step in (0, 9, 10)] == [1, 1, 1]


@pytest.mark.parametrize('schedule, options, name', [
    (schedules.multi_step, {'milestones': (6, 3)}, 'multi_step.milestones'),
    (schedules.multi_step, {'milestones': (-1, 3)}, 'multi_step.milestones'),
    (schedules.multi_step, {'warmup_steps': -1, 'milestones': ()}, 'multi_step.warmup_steps'),
    (schedules.cosine, {'start': -1}, 'cosine.start')])
def test_steps_out_of_order_or_below_0_are_refused(schedule, options, name):
    with pytest.raises(ValueError, match=f'{name} must be steps from 0 on in ascending order, found .*-?[136]'):
        schedule(0, 10, **{'warmup_steps': 0, **options})


@pytest.mark.parametrize('schedule, options, name, step', [
    (schedules.multi_step, {'warmup_steps': 11, 'milestones': ()}, 'multi_step.warmup_steps', 11),
    (schedules.multi_step, {'warmup_steps': 0, 'milestones': (3, 12, 99)}, 'multi_step.milestones', 12),
    (schedules.cosine, {'warmup_steps': 11}, 'cosine.warmup_steps', 11),
    (schedules.cosine, {'warmup_steps': 0, 'start': 11}, 'cosine.start', 11)])
def test_steps_beyond_the_run_are_refused_and_both_are_named(schedule, options, name, step):
    message = f'{name} has step {step}, but training ends at total_steps = 10. Bind a {name}'
    with pytest.raises(ValueError, match=message):
        schedule(0, 10, **options)
    fitting = {key: tuple(min(step, 10) for step in value) if isinstance(value, tuple) else min(value, 10)
               for key, value in options.items()}
    schedule(0, 10, **fitting)


@pytest.mark.parametrize('bindings, name', [
    (['cosine.start = 8'], 'cosine.start'), (['cosine.warmup_steps = 8'], 'cosine.warmup_steps'),
    (['train.schedule = @multi_step', 'multi_step.warmup_steps = 0'], 'multi_step.milestones')])
def test_training_refuses_them_before_it_writes_anything(thin, market, tmp_path, bindings, name):
    with pytest.raises(ValueError, match=f'{name} has step .*, but training ends at total_steps = 7'):
        train(market, tmp_path / 'run', *bindings)
    assert not (tmp_path / 'run').exists()
