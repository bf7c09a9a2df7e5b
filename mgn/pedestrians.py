"""Drawn pedestrians in Market-1501's layout: the data of `gin/demo.gin`, for a first run with nothing to download.

A person is a combination of attributes from small shared alphabets: a handful of clothing colours, patterns, sleeves,
trousers or skirts, hair, hats, bags. Persons come in families that wear the same colours and differ in pattern and other
details, and six cameras see them in other light, so colour alone tells few of them apart. Each image draws its own
pose, viewpoint, background, passers-by, occluders, crop, blur and noise.

The body is a stick figure in three dimensions, turned about its vertical axis, projected straight, and painted far to
near as rounded shapes, antialiased by their signed distances.
"""

import json
import os
import re
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from torchvision.io import encode_jpeg

VERSION = 1  # raise it whenever a change below alters a single byte of an image or a name
STAMP = "complete.json"
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c\d+s\d+_\d{6}_\d\d\.jpg")  # pid, camera, sequence, frame, box

FAMILY = 3  # persons that share the colours of their clothes
TRAIN_PIDS, TEST_PIDS = 96, 42
FAMILIES = (TRAIN_PIDS + TEST_PIDS) // FAMILY
TRAIN_CAMERAS, TRAIN_SHOTS = 4, 3  # each person is seen by so many of the six cameras, so many times by each
TEST_CAMERAS, TEST_SHOTS = 3, 4  # of each camera's shots the first is a query
DISTRACTORS, JUNK = 40, 20

# What a stream of random numbers is for; it stands behind the seed in every default_rng.
WARDROBE, DETAILS, SIGHTINGS, FRAMES, SHOT = range(5)


def _palette(*codes):
    return np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in codes], np.float32) / 255


UPPERS = _palette("c23a34", "2f57b5", "2f8f4e", "e0b23c", "e9e7e2", "39393f", "8b4fa8")
LOWERS = _palette("2a3a63", "26262a", "b59c72", "85888c", "6e3f2c")
BAGS = _palette("1f1f22", "a8552a", "d9cf45", "2f7fa0")
HAIRS = _palette("17130f", "5a3a20", "c9a35a", "9b9a98")
SKINS = _palette("f0c8a8", "d09a70", "8a5a3c")
SHOES = _palette("1c1c1e", "ececea", "7a4a2a")
PATTERNS = ("plain", "hoops", "stripes", "checks", "block", "split", "sleeves")  # a prime number of them: see _dress
LOWER_KINDS = ("trousers", "shorts", "skirt")
HAIR_KINDS = ("short", "long", "cap")
BAG_KINDS = ("none", "backpack", "shoulder", "hand")


class Person(NamedTuple):
    """One identity. Colours are (3,) float32 in [0, 1]; height and build are relative to the average."""

    upper: np.ndarray
    second: np.ndarray  # the pattern's other colour
    pattern: str
    long_sleeves: bool
    lower: np.ndarray
    lower_kind: str
    shoes: np.ndarray
    skin: np.ndarray
    hair: np.ndarray
    hair_kind: str
    bag: np.ndarray
    bag_kind: str
    bag_side: int  # -1 or 1
    height: float
    build: float


class Camera(NamedTuple):
    """What one camera does to every image it takes."""

    walls: tuple  # kinds of texture above the horizon
    grounds: tuple  # and below it
    zoom: float  # height of an average person as a part of the crop's
    light: tuple  # gain of red, green and blue
    saturation: float
    gamma: float
    black: float  # haze: what black becomes
    white: float  # what white becomes
    blur: float  # mean weight of each neighbour in the three-tap blur
    noise: float  # standard deviation, of 1


CAMERAS = (
    Camera(("bricks", "panels"), ("tiles", "noise"), 0.90, (1.10, 1.02, 0.92), 1.10, 0.90, 0.00, 1.00, 0.05, 0.010),
    Camera(("panels", "noise"), ("tiles",), 0.84, (1.25, 0.92, 0.62), 0.90, 1.20, 0.02, 0.85, 0.12, 0.020),
    Camera(("noise", "bricks"), ("noise", "tiles"), 0.88, (0.74, 0.95, 1.25), 0.75, 1.00, 0.06, 0.95, 0.08, 0.012),
    Camera(("panels", "bricks"), ("noise",), 0.80, (0.80, 0.84, 1.00), 0.80, 1.60, 0.00, 0.62, 0.18, 0.035),
    Camera(("tiles", "panels"), ("tiles", "noise"), 0.93, (0.82, 1.15, 0.84), 0.85, 0.95, 0.04, 0.95, 0.10, 0.018),
    Camera(("noise", "panels"), ("noise", "tiles"), 0.86, (1.00, 0.98, 0.96), 0.60, 0.80, 0.28, 0.95, 0.15, 0.015),
)


class Shot(NamedTuple):
    """One image to take. pid 0 is a distractor, -1 a junk box; of both, index counts them."""

    folder: str
    name: str
    pid: int
    camera: int  # from 0, as in CAMERAS
    index: int  # which of this person's images from this camera


def write_pedestrians(folder, seed=0):
    """Makes `folder/bounding_box_train`, `folder/query` and `folder/bounding_box_test`, once.

    A complete set of this VERSION and seed is left as it is; another version's or seed's, or one with images missing,
    is replaced. The images are written beside `folder` and renamed into place, so `folder` is never half full, also
    when two processes start together. The same bytes come out of every run on one machine.

    Raises ValueError if `folder` holds anything that this function did not write.
    """
    folder = os.path.abspath(folder)
    shots = _plan(seed)
    stamp = {"generator": "mgn.pedestrians", "version": VERSION, "seed": seed, "images": len(shots)}
    if _is_complete(folder, stamp):
        return
    _refuse_foreign(folder, stamp)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.path.basename(folder)}.", dir=os.path.dirname(folder)) as scratch:
        fresh = os.path.join(scratch, "fresh")
        for name in FOLDERS:
            os.makedirs(os.path.join(fresh, name))
        for shot in shots:
            image = torch.from_numpy(_take(seed, shot)).permute(2, 0, 1).contiguous()
            with open(os.path.join(fresh, shot.folder, shot.name), "wb") as file:
                file.write(encode_jpeg(image, quality=92).numpy().tobytes())
        with open(os.path.join(fresh, STAMP), "w") as file:
            json.dump(stamp, file)

        if _is_complete(folder, stamp):  # another process was faster
            return
        try:
            if os.path.exists(folder):
                _refuse_foreign(folder, stamp)
                os.rename(folder, os.path.join(scratch, "replaced"))
            os.rename(fresh, folder)
        except OSError:  # another process moved its own set there in this very moment
            if not _is_complete(folder, stamp):
                raise


def _read_stamp(folder):
    try:
        with open(os.path.join(folder, STAMP)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _images_in(folder):
    return [os.path.join(name, file) for name in FOLDERS if os.path.isdir(os.path.join(folder, name))
            for file in os.listdir(os.path.join(folder, name))]


def _is_complete(folder, stamp):
    return _read_stamp(folder) == stamp and len(_images_in(folder)) == stamp["images"]


def _refuse_foreign(folder, stamp):
    """What stands at `folder` will be deleted, so all of it must be ours."""
    if not os.path.exists(folder):
        return
    ours = _read_stamp(folder)
    foreign = [file for file in os.listdir(folder) if file not in (*FOLDERS, STAMP)]
    foreign += [file for file in _images_in(folder) if not NAME.fullmatch(os.path.basename(file))]
    if os.listdir(folder) and (foreign or not isinstance(ours, dict) or ours.get("generator") != stamp["generator"]):
        raise ValueError(
            f"write_pedestrians needs a folder that is absent, empty or its own ({STAMP} of {stamp['generator']} and "
            f"nothing else), found {sorted(os.listdir(folder))[:5]} in {folder}; name another folder or move this one away"
        )


def _plan(seed):
    """All images of the set, a list of Shot. Frame numbers are unique and random, so no order of names tells anything."""
    sightings = []  # (folder, pid, camera, index)
    for pid in range(1, TRAIN_PIDS + TEST_PIDS + 1):
        is_test = pid % FAMILIES < TEST_PIDS // FAMILY  # whole families
        cameras, count = (TEST_CAMERAS, TEST_SHOTS) if is_test else (TRAIN_CAMERAS, TRAIN_SHOTS)
        for camera in np.random.default_rng([seed, SIGHTINGS, pid]).permutation(len(CAMERAS))[:cameras]:
            for index in range(count):
                folder = FOLDERS[0] if not is_test else FOLDERS[1] if index == 0 else FOLDERS[2]
                sightings.append((folder, pid, int(camera), index))
    for pid, count in ((0, DISTRACTORS), (-1, JUNK)):
        sightings += [(FOLDERS[2], pid, index % len(CAMERAS), index) for index in range(count)]

    rng = np.random.default_rng([seed, FRAMES])
    frames = rng.permutation(100_000)[: len(sightings)]
    sequences, boxes = rng.integers(1, 7, (2, len(sightings)))
    return [
        Shot(folder, f"{pid if pid < 0 else f'{pid:04d}'}_c{camera + 1}s{s}_{frame:06d}_{box:02d}.jpg", pid, camera, index)
        for (folder, pid, camera, index), s, frame, box in zip(sightings, sequences, frames, boxes)
    ]


def _take(seed, shot):
    """One image, (H, W, 3) uint8 with H and W about 128 and 64, drawn from (seed, pid, camera, index) alone."""
    rng = np.random.default_rng([seed, SHOT, shot.pid + 1, shot.camera, shot.index])
    camera = CAMERAS[shot.camera]
    h, w = int(rng.integers(116, 141)), int(rng.integers(56, 73))  # a detector's boxes are never quite alike
    person = _person(seed, shot.pid) if shot.pid > 0 else _dress(rng, rng, 0)
    scale = h * camera.zoom * rng.uniform(0.93, 1.07)
    foot = np.array([w * rng.normal(0.5, 0.04), h * rng.normal(0.5, 0.015) + 0.5 * scale])
    empty = shot.pid < 0 and shot.index % 3 == 0
    if shot.pid < 0:  # a body cut in two, at the waist or lengthwise
        foot += rng.permutation([[0.55 * w, 0], [-0.55 * w, 0], [0, 0.5 * h], [0, -0.5 * h]])[0]

    pixels = _background(rng, camera, h, w)
    beside = foot + [w * rng.choice([-1, 1]) * rng.uniform(0.38, 0.6), 0]
    if rng.random() < 0.25:  # a passer-by farther away
        _draw_person(_Canvas(pixels, scale * rng.uniform(0.6, 0.9), beside - [0, 0.06 * h]), _dress(rng, rng, 0), rng)
    if not empty:
        _draw_person(_Canvas(pixels, scale, foot), person, rng)
    _occlude(rng, _Canvas(pixels, scale, foot), beside)
    return _expose(rng, camera, pixels)


def _person(seed, pid):
    return _dress(
        np.random.default_rng([seed, WARDROBE, pid % FAMILIES]),
        np.random.default_rng([seed, DETAILS, pid]),
        pid // FAMILIES,
    )


def _dress(wardrobe, details, member):
    """A Person: clothing colours from the generator `wardrobe`, the rest from `details`.

    Generators in the same state give members of one family: each has another pattern, as steps below a prime number of
    patterns do not meet.
    """
    upper, second = wardrobe.permutation(len(UPPERS))[:2]
    lower = wardrobe.integers(len(LOWERS))
    pattern = wardrobe.integers(len(PATTERNS)) + member * wardrobe.integers(1, len(PATTERNS))
    return Person(
        upper=UPPERS[upper],
        second=UPPERS[second],
        pattern=PATTERNS[pattern % len(PATTERNS)],
        long_sleeves=bool(details.random() < 0.5),
        lower=LOWERS[lower],
        lower_kind=LOWER_KINDS[details.choice(3, p=[0.5, 0.25, 0.25])],
        shoes=SHOES[details.integers(len(SHOES))],
        skin=SKINS[details.integers(len(SKINS))],
        hair=HAIRS[details.integers(len(HAIRS))],
        hair_kind=HAIR_KINDS[details.integers(len(HAIR_KINDS))],
        bag=BAGS[details.integers(len(BAGS))],
        bag_kind=BAG_KINDS[details.integers(len(BAG_KINDS))],
        bag_side=int(details.choice([-1, 1])),
        height=float(details.uniform(0.95, 1.05)),
        build=float(details.uniform(0.88, 1.15)),
    )


class _Canvas(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) float32 in [0, 1], painted in place
    scale: float  # pixels per body height, the unit of all lengths below
    foot: np.ndarray  # column and row of the ground between the feet: the origin; y points up


def _draw_person(canvas, person, rng):
    """Paints `person` in a pose of its own. Body axes: x to a side, y up, z forward; yaw 0 faces the camera."""
    canvas = canvas._replace(scale=canvas.scale * person.height)
    yaw = rng.choice([0.0, 0.5, 1.0, 1.5]) * np.pi + rng.normal(0, 0.3)
    phase, stride = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5)
    cos, sin = np.cos(yaw), np.sin(yaw)
    parts = []  # (depth towards the camera, corners (n, 2), radius, colour)

    def limb(joints, radius, colour, layer=0.0):
        joints = np.asarray(joints)
        corners = np.stack([joints[:, 0] * cos + joints[:, 2] * sin, joints[:, 1]], 1)
        parts.append((layer + (joints[:, 2] * cos - joints[:, 0] * sin).mean(), corners, radius, colour))

    def prism(middle, profile, radius, colour, layer=0.0):
        """A solid of elliptic cross-sections; profile: (y, half width, half depth) from the bottom up."""
        x, depth = middle[0] * cos + middle[1] * sin, middle[1] * cos - middle[0] * sin
        half = [(np.hypot(wide * cos, deep * sin) - radius, y) for y, wide, deep in profile]
        corners = [(x + r, y) for r, y in half] + [(x - r, y) for r, y in half[::-1]]
        parts.append((layer + depth, np.array(corners), radius, colour))

    def cloth(x, y):
        return _pattern(person, x, y, abs(cos))

    b = person.build
    prism((0, 0), [(0.48, 0.100 * b, 0.075 * b), (0.60, 0.092 * b, 0.068 * b), (0.81, 0.125 * b, 0.070 * b)], 0.02, cloth)
    limb([(0, 0.80, 0), (0, 0.87, 0.01)], 0.03, person.skin, -0.01)
    limb([(0, 0.895, 0.018), (0, 0.925, 0.018)], 0.050, person.skin)
    limb([(0, 0.915, -0.018), (0, 0.940, -0.008)], 0.058, person.hair, -0.001)
    if person.hair_kind == "long":
        limb([(0, 0.92, -0.030), (0, 0.77, -0.055)], 0.056, person.hair)
    if person.hair_kind == "cap":
        limb([(-0.03, 0.965, -0.01), (0.03, 0.965, -0.01)], 0.032, person.second, 0.2)
        limb([(0, 0.95, 0.02), (0, 0.945, 0.09)], 0.012, person.second, 0.2)

    sleeve = person.second if person.pattern == "sleeves" else cloth
    for side in (-1, 1):
        swing = side * stride * np.sin(phase)
        hip = np.array([side * 0.048 * b, 0.50, 0])
        knee = hip + 0.24 * np.array([0, -np.cos(swing), np.sin(swing)])
        shin = swing - (0.08 + 0.5 * stride * (1 + side * np.cos(phase)))
        ankle = knee + 0.23 * np.array([0, -np.cos(shin), np.sin(shin)])
        bare = person.skin if person.lower_kind != "trousers" else person.lower
        limb([knee, ankle], 0.034 * b, bare, -0.2)
        limb([hip, knee], 0.046 * b, person.lower if person.lower_kind != "skirt" else bare, -0.2)
        limb([ankle, ankle + [0, -0.012, 0.05]], 0.024, person.shoes, -0.2)

        shoulder = np.array([side * 0.118 * b, 0.79, 0])
        elbow = shoulder + 0.16 * np.array([side * 0.18, -np.cos(swing), -np.sin(swing)])
        bend = 0.3 + 0.4 * stride - swing
        hand = elbow + 0.14 * np.array([0, -np.cos(bend), np.sin(bend)])
        limb([elbow, hand], 0.024 * b, sleeve if person.long_sleeves else person.skin)
        limb([shoulder, elbow], 0.032 * b, sleeve, 0.001)
        limb([hand, hand + [0, -0.02, 0]], 0.022, person.skin, 0.001)
        if person.bag_kind == "hand" and side == person.bag_side:
            limb([hand + [0, -0.09, -0.05], hand + [0, -0.09, 0.05]], 0.055, person.bag, 0.01)
    if person.lower_kind == "skirt":
        prism((0, 0), [(0.29, 0.145 * b, 0.13 * b), (0.52, 0.090 * b, 0.075 * b)], 0.01, person.lower, -0.05)

    if person.bag_kind == "backpack":
        prism((0, -0.11), [(0.57, 0.095, 0.06), (0.68, 0.10, 0.06), (0.80, 0.075, 0.045)], 0.025, person.bag, 0.02)
        for x in (-0.075, 0.075):
            limb([(x, 0.82, 0.02), (x, 0.63, 0.08)], 0.014, person.bag, 0.05)
    if person.bag_kind == "shoulder":
        x = 0.115 * person.bag_side
        for z in (-0.075, 0.075):
            limb([(-0.8 * x, 0.82, 0.2 * z), (1.2 * x, 0.53, z)], 0.011, person.bag, 0.03)
        prism((1.35 * x, 0), [(0.40, 0.04, 0.085), (0.54, 0.04, 0.075)], 0.015, person.bag, 0.03)

    for _, corners, radius, colour in sorted(parts, key=lambda part: part[0]):
        _paint(canvas, corners, radius, colour)


def _pattern(person, x, y, frontal):
    """Colours (h, w, 3) of the upper clothing at x (1, w) and y (h, 1); edges are soft so as not to alias."""
    if person.pattern == "hoops":
        second = np.clip(0.5 + 2 * np.sin(2 * np.pi * y / 0.095), 0, 1) + 0 * x
    elif person.pattern == "stripes":
        second = np.clip(0.5 + 2 * np.cos(2 * np.pi * x / 0.095), 0, 1) + 0 * y
    elif person.pattern == "checks":
        second = np.clip(0.5 + 3 * np.sin(2 * np.pi * x / 0.13) * np.sin(2 * np.pi * y / 0.13), 0, 1)
    elif person.pattern == "block":
        second = (np.abs(x) < 0.02 + 0.05 * frontal) & (np.abs(y - 0.69) < 0.055)
    elif person.pattern == "split":
        second = (y > 0.66) & (x == x)
    else:
        second = np.zeros_like(x + y)
    return person.upper + second[..., None] * (person.second - person.upper)


def _paint(canvas, corners, radius, colour):
    """Paints a convex shape of corners (n, 2) counter-clockwise (two: a capsule), grown by radius.

    colour: (3,) or a function of x (1, w) and y (h, 1). The rim is darker, as on a round body.
    """
    pixels, scale, (column, row) = canvas
    (left, bottom), (right, top) = corners.min(0) - radius, corners.max(0) + radius
    rows = slice(max(int(row - top * scale) - 1, 0), max(int(row - bottom * scale) + 2, 0))
    columns = slice(max(int(column + left * scale) - 1, 0), max(int(column + right * scale) + 2, 0))
    window = pixels[rows, columns]
    x = (np.arange(columns.start, columns.start + window.shape[1])[None] + 0.5 - column) / scale
    y = (row - np.arange(rows.start, rows.start + window.shape[0])[:, None] - 0.5) / scale

    squared, outside = np.inf, -np.inf
    edges = list(zip(corners, np.roll(corners, -1, 0)))[: len(corners) if len(corners) > 2 else 1]
    for (ax, ay), (bx, by) in edges:
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey + 1e-12), 0, 1)
        squared = np.minimum(squared, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        outside = np.maximum(outside, ey * px - ex * py)
    distance = np.sqrt(squared)
    if len(edges) > 1:
        distance = np.where(outside < 0, -distance, distance)
    distance = (distance - radius)[..., None]  # negative inside
    colour = colour(x, y) if callable(colour) else colour
    shaded = colour * (0.72 + 0.28 * np.clip(-distance / 0.03, 0, 1))
    window += np.clip(0.5 - distance * scale, 0, 1) * (shaded - window)


def _background(rng, camera, h, w):
    """(h, w, 3) float32: a wall, a ground, and up to three upright things in the colours of clothes."""
    horizon = int(h * rng.uniform(0.5, 0.85))
    wall = _texture(rng, camera.walls[rng.integers(len(camera.walls))], horizon, w)
    ground = _texture(rng, camera.grounds[rng.integers(len(camera.grounds))], h - horizon, w)
    pixels = np.concatenate([wall, ground]).astype(np.float32)
    for _ in range(rng.integers(0, 4)):
        colour = rng.permutation(np.concatenate([UPPERS, LOWERS]))[0] * rng.uniform(0.5, 1.0)
        width, height = rng.uniform(4, 14), rng.uniform(8, 0.6 * h)
        box = np.array([[0, 0], [width, 0], [width, height], [0, height]])
        _paint(_Canvas(pixels, 1.0, np.array([rng.uniform(-8, w), horizon + rng.uniform(-0.4, 0.2) * h])), box, 1.0, colour)
    return pixels


def _texture(rng, kind, h, w):
    def paint():
        return np.clip(rng.uniform(0.25, 0.8) + rng.normal(0, 0.07, 3), 0.05, 1)

    pixels = paint() + np.zeros((h, w, 3))
    y, x = np.arange(h)[:, None], np.arange(w)[None]
    if kind == "panels":
        edges = np.cumsum(rng.integers(5, 22, w))
        pixels = np.stack([paint() for _ in edges[: w // 5 + 2]])[np.searchsorted(edges, x, "right")] + 0 * pixels
    elif kind in ("bricks", "tiles"):
        height, width = (rng.integers(5, 9), rng.integers(11, 18)) if kind == "bricks" else rng.integers(12, 26, 2)
        course = (y + rng.integers(99)) // height
        shift = course * (width // 2 if kind == "bricks" else rng.integers(0, 3))
        column = x + shift + rng.integers(99)
        joint = ((y - y[0] + rng.integers(99)) % height == 0) | (column % width == 0)
        tone = rng.normal(1, 0.08, (50, 50))[course % 50, column // width % 50]
        pixels = np.where(joint[..., None], paint(), pixels * tone[..., None])
    else:
        pixels = pixels + np.clip(0.5 + _smooth(rng, h, w, 5), 0, 1)[..., None] * (paint() - pixels)
    return pixels * (1 + 0.12 * _smooth(rng, h, w, 3) + 0.15 * _smooth(rng, h, w, 30))[..., None]


def _smooth(rng, h, w, cell):
    """Noise (h, w) of mean 0 and deviation about 0.7: random values every `cell` pixels, linear between."""
    values = rng.normal(0, 1, (h // cell + 2, w // cell + 2))
    for size in (h, w):  # along the first axis, then, transposed, along the other
        whole, part = np.divmod(np.arange(size) / cell, 1)
        whole = whole.astype(int)
        values = (values[whole] * (1 - part[:, None]) + values[whole + 1] * part[:, None]).T
    return values


def _occlude(rng, canvas, beside):
    """Sometimes, something stands before the person: a pole, a bin, or someone half in the picture."""
    h, w = canvas.pixels.shape[:2]
    kind = rng.random()
    ground = canvas._replace(scale=1.0, foot=np.array([rng.uniform(0, w), h + 4.0]))
    grey = rng.uniform(0.1, 0.7) + rng.normal(0, 0.05, 3)
    if kind < 0.10:
        _paint(ground, np.array([[0, 0], [0, h + 9.0]]), rng.uniform(1.5, 4), grey)
    elif kind < 0.20:
        width, height = rng.uniform(14, 30), rng.uniform(0.15, 0.4) * h
        _paint(ground, np.array([[-width / 2, 0], [width / 2, 0], [width / 2, height], [-width / 2, height]]), 1.0, grey)
    elif kind < 0.30:
        _draw_person(canvas._replace(foot=beside + [0, 0.05 * h]), _dress(rng, rng, 0), rng)


def _expose(rng, camera, pixels):
    """What the lens and the sensor make of the scene: (H, W, 3) float in [0, 1] -> uint8."""
    h, w = pixels.shape[:2]
    pixels = np.clip(pixels * (1 + 0.2 * _smooth(rng, h, w, 40))[..., None], 0, 1)  # shadows, sunlight
    for _ in range(2):
        side = camera.blur * rng.uniform(0.3, 1.7)
        for axis in (0, 1):
            before, after = np.roll(pixels, 1, axis), np.roll(pixels, -1, axis)
            pixels = pixels + side * (before + after - 2 * pixels)
    grey = pixels.mean(2, keepdims=True)
    pixels = (grey + camera.saturation * (pixels - grey)) * camera.light * rng.uniform(0.85, 1.15) * rng.normal(1, 0.04, 3)
    pixels = camera.black + (camera.white - camera.black) * np.clip(pixels, 0, 1) ** camera.gamma
    pixels = pixels + rng.normal(0, camera.noise, pixels.shape)
    return (255 * np.clip(pixels, 0, 1) + 0.5).astype(np.uint8)
