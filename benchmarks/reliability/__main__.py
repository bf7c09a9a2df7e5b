"""Writes docs/reliability.md: what was tried to make this project crash, lose a checkpoint or tell a wrong number.

    python -m benchmarks.reliability [--rows=match_ranks,jpeg] [--scale=0.01] [--limit=600]
    python -m benchmarks.reliability --rows=jpeg --case=17

Results are kept in docs/reliability.json, so an interrupted call, or one that has reached its time limit, continues
where it stopped. --case runs one case alone and shows its traceback. Linux.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / 'tests'), str(ROOT / 'tests' / 'ops')]

from benchmarks.reliability import bindings, driver, files, operations, page, runs  # noqa: E402

PARTS = {'Operations': operations.ROWS, 'Files': files.ROWS, 'Bindings': bindings.ROWS, 'Runs': runs.ROWS}
ROWS = {name: row for rows in PARTS.values() for name, row in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default=','.join(ROWS), help='by name, with commas between; all: %(default)s')
    parser.add_argument('--scale', type=float, default=1, help='share of the cases of each row')
    parser.add_argument('--limit', type=float, help='seconds for each row')
    parser.add_argument('--case', type=int, help='run this case of one row alone')
    parser.add_argument('--anew', action='store_true', help='forget earlier results of these rows')
    parser.add_argument('--page', type=Path, default=ROOT / 'docs' / 'reliability.md',
                        help='what is written; results are kept in a .json file beside it')
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, as would what we start
    names = [name for name in args.rows.split(',') if name]
    if unknown := set(names) - set(ROWS):
        sys.exit(f'There are no rows {", ".join(unknown)}; there are {", ".join(ROWS)}')
    store = args.page.with_suffix('.json')
    for name in names:
        if args.case is not None:
            one_case(name, args.case)
            continue
        if args.anew:
            driver.write(store, name, {})
        result = driver.run_row(name, ROWS[name], args.scale, store, args.limit)
        print(f'{name}: {result["done"]} of {result["cases"]} cases, {result["found"]} failures, '
              f'{result["seconds"]:.0f} s', flush=True)
        for failure in result['failures']:
            print(f'    {failure["count"]} × (case {failure["case"]}) {failure["message"]}', flush=True)
        args.page.write_text(page.page(PARTS, driver.read(store)))


def one_case(name, number):
    with tempfile.TemporaryDirectory() as folder:
        driver.prepared(ROWS[name], Path(folder))
        ROWS[name].case(driver.random_of(name, number), Path(folder), number)
        print(f'{name}: case {number} is right')


if __name__ == '__main__':
    main()
