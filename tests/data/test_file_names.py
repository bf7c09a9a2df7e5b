"""Names of files and folders that are not UTF-8: they are bytes, which Python holds as strings with surrogates."""

import os
from pathlib import Path

import gin
import numpy as np
import pytest
from conftest import write_market
from forks import run_program
from test_datasets import write_msmt
from thin import thin, train  # noqa: F401 (a fixture)

from mgn import config, evaluation
from mgn.data import datasets
from mgn.data.images import Decoder
from mgn.features import image_lists
from mgn.ops.errors import FileError

ODD = os.fsdecode(b'd\xe9t\xff')


@pytest.fixture
def odd_market(tmp_path):
    """A data set whose folder and files have names that are not UTF-8."""
    root = write_market(tmp_path / ODD, size=(16, 8))
    for path in root.glob('*/*.jpg'):
        path.rename(path.with_name(path.stem + ODD + '.jpg'))
    return root


def test_images_are_read_and_unreadable_ones_named(odd_market):
    dataset = datasets.market_layout(str(odd_market))
    assert dataset.name == ODD and [len(part) for part in dataset[2:5]] == [24, 3, 10]
    assert Decoder()(dataset.query[0].path).shape == (3, 16, 8)
    Path(dataset.query[0].path).write_text('no image')
    with pytest.raises(FileError) as error:
        Decoder()(dataset.query[0].path)
    assert error.value.message.startswith(dataset.query[0].path)
    paths = image_lists(dataset, 'query')['paths']
    assert paths.dtype.kind == 'S' and paths[0] == os.fsencode(f'query/0101_c1s1_000000_00{ODD}.jpg')
    (odd_market / 'query' / f'person{ODD}.jpg').touch()
    with pytest.raises(ValueError, match=f'but .*/person{ODD}.jpg does not; rename'):
        datasets.market_layout(str(odd_market))


def test_a_list_of_msmt17_names_files_by_their_bytes(tmp_path):
    write_msmt(tmp_path)
    line = b'0001/0001_000_07_a_1_\xe9.jpg 1\n'
    (tmp_path / 'list_query.txt').write_bytes(line)
    sample, = datasets.msmt17(str(tmp_path)).query
    assert os.fsencode(sample.path) == os.fsencode(tmp_path) + b'/test/' + line[:-3]
    (tmp_path / 'list_query.txt').write_bytes(b'\xe9\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is '\\udce9"):
        datasets.msmt17(str(tmp_path))


def test_a_run_is_trained_evaluated_and_extracted(odd_market, tmp_path, thin):  # noqa: F811
    run, features = tmp_path / f'run{ODD}', tmp_path / f'features{ODD}'
    train(odd_market, run, 'total_steps = 1', 'workers = 1')
    weights = f"weights = '{run}/last.pth'"
    for bindings in ([weights], [weights, f"features_dir = '{features}'"]):
        content = config.load_checkpoint([], [*bindings, f"output_dir = '{tmp_path}'"])
        assert gin.query_parameter('%data_root') == str(odd_market)
        if len(bindings) > 1:
            evaluation.extract_checkpoint(content)
            assert len(np.load(features / 'query_paths.npy')) == 3
        assert evaluation.evaluate_checkpoint(content)['data_root'] == str(odd_market)


def test_log_lines_and_errors_of_a_binary_show_them_as_escapes():
    script = (f'from mgn import command_line\nfrom mgn.ops.errors import UserError\n'
              f'def main(files, bindings):\n import logging\n name = {ODD!a}\n'
              f' logging.getLogger("mgn").info("read %s", name)\n print(name)\n raise UserError(name)\n'
              f'command_line.run(main)')
    result = run_program(script)
    assert result.stdout.splitlines()[0].endswith(r' I read d\udce9t\udcff')
    assert result.stdout.splitlines()[1:] == [r'd\udce9t\udcff']
    assert (result.stderr, result.returncode) == ('error: d\\udce9t\\udcff\n', 1)
