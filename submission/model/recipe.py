"""Model recipes: how a model is put together and sampled. One TOML each, those that come along in `recipes/`.

A recipe of one's own has the same form. All that it can hold:

    base = "OWNER/NAME"                # a hub id, or a folder: whose encoders, VAE and UNet are used
    revision = "0123abc"               # optional, of a hub id
    weights = "model.safetensors"      # optional, in place of the base's: one file with all of them, or a folder of
                                       # what differs, with folders such as unet/, tokenizer/, scheduler/
    licence = "MIT"                    # optional, for people
    resolution = 512                   # the canvas in pixels; default: the base's own

    [unet]                             # optional, in place of the base's UNet
    repository = "OWNER/NAME"          # optional: without it, file is a path
    revision = "0123abc"               # optional, of the repository
    file = "unet.safetensors"          # or a .bin of tensors alone
    sha256 = "..."                     # optional; another file is refused by fetch-weights, and a warning of the job

    [lora]                             # optional, fused into the UNet: keys as above, and
    weight = 1.0

    [sampling]                         # optional: what is not here is as the base's scheduler has it
    scheduler = "LCMScheduler"         # a class of diffusers
    settings = { timestep_spacing = "trailing" }
    prediction = "epsilon"             # or v_prediction, sample: what the UNet predicts
    steps = 1                          # or timesteps = [999, 499]
    most_steps = 4                     # up to how many steps more of them help; default: as many as above
    guidance = 2.0                     # up to 1: none; [1.0, 3.0]: drawn for each image
    negative = "blurry"                # what guidance leads away from
    eta = 1.0                          # how much of the noise a step of TCD or DDIM draws anew

    [sha256]                           # optional, of the base's files
    "unet/diffusion_pytorch_model.fp16.safetensors" = "..."

Relative paths begin at the recipe's folder.
"""

import stat
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from submission.errors import UsageError

RECIPES = Path(__file__).parent / "recipes"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# A recipe takes a kilobyte: anything this large is another kind of file.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A file of weights, in a hub repository or, where that is None, by its path. `weight` is how much of a LoRA is
    added."""

    file: str
    repository: str | None = None
    revision: str | None = None
    sha256: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn: by a scheduler class of diffusers (None: the checkpoint's own) with `settings` in place of
    its own, in so many steps or at `timesteps`.

    `guidance` is the range that each image's is drawn from; up to 1 is none. `negative` is the prompt that guidance
    leads away from; None is what the pipelines of diffusers take without one. `eta` goes to the scheduler's steps.
    """

    scheduler: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    timesteps: tuple[int, ...] = ()
    most_steps: int = 1
    guidance: tuple[float, float] = (0.0, 0.0)
    negative: str | None = None
    eta: float | None = None

    @property
    def count(self) -> int | None:
        """How many steps there are; None where that is not said."""
        return len(self.timesteps) or self.steps

    @property
    def guided(self) -> bool:
        return self.guidance[1] > 1

    def with_wishes(self, steps: int | None, guidance: tuple[float, float] | None) -> "Sampling":
        """The same with another number of steps, or other guidance, where these are wanted."""
        changed = replace(self, steps=steps, timesteps=()) if steps else self
        return replace(changed, guidance=guidance) if guidance else changed

    def __str__(self) -> str:
        """For people, as in "1 step" or "4 steps, guidance 1 to 3"."""
        steps = "1 step" if self.count == 1 else f"{self.count} steps"
        low, high = self.guidance
        if not self.guided:
            return steps
        return f"{steps}, guidance {low:g}" if low == high else f"{steps}, guidance {low:g} to {high:g}"


@dataclass(frozen=True)
class Recipe:
    """A model: `base` with `weights`, `unet` and `lora` in place of, or added to, its own. `sha256` has what digests of
    the base's files are known, by their paths."""

    name: str
    base: str
    revision: str | None
    weights: Path | None
    unet: Part | None
    lora: Part | None
    sampling: Sampling
    resolution: int | None
    licence: str | None
    sha256: Mapping[str, str]


def recipe_names() -> list[str]:
    """Names of the recipes that come along, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of that name, or the one in that `.toml` file. Raises UsageError."""
    path = RECIPES / f"{name_or_path}.toml" if name_or_path in recipe_names() else Path(name_or_path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise UsageError(f"{path}: not a file")
        if found.st_size > MOST_BYTES:
            raise UsageError(f"{path}: too large for a recipe")
        # Some editors put a byte order mark first, and TOML allows none.
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested without end
        raise UsageError(f"{path}: not a recipe in TOML ({error})") from error
    _check(table, _RECIPE, f"{path}:")
    unet = _part(table.get("unet"), _PART, f"{path}: [unet]", path.parent)
    lora = _part(table.get("lora"), _PART | _LORA, f"{path}: [lora]", path.parent)
    base, weights = table["base"], table.get("weights")
    return Recipe(
        name=path.stem,
        base=_base(base, path),
        revision=table.get("revision"),
        weights=path.parent / weights if weights else None,
        unet=unet,
        lora=lora,
        sampling=_sampling(table.get("sampling", {}), f"{path}: [sampling]"),
        resolution=table.get("resolution"),
        licence=table.get("licence"),
        sha256=table.get("sha256", {}),
    )


def guidance_range(value: Any) -> tuple[float, float] | None:
    """The range that a number or a list of two means; None where it is neither."""
    low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
    return (float(low), float(high)) if _is_number(low) and _is_number(high) and 0 <= low <= high else None


def _base(base: str, recipe: Path) -> str:
    """The path of a folder, or what else is meant to be a hub id."""
    try:
        return str(recipe.parent / base) if (recipe.parent / base).is_dir() else base
    except OSError as error:
        raise UsageError(f"{recipe}: base {base} cannot be looked into ({error.strerror})") from error


def _part(table: Mapping[str, Any] | None, rules: Mapping[str, "_Rule"], where: str, folder: Path) -> Part | None:
    if table is None:
        return None
    _check(table, rules, where)
    if "revision" in table and "repository" not in table:
        raise UsageError(f"{where} revision is of a repository, and none is named")
    return Part(**table) if "repository" in table else Part(**{**table, "file": str(folder / table["file"])})


def _sampling(table: Mapping[str, Any], where: str) -> Sampling:
    _check(table, _SAMPLING, where)
    if "steps" in table and "timesteps" in table:
        raise UsageError(f"{where} steps and timesteps contradict each other: leave one of them out")
    settings = dict(table.get("settings", {}))
    if "prediction" in table:
        settings["prediction_type"] = table["prediction"]
    timesteps = tuple(table.get("timesteps", ()))
    return Sampling(
        scheduler=table.get("scheduler"),
        settings=settings,
        steps=table.get("steps"),
        timesteps=timesteps,
        most_steps=table.get("most_steps", len(timesteps) or table.get("steps", 1)),
        guidance=guidance_range(table.get("guidance", 0.0)) or (0.0, 0.0),
        negative=table.get("negative"),
        eta=table.get("eta"),
    )


def _check(table: Mapping[str, Any], rules: Mapping[str, "_Rule"], where: str) -> None:
    """Refuses keys that there are not, and values that make no sense."""
    for key in table:
        if key not in rules:
            raise UsageError(f"{where} unknown key {key!r}; there are {', '.join(rules)}")
    for key, (required, holds, words) in rules.items():
        if key not in table and required:
            raise UsageError(f"{where} {key} is missing")
        if key in table and not holds(table[key]):
            raise UsageError(f"{where} {key} must be {words}, not {table[key]!r}")


_Rule = tuple[bool, Callable[[Any], bool], str]


def _is_number(value: object) -> bool:
    # TOML has NaN and infinities, and whole numbers without end.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_setting(value: object) -> bool:
    """What JSON has as well: the manifest tells of it."""
    if isinstance(value, list):
        return all(map(_is_setting, value))
    return isinstance(value, str | bool) or _is_number(value)


def _falls(value: Any) -> bool:
    whole = isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value)
    return whole and bool(value) and sorted(set(value), reverse=True) == value


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


_TEXT: _Rule = (False, _is_text, "text of one line, not empty")
_TABLE: _Rule = (False, lambda value: isinstance(value, dict), "a table")
_COUNT: _Rule = (False, _is_count, "a whole number, 1 or more")
_DIGEST: _Rule = (False, _is_digest, "64 hexadecimal digits in lower case")
_RECIPE: dict[str, _Rule] = {
    "base": (True, _is_text, "a hub id or a folder"),
    "revision": _TEXT,
    "weights": _TEXT,
    "licence": _TEXT,
    "resolution": _COUNT,
    "unet": _TABLE,
    "lora": _TABLE,
    "sampling": _TABLE,
    "sha256": (False, lambda v: isinstance(v, dict) and all(map(_is_digest, v.values())), "a table of digests"),
}
_PART: dict[str, _Rule] = {
    "file": (True, _is_text, "text of one line, not empty"),
    "repository": _TEXT,
    "revision": _TEXT,
    "sha256": _DIGEST,
}
_LORA: dict[str, _Rule] = {"weight": (False, _is_number, "a number")}
_SAMPLING: dict[str, _Rule] = {
    "scheduler": _TEXT,
    "settings": (
        False,
        lambda value: isinstance(value, dict) and all(map(_is_setting, value.values())),
        "a table of text, numbers, true and false",
    ),
    "prediction": (False, lambda value: value in PREDICTIONS, f"one of {', '.join(PREDICTIONS)}"),
    "steps": _COUNT,
    "timesteps": (False, _falls, "a list of falling whole numbers"),
    "most_steps": _COUNT,
    "guidance": (False, lambda v: guidance_range(v) is not None, "a number, 0 or more, or a list of two, low and high"),
    "negative": (False, lambda value: isinstance(value, str), "text"),
    "eta": (False, lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
}
