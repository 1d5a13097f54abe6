"""Reads pictures of the world from their pixels alone, and tells true texts about them from false.

It shares no line with the package: it has colours, shapes and letters of its own, written as a
person would see them, and every sentence form that may occur. A text of another form is an error.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {"red": 0, "yellow": 48, "green": 132, "cyan": 184, "blue": 227, "pink": 310}  # hue
SHAPES = {
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "ring": "..####.. .######. ###..### ##....## ##....## ###..### .######. ..####..",
    "cross": "#......# ##....## .##..##. ..####.. ..####.. .##..##. ##....## #......#",
    "ladder": "##....## ##....## ######## ##....## ##....## ######## ##....## ##....##",
    "comb": "######## ######## ##.##.## ##.##.## ##.##.## ##.##.## ##.##.## ##.##.##",
}
SIGNS = {
    "L": "#.. #.. #.. #.. ###",
    "T": "### .#. .#. .#. .#.",
    "X": "#.# #.# .#. #.# #.#",
    "GO": "###.### #...#.# #.#.#.# #.#.#.# ###.###",
    "HI": "#.#.### #.#..#. ###..#. #.#..#. #.#.###",
    "UP": "#.#.### #.#.#.# #.#.### #.#.#.. ###.#..",
}
NUMBERS = [str(word) for word in "zero one two three four five six seven eight nine".split()]
NUMBERS += ["ten", "eleven", "twelve"]
CELLS = ["top-left", "top-right", "bottom-left", "bottom-right"]
PLURALS = {"crosses": "cross"}


@dataclass(frozen=True)
class Seen:
    shape: str
    colour: str
    size: str
    text: str
    box: tuple[int, int, int, int]  # left, top, right, bottom; faint edges may be missing

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}".strip()

    @property
    def full(self) -> str:
        return f"a sign that says {self.text}" if self.text else f"a {self.size} {self.name}"


@dataclass(frozen=True)
class Reading:
    at: dict[str, Seen]  # by cell, in reading order
    background: str
    style: str

    @property
    def things(self) -> list[Seen]:
        return list(self.at.values())

    @property
    def shapes(self) -> list[Seen]:
        return [thing for thing in self.things if not thing.text]

    def cell_of(self, name: str) -> str:
        [cell] = [cell for cell, thing in self.at.items() if thing.name == name]
        return cell

    def called(self, name: str) -> Seen:
        return self.at[self.cell_of(name)]


def read(picture: Image.Image) -> Reading:
    pixel_HW3 = np.asarray(picture.convert("RGB"), np.float64)
    size = len(pixel_HW3)
    shades = {"dark": (38, 38, 44), "light": (232, 229, 222)}
    distance = {name: np.abs(pixel_HW3 - shade).max(-1) for name, shade in shades.items()}
    near = {name: int((values < 20).sum()) for name, values in distance.items()}
    background = max(near, key=lambda name: near[name])
    covered_HW = distance[background] > 36
    half = size // 2
    at, fading = {}, []
    for cell in CELLS:
        top, left = half * cell.startswith("bottom"), half * cell.endswith("right")
        part_HW = covered_HW[top : top + half, left : left + half]
        if part_HW.sum() < 4:
            continue
        rows, columns = np.flatnonzero(part_HW.any(1)), np.flatnonzero(part_HW.any(0))
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        crop_HW3 = pixel_HW3[box[1] : box[3], box[0] : box[2]]
        mask_HW = covered_HW[box[1] : box[3], box[0] : box[2]]
        at[cell] = seen = _look(crop_HW3, mask_HW, box, size)
        if not seen.text:
            fading.append(_fading(crop_HW3))
    return Reading(at, background, "shaded" if np.mean(fading) > 1.15 else "flat")


def _look(crop_HW3, mask_HW, box, size) -> Seen:
    saturation_HW = crop_HW3.max(-1) - crop_HW3.min(-1)
    if np.median(saturation_HW[mask_HW]) < 40:
        return Seen("sign", "", "big", _letters(crop_HW3.mean(-1)), box)
    strong_HW = mask_HW & (saturation_HW > 0.6 * np.percentile(saturation_HW[mask_HW], 90))
    hue = _hue(np.median(crop_HW3[strong_HW], axis=0))
    colour = min(
        COLOURS, key=lambda name: min(abs(hue - COLOURS[name]), 360 - abs(hue - COLOURS[name]))
    )
    # The share of the colour that a pixel holds, from its saturation.
    share_HW = (saturation_HW / np.median(saturation_HW[strong_HW])).clip(0, 1)
    shape = _nearest(share_HW, SHAPES)
    width = max(box[2] - box[0], box[3] - box[1]) / size
    return Seen(shape, colour, "big" if width > 0.32 else "small", "", box)


def _hue(rgb) -> float:
    red, green, blue = rgb
    return float(np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360)


def _letters(grey_HW) -> str:
    inside_HW = grey_HW[3:-3, 3:-3]
    ink_HW = ((200 - inside_HW) / 150).clip(0, 1)
    rows, columns = np.flatnonzero(ink_HW.max(1) > 0.4), np.flatnonzero(ink_HW.max(0) > 0.4)
    ink_HW = ink_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink_HW.shape
    wide = width > height
    return _nearest(ink_HW, {t: rows for t, rows in SIGNS.items() if (len(t) == 2) == wide})


def _nearest(share_HW, patterns: dict[str, str]) -> str:
    def error(pattern: str) -> float:
        dots = np.array([[255 * (dot == "#") for dot in row] for row in pattern.split()], np.uint8)
        size = (share_HW.shape[1], share_HW.shape[0])
        wanted_HW = np.asarray(Image.fromarray(dots).resize(size, Image.Resampling.BOX)) / 255
        return float(np.abs(wanted_HW - share_HW).mean())

    return min(patterns, key=lambda name: error(patterns[name]))


def _fading(crop_HW3) -> float:
    """How much more colour the upper part of an object has than its lower part."""
    # The most of each row: a pixel that is covered in full.
    saturation_H = (crop_HW3.max(-1) - crop_HW3.min(-1)).max(-1)
    height = len(saturation_H)
    return float(saturation_H[round(0.25 * height)] / saturation_H[round(0.8 * height)])


NAME = r"sign|\w+ \w+"
FULL = r"a sign that says \w+|a \w+ \w+ \w+"
CELL = r"(?:top|bottom)-(?:left|right)"


def parts(text: str) -> list[str]:
    """x, y and z → x; y; z"""
    return re.split(r", | and ", text)


def counted(text: str) -> tuple[int, str]:
    """two crosses → 2, cross"""
    number, noun = text.split(" ", 1)
    if number not in ("one", "a"):
        noun = PLURALS.get(noun, noun.removesuffix("s"))
    return (1 if number == "a" else NUMBERS.index(number)), noun


def says_true(text: str, seen: Reading) -> bool:
    """Whether a caption, or a sentence of a description, holds. Each form is read in full."""
    names = [f"a {thing.name}" for thing in seen.things]
    if match := re.fullmatch(r"(\w+ objects?) on a (\w+) background(?:: (.*))?", text):
        number, background, listed = match.groups()
        right = counted(number) == (len(names), "object") and background == seen.background
        return right and (listed is None or sorted(parts(listed)) == sorted(names))
    if match := re.fullmatch(r"(\w+ colours?) on a (\w+) background: (.*)", text):
        colours = {thing.colour for thing in seen.shapes}
        listed = parts(match[3])
        return (
            counted(match[1]) == (len(colours), "colour")
            and match[2] == seen.background
            and sorted(listed) == sorted(colours)
        )
    if match := re.fullmatch(r"a (\w+) drawing of (.*)", text):
        groups = Counter({noun: number for number, noun in map(counted, parts(match[2]))})
        return match[1] == seen.style and groups == Counter(t.shape for t in seen.things)
    if match := re.fullmatch(r"a picture with (.*)", text):
        groups = {
            noun.removesuffix(" thing"): number for number, noun in map(counted, parts(match[1]))
        }
        return groups == Counter("sign" if t.text else t.size for t in seen.things)
    if match := re.fullmatch(rf"there is ({FULL}) at the ({CELL}), and (.*)", text):
        rest = len(names) - 1
        more = f"{NUMBERS[rest]} more object{'s' * (rest > 1)}" if rest else "nothing more"
        return seen.at[match[2]].full == match[1] and match[3] == more
    if match := re.fullmatch(rf"nothing at the ({CELL}), but (a (?:{NAME})) at the ({CELL})", text):
        return match[1] not in seen.at and f"a {seen.at[match[3]].name}" == match[2]
    if match := re.fullmatch(
        rf"a ({NAME}) (to the left of|to the right of|above|below) a ({NAME})", text
    ):
        one, other = (seen.called(match[group]).box for group in (1, 3))
        x, y = other[0] + other[2] - one[0] - one[2], other[1] + other[3] - one[1] - one[3]
        side = ("to the left of" if x > 0 else "to the right of") if abs(x) > abs(y) else None
        return match[2] == (side or ("above" if y > 0 else "below"))
    if match := re.fullmatch(rf"at the ({CELL}) is ({FULL})", text):
        return seen.at[match[1]].full == match[2]
    if match := re.fullmatch(r"(.*) (is|are) empty", text):
        empty = {f"the {cell}" for cell in CELLS if cell not in seen.at}
        listed = parts(match[1])
        return set(listed) == empty and match[2] == ("is" if len(listed) == 1 else "are")
    if match := re.fullmatch(r"the drawing is (\w+)", text):
        return match[1] == seen.style
    if re.fullmatch(rf"(?:(?:{FULL}) at the {CELL}(?:, | and |$))+", text):
        return sorted(parts(text)) == sorted(f"{t.full} at the {c}" for c, t in seen.at.items())
    raise AssertionError(f"no known form: {text!r}")


def describes_all(text: str, seen: Reading) -> bool:
    """Whether a description in detail is true, and leaves nothing out."""
    sentences = text.removesuffix(".").split(". ")
    sentences[0] = re.sub(
        r"^there (is one|are \w+) ", lambda m: m[1].split()[1] + " ", sentences[0]
    )
    true = all(says_true(sentence, seen) for sentence in sentences)
    gap = any(sentence.endswith("empty") for sentence in sentences)
    places = sum(sentence.startswith("at the") for sentence in sentences)
    return true and places == len(seen.at) and gap == (places < 4) and "drawing" in sentences[-1]


def answer(question: str, seen: Reading) -> str:
    """The one answer to a closed question, or to a request to describe an object."""

    def only(things: list[Seen]) -> Seen:
        [thing] = things
        return thing

    if match := re.fullmatch(r"what colour is the (\w+)\?", question):
        return only([thing for thing in seen.shapes if thing.shape == match[1]]).colour
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return only([thing for thing in seen.shapes if thing.colour == match[1]]).shape
    if match := re.fullmatch(rf"what is at the ({CELL})\?", question):
        return f"a {seen.at[match[1]].name}" if match[1] in seen.at else "nothing"
    if match := re.fullmatch(rf"where is the ({NAME})\?", question):
        return seen.cell_of(match[1])
    if question == "how many objects are there?":
        return NUMBERS[len(seen.at)]
    if question == "what does the sign say?":
        return only([thing for thing in seen.things if thing.text]).text
    if match := re.fullmatch(rf"is the ({NAME}) small or big\?", question):
        return seen.called(match[1]).size
    if match := re.fullmatch(rf"is there a ({NAME})\?", question):
        return "yes" if match[1] in [thing.name for thing in seen.things] else "no"
    if match := re.fullmatch(rf"which is (.*), the ({NAME}) or the ({NAME})\?", question):
        left, top, right, bottom = range(4)
        key = {
            "bigger": lambda box: box[left] - box[right],
            "further left": lambda box: box[left] + box[right],
            "higher": lambda box: box[top] + box[bottom],
        }[match[1]]
        one, other = (key(seen.called(match[group]).box) for group in (2, 3))
        assert abs(one - other) >= 4, "too close to tell"
        return f"the {match[2] if one < other else match[3]}"
    if match := re.fullmatch(rf"describe the object at the ({CELL})\.", question):
        return seen.at[match[1]].full
    if match := re.fullmatch(rf"describe the ({NAME})\.", question):
        return f"{seen.called(match[1]).full} at the {seen.cell_of(match[1])}"
    raise AssertionError(f"no known form: {question!r}")
