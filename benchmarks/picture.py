"""Draws docs/pedestrians.jpg: queries of the demo's test set, in grey, and their nearest gallery images.

    python -m mgn.train --gin_file=gin/demo.gin
    python -m benchmarks.picture

All people in it are drawn. Green frame, tick: the identity of the query; red frame, cross: another one. As in
evaluation, images of the query's identity and camera are left out. Queries are evenly spaced in the list, not chosen.
"""

import os
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from mgn import ops

ROWS, COLUMNS = 4, 7
WIDTH, HEIGHT, FRAME, GAP, MARK = 64, 128, 4, 6, 16
STRIDE_X, STRIDE_Y = WIDTH + 2 * FRAME + GAP, HEIGHT + 2 * FRAME + GAP
GREY, GREEN, RED = '#808080', '#1a9850', '#d73027'
TICK, CROSS = [(4, 9, 7, 12), (7, 12, 13, 4)], [(4, 4, 12, 12), (12, 4, 4, 12)]


def framed(path, colour, strokes=()):
    """The image of `path` in a frame of `colour`, with a mark of white strokes in its lower right corner."""
    tile = Image.new('RGB', (WIDTH + 2 * FRAME, HEIGHT + 2 * FRAME), colour)
    tile.paste(Image.open(path).convert('RGB').resize((WIDTH, HEIGHT)), (FRAME, FRAME))
    draw, left, top = ImageDraw.Draw(tile), WIDTH + FRAME - MARK, HEIGHT + FRAME - MARK
    if strokes:
        draw.rectangle((left, top, left + MARK, top + MARK), fill=colour)
    for x0, y0, x1, y1 in strokes:
        draw.line((left + x0, top + y0, left + x1, top + y1), fill='white', width=2)
    return tile


def main(weights='runs/demo/best.pth', output='docs/pedestrians.jpg', images='~/.cache/mgn/pedestrians'):
    with tempfile.TemporaryDirectory() as folder:  # mgn.extract writes features, ids and paths of query and gallery
        bindings = [f'--gin_bindings=weights={weights!r}', f'--gin_bindings=features_dir={folder!r}']
        subprocess.run([sys.executable, '-m', 'mgn.extract', *bindings], check=True)
        query, gallery = ([np.load(f'{folder}/{part}_{name}.npy') for name in ('features', 'pids', 'camids', 'paths')]
                          for part in ('query', 'gallery'))
    same_identity, same_camera = (query[i][:, None] == gallery[i] for i in (1, 2))
    distances = np.where(same_identity & same_camera, np.inf, 1 - query[0] @ gallery[0].T)
    nearest = ops.topk_from_distance(distances, COLUMNS).indices
    images = os.path.expanduser(images)
    picture = Image.new('RGB', ((COLUMNS + 1) * STRIDE_X, ROWS * STRIDE_Y - GAP), 'white')
    for row, q in enumerate(np.linspace(0, len(nearest) - 1, 2 * ROWS + 1).astype(int)[1::2]):
        picture.paste(framed(f'{images}/{query[3][q].decode()}', GREY), (0, row * STRIDE_Y))
        for column, g in enumerate(nearest[q], 1):
            colour, strokes = (GREEN, TICK) if same_identity[q, g] else (RED, CROSS)
            tile = framed(f'{images}/{gallery[3][g].decode()}', colour, strokes)
            picture.paste(tile, (column * STRIDE_X + GAP, row * STRIDE_Y))
    picture.save(output, quality=86)


if __name__ == '__main__':
    main(*sys.argv[1:])
