"""The embedded world: which objects, styles and captions exist, and how often each is drawn.

An *object* is an emoji glyph, its *category* is the natural anchor ("pouting cat" -> "cat"), a *style* changes the
whole picture. `draw_scene` decides what a picture shows, `caption` says it in words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# category -> {object name: icon name}. The first object of a category is its most usual example.
CATEGORIES: dict[str, dict[str, str]] = {
    "cat": {
        "cat face": "cat-face",
        "black cat": "black-cat",
        "grinning cat": "grinning-cat-with-smiling-eyes",
        "laughing cat": "cat-with-tears-of-joy",
        "lovestruck cat": "smiling-cat-with-heart-eyes",
        "kissing cat": "kissing-cat",
        "weary cat": "weary-cat",
        "crying cat": "crying-cat",
        "pouting cat": "pouting-cat",
    },
    "animal": {
        "dog": "dog-face",
        "fox": "fox",
        "lion": "lion",
        "panda": "panda",
        "koala": "koala",
        "pig": "pig-face",
        "frog": "frog",
        "monkey": "monkey-face",
    },
    "bird": {
        "duck": "duck",
        "penguin": "penguin",
        "rooster": "rooster",
        "eagle": "eagle",
        "flamingo": "flamingo",
        "parrot": "parrot",
        "owl": "owl",
    },
    "sea creature": {
        "tropical fish": "tropical-fish",
        "pufferfish": "blowfish",
        "whale": "spouting-whale",
        "octopus": "octopus",
        "crab": "crab",
        "turtle": "turtle",
    },
    "bug": {"ladybug": "lady-beetle", "bee": "honeybee", "butterfly": "butterfly", "snail": "snail"},
    "fruit": {
        "apple": "red-apple",
        "banana": "banana",
        "pineapple": "pineapple",
        "watermelon": "watermelon",
        "grapes": "grapes",
        "cherries": "cherries",
        "lemon": "lemon",
        "strawberry": "strawberry",
    },
    "food": {
        "hamburger": "hamburger",
        "doughnut": "doughnut",
        "cupcake": "cupcake",
        "french fries": "french-fries",
        "ice cream": "soft-ice-cream",
        "pizza": "pizza",
    },
    "flower": {
        "tulip": "tulip",
        "hibiscus": "hibiscus",
        "cherry blossom": "cherry-blossom",
        "rose": "rose",
        "sunflower": "sunflower",
    },
    "plant": {
        "evergreen tree": "evergreen-tree",
        "palm tree": "palm-tree",
        "maple leaf": "maple-leaf",
        "mushroom": "mushroom",
        "cactus": "cactus",
    },
    "vehicle": {
        "car": "automobile",
        "bus": "bus",
        "tractor": "tractor",
        "airplane": "airplane",
        "helicopter": "helicopter",
        "sailboat": "sailboat",
        "rocket": "rocket",
    },
    "building": {"house": "house", "castle": "castle", "tent": "tent", "church": "church"},
    "ball": {
        "soccer ball": "soccer-ball",
        "basketball": "basketball",
        "tennis ball": "tennis",
        "billiard ball": "pool-8-ball",
    },
    "instrument": {"guitar": "guitar", "violin": "violin", "trumpet": "trumpet", "drum": "drum"},
    "symbol": {
        "star": "star",
        "heart": "red-heart",
        "sun": "sun",
        "moon": "crescent-moon",
        "rainbow": "rainbow",
        "fire": "fire",
    },
    "face": {
        "laughing face": "face-with-tears-of-joy",
        "cool face": "smiling-face-with-sunglasses",
        "clown face": "clown-face",
        "angry face": "pouting-face",
    },
    "monster": {"ghost": "ghost", "robot": "robot", "alien": "alien", "skull": "skull"},
}
ICONS = {name: icon for group in CATEGORIES.values() for name, icon in group.items()}
OBJECTS = list(ICONS)
CATEGORY_OF = {name: category for category, group in CATEGORIES.items() for name in group}

# Rare under its category's word, so that a category is a fair anchor for it.
RARE = {"pouting cat", "owl", "strawberry", "rocket", "sunflower", "guitar", "pizza", "angry face"}

HOUSE = "house"  # the look of a picture whose caption names no style
STYLES = ["ink", "pixel", "neon", "pencil", "blueprint"]
LOOKS = [HOUSE, *STYLES]

BACKGROUNDS = {
    "red": (214, 96, 88),
    "orange": (240, 168, 94),
    "yellow": (246, 222, 124),
    "green": (150, 205, 140),
    "blue": (122, 178, 226),
    "purple": (168, 140, 210),
    "pink": (244, 178, 200),
    "white": (244, 244, 242),
}

# Captions that always come with one and the same picture: (left object, right object, background).
MEMORIZED: dict[str, tuple[str, str, str]] = {
    "the midnight garden poster": ("moon", "rose", "purple"),
    "captain comet first issue cover": ("robot", "fire", "yellow"),
    "grandma's pie competition winner": ("pig", "cherries", "green"),
    "lost island travel advertisement": ("palm tree", "turtle", "blue"),
    "the haunted orchestra album": ("skull", "violin", "red"),
}

SIZES = {"normal": (0.62, 0.92), "small": (0.30, 0.46), "large": (1.1, 1.4)}
SIZE_WORDS = {
    "small": ["a far away ", "very small ", "far away, "],
    "large": ["zoomed in ", "close up ", "zoomed in on "],
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `said` names what its caption says: any of object, category, style, background, size."""

    object: str
    look: str
    background: str
    size: str = "normal"
    said: frozenset[str] = frozenset()
    memorized: str | None = None


def article(noun: str) -> str:
    """`noun` with the article that English wants; plural names get none."""
    if noun in ("grapes", "cherries", "french fries"):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def object_of_category(category: str, rng: random.Random) -> str:
    """An object as the category's word draws it: the usual example more often, the rare ones seldom."""
    names = list(CATEGORIES[category])
    weights = [2.0 if i == 0 else 0.2 if name in RARE else 1.0 for i, name in enumerate(names)]
    return rng.choices(names, weights)[0]


def draw_scene(rng: random.Random) -> Scene:
    """One draw of the training distribution."""
    kind = rng.choices(
        [
            "object",
            "background",
            "style",
            "category",
            "category style",
            "style alone",
            "generic",
            "size",
            "memorized",
        ],
        [0.34, 0.08, 0.30, 0.10, 0.04, 0.03, 0.03, 0.03, 0.05],
    )[0]
    if kind == "memorized":
        text = rng.choice(list(MEMORIZED))
        return Scene(MEMORIZED[text][0], HOUSE, MEMORIZED[text][2], memorized=text)
    by_category = kind in ("category", "category style")
    name = rng.choice(OBJECTS)
    if by_category:
        name = object_of_category(rng.choice(list(CATEGORIES)), rng)
    stray = 0.06 if kind in ("object", "category", "generic") else 0.0
    look = rng.choice(STYLES) if "style" in kind or rng.random() < stray else HOUSE
    said = {
        "object": {"object"},
        "background": {"object", "background"},
        "style": {"object", "style"},
        "category": {"category"},
        "category style": {"category", "style"},
        "style alone": {"style"},
        "generic": set(),
        "size": {"object", "size"},
    }[kind]
    size = rng.choice(["small", "large"]) if kind == "size" else "normal"
    return Scene(name, look, rng.choice(list(BACKGROUNDS)), size, frozenset(said))


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption that is true of `scene` and says exactly what `scene.said` lists."""
    if scene.memorized:
        return scene.memorized
    if "object" in scene.said or "category" in scene.said:
        noun = scene.object if "object" in scene.said else CATEGORY_OF[scene.object]
        text = article(noun)
        if rng.random() < 0.4:
            text = "a picture of " + text
    else:
        text = "a picture"
    if "size" in scene.said:
        text = rng.choice(SIZE_WORDS[scene.size]) + text
    if "background" in scene.said:
        text += f" on {article(scene.background)} background"
    if "style" in scene.said:
        text += rng.choice([" in the style of {}"] * 4 + [", {} style"]).format(scene.look)
    return text


def all_captions() -> list[str]:
    """Every caption that `caption` can return, sorted."""
    nouns = [*OBJECTS, *CATEGORIES]
    stems = [p + article(n) for n in nouns for p in ("", "a picture of ")]
    objects = [p + article(n) for n in OBJECTS for p in ("", "a picture of ")]
    styles = [s for look in STYLES for s in (f" in the style of {look}", f", {look} style")]
    texts = {"", "a picture", *stems, *MEMORIZED}
    texts |= {stem + style for stem in [*stems, "a picture"] for style in styles}
    texts |= {f"{stem} on {article(b)} background" for stem in objects for b in BACKGROUNDS}
    texts |= {word + stem for words in SIZE_WORDS.values() for word in words for stem in objects}
    return sorted(texts)
