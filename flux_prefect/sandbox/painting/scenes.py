"""What there is to see: each scene composes one kind of image from a palette and chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from flux_prefect.sandbox.painting.canvas import Canvas, Point, Shape, circle
from flux_prefect.sandbox.painting.palettes import Colour, Palette, along, mix

__all__ = ["SCENES", "choose_scene"]

Scene = Callable[[Canvas, Palette], None]


def mountains(canvas: Canvas, palette: Palette) -> None:
    """Ridges behind ridges in the haze, under a sun."""
    chance, unit, height = canvas.chance, canvas.unit, canvas.height
    canvas.fill([*palette.sky, palette.horizon])
    _stars(canvas, palette)
    _sun(canvas, palette, (canvas.width * chance.uniform(0.2, 0.8), height * chance.uniform(0.22, 0.42)))
    _birds(canvas, palette)
    layers = chance.randint(5, 7)
    for layer in range(layers):
        depth = (layer + 1) / layers
        base = height * (0.44 + 0.46 * (layer / (layers - 1)) ** 1.15)
        rugged, rise = _ridge(chance, peaks=chance.uniform(1.6, 2.8) + layer * 0.5), unit * (36 - 20 * depth)
        line = [(x, base - rugged(x / canvas.width) ** 1.3 * rise) for x in canvas.columns(0.55)]
        colour = mix(palette.horizon, palette.dark, 0.12 + 0.82 * depth**1.25)
        canvas.shapes([canvas.ground(line)], [colour, mix(colour, palette.horizon, 0.5 * (1 - depth) + 0.06)])
        if layer < layers - 1:
            canvas.haze(base - unit * 4, base + unit * 14, palette.horizon, 0.34 * (1 - depth))


def sea(canvas: Canvas, palette: Palette) -> None:
    """A low sun over rolling waves, and a small boat."""
    chance, unit, width, height = canvas.chance, canvas.unit, canvas.width, canvas.height
    horizon = height * chance.uniform(0.42, 0.54)
    canvas.fill([*palette.sky, palette.horizon, palette.horizon])
    _stars(canvas, palette)
    sun = width * chance.uniform(0.25, 0.75), horizon - unit * chance.uniform(2, 12)
    _sun(canvas, palette, sun, radius=chance.uniform(9, 15))
    _clouds(canvas, palette, horizon)
    deep = mix(palette.sky[0], palette.dark, 0.45)
    canvas.shapes(
        [[(0, horizon), (width, horizon), (width, height), (0, height)]],
        [mix(palette.horizon, palette.sky[1], 0.35), palette.sky[1]],
    )
    _reflection(canvas, palette, sun[0], horizon)
    rows = 11
    for row in range(rows):
        near = row / (rows - 1)
        base = horizon + (height - horizon) * (0.08 + 0.84 * near**1.25)
        length, swell = unit * (2.5 + 7.5 * near), unit * (0.25 + 2.3 * near)
        phase, drift = chance.uniform(0, math.tau), chance.uniform(0, math.tau)
        line = [(x, base - _wave(x / length + phase, x / length * 0.37 + drift) * swell) for x in canvas.columns(0.6)]
        colour = along([mix(palette.horizon, palette.sky[1], 0.6), mix(palette.sky[1], deep, 0.3), deep], near)
        foam = [(x, y - unit * (0.12 + 0.34 * near)) for x, y in line]
        canvas.shapes([[*foam, *reversed(line)]], [mix(colour, palette.light, 0.6)])
        canvas.shapes([canvas.ground(line)], [mix(colour, palette.light, 0.06), mix(colour, palette.dark, 0.4)])
        if row == 2:  # noqa: PLR2004 - far enough to be small
            _boat(canvas, palette, (width * (0.22 if sun[0] > width / 2 else 0.74), base - swell * 0.2))


def ribbons(canvas: Canvas, palette: Palette) -> None:
    """Bands of silk flowing across."""
    chance, width, height = canvas.chance, canvas.width, canvas.height
    canvas.fill([mix(palette.sky[0], palette.dark, 0.5), palette.dark])
    colours = [
        palette.sky[0],
        palette.accents[0],
        palette.accents[1],
        palette.light,
        palette.accents[2],
        palette.accents[3],
    ]
    bands = 30
    phases = [chance.uniform(0, math.tau) for _ in range(4)]
    speeds = chance.uniform(0.55, 0.9), chance.uniform(1.1, 1.7)
    lean = chance.choice((-1, 1)) * chance.uniform(0.15, 0.4) * height
    columns = canvas.columns(1)

    def edge(band: float) -> list[Point]:
        line = []
        for x in columns:
            across = x / width
            sway = math.sin(math.tau * speeds[0] * across + phases[0] + band * 1.6)
            ripple = math.sin(math.tau * speeds[1] * across + phases[1] - band * 2.3)
            pinch = 0.36 + 0.3 * (1 + math.sin(math.tau * 0.6 * across + phases[2])) / 2
            y = height * (0.5 + 0.16 * sway + 0.07 * ripple + (band - 0.5) * pinch * 1.7) + lean * (across - 0.5)
            line.append((x, y))
        return line

    upper = edge(0)
    for band in range(bands):
        lower = edge((band + 1) / bands)
        colour = along(colours, band / (bands - 1))
        shade = mix(colour, palette.dark, 0.42)
        # One pixel of overlap: two smooth edges side by side would let the ground shine through.
        canvas.shapes([[*upper, *((x, y + 1) for x, y in reversed(lower))]], [colour, shade])
        upper = lower


def shapes(canvas: Canvas, palette: Palette) -> None:
    """A poster of quarter circles, arcs, stripes and dots."""
    chance = canvas.chance
    cells = chance.choice((5, 6))
    side = min(canvas.width, canvas.height) / cells
    columns, rows = math.ceil(canvas.width / side), math.ceil(canvas.height / side)
    paper = mix(palette.light, palette.accents[-1], 0.15)
    canvas.fill([paper])
    left, top = (canvas.width - columns * side) / 2, (canvas.height - rows * side) / 2
    inks = [*palette.accents[:4], palette.dark, palette.sky[0]]
    for column in range(columns):
        for row in range(rows):
            ground, ink, third = chance.sample(inks, 3)
            corner = left + column * side, top + row * side
            canvas.shapes([_box(corner, side, side)], [paper if chance.random() < 0.34 else ground])  # noqa: PLR2004
            _motif(canvas, corner, side, ink, third)


def planets(canvas: Canvas, palette: Palette) -> None:
    """A ringed planet, its moons and the stars."""
    chance, unit, width, height = canvas.chance, canvas.unit, canvas.width, canvas.height
    night = mix(palette.dark, (4, 6, 18), 0.55)
    canvas.fill([night, mix(palette.sky[0], night, 0.7), mix(palette.sky[1], night, 0.72)])
    for _ in range(4):
        spot = width * chance.random(), height * chance.random()
        canvas.glow(spot, unit * chance.uniform(35, 65), chance.choice(palette.accents), 0.2)
    _scatter_stars(canvas, (255, 255, 255), 260, height)
    radius = unit * chance.uniform(22, 28)
    centre = width * chance.uniform(0.36, 0.64), height * chance.uniform(0.42, 0.54)
    plane = _RingPlane(centre, radius, tilt=chance.uniform(-0.5, 0.5))
    colours = chance.sample(palette.accents, 3)
    canvas.glow(centre, radius * 2.1, mix(colours[0], palette.light, 0.4), 0.4)
    _rings(canvas, plane, [palette.light, colours[1]], front=False)
    _globe(canvas, centre, radius, colours, night)
    _rings(canvas, plane, [palette.light, colours[1]], front=True)
    for _ in range(chance.randint(2, 3)):
        angle, far = chance.uniform(0, math.tau), radius * chance.uniform(2.1, 2.6)
        moon = centre[0] + far * math.cos(angle) * 1.1, centre[1] + far * math.sin(angle) * 0.62
        _globe(canvas, moon, unit * chance.uniform(1.6, 4.4), chance.sample(palette.accents, 2), night)


def dunes(canvas: Canvas, palette: Palette) -> None:
    """Sand in evening light: every crest has a lit and a shaded side."""
    chance, unit, width, height = canvas.chance, canvas.unit, canvas.width, canvas.height
    canvas.fill([*palette.sky, palette.horizon])
    _stars(canvas, palette)
    _sun(canvas, palette, (width * chance.uniform(0.2, 0.8), height * chance.uniform(0.2, 0.36)))
    sand = mix(palette.accents[1], palette.horizon, 0.35)
    layers = 6
    for layer in range(layers):
        depth = layer / (layers - 1)
        base = height * (0.5 + 0.44 * depth**1.2)
        phase, length = chance.uniform(0, math.tau), width * chance.uniform(0.5, 0.85) * (0.7 + 0.6 * depth)
        swing = unit * (4 + 8 * depth)

        def crest(
            x: float, base: float = base, phase: float = phase, length: float = length, swing: float = swing
        ) -> float:
            turn = math.tau * x / length + phase
            return base - swing * (math.sin(turn + 0.55 * math.sin(turn)) + 0.25 * math.sin(turn * 2.3 + phase))

        line = [(x, crest(x)) for x in canvas.columns(0.7)]
        lit = mix(mix(sand, palette.light, 0.3), palette.horizon, 0.55 * (1 - depth))
        shaded = mix(lit, palette.dark, 0.34 + 0.3 * depth)
        canvas.shapes([canvas.ground(line)], [lit, mix(lit, palette.dark, 0.2 + 0.25 * depth)])
        # The lee side leaves the crest at each summit and falls away in a curve.
        summits = [
            here
            for before, here, after in zip(line, line[1:], line[2:], strict=False)
            if here[1] < before[1] and here[1] <= after[1]
        ]
        for summit in summits:
            canvas.shapes([_lee(canvas, summit, line, length)], [shaded, mix(shaded, lit, 0.75)])
        if layer < layers - 1:
            canvas.haze(base - swing, base + unit * 14, palette.horizon, 0.16 * (1 - depth))


def forest(canvas: Canvas, palette: Palette) -> None:
    """Rows of firs fading into the mist."""
    chance, unit, width, height = canvas.chance, canvas.unit, canvas.width, canvas.height
    canvas.fill([*palette.sky, palette.horizon])
    _stars(canvas, palette)
    _sun(canvas, palette, (width * chance.uniform(0.25, 0.75), height * chance.uniform(0.24, 0.4)))
    rows = 5
    for row in range(rows):
        depth = (row + 1) / rows
        base = height * (0.54 + 0.5 * (row / (rows - 1)) ** 1.2)
        slope = _ridge(chance, peaks=1.6)
        line = [(x, base - slope(x / width) * unit * 9) for x in canvas.columns(2)]
        colour = mix(palette.horizon, palette.dark, 0.16 + 0.8 * depth**1.3)
        trees = []
        place = -unit * 3
        while place < width + unit * 3:
            tall = unit * (5 + 19 * depth**1.4) * chance.uniform(0.65, 1.25)
            foot = base - slope(min(max(place / width, 0), 1)) * unit * 9 + unit
            trees.append(_fir(chance, (place, foot), tall))
            place += tall * chance.uniform(0.16, 0.42)
        canvas.shapes([canvas.ground(line), *trees], [colour, mix(colour, palette.dark, 0.15)])
        if row < rows - 1:
            canvas.haze(base - unit * 12, base + unit * 10, palette.horizon, 0.6 * (1 - depth))


def city(canvas: Canvas, palette: Palette) -> None:
    """A skyline at dusk, its windows lit."""
    chance, unit, width, height = canvas.chance, canvas.unit, canvas.width, canvas.height
    canvas.fill([*palette.sky, palette.horizon])
    _stars(canvas, palette)
    _sun(canvas, palette, (width * chance.uniform(0.25, 0.75), height * chance.uniform(0.3, 0.5)), radius=13)
    _clouds(canvas, palette, height * 0.6)
    rows = 4
    for row in range(rows):
        depth = (row + 1) / rows
        colour = mix(palette.horizon, palette.dark, 0.2 + 0.74 * depth)
        houses, windows = [], []
        left = -unit * chance.uniform(0, 6)
        while left < width:
            wide = unit * chance.uniform(4.5, 9.5) * (0.75 + 0.5 * depth)
            tall = height * (0.62 - 0.4 * depth + chance.triangular(-0.1, 0.24, -0.04))
            top = height - tall
            houses.append(_box((left, top), wide + 1, tall + 1))
            houses.extend(_roof(canvas, (left, top), wide))
            windows.extend(_windows(canvas, (left, top), wide))
            left += wide + unit * chance.choice((0, 0, 0.5, 1.6))
        canvas.shapes(houses, [colour, mix(colour, palette.dark, 0.35)])
        canvas.shapes(windows, [mix(palette.light, palette.accents[1], 0.4)], 0.25 + 0.6 * depth)
        if row < rows - 1:
            canvas.haze(height * 0.45, height, palette.horizon, 0.4 * (1 - depth))


SCENES: tuple[Scene, ...] = (mountains, sea, ribbons, shapes, planets, dunes, forest, city)

_WORDS: dict[str, Scene] = {
    **dict.fromkeys(("mountain", "alps", "peak", "valley", "snow", "glacier", "lake"), mountains),
    **dict.fromkeys(
        ("sea", "ocean", "beach", "wave", "boat", "ship", "harbour", "harbor", "island", "lighthouse"), sea
    ),
    **dict.fromkeys(("abstract", "flow", "silk", "ribbon", "wind", "music"), ribbons),
    **dict.fromkeys(("poster", "geometric", "bauhaus", "pattern", "logo", "tile"), shapes),
    **dict.fromkeys(("space", "planet", "galaxy", "moon", "rocket", "astronaut", "star"), planets),
    **dict.fromkeys(("desert", "dune", "sand", "sahara", "camel"), dunes),
    **dict.fromkeys(("forest", "tree", "wood", "fox", "deer", "cabin", "jungle"), forest),
    **dict.fromkeys(("city", "street", "skyline", "tower", "building", "neon", "tokyo", "robot", "car"), city),
}


def choose_scene(prompt: str, chance: Random) -> Scene:
    """The scene that the prompt's first telling word asks for, else any."""
    anything = chance.choice(SCENES)
    words = "".join(letter if letter.isalpha() else " " for letter in prompt[:400].lower()).split()
    return next((_WORDS[stem] for word in words for stem in (word, word.removesuffix("s")) if stem in _WORDS), anything)


def _ridge(chance: Random, *, peaks: float) -> Callable[[float], float]:
    """A rugged line over 0 to 1, from 0 to about 1: folded waves, each octave finer and flatter."""
    octaves = [(peaks * 2.07**octave, 0.52**octave, chance.uniform(0, 100)) for octave in range(6)]
    total = sum(weight for _, weight, _ in octaves)

    def height(place: float) -> float:
        rise = 0.0
        for frequency, weight, shift in octaves:
            cell, inside = divmod(place * frequency + shift, 1)
            fold = 1 - abs(2 * inside - 1)
            # A cell's own factor keeps the peaks from looking stamped.
            rise += weight * fold * (0.45 + 0.55 * math.sin(cell * 12.9898 + shift) ** 2)
        return rise / total * 1.35

    return height


def _wave(first: float, second: float) -> float:
    return math.sin(first + 0.5 * math.sin(first)) * 0.75 + math.sin(second) * 0.25


def _is_dark(colour: Colour) -> bool:
    return sum(colour) < 300  # noqa: PLR2004 - about 40 % grey


def _stars(canvas: Canvas, palette: Palette) -> None:
    if _is_dark(palette.sky[0]):
        _scatter_stars(canvas, palette.light, 90, canvas.height * 0.4)


def _scatter_stars(canvas: Canvas, colour: Colour, count: int, lowest: float) -> None:
    chance, unit = canvas.chance, canvas.unit
    for opacity in (0.35, 0.6, 0.95):
        dots = []
        for _ in range(count // 3):
            x, y = chance.uniform(0, canvas.width), lowest * chance.random() ** 1.3
            size = unit * chance.uniform(0.06, 0.19)
            dots.append([(x - size, y), (x, y - size), (x + size, y), (x, y + size)])
        canvas.shapes(dots, [colour], opacity)


def _sun(canvas: Canvas, palette: Palette, centre: Point, *, radius: float | None = None) -> None:
    size = canvas.unit * (radius or canvas.chance.uniform(6, 11))
    canvas.glow(centre, size * 6, palette.light, 0.4)
    canvas.glow(centre, size * 2.2, palette.light, 0.6)
    canvas.disc(centre, size, [palette.light, mix(palette.light, palette.horizon, 0.4)])


def _birds(canvas: Canvas, palette: Palette) -> None:
    chance, unit = canvas.chance, canvas.unit
    flock = canvas.width * chance.uniform(0.15, 0.85), canvas.height * chance.uniform(0.12, 0.3)
    birds = []
    for _ in range(chance.randint(3, 6)):
        x, y = flock[0] + unit * chance.uniform(-9, 9), flock[1] + unit * chance.uniform(-4, 4)
        span = unit * chance.uniform(0.7, 1.4)
        birds.append(
            [
                (x - span, y - span * 0.45),
                (x - span * 0.4, y - span * 0.34),
                (x, y),
                (x + span * 0.4, y - span * 0.34),
                (x + span, y - span * 0.45),
                (x + span * 0.4, y - span * 0.14),
                (x, y + span * 0.2),
                (x - span * 0.4, y - span * 0.14),
            ]
        )
    canvas.shapes(birds, [mix(palette.dark, palette.sky[1], 0.2)], 0.8)


def _clouds(canvas: Canvas, palette: Palette, lowest: float) -> None:
    chance, unit = canvas.chance, canvas.unit
    for _ in range(chance.randint(4, 7)):
        x, y = canvas.width * chance.random(), lowest * chance.uniform(0.3, 0.92)
        streaks = []
        for _ in range(3):
            shift, long = unit * chance.uniform(-8, 8), unit * chance.uniform(7, 20)
            streaks.append(circle((x + shift, y + unit * chance.uniform(-0.8, 0.8)), long, squash=0.04))
        canvas.shapes(streaks, [mix(palette.light, palette.horizon, 0.5)], 0.3)


def _reflection(canvas: Canvas, palette: Palette, x: float, horizon: float) -> None:
    chance, unit = canvas.chance, canvas.unit
    bars, y, wide = [], horizon + unit * 0.6, 11.0
    while y < canvas.height:
        bars.append(
            circle((x + unit * chance.uniform(-1.6, 1.6), y), unit * wide * chance.uniform(0.4, 1), squash=0.035)
        )
        y += unit * chance.uniform(0.7, 1.5)
        wide = max(wide * 0.95, 3)
    canvas.shapes(bars, [palette.light, mix(palette.light, palette.horizon, 0.6)], 0.75)


def _boat(canvas: Canvas, palette: Palette, water: Point) -> None:
    x, y, unit = *water, canvas.unit
    hull = [(x - 3 * unit, y - unit), (x + 3 * unit, y - unit), (x + 2 * unit, y + unit), (x - 2.2 * unit, y + unit)]
    canvas.shapes([hull], [palette.dark])
    canvas.shapes(
        [[(x - 0.2 * unit, y - 9 * unit), (x - 0.2 * unit, y - 1.6 * unit), (x - 2.9 * unit, y - 1.6 * unit)]],
        [palette.light],
    )
    canvas.shapes(
        [[(x + 0.2 * unit, y - 8 * unit), (x + 0.2 * unit, y - 1.6 * unit), (x + 2.3 * unit, y - 1.6 * unit)]],
        [palette.accents[0]],
    )


def _box(corner: Point, wide: float, tall: float) -> Shape:
    x, y = corner
    return [(x, y), (x + wide, y), (x + wide, y + tall), (x, y + tall)]


def _motif(canvas: Canvas, corner: Point, side: float, ink: Colour, third: Colour) -> None:
    chance, (x, y) = canvas.chance, corner
    kind = chance.choice(("quarter", "arcs", "half", "dot", "stripes", "triangle", "petal", "dots"))
    start = chance.randrange(4)
    turn = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    pivot, middle = turn[start], (x + side / 2, y + side / 2)
    if kind == "quarter":
        canvas.shapes([_sector(pivot, side, start)], [ink])
    elif kind == "arcs":
        for ring in range(4):
            canvas.shapes([_sector(pivot, side * (1 - ring / 4), start)], [third if ring % 2 else ink])
    elif kind == "half":
        canvas.shapes([_sector(turn[start], side / 2, start), _sector(turn[start - 1], side / 2, start - 1)], [ink])
    elif kind == "dot":
        canvas.disc(middle, side * 0.36, [ink])
        canvas.disc(middle, side * 0.16, [third])
    elif kind == "stripes":
        bars = [index * side / 6 for index in range(0, 6, 2)]
        flat = [_box((x, y + bar), side, side / 6) for bar in bars]
        canvas.shapes(flat if start % 2 else [_box((x + bar, y), side / 6, side) for bar in bars], [ink])
    elif kind == "triangle":
        canvas.shapes([[turn[start], turn[start - 1], turn[start - 2]]], [ink])
    elif kind == "petal":
        canvas.shapes([_petal(turn[start], turn[start - 2], side)], [ink])
    else:
        step = side / 4
        dots = [(x + step * (0.5 + column), y + step * (0.5 + row)) for column in range(4) for row in range(4)]
        canvas.shapes([circle(dot, step * 0.26) for dot in dots], [ink])


def _sector(pivot: Point, radius: float, quarter: int) -> Shape:
    angles = [math.pi / 2 * (quarter + step / 24) for step in range(25)]
    return [pivot, *((pivot[0] + radius * math.cos(angle), pivot[1] + radius * math.sin(angle)) for angle in angles)]


def _petal(first: Point, last: Point, side: float) -> Shape:
    """The lens between two quarter circles around the cell's other corners."""
    outline = []
    for start, end in ((first, last), (last, first)):
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        centre = middle[0] + (start[1] - end[1]) / 2, middle[1] + (end[0] - start[0]) / 2
        begin = math.atan2(start[1] - centre[1], start[0] - centre[0])
        stop = math.atan2(end[1] - centre[1], end[0] - centre[0])
        sweep = (stop - begin + math.pi) % math.tau - math.pi
        outline += [
            (
                centre[0] + side * math.cos(begin + sweep * step / 24),
                centre[1] + side * math.sin(begin + sweep * step / 24),
            )
            for step in range(25)
        ]
    return outline


def _globe(canvas: Canvas, centre: Point, radius: float, colours: list[Colour], night: Colour) -> None:
    chance = canvas.chance
    stripes: list[Colour] = []
    for _ in range(12):
        stripes += [mix(along(colours, chance.random()), (255, 255, 255), chance.uniform(0, 0.22))] * 2
    canvas.disc(centre, radius, stripes)
    canvas.shadow(centre, radius, night)


@dataclass(frozen=True)
class _RingPlane:
    """The plane of a planet's rings, seen from a little above."""

    centre: Point
    radius: float
    tilt: float

    def half(self, reach: float, *, front: bool) -> list[Point]:
        """The near or the far half of the circle that reaches so many radii out."""
        angles = [math.pi * step / 64 * (1 if front else -1) for step in range(65)]
        flat = [(self.radius * reach * math.cos(a), self.radius * reach * 0.24 * math.sin(a)) for a in angles]
        cosine, sine = math.cos(self.tilt), math.sin(self.tilt)
        return [(self.centre[0] + x * cosine - y * sine, self.centre[1] + x * sine + y * cosine) for x, y in flat]


def _rings(canvas: Canvas, plane: _RingPlane, colours: list[Colour], *, front: bool) -> None:
    for ring in range(4):
        inner = plane.half(1.42 + 0.15 * ring, front=front)
        outer = plane.half(1.52 + 0.15 * ring, front=front)
        canvas.shapes([[*outer, *reversed(inner)]], [along(colours, ring / 3)], 0.85 if front else 0.6)


def _lee(canvas: Canvas, summit: Point, line: list[Point], length: float) -> Shape:
    """The hollow between a crest, right of its summit, and a curve that hangs below it."""
    crest = [point for point in line if summit[0] <= point[0] <= summit[0] + length * 0.5]
    end = crest[-1]
    low = summit[0] + length * 0.12, max(summit[1], end[1]) + canvas.unit * 9
    curve = []
    for step in range(25):
        share = step / 24
        weights = (1 - share) ** 2, 2 * share * (1 - share), share**2
        x, y = (sum(w * point[axis] for w, point in zip(weights, (end, low, summit), strict=True)) for axis in (0, 1))
        curve.append((x, y))
    return [*crest, *curve]


def _fir(chance: Random, foot: Point, tall: float) -> Shape:
    x, y = foot
    tiers, wide = chance.randint(6, 9), tall * chance.uniform(0.17, 0.24)
    left: list[Point] = []
    right: list[Point] = []
    for tier in range(1, tiers + 1):
        level, reach = y - tall * (1 - tier / tiers * 0.94), wide * (tier / tiers) ** 0.85
        left += [(x - reach * chance.uniform(0.85, 1.1), level), (x - reach * 0.5, level - tall * 0.012)]
        right += [(x + reach * chance.uniform(0.85, 1.1), level), (x + reach * 0.5, level - tall * 0.012)]
    trunk = tall * 0.02
    return [(x, y - tall), *right, (x + trunk, y), (x - trunk, y), *reversed(left)]


def _roof(canvas: Canvas, corner: Point, wide: float) -> list[Shape]:
    (x, y), chance, unit = corner, canvas.chance, canvas.unit
    kind = chance.choice(("flat", "flat", "step", "spire", "slant"))
    if kind == "step":
        return [_box((x + wide * 0.2, y - unit * 1.6), wide * 0.6, unit * 1.7)]
    if kind == "spire":
        mast = x + wide / 2
        return [
            [(mast - unit * 0.25, y), (mast, y - unit * 6), (mast + unit * 0.25, y)],
            _box((x + wide * 0.3, y - unit), wide * 0.4, unit * 1.1),
        ]
    if kind == "slant":
        return [[(x, y + 1), (x + wide, y - unit * 2.4), (x + wide, y + 1)]]
    return []


def _windows(canvas: Canvas, corner: Point, wide: float) -> list[Shape]:
    (left, top), chance, unit = corner, canvas.chance, canvas.unit
    across, down = max(int(wide / (unit * 1.15)), 2), int((canvas.height - top) / (unit * 1.7))
    step = wide / across
    lit = chance.uniform(0.18, 0.5)
    return [
        _box((left + step * (0.28 + column), top + unit * (1.2 + 1.7 * row)), step * 0.46, unit * 0.85)
        for column in range(across)
        for row in range(min(down, 30))
        if chance.random() < lit
    ]
