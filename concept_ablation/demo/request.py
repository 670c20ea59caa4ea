"""What a reader asks for, and the pictures that answer it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from concept_ablation.common.errors import UserError, show
from concept_ablation.demo.catalogue import Catalogue, Choice

if TYPE_CHECKING:
    from PIL.Image import Image

    from concept_ablation.demo.studio import Studio

Several = Literal["each", "added", "both"]
"""Of several choices: a picture of each, one of all changes added up, or both."""
LONGEST = 1000  # characters of a prompt; a text encoder reads 77 tokens
SEEDS = 2**53  # seeds are below it: a browser's numbers are exact up to here
STRONGEST = 3.0


class RequestError(UserError):
    """What was asked for can't be drawn; the message says what is allowed."""


@dataclass(frozen=True)
class Request:
    """A prompt, a seed, the names of choices, how several are shown, and the strength of their changes (1: as trained)."""

    prompt: str
    seed: int
    names: tuple[str, ...] = ()
    strength: float = 1.0
    several: Several = "both"


@dataclass(frozen=True)
class Picture:
    """A picture of an answer: its title, the strength of each delta by path, and the image, None until it is drawn."""

    title: str
    changes: Mapping[str, float]
    image: Image | None = None


def check(request: Request, catalogue: Catalogue) -> None:
    """Raises RequestError if a value is out of its range, a name is unknown, or the choices' samplers differ."""
    if not request.prompt.strip():
        raise RequestError("the prompt is empty: say what to draw")
    if len(request.prompt) > LONGEST:
        raise RequestError(f"the prompt has {len(request.prompt)} characters (allowed: {LONGEST})")
    if not isinstance(request.seed, int) or not 0 <= request.seed < SEEDS:
        raise RequestError(f"seed {show(request.seed)}: a whole number from 0 to {SEEDS - 1} is allowed")
    if not isinstance(request.strength, int | float) or not 0 <= request.strength <= STRONGEST:
        raise RequestError(f"strength {show(request.strength)}: 0 to {STRONGEST:g} is allowed")
    if request.several not in get_args(Several):
        raise RequestError(f"{show(request.several)} is unknown (allowed: {', '.join(get_args(Several))})")
    for name in request.names:
        if name not in catalogue.choices:
            raise RequestError(f"{show(name)} is no finished row or bundle of this table")
    sampler_of(request, catalogue)


def _chosen(request: Request, catalogue: Catalogue) -> list[Choice]:
    return [catalogue.choices[name] for name in dict.fromkeys(request.names)]


def sampler_of(request: Request, catalogue: Catalogue) -> Mapping[str, object]:
    """The sampler of the choices' pictures in the report; without a choice, that of the first of all.

    Raises RequestError where they differ, since one picture of the base model stands beside all.
    """
    first, *others = _chosen(request, catalogue) or list(catalogue.choices.values())[:1]
    for other in others:
        if differing := [name for name, value in first.sampler.items() if other.sampler.get(name) != value]:
            told = ", ".join(
                f"{name} {first.sampler[name]} and {other.sampler.get(name)}" for name in differing
            )
            raise RequestError(
                f"{show(first.name)} and {show(other.name)} are judged with different samplers ({told}): choose one of them"
            )
    return first.sampler


def pictures_of(request: Request, catalogue: Catalogue) -> list[Picture]:
    """The pictures that `request` asks for, yet to be drawn: the base model's first. Raises RequestError."""
    check(request, catalogue)
    choices = _chosen(request, catalogue)
    pictures = [Picture("base model", {})]
    if len(choices) < 2 or request.several != "added":
        pictures += [Picture(choice.title, {choice.delta: request.strength}) for choice in choices]
    if len(choices) > 1 and request.several != "each":
        names = " + ".join(choice.short for choice in choices) + ", added up"
        pictures.append(Picture(names, {choice.delta: request.strength for choice in choices}))
    return pictures


def answer(request: Request, catalogue: Catalogue, studio: Studio) -> Iterator[list[Picture]]:
    """All pictures of `request`, first undrawn, then again after each that was drawn. Raises RequestError, DeltaError."""
    pictures = pictures_of(request, catalogue)
    sampler = sampler_of(request, catalogue)
    yield list(pictures)
    for place, picture in enumerate(pictures):
        image = studio.draw(request.prompt, request.seed, sampler, picture.changes)
        pictures[place] = replace(picture, image=image)
        yield list(pictures)
