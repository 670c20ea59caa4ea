"""The forms in which a delta can be written. No torch here, so that the command line knows them at once."""

from typing import Literal, get_args

Format = Literal["pipeline", "delta-bin", "compvis", "lora", "kohya"]
FORMATS: tuple[Format, ...] = get_args(Format)
