"""The stored results as docs/reliability.md."""

import re

SHOWN = 8  # failures of a row
PARTS = {  # of the page: what their rows do, and what is right
    'Operations': 'Random small cases against naive loops in float64: ties, duplicates, zeros, strides, half '
                  'precision, empty input; on 1, 2 and 7 threads, for each instruction set here and as reference.',
    'Files': 'Valid files with a few bytes flipped, cut, inserted, swapped or repeated, and checkpoints with a wrong '
             'field. A case passes if the file is read unchanged, or refused with an error message, within a limit of '
             'memory.',
    'Bindings': 'Every parameter that gin can bind × 22 wrong values, such as `\'x\'`, `-1`, `10 ** 20`, `()`, '
                '`@market1501`. A case passes if the value is refused with a message that names it, or is valid and '
                'used in a run.',
    'Runs': 'Training, evaluation and extraction of a thin network, disturbed. A case passes if the run ends in time '
            'with a message or its own exit status, and the same command again gives the files of an undisturbed run, '
            'bit for bit.'}
RELIES = '''
## What a run relies on

- **Gin files and `--gin_bindings` are programs.** `import` in a gin file runs a module. Use gin files of people whose
  programs you would run.
- **Checkpoints, features and images are data.** Reading them runs nothing that they hold. A checkpoint of somebody
  else can be evaluated.
- **The file system honours `fsync` and `rename`.** A checkpoint is complete on disk once both have returned.
- **One run, or extraction, at a time writes to a folder.** A lock ensures it, where the file system has locks.
'''


def page(rows, results):
    """The whole page. rows: {part: {name: Row}}, results: {name: result}."""
    found = sum(result.get('found', 0) for result in results.values())
    left = sum(results.get(name, {}).get('done', 0) < row.cases for of_part in rows.values()
               for name, row in of_part.items())
    lines = ['# Reliability', '',
             'After reading this page you know what was tried to make this project crash, lose a checkpoint, report a '
             'wrong number or end with an error without a remedy, and what was found. This command writes the page, '
             'and continues where it was interrupted:', '', '<!-- not run: it takes hours -->', '```',
             'python -m benchmarks.reliability', '```', '',
             f'**Open failures: {found:,}**, [listed below](#open). **Rows that have not run to their end: {left}.**']
    for title, of_part in rows.items():
        lines += ['', f'## {title}', '', PARTS[title], '', '| what | `--rows=` | cases | open | seconds | found and '
                  'fixed |', '|---|---|--:|--:|--:|---|']
        lines += [line(name, row, results.get(name)) for name, row in of_part.items()]
    machines = sorted({f'{result["machine"]}, torch {result["torch"]}, {result["date"]}'
                       for result in results.values() if result})
    lines += ['', 'Measured on: ' + '; '.join(machines) + '.', '', '## Open', '']
    for of_part in rows.values():
        for name, row in of_part.items():
            lines += failures(name, row, results.get(name))
    return wrapped(lines + ([] if found else ['Nothing.'])) + RELIES


def line(name, row, result):
    if not result:
        return f'| {row.title} | {name} | 0 of {row.cases * row.counts:,} | not run | | {row.fixed} |'
    of = '' if result['done'] >= row.cases else f' of {row.cases * row.counts:,}'
    return (f'| {row.title} | {name} | {result["done"] * row.counts:,}{of} | {result["found"]:,} | '
            f'{result["seconds"]:,.0f} | {row.fixed} |')


def failures(name, row, result):
    if not result or not result['found']:
        return []
    kept = sorted(result['failures'], key=lambda failure: -failure['count'])
    lines = ['', f'**{row.title}**: {result["found"]:,} failures. `--rows="{name}" --case=N` runs one.', '']
    for failure in kept[:SHOWN]:
        message = re.sub(r'/tmp/tmp\w+', '…', failure['message']).replace('`', "'")
        lines.append(f'- {failure["count"]} ×, e.g. case {failure["case"]}: {message[:180]}')
    return lines + ([f'- and {len(kept) - SHOWN} further kinds'] if len(kept) > SHOWN else [])


def wrapped(lines):
    """Paragraphs in lines of up to 120 characters; tables and lists stay."""
    result = []
    for text in lines:
        while len(text) > 120 and text[0] not in '|-#':
            cut = text.rfind(' ', 0, 120)
            result.append(text[:cut])
            text = text[cut + 1:]
        result.append(text)
    return re.sub('\n{3,}', '\n\n', '\n'.join(result)) + '\n'
