"""The report in a real Chromium: what it shows, asks for and answers to, and whether everybody can use it."""

import base64
import importlib.util
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from reports import bind, data_of, made, people, write_table, write_weights
from thin import ThinResNet

from mgn import evaluation

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name in ('playwright', 'axe_playwright_python') if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ['a chromium on PATH']
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(MISSING), reason=(
    f"The report is not opened in a browser: {', '.join(MISSING)} missing; apt-get install -y chromium; "
    f"pip install -e '.[browser]'"))]
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
WIDTHS = 1280, 390


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """A report of 60 queries with two checkpoints, two runs, an image that cannot be read and names that are markup."""
    home = tmp_path_factory.mktemp('report')
    shots = people(60)
    shots[5] = ('q/<img src=x onerror=alert(1)>.png', *shots[5][1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mgn.model.make_resnet', lambda backbone, imagenet: ThinResNet())
        root, weights = write_table(home / 'data', shots), write_weights(home / 'run/best.pth')
        other = write_weights(home / 'other/best.pth', 1, 'MGN.parts = (1, 2, 3)', 'MGN.last_strides = (2, 1, 1)')
        for i, name in enumerate(('run', 'other')):
            (home / name / 'metrics.jsonl').write_text(''.join(json.dumps({'step': step, **record}) + '\n' for step in (
                0, 10, 20) for record in ({'mAP': 0.1 * i + step / 50, 'rank1': 0.5}, {
                    'loss': 5 - step / 10 + i, 'lr': 1e-3, 'images_per_s': 60 + i, 'data_wait': 0.01, 'triplet': 1.0})))
        features = f"features_dir = '{home}/features'"
        evaluation.extract_checkpoint(bind(weights, root, home, features))
        (root / shots[2][0]).write_text('no image')
        page = made(weights, root, home, features, f"runs = ('{home}/run', '{home}/other')", 'report.queries = 50')
        (root / shots[2][0]).unlink()
        Image.new('RGB', (32, 64)).save(root / shots[2][0])
        compared = made(weights, root, home / 'two', features, f"compare = '{other}'")
    assert sum('error' in image for image in page['images']) == 1 and compared['compare']['lists']
    return home / 'report.html'


@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """show(path, width, scheme) opens a page; in the end no page has complained or asked for anything but itself."""
    contexts, heard = [], []

    def show(path, width=1280, scheme='light', **options):
        contexts.append(chromium.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme, **options))
        page = contexts[-1].new_page()
        page.on('console', lambda message: heard.append(message.text))
        page.on('pageerror', lambda error: heard.append(str(error)))
        page.on('dialog', lambda dialog: heard.append(dialog.message) or dialog.dismiss())
        page.on('request', lambda request: heard.append(request.url) if not request.url.startswith('data:') and (
            request.url != path.as_uri()) else None)
        page.goto(path.as_uri())
        page.wait_for_selector('.row')
        return page
    yield show
    for context in contexts:
        context.close()
    assert heard == []


def field(page, label):
    return page.locator('#filters').get_by_label(label)


def names(page):
    """The file names of the queries that are shown, in order."""
    return page.locator('#rows .who').evaluate_all('all => all.map(row => row.querySelector(".soft").textContent)')


def test_it_shows_what_is_in_its_data(show, file):
    page, data = show(file), data_of(file)
    assert page.title() == f'data: mAP {100 * data["measures"][0][1]["mAP"]:.1f} %'
    figures = page.locator('#headline dd').all_inner_texts()
    assert figures == [f'{100 * data["measures"][0][1][name]:.2f}' for name in data['metrics']]
    assert page.locator('#command').inner_text() == data['command']
    assert page.locator('#found').inner_text() == '60 of 60 queries fit, 50 of them with pictures; 20 are shown'
    assert 'pictures of people' in page.locator('#overview').inner_text()
    order = sorted((data['queries']['ap'][row['query']], row['query']) for row in data['lists'])
    assert names(page) == [data['queries']['file'][query].split('/')[-1] for _, query in order[:20]]
    first = next(row for row in data['lists'] if row['query'] == order[0][1])
    assert page.locator('#rows .near').first.locator('li').count() == len(first['nearest'])
    kinds = page.locator('#rows .near').first.locator('.crop').evaluate_all('all => all.map(one => one.className)')
    assert kinds == [f'crop {kind}' for _, kind, _, _ in first['nearest']]
    shares = [np.array(data['similarities'][name]) / sum(data['similarities'][name]) for name in ('matches', 'others')]
    assert f'overlap by {100 * np.minimum(*shares).sum():.1f} %' in page.locator('#charts').inner_text()
    cells = page.locator('#cameras td').all_inner_texts()
    assert cells == ['–' if cell is None else f'{100 * cell:.1f}' for row in data['cameras']['mAP'] for cell in row]
    assert page.locator('#main-logs figure').count() == 5 and page.locator('#other-logs figure').count() == 2
    assert page.locator('#compare').count() == 0
    page.get_by_role('button', name='Show 20 more').click()
    assert page.locator('#rows .row').count() == 40


def test_cmc_is_drawn_from_the_first_ranks(show, file):
    page, first = show(file), np.array(data_of(file)['queries']['first'])
    path = page.locator('#charts figure').first.locator('path').get_attribute('d')
    heights = np.array([float(point.split()[1]) for point in re.split('[ML]', path)[1:]])
    cmc = np.array([np.mean(first[first > 0] <= k) for k in range(1, 51)])
    drawn = np.interp(heights, (heights.min(), heights.max()), (cmc.max(), cmc.min()))
    assert np.ptp(cmc) > 0.1 and np.allclose(drawn, cmc)


def test_filters_and_search_change_what_is_shown(show, file):
    page, queries = show(file), data_of(file)['queries']

    def fitting(fits):
        wanted = sum(map(fits, queries['ap'], queries['first'], queries['camid'], queries['pid'], queries['file']))
        assert page.locator('#found').inner_text().startswith(f'{wanted} of 60 queries fit') and 0 < wanted < 60
    for name, value, fits in (
            ('Camera', '1', lambda ap, first, camid, pid, file: camid == 1),
            ('Identity', '7', lambda ap, first, camid, pid, file: pid == 7),
            ('AP from, %', '8', lambda ap, first, camid, pid, file: ap is not None and ap >= 0.08),
            ('AP to, %', '8', lambda ap, first, camid, pid, file: ap is not None and ap <= 0.08),
            ('1st match behind rank', '5', lambda ap, first, camid, pid, file: first > 5),
            ('File name', 'Q/2', lambda ap, first, camid, pid, file: 'q/2' in file.lower())):
        choose = field(page, name).select_option if name == 'Camera' else field(page, name).fill
        choose(value)
        fitting(fits)
        choose('')
    field(page, 'Identity').fill('7')
    assert names(page) == ['7_1.png'] or page.locator('#rows .row').count() == 0
    field(page, 'Identity').fill('')
    field(page, 'Order').select_option('best')
    aps = [float(text.split()[0]) for text in page.locator('#rows .who strong').all_inner_texts()]
    assert aps == sorted(aps, reverse=True) and aps[0] > aps[-1]
    field(page, 'Order').select_option('late')
    ranks = [int(re.search(r'at rank (\d+)', text)[1]) for text in page.locator('#rows .who').all_inner_texts()]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1]
    page.locator('#lists summary').click()
    assert page.locator('#every tbody tr').count() == 50
    page.locator('#every').get_by_role('button', name='next').click()
    assert page.locator('#every tbody tr').count() == 10 and 'page 2 of 2' in page.locator('#every').inner_text()


def test_keys_work(show, file):
    page = show(file)

    def focused():
        return page.evaluate('document.activeElement.getAttribute("aria-label")')
    page.locator('#rows .crop').first.focus()
    assert focused().startswith('Query, identity')
    page.keyboard.press('ArrowRight')
    first = focused()
    assert re.match('Rank 1, |junk, ', first)
    page.keyboard.press('ArrowDown')
    assert focused() != first and page.locator('#rows .row').nth(1).locator('button:focus').count() == 1
    page.keyboard.press('ArrowUp')
    assert focused() == first
    page.keyboard.press('Enter')
    dialog = page.get_by_role('dialog')
    assert dialog.get_attribute('aria-label') == first and dialog.locator('canvas').count() == 6
    page.keyboard.press('ArrowRight')
    assert dialog.get_attribute('aria-label') not in (first, None) and dialog.locator('button:focus').count() == 1
    page.keyboard.press('Escape')
    assert dialog.count() == 0 and focused() == first
    page.keyboard.press('/')
    page.keyboard.type('q/1_')
    assert page.locator('#search').input_value() == 'q/1_' and page.locator('#rows .row').count() <= 1
    page.keyboard.press('Escape')
    assert page.locator('#search').input_value() == '' and page.locator('#rows .row').count() == 20


def test_maps_are_painted_where_the_network_responds(show, file):
    page, data = show(file), data_of(file)
    number, image = next((i, image) for i, image in enumerate(data['images']) if 'maps' in image)
    for branch, given in enumerate(image['maps']):
        values = np.frombuffer(base64.b64decode(given['values']), np.uint8)
        drawn = page.evaluate(f'''() => {{ const map = data.images[{number}].maps[{branch}], canvas = heat(map);
            return [...canvas.getContext('2d').getImageData(0, 0, map.size[1], map.size[0]).data]; }}''')
        colours = np.reshape(drawn, (-1, 4))[:, :3]
        assert np.abs(colours[values.argmax()] - (255, 245, 130)).max() < 6  # alpha is multiplied in and out again
        assert np.abs(colours[values.argmin()] - (40, 0, 90)).max() < 6
    page.locator('#rows .crop').first.click()
    page.wait_for_function('document.querySelectorAll("dialog canvas").length === 3')
    page.wait_for_timeout(300)
    picture = page.locator('dialog canvas').nth(1).screenshot()
    assert np.asarray(Image.open(io.BytesIO(picture)).convert('RGB')).std() > 10


def test_an_image_that_could_not_be_read_is_shown_as_such_and_a_damaged_one(show, file, tmp_path):
    page = show(file)
    assert '1 pictures could not be read' in page.locator('#notices').inner_text()
    field(page, 'Identity').fill('3')
    marked = page.locator('#rows .who .gone')
    assert marked.inner_text() == 'cannot be read' and 'no image' in marked.get_attribute('title')
    page.locator('#rows .crop').first.click()
    assert page.get_by_role('dialog').locator('.gone').count() == 1
    text = file.read_text()
    damaged = tmp_path / 'damaged.html'
    damaged.write_text(re.sub(r'"jpeg":"[^"]{80}', '"jpeg":"' + 'A' * 80, text))
    page = show(damaged)
    page.wait_for_selector('#rows .gone')
    page.wait_for_function('document.querySelectorAll("#rows img").length === 0')
    page.locator('#rows .crop').nth(1).click()
    page.wait_for_function('document.querySelectorAll("dialog canvas").length === 0')


def test_names_of_files_are_text(show, file):
    page = show(file)
    field(page, 'Identity').fill('6')
    assert page.locator('img[src="x"]').count() == 0
    page.locator('#lists summary').click()
    assert 'q/<img src=x onerror=alert(1)>.png' in page.locator('#every').inner_text()


def test_two_checkpoints_stand_side_by_side(show, file):
    path = file.parent / 'two/report.html'
    page, data = show(path), data_of(path)
    rows = page.locator('#pairs .row')
    assert rows.count() == 2 * len(data['compare']['lists']) > 0
    assert 'run/best.pth' in rows.nth(0).inner_text() and 'other/best.pth' in rows.nth(1).inner_text()
    assert page.locator('#stages tbody tr').count() == 2
    assert page.locator('#charts figure').first.locator('path').count() == 2


@pytest.mark.parametrize('width', WIDTHS)
def test_nothing_is_cut_off_at_a_text_of_200_per_cent(show, file, width):
    def wider_than_the_window(page):
        return page.evaluate('''() => [...document.querySelectorAll('body > :not(script) *')].filter(each =>
            each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.wide') && !each.closest('svg')
            ).map(each => each.outerHTML.slice(0, 100))''')
    page = show(file, width)
    for size in ('100%', '200%'):
        page.evaluate(f'document.documentElement.style.fontSize = "{size}"')
        assert wider_than_the_window(page) == [] and page.evaluate('document.documentElement.scrollWidth') <= width
        page.locator('#rows .crop').nth(1).click()
        assert wider_than_the_window(page) == []
        page.keyboard.press('Escape')
    page.evaluate('''document.querySelector('main').append(Object.assign(document.createElement('div'),
        {style: 'width: 200vw', textContent: 'wide'}))''')
    assert len(wider_than_the_window(page)) == 1  # it does look
    zoomed = show(file, width // 2, device_scale_factor=2)  # as the zoom of the browser does
    assert zoomed.evaluate('document.documentElement.scrollWidth') <= width // 2


def test_it_follows_the_colour_scheme_and_prints_without_controls(show, file):
    light, dark = (show(file, scheme=scheme).evaluate('getComputedStyle(document.body).backgroundColor')
                   for scheme in ('light', 'dark'))
    assert light != dark
    page = show(file)
    page.emulate_media(media='print')
    assert not page.locator('#filters').is_visible() and page.locator('#rows .row').first.is_visible()


@pytest.mark.parametrize('scheme', ('light', 'dark'))
@pytest.mark.parametrize('width', WIDTHS)
def test_an_accessibility_checker_finds_nothing_serious(show, file, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = show(file.parent / 'two/report.html', width, scheme, bypass_csp=True)

    def found():
        violations = Axe().run(page).response['violations']
        return [(each['id'], each['nodes'][0]['html']) for each in violations
                if each['impact'] in ('serious', 'critical')]
    page.locator('#lists summary').click()
    assert found() == []
    page.locator('#rows .crop').nth(1).click()
    assert found() == []
    page.keyboard.press('Escape')
    page.evaluate('document.querySelector("main").append(document.createElement("input"))')
    assert [name for name, _ in found()] == ['label']  # it does look
