"""Drawn pedestrians in Market-1501's layout, the data of `gin/demo.gin`: training and evaluation with no download.

A person combines attributes of small shared alphabets: colours of clothes, a pattern, sleeves, trousers or a skirt,
hair, a bag. Families wear the same colours and differ in pattern and details, and six cameras show them in other light,
so colour alone tells few of them apart. Every image has its own pose, viewpoint, background, passers-by and crop.

The body is a stick figure in three dimensions, turned about its vertical axis, projected in parallel, and painted far
to near as rounded shapes whose edges are antialiased by their signed distance.
"""

import json
import os
import re
import tempfile
from typing import NamedTuple

import numpy as np
import torch

VERSION = 1  # of the images; raise it with any change that alters one of their bytes or names
STAMP = 'complete.json'
TRAIN, QUERY, GALLERY = FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')

TRAIN_PIDS, TEST_PIDS = 144, 28
FAMILY = 2  # persons in clothes of the same colours; a family is trained or tested as a whole
FAMILIES = (TRAIN_PIDS + TEST_PIDS) // FAMILY
TRAIN_CAMERAS, TRAIN_SHOTS = 4, 2  # how many of the six cameras see a person, and how many images each takes
TEST_CAMERAS, TEST_SHOTS = 3, 4    # the first shot of each camera is a query
DISTRACTORS, JUNK = 24, 18         # gallery images of nobody's query, pid 0, and of no whole person, pid -1

# What a random stream is for: default_rng([seed, purpose, ...]). Far from the purposes in draws.py.
WARDROBE, DETAILS, SIGHTINGS, NAMES, IMAGE = range(100, 105)


def palette(colours):
    """'c23a34 2f57b5' → (2, 3) float32 in [0, 1]."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.float32) / 255


UPPERS = palette('c23a34 2f57b5 2f8f4e e0b23c e9e7e2 39393f 8b4fa8')
LOWERS = palette('2a3a63 26262a b59c72 85888c 6e3f2c')
BAGS = palette('1f1f22 a8552a d9cf45 2f7fa0')
HAIRS = palette('17130f 5a3a20 c9a35a 9b9a98')
SKINS = palette('f0c8a8 d09a70 8a5a3c')
SHOES = palette('1c1c1e ececea 7a4a2a')
PATTERNS = ('plain', 'hoops', 'stripes', 'checks', 'block', 'split', 'sleeves')  # a prime number of them: see dress
LEGWEAR = ('trousers', 'trousers', 'shorts', 'skirt')
HEADS = ('short hair', 'long hair', 'cap')
LUGGAGE = ('none', 'backpack', 'shoulder bag', 'hand bag')


class Person(NamedTuple):
    """Colours are (3,) float32 in [0, 1]."""
    upper: np.ndarray
    second: np.ndarray  # the pattern's other colour
    lower: np.ndarray
    pattern: str
    long_sleeves: bool
    legwear: str
    shoes: np.ndarray
    skin: np.ndarray
    head: str
    hair: np.ndarray
    luggage: str
    bag: np.ndarray
    bag_side: int       # -1 or 1
    height: float       # relative to the average
    build: float        # width relative to the average


class Camera(NamedTuple):
    textures: tuple     # of the wall and of the ground
    zoom: float         # height of an average person, relative to the crop's
    light: tuple        # gain of red, green and blue
    saturation: float
    gamma: float
    black: float        # what black becomes in the haze
    white: float        # what white becomes in the dark
    blur: float         # mean weight of each neighbour in the three-tap blur
    noise: float        # standard deviation; the full range is 1


CAMERAS = (
    Camera(('bricks', 'tiles'), 0.90, (1.04, 1.00, 0.97), 1.05, 0.95, 0.00, 1.00, 0.05, 0.010),
    Camera(('panels', 'tiles'), 0.85, (1.08, 0.98, 0.86), 0.95, 1.10, 0.00, 0.93, 0.10, 0.015),
    Camera(('foliage', 'tiles'), 0.88, (0.90, 0.99, 1.08), 0.90, 1.00, 0.03, 0.96, 0.07, 0.012),
    Camera(('panels', 'foliage'), 0.82, (0.93, 0.96, 1.01), 0.90, 1.25, 0.00, 0.80, 0.14, 0.025),
    Camera(('tiles', 'tiles'), 0.92, (0.93, 1.06, 0.93), 0.92, 0.97, 0.02, 0.97, 0.08, 0.015),
    Camera(('bricks', 'foliage'), 0.87, (1.00, 1.00, 0.99), 0.80, 0.90, 0.13, 0.95, 0.12, 0.012),
)


class Shot(NamedTuple):
    """An image to take: everything in it follows from the seed, pid, camera and index."""
    folder: str
    pid: int
    camera: int  # of CAMERAS, from 0
    index: int   # among the images that this camera takes of this pid


def write_pedestrians(folder, seed=0):
    """Writes about 1,600 small JPEG files to `folder`/bounding_box_train, /query and /bounding_box_test, once.

    A complete set of this version and seed stays as it is; any other set of ours is replaced. The files are written
    beside `folder` and moved there in one step, so it never holds half a set, also where two processes start together.
    One machine writes the same bytes every time.

    Raises ValueError where `folder` holds files that are not ours.
    """
    folder = os.path.abspath(folder)
    shots = plan(seed)
    stamp = {'generator': 'mgn.pedestrians', 'version': VERSION, 'seed': seed, 'images': len(shots)}
    if is_complete(folder, stamp):
        return
    refuse_foreign(folder, stamp)
    from torchvision.io import encode_jpeg  # takes as long to import as torch, which --help need not wait for

    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{name}.', dir=parent) as scratch:
        fresh = os.path.join(scratch, 'fresh')
        for part in FOLDERS:
            os.makedirs(os.path.join(fresh, part))
        for shot, file_name in zip(shots, file_names(shots, seed)):
            image = torch.from_numpy(take(shot, seed)).permute(2, 0, 1).contiguous()
            with open(os.path.join(fresh, shot.folder, file_name), 'wb') as file:
                file.write(encode_jpeg(image, quality=92).numpy().tobytes())
        with open(os.path.join(fresh, STAMP), 'w') as file:
            json.dump(stamp, file)
        try:
            if os.path.exists(folder) and not is_complete(folder, stamp):
                refuse_foreign(folder, stamp)
                os.rename(folder, os.path.join(scratch, 'old'))
            os.rename(fresh, folder)
        except OSError:  # somebody else's set is there already
            if not is_complete(folder, stamp):
                raise


def read_stamp(folder):
    try:
        with open(os.path.join(folder, STAMP)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def images_in(folder):
    parts = [os.path.join(folder, part) for part in FOLDERS]
    return [file_name for part in parts if os.path.isdir(part) for file_name in os.listdir(part)]


def is_complete(folder, stamp):
    return read_stamp(folder) == stamp and len(images_in(folder)) == stamp['images']


def refuse_foreign(folder, stamp):
    """What stands in `folder` is about to be deleted, so every file of it must be ours."""
    found = os.listdir(folder) if os.path.exists(folder) else []
    ours = isinstance(read_stamp(folder), dict) and read_stamp(folder).get('generator') == stamp['generator']
    foreign = [name for name in found if not ours or name not in (*FOLDERS, STAMP)]
    foreign += [name for name in images_in(folder) if not re.fullmatch(r'(-1|\d{4})_c\ds\d_\d{6}_\d\d\.jpg', name)]
    if foreign:
        raise ValueError(f'want a folder for drawn pedestrians that is absent, empty or written by {stamp["generator"]}, '
                         f'got {folder} with {", ".join(sorted(foreign)[:3])}; name another folder or move this one away')


def plan(seed):
    """→ the list of all Shots."""
    shots = []
    for pid in range(1, TRAIN_PIDS + TEST_PIDS + 1):
        tested = pid % FAMILIES < TEST_PIDS // FAMILY
        cameras, count = (TEST_CAMERAS, TEST_SHOTS) if tested else (TRAIN_CAMERAS, TRAIN_SHOTS)
        for camera in np.random.default_rng([seed, SIGHTINGS, pid]).permutation(len(CAMERAS))[:cameras]:
            shots += [Shot(TRAIN if not tested else GALLERY if index else QUERY, pid, int(camera), index)
                      for index in range(count)]
    for pid, count in ((0, DISTRACTORS), (-1, JUNK)):
        shots += [Shot(GALLERY, pid, index % len(CAMERAS), index // len(CAMERAS)) for index in range(count)]
    return shots


def file_names(shots, seed):
    """Names as 0002_c1s1_000451_03.jpg. Sequence, frame and box are random, so nothing but the pid tells the identity."""
    rng = np.random.default_rng([seed, NAMES])
    frames = rng.permutation(100_000)[:len(shots)]
    sequences, boxes = rng.integers(1, 7, (2, len(shots)))
    return [f'{shot.pid if shot.pid < 0 else f"{shot.pid:04}"}_c{shot.camera + 1}s{sequence}_{frame:06}_{box:02}.jpg'
            for shot, sequence, frame, box in zip(shots, sequences, frames, boxes)]


def take(shot, seed):
    """One image, (H, W, 3) uint8, H about 128 and W about 64."""
    rng = np.random.default_rng([seed, IMAGE, shot.pid + 1, shot.camera, shot.index])
    camera = CAMERAS[shot.camera]
    h, w = rng.integers((116, 56), (141, 73)).tolist()  # no two boxes of a detector are alike
    if shot.pid > 0:
        person = dress(np.random.default_rng([seed, WARDROBE, shot.pid % FAMILIES]),
                       np.random.default_rng([seed, DETAILS, shot.pid]), shot.pid // FAMILIES)
    else:
        person = dress(rng, rng)
    scale = h * camera.zoom * rng.uniform(0.94, 1.06)
    foot = np.array([w * rng.normal(0.5, 0.03), h * rng.normal(0.5, 0.015) + 0.5 * scale])
    if shot.pid < 0:  # half a person, cut at the waist or lengthwise
        foot += ((0, 0.5 * h), (0, -0.5 * h), (0.5 * w, 0), (-0.5 * w, 0))[rng.integers(4)]

    scene = Canvas(background(camera, h, w, rng), scale, foot)
    aside = foot + (rng.choice((-1, 1)) * rng.uniform(0.4, 0.6) * w, 0)
    if rng.random() < 0.15:  # a passer-by farther away
        draw_person(Canvas(scene.pixels, scale * rng.uniform(0.6, 0.9), aside - (0, 0.06 * h)), dress(rng, rng), rng)
    if shot.pid >= 0 or shot.index % 3:  # every third junk box is empty
        draw_person(scene, person, rng)
    in_front = rng.random()
    if in_front < 0.04:
        draw_person(scene._replace(foot=aside + (0, 0.05 * h)), dress(rng, rng), rng)
    elif in_front < 0.09:
        draw_box(scene.pixels, rng.uniform(0, w), h + 4, rng.uniform(3, 7), 1.2 * h, rng.uniform(0.2, 0.7, 1))  # a pole
    elif in_front < 0.14:
        draw_box(scene.pixels, rng.uniform(0, w), h + 4, rng.uniform(14, 28), rng.uniform(0.15, 0.35) * h,
                 rng.uniform(0.2, 0.7, 1))  # a bin
    return expose(camera, scene.pixels, rng)


def dress(wardrobe, details, member=0):
    """→ Person; the generator `wardrobe` draws what the members of a family share, `details` the rest.

    Members have different patterns: multiples of a step meet only after a prime number of patterns.
    """
    upper, second = wardrobe.permutation(len(UPPERS))[:2]
    lower = wardrobe.integers(len(LOWERS))
    first, step = wardrobe.integers((0, 1), len(PATTERNS))

    def pick(choices):
        return choices[details.integers(len(choices))]

    return Person(UPPERS[upper], UPPERS[second], LOWERS[lower], PATTERNS[(first + member * step) % len(PATTERNS)],
                  pick((False, True)), pick(LEGWEAR), pick(SHOES), pick(SKINS), pick(HEADS), pick(HAIRS), pick(LUGGAGE),
                  pick(BAGS), pick((-1, 1)), details.uniform(0.96, 1.04), details.uniform(0.88, 1.12))


class Canvas(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) float32 in [0, 1], painted in place
    scale: float        # pixels to a unit of length
    foot: np.ndarray    # column and row of the origin; from there x points right and y up


def draw_person(canvas, person, rng):
    """Paints `person` in a pose drawn from `rng`. Lengths in body heights; x points sideways, y up, z forwards."""
    yaw = rng.integers(2) * np.pi + rng.normal(0, 0.35)  # 0 faces the camera
    phase, stride = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
    cos, sin = np.cos(yaw), np.sin(yaw)
    b = person.build
    shapes = []  # (depth towards the camera, corners (n, 2), radius, colour)

    def limb(start, end, radius, colour, layer=0.0):
        x, y, z = np.array((start, end)).T
        shapes.append((layer + np.mean(z * cos - x * sin), np.stack((x * cos + z * sin, y), 1), radius, colour))

    def trunk(x, z, rings, colour, layer=0.0, radius=0.02):
        """A solid of elliptic cross-sections; rings: (y, half width, half depth), from the lowest up."""
        middle, half = x * cos + z * sin, [np.hypot(wide * cos, deep * sin) - radius for _, wide, deep in rings]
        right = [(middle + r, y) for r, (y, _, _) in zip(half, rings)]
        left = [(middle - r, y) for r, (y, _, _) in zip(half, rings)]
        shapes.append((layer + z * cos - x * sin, np.array(right + left[::-1]), radius, colour))

    def cloth(x, y):
        return weave(person, x, y, abs(cos))

    trunk(0, 0, ((0.48, 0.105 * b, 0.078), (0.60, 0.100 * b, 0.070), (0.80, 0.118 * b, 0.072)), cloth)
    limb((0, 0.80, 0), (0, 0.87, 0.01), 0.03, person.skin, -0.01)
    limb((0, 0.895, 0.018), (0, 0.925, 0.018), 0.050, person.skin)
    limb((0, 0.915, -0.018), (0, 0.94, -0.008), 0.058, person.hair)
    if person.head == 'long hair':
        limb((0, 0.92, -0.03), (0, 0.77, -0.055), 0.056, person.hair)
    if person.head == 'cap':
        limb((-0.03, 0.965, -0.01), (0.03, 0.965, -0.01), 0.032, person.second, 0.2)
        limb((0, 0.95, 0.02), (0, 0.945, 0.09), 0.012, person.second, 0.2)

    for side in (-1, 1):
        swing = side * stride * np.sin(phase)
        shin = swing - 0.08 - 0.5 * stride * (1 + side * np.cos(phase))  # knees bend backwards only
        forearm = 0.3 + 0.4 * stride - swing
        hip = np.array((side * 0.048 * b, 0.50, 0))
        knee = hip + (0, -0.24 * np.cos(swing), 0.24 * np.sin(swing))
        ankle = knee + (0, -0.23 * np.cos(shin), 0.23 * np.sin(shin))
        limb(knee, ankle, 0.034 * b, person.lower if person.legwear == 'trousers' else person.skin, -0.2)
        limb(hip, knee, 0.046 * b, person.skin if person.legwear == 'skirt' else person.lower, -0.2)
        limb(ankle, ankle + (0, -0.012, 0.05), 0.024, person.shoes, -0.2)

        shoulder = np.array((side * 0.112 * b, 0.78, 0))
        elbow = shoulder + (side * 0.02, -0.16 * np.cos(swing), -0.16 * np.sin(swing))
        hand = elbow + (0, -0.14 * np.cos(forearm), 0.14 * np.sin(forearm))
        sleeve = person.second if person.pattern == 'sleeves' else cloth
        limb(elbow, hand, 0.024 * b, sleeve if person.long_sleeves else person.skin)
        limb(shoulder, elbow, 0.032 * b, sleeve, 0.001)
        limb(hand, hand + (0, -0.02, 0), 0.022, person.skin, 0.001)
        if person.luggage == 'hand bag' and side == person.bag_side:
            trunk(hand[0], hand[2], ((hand[1] - 0.16, 0.035, 0.080), (hand[1] - 0.04, 0.035, 0.070)), person.bag, 0.02)

    if person.legwear == 'skirt':
        trunk(0, 0, ((0.29, 0.145 * b, 0.130), (0.52, 0.090 * b, 0.075)), person.lower, -0.05)
    if person.luggage == 'backpack':
        trunk(0, -0.11, ((0.56, 0.100, 0.060), (0.68, 0.105, 0.060), (0.80, 0.080, 0.045)), person.bag, 0.02)
        for x in (-0.075, 0.075):
            limb((x, 0.82, 0.02), (x, 0.60, 0.08), 0.014, person.bag, 0.05)
    if person.luggage == 'shoulder bag':
        x = 0.115 * person.bag_side
        for z in (-0.075, 0.075):
            limb((-0.8 * x, 0.82, 0.2 * z), (1.2 * x, 0.53, z), 0.011, person.bag, 0.03)
        trunk(1.35 * x, 0, ((0.38, 0.040, 0.090), (0.54, 0.040, 0.080)), person.bag, 0.03)

    canvas = canvas._replace(scale=canvas.scale * person.height)
    for _, corners, radius, colour in sorted(shapes, key=lambda shape: shape[0]):
        paint(canvas, corners, radius, colour)


def weave(person, x, y, frontal):
    """Colours (h, w, 3) of the upper garment at x (1, w), y (h, 1); `frontal` in [0, 1]: is its front or back in view?"""
    x, y = np.broadcast_arrays(x, y)
    if person.pattern == 'hoops':
        second = np.clip(0.5 + 2 * np.sin(48 * y), 0, 1)  # a gain of 2: edges a pixel wide, against aliasing
    elif person.pattern == 'stripes':
        second = np.clip(0.5 + 2 * np.cos(54 * x), 0, 1)
    elif person.pattern == 'checks':
        second = np.clip(0.5 + 3 * np.sin(40 * x) * np.sin(40 * y), 0, 1)
    elif person.pattern == 'block':
        second = (np.abs(x) < 0.02 + 0.05 * frontal) & (np.abs(y - 0.69) < 0.055)
    else:
        second = (y > 0.66) & (person.pattern == 'split')
    return person.upper + second[..., None] * (person.second - person.upper)


def paint(canvas, corners, radius, colour):
    """Paints a convex polygon, grown by `radius`; its rim is darker, as on a round body.

    corners: (n, 2), anticlockwise; two make a capsule. colour: (3,), or a function of x (1, w) and y (h, 1).
    """
    pixels, scale, (column, row) = canvas
    (left, bottom), (right, top) = (corners.min(0) - radius).tolist(), (corners.max(0) + radius).tolist()
    rows = slice(max(int(row - top * scale) - 1, 0), max(int(row - bottom * scale) + 2, 0))
    columns = slice(max(int(column + left * scale) - 1, 0), max(int(column + right * scale) + 2, 0))
    window = pixels[rows, columns]
    y = ((row - rows.start - 0.5 - np.arange(window.shape[0], dtype=np.float32)) / np.float32(scale))[:, None]
    x = ((columns.start + 0.5 - column + np.arange(window.shape[1], dtype=np.float32)) / np.float32(scale))[None]

    points = corners.tolist()
    squared, outside = np.inf, -np.inf
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.minimum(np.maximum((px * ex + py * ey) / (ex * ex + ey * ey + 1e-9), 0), 1)
        squared = np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if len(points) == 2:
            break
        outside = np.maximum(outside, ey * px - ex * py)
    distance = np.sqrt(squared)[..., None]
    if len(points) > 2:
        distance = np.where(outside[..., None] < 0, -distance, distance)
    distance -= radius
    shade = 0.72 + 0.28 * np.minimum(np.maximum(distance / -0.03, 0), 1)
    cover = np.minimum(np.maximum(0.5 - distance * scale, 0), 1)
    window += cover * (shade * (colour(x, y) if callable(colour) else colour) - window)


def draw_box(pixels, column, row, width, height, colour):
    """An upright box on the ground; lengths in pixels, (column, row) the middle of its lower edge."""
    x = 0.5 * width
    corners = np.array(((-x, 0), (x, 0), (x, height), (-x, height)))
    paint(Canvas(pixels, 1.0, np.array((column, row))), corners, 1.0, colour)


def background(camera, h, w, rng):
    """(h, w, 3) float32: a wall, the ground, and up to two boxes in dulled colours of clothes."""
    horizon = int(h * rng.uniform(0.5, 0.85))
    wall, ground = camera.textures
    pixels = np.concatenate((texture(wall, horizon, w, rng), texture(ground, h - horizon, w, rng)))
    pixels = np.float32(0.23) + np.float32(0.55) * pixels  # flatter than clothes, which stand out
    pixels *= (1 + 0.06 * noise(h, w, 3, rng) + 0.08 * noise(h, w, 30, rng))[..., None]
    for _ in range(rng.integers(3)):
        colour = np.concatenate((UPPERS, LOWERS))[rng.integers(len(UPPERS) + len(LOWERS))]
        draw_box(pixels, rng.uniform(0, w), horizon + rng.uniform(0, 0.2) * h, rng.uniform(5, 14), rng.uniform(0.1, 0.5) * h,
                 0.3 + 0.4 * colour)
    return pixels


def texture(kind, h, w, rng):
    """(h, w, 3) float32 in random, muted colours."""
    main = rng.uniform(0.35, 0.65) + rng.normal(0, 0.04, 3)
    other = main + rng.normal(0, 0.08) + rng.normal(0, 0.03, 3)
    rows, columns = np.arange(h)[:, None] + rng.integers(99), np.arange(w)[None] + rng.integers(99)
    if kind == 'foliage':
        share = np.clip(0.5 + noise(h, w, 5, rng), 0, 1)
    elif kind == 'panels':
        share = rng.random(99)[columns // rng.integers(6, 16)] + 0 * rows
    else:
        height, width = rng.integers((5, 11), (9, 18)) if kind == 'bricks' else rng.integers(12, 26, 2)
        columns = columns + rows // height * (width // 2 if kind == 'bricks' else 0)
        share = (rows % height == 0) | (columns % width == 0)
    return (main + share[..., None] * (other - main)).astype(np.float32)


def noise(h, w, cell, rng):
    """(h, w) float32 of mean 0 and deviation about 0.7: normal values every `cell` pixels, linear in between."""
    values = rng.standard_normal((h // cell + 2, w // cell + 2), np.float32)
    for size in (h, w):  # along the rows, then, transposed, along the columns
        whole, part = np.divmod(np.arange(size, dtype=np.float32) / np.float32(cell), 1)
        whole, part = whole.astype(int), part[:, None]
        values = (values[whole] * (1 - part) + values[whole + 1] * part).T
    return values


def expose(camera, pixels, rng):
    """What lens and sensor make of the scene: (H, W, 3) float32 → uint8."""
    h, w = pixels.shape[:2]
    pixels = pixels * (1 + 0.1 * noise(h, w, 40, rng))[..., None]  # sun and shade
    for side in np.repeat(camera.blur * rng.uniform(0.3, 1.7, 2), 2).astype(np.float32):
        pixels = pixels.swapaxes(0, 1)  # twice along either axis
        pixels[1:-1] += side * (pixels[2:] + pixels[:-2] - 2 * pixels[1:-1])
    light = rng.uniform(0.88, 1.12) * rng.normal(1, 0.03, 3) * camera.light
    grey = pixels.mean(2, keepdims=True)
    pixels = (grey + camera.saturation * (pixels - grey)) * light.astype(np.float32)
    pixels = camera.black + (camera.white - camera.black) * np.clip(pixels, 0, 1) ** camera.gamma
    pixels += camera.noise * rng.standard_normal(pixels.shape, np.float32)
    return (255 * np.clip(pixels, 0, 1) + 0.5).astype(np.uint8)
