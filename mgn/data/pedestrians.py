"""Drawn pedestrians in Market-1501's layout, the data of `gin/demo.gin`: training and evaluation without a download.

Two persons each wear the same colours and differ in pattern, sleeves, legs, hair and backpack, and six cameras show
them in different light, so colour alone identifies few. Every image has its own pose, viewpoint and background.
The body is a stick figure in three dimensions, turned about its vertical axis, projected in parallel, and painted from
far to near as rounded polygons. A point of the image is a complex number, column + 1j * row, in pixels.
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mgn.data.random_streams import generator
from mgn.ops.errors import UserError

VERSION = 2  # of the images; raise it with any change that alters one of their bytes or names
GENERATOR, STAMP = 'mgn.pedestrians', 'complete.json'
TRAIN, QUERY, GALLERY = FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')

TRAIN_PIDS, TEST_PIDS = 144, 28    # even: two persons in the same colours are trained or tested together
CAMERAS_OF_PERSON, SHOTS = 4, 2    # how many of the six cameras see a person, and how many images each takes
DISTRACTORS, JUNK = 24, 18         # gallery images of people without a query (pid 0) and of half a body (pid -1)
WARDROBE, DETAILS, SIGHTINGS, FRAMES, IMAGE = range(100, 105)  # purposes of random streams, beside random_streams.py's


def palette(colours):
    """'c23a34 2f57b5' → (2, 3) float32 in [0, 1]."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.float32) / 255


UPPERS = palette('c23a34 2f57b5 2f8f4e e0b23c e9e7e2 39393f 8b4fa8')
LOWERS = palette('2a3a63 26262a b59c72 85888c 6e3f2c')
BAGS = palette('1f1f22 a8552a d9cf45 2f7fa0')
HAIRS = palette('17130f 5a3a20 c9a35a 9b9a98')
SKINS = palette('f0c8a8 d09a70 8a5a3c')
SHOES = palette('1c1c1e')[0]
PATTERNS = (  # functions of x and y in body heights, above 0 where the second colour shows
    lambda x, y: np.full_like(x, -1), lambda x, y: 40 * (y - 0.66), lambda x, y: np.sin(48 * y),
    lambda x, y: np.cos(54 * x), lambda x, y: 2 * np.sin(40 * x) * np.sin(40 * y))
CAMERAS = (  # gain of red, green and blue; gamma; haze, which black becomes; blur, a neighbour's weight; noise
    ((1.04, 1.00, 0.97), 0.95, 0.00, 0.05, 0.010), ((1.08, 0.98, 0.86), 1.10, 0.00, 0.10, 0.015),
    ((0.90, 0.99, 1.08), 1.00, 0.03, 0.07, 0.012), ((0.80, 0.83, 0.88), 1.25, 0.00, 0.14, 0.025),
    ((0.93, 1.06, 0.93), 0.97, 0.02, 0.08, 0.015), ((1.00, 1.00, 0.99), 0.90, 0.20, 0.12, 0.012))
HEIGHT, WIDTH = 140, 72  # of the scene, of which an image shows the upper left part
POINTS = np.arange(WIDTH, dtype=np.float32) + 0.5 + 1j * (np.arange(HEIGHT, dtype=np.float32)[:, None] + 0.5)


class Shot(NamedTuple):
    """An image to take: what it shows follows from the seed, pid, camera and index."""
    file: str
    pid: int
    camera: int  # of CAMERAS, from 0
    index: int   # among the images that this camera takes of this pid


def write_pedestrians(folder, seed=0):
    """Writes about 1,400 small JPEG files to `folder`/bounding_box_train, /query and /bounding_box_test, once.

    A complete set of this version and seed stays as it is. The files are written beside `folder` and moved there in one
    step, so it never holds half a set, also where two processes start together. One machine writes the same bytes every
    time. Raises UserError where `folder` holds anything else.
    """
    folder, shots = Path(folder).resolve(), plan(seed)
    stamp = json.dumps({'generator': GENERATOR, 'version': VERSION, 'seed': seed, 'images': len(shots)})

    def is_complete():
        return ((folder / STAMP).is_file() and (folder / STAMP).read_text(errors='replace') == stamp
                and len(list(folder.glob('*/*.jpg'))) == len(shots))

    if is_complete():
        return
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f'The drawn pedestrians need a folder of their own, but {folder} holds something else, or a '
                        f'set that is not whole or of another seed; bind data_root to another folder, or remove it')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{folder.name}.', dir=folder.parent) as scratch:
        fresh = Path(scratch, 'fresh')
        for shot in shots:
            (fresh / shot.file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(take(shot, seed)).save(fresh / shot.file, quality=92)
        (fresh / STAMP).write_text(stamp)
        try:
            fresh.rename(folder)
        except OSError:  # another process has just finished the same set
            if not is_complete():
                raise


def plan(seed):
    """→ the list of all Shots, in files such as query/0002_c1s1_000451_01.jpg, whose frame numbers are random."""
    places = [(GALLERY, pid, i % len(CAMERAS), i // len(CAMERAS))
              for pid, count in ((0, DISTRACTORS), (-1, JUNK)) for i in range(count)]
    for pid in range(1, TRAIN_PIDS + TEST_PIDS + 1):
        for camera in generator(seed, SIGHTINGS, pid).permutation(len(CAMERAS))[:CAMERAS_OF_PERSON].tolist():
            places += [(TRAIN if pid <= TRAIN_PIDS else GALLERY if i else QUERY, pid, camera, i) for i in range(SHOTS)]
    frames = generator(seed, FRAMES).permutation(100_000)
    return [Shot(f'{folder}/{pid if pid < 0 else f"{pid:04}"}_c{camera + 1}s1_{frame:06}_01.jpg', pid, camera, i)
            for (folder, pid, camera, i), frame in zip(places, frames)]


def take(shot, seed):
    """One image, (H, W, 3) uint8, H about 128 and W about 64."""
    rng = generator(seed, IMAGE, shot.pid + 1, shot.camera, shot.index)
    h, w = rng.integers((116, 56), (HEIGHT + 1, WIDTH + 1)).tolist()  # a detector's boxes differ in size
    pixels = background(rng)
    height = h * rng.uniform(0.8, 0.95)
    foot = complex(w * rng.normal(0.5, 0.03), h * rng.normal(0.5, 0.015) + 0.5 * height)
    if shot.pid < 0:
        foot += 0.5j * h  # the legs are below the image
    unknown, passer_by = rng.integers(10**6, 10**9, 2)
    people = [(foot, height, shot.pid if shot.pid > 0 else unknown)]
    if rng.random() < 0.25:  # somebody passes by, behind or in front
        aside = rng.choice((-1, 1)) * rng.uniform(0.4, 0.6) * w
        people.insert(rng.integers(2), (foot + aside, height * rng.uniform(0.6, 0.9), passer_by))
    for foot, height, number in people:
        draw_person(pixels, foot, height, Person(seed, number), rng)
    return expose(CAMERAS[shot.camera], pixels, rng)[:h, :w]


class Person:
    """The attributes that follow from the seed and the number of a person; colours are (3,) float32 in [0, 1]."""
    def __init__(self, seed, number):
        wardrobe, details = generator(seed, WARDROBE, (number - 1) // 2), generator(seed, DETAILS, number)
        self.upper, self.second = wardrobe.permutation(UPPERS)[:2]
        self.pattern = PATTERNS[wardrobe.permutation(len(PATTERNS))[number % 2]]
        self.long_sleeves, self.long_hair, self.backpack = details.random(3) < 0.5
        self.skin, self.hair, self.bag = (details.choice(colours) for colours in (SKINS, HAIRS, BAGS))
        self.lower, self.legwear = wardrobe.choice(LOWERS), details.choice(('trousers', 'shorts', 'skirt'))


def draw_person(pixels, foot, height, person, rng):
    """Paints `person` in a random pose above the point `foot`. In body heights, x points sideways, y up, z forwards."""
    yaw = rng.integers(2) * np.pi + rng.normal(0, 0.35)  # 0 faces the camera
    phase, stride = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
    cos, sin = np.cos(yaw), np.sin(yaw)
    shapes = []  # (depth towards the camera, corners, radius, colour)

    def limb(start, end, radius, colour, layer=0.0):
        x, y, z = np.array((start, end)).T
        shapes.append((layer + np.mean(z * cos - x * sin), x * cos + z * sin - 1j * y, radius, colour))

    def trunk(x, z, rings, colour, layer=0.0):  # of elliptic cross-sections; rings: (y, half width), from below
        y, half = np.array(rings).T
        half = half * np.hypot(cos, 0.7 * sin) - 0.02
        corners = x * cos + z * sin + np.concatenate((half - 1j * y, (-half - 1j * y)[::-1]))
        shapes.append((layer + z * cos - x * sin, corners, 0.02, colour))

    def cloth(points):
        x, y = (points.real - foot.real) / height, (foot.imag - points.imag) / height
        return person.upper + (0.5 + 2 * person.pattern(x, y)).clip(0, 1)[..., None] * (person.second - person.upper)

    trunk(0, 0, ((0.48, 0.105), (0.60, 0.100), (0.80, 0.118)), cloth)
    limb((0, 0.80, 0), (0, 0.87, 0.01), 0.03, person.skin, -0.01)
    limb((0, 0.895, 0.018), (0, 0.925, 0.018), 0.050, person.skin)
    limb((0, 0.915, -0.018), (0, 0.94, -0.008), 0.058, person.hair)
    if person.long_hair:
        limb((0, 0.92, -0.03), (0, 0.77, -0.055), 0.056, person.hair)
    for side in (-1, 1):
        swing = side * stride * np.sin(phase)
        shin = swing - 0.08 - 0.5 * stride * (1 + side * np.cos(phase))  # knees bend backwards only
        forearm = 0.3 + 0.4 * stride - swing
        hip, shoulder = np.array(((side * 0.048, 0.50, 0), (side * 0.112, 0.78, 0)))
        knee = hip + (0, -0.24 * np.cos(swing), 0.24 * np.sin(swing))
        ankle = knee + (0, -0.23 * np.cos(shin), 0.23 * np.sin(shin))
        limb(knee, ankle, 0.034, person.lower if person.legwear == 'trousers' else person.skin, -0.2)
        limb(hip, knee, 0.046, person.skin if person.legwear == 'skirt' else person.lower, -0.2)
        limb(ankle, ankle + (0, -0.012, 0.05), 0.024, SHOES, -0.2)
        elbow = shoulder + (side * 0.02, -0.16 * np.cos(swing), -0.16 * np.sin(swing))
        hand = elbow + (0, -0.14 * np.cos(forearm), 0.14 * np.sin(forearm))
        limb(elbow, hand, 0.024, cloth if person.long_sleeves else person.skin)
        limb(shoulder, elbow, 0.032, cloth, 0.001)
        limb(hand, hand + (0, -0.02, 0), 0.022, person.skin, 0.001)
    if person.legwear == 'skirt':
        trunk(0, 0, ((0.29, 0.145), (0.52, 0.090)), person.lower, -0.05)
    if person.backpack:
        trunk(0, -0.11, ((0.56, 0.100), (0.68, 0.105), (0.80, 0.080)), person.bag, 0.02)
        limb((-0.075, 0.82, 0.02), (-0.075, 0.60, 0.08), 0.014, person.bag, 0.05)
        limb((0.075, 0.82, 0.02), (0.075, 0.60, 0.08), 0.014, person.bag, 0.05)
    for _, corners, radius, colour in sorted(shapes, key=lambda shape: shape[0]):
        paint(pixels, foot + height * corners, height * radius, colour)


def paint(pixels, corners, radius, colour):
    """Paints a convex polygon of anticlockwise `corners`, grown by `radius`; two corners make a capsule."""
    columns, rows = (slice(max(int(low - radius), 0), max(int(high + radius + 1), 0)) for low, high in (
        (corners.real.min(), corners.real.max()), (corners.imag.min(), corners.imag.max())))
    points, window = POINTS[rows, columns], pixels[rows, columns]
    corners = corners.astype(np.complex64)[:, None, None]
    edges = corners - corners[np.arange(len(corners)) - 1]
    offsets = (points - corners) / edges  # (n, h, w): -1 to 0 along the edge is real, what lies beside it imaginary
    distance = (abs(offsets - offsets.real.clip(-1, 0)) * abs(edges)).min(0)
    distance = np.where((offsets.imag < 0).all(0), -distance, distance)[..., None] - np.float32(radius)
    shade = 0.72 + 0.28 * (distance / np.float32(-radius)).clip(0, 1)  # a darker rim, as on a round body
    window += (0.5 - distance).clip(0, 1) * (shade * (colour(points) if callable(colour) else colour) - window)


def background(rng):
    """(HEIGHT, WIDTH, 3) float32: a wall and the ground, of bricks or tiles in muted colours."""
    horizon = rng.integers(HEIGHT // 2, HEIGHT)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    pixels = np.empty((HEIGHT, WIDTH, 3), np.float32)
    for part in (slice(horizon), slice(horizon, HEIGHT)):
        height, width = rng.integers((5, 9), 26)
        joints = (rows[part] % height == 0) | ((columns + rows[part] // height * (width // 2)) % width == 0)
        pixels[part] = rng.uniform(0.42, 0.58) + rng.normal(0, 0.03, 3) + rng.normal(0, 0.05) * joints[..., None]
    return pixels * (1 + 0.06 * noise(3, rng) + 0.08 * noise(30, rng))


def noise(cell, rng):
    """(HEIGHT, WIDTH, 1) float32 of mean 0: normal values every `cell` pixels, linear in between."""
    down, across = (np.maximum(0, 1 - abs(np.arange(n)[:, None] / cell - np.arange(n // cell + 2)))
                    for n in (HEIGHT, WIDTH))
    return (down @ rng.standard_normal((down.shape[1], across.shape[1])) @ across.T)[..., None].astype(np.float32)


def expose(camera, pixels, rng):
    """What lens and sensor make of the scene: (HEIGHT, WIDTH, 3) float32 → uint8."""
    light, gamma, haze, blur, grain = camera
    blur *= rng.uniform(0.3, 1.7)
    pixels = pixels * (1 + 0.1 * noise(40, rng))  # sun and shade
    for _ in range(4):
        pixels = pixels.swapaxes(0, 1)  # twice along either axis
        pixels[1:-1] += blur * (pixels[2:] + pixels[:-2] - 2 * pixels[1:-1])
    light = (rng.uniform(0.88, 1.12) * rng.normal(1, 0.03, 3) * light).astype(np.float32)
    pixels = haze + (1 - haze) * (pixels * light).clip(0, 1) ** gamma
    pixels += grain * rng.standard_normal(pixels.shape, np.float32)
    return (255 * pixels.clip(0, 1) + 0.5).astype(np.uint8)
