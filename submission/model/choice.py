"""Which model: what `--model` names to a checkpoint whose files are all here."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from submission.errors import CheckpointError, UsageError
from submission.model.checkpoint import EMBEDDED, LAYOUTS, Checkpoint, inspect_recipe, plain
from submission.model.hub import fetch, fetch_part
from submission.model.recipe import Part, Recipe, Sampling, load_recipe, recipe_names

PROJECT = Path(__file__).resolve().parents[2]
SDXL_TURBO = "sdxl-turbo"
# Of the layout that has most of them.
COMPONENTS = LAYOUTS["StableDiffusionXLPipeline"]


@dataclass(frozen=True)
class ModelRequest:
    """A model by what `--model` takes, and what is wanted otherwise than its recipe says: a number of steps, and the
    range that guidance is drawn from."""

    name: str = "auto"
    steps: int | None = None
    guidance: tuple[float, float] | None = None


def choose(
    model: ModelRequest, *, cuda: bool, environment: Mapping[str, str] = os.environ, root: Path = PROJECT
) -> Checkpoint:
    """Finds and checks the checkpoint that is asked for: `auto`, `embedded`, a recipe's name or its .toml, a folder, or
    a hub id.

    `auto` takes the `BANKO_MODEL` of `environment`, else `root`/models/sdxl-turbo, else with `cuda` SDXL-Turbo from the
    hub (its cache first), else the embedded one: a machine with a GPU never submits the stand-in by accident. Raises
    CheckpointError, and UsageError for a recipe that makes no sense.
    """
    if model.name != "auto":
        return _named(model, f"--model {model.name}", root)
    if chosen := environment.get("BANKO_MODEL"):
        return _named(replace(model, name=chosen), f"BANKO_MODEL={chosen}", root)
    recipe = _as_wished(load_recipe(SDXL_TURBO), model)
    if os.path.lexists(root / "models" / SDXL_TURBO):
        return inspect_recipe(localise(recipe, root), f"models/{SDXL_TURBO}")
    if not cuda:
        source = "embedded (no CUDA device, no SDXL-Turbo in models/sdxl-turbo)"
        return inspect_recipe(_as_wished(plain(EMBEDDED, Sampling()), model), source)
    try:
        return _whole(recipe, f"hub {recipe.base}", root)
    except CheckpointError as error:
        raise CheckpointError(
            f"no SDXL-Turbo weights: {error}; put them into models/sdxl-turbo, set BANKO_MODEL, "
            "or ask for the stand-in with --model embedded"
        ) from error


def localise(recipe: Recipe, root: Path = PROJECT, *, local_files_only: bool = False) -> Recipe:
    """The same recipe with all files here: in the project's `models/NAME`, where its base or a part says, in the hub's
    cache, or fetched, unless `local_files_only`. Raises CheckpointError."""
    own = models_folder(recipe, root) if of_the_hub(recipe) else None
    if own and os.path.lexists(own):
        if not own.is_dir():
            raise CheckpointError(f"{own} is no folder, or a link that leads nowhere: put the checkpoint there")
        return in_folder(recipe, own)
    base = Path(recipe.base)
    if not base.is_dir():
        base = fetch(
            recipe.base,
            COMPONENTS,
            without=without(recipe),
            revision=recipe.revision,
            local_files_only=local_files_only,
        )

    return _put(recipe, base, partial(fetch_part, local_files_only=local_files_only))


def of_the_hub(recipe: Recipe) -> bool:
    """Whether some of its files are in the hub's repositories, wherever they may be here."""
    return not Path(recipe.base).is_dir() or any(part and part.repository for part in (recipe.unet, recipe.lora))


def models_folder(recipe: Recipe, root: Path = PROJECT) -> Path:
    """`models/NAME`, where `fetch-weights` leaves a recipe's files. Raises UsageError where it is another recipe's."""
    if recipe.name in recipe_names():
        files = [(one.base, one.revision, one.unet, one.lora) for one in (recipe, load_recipe(recipe.name))]
        if files[0] != files[1]:
            raise UsageError(
                f"{recipe.name}.toml: models/{recipe.name} is for the recipe of that name that comes along: rename it"
            )
    return root / "models" / recipe.name


def without(recipe: Recipe) -> Sequence[str]:
    """The components whose weights in the base the recipe does not use."""
    if recipe.weights and recipe.weights.is_file():
        return COMPONENTS
    replaced = [component for component in COMPONENTS if recipe.weights and (recipe.weights / component).is_dir()]
    return [*replaced, "unet"] if recipe.unet else replaced


def in_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with its base in a folder, and its parts beside the base's components, as `fetch-weights` leaves
    them."""
    base = Path(recipe.base)
    return _put(recipe, base if base.is_dir() else folder, lambda part: folder / part.file)


def recognise(sha256: Mapping[str, str]) -> str | None:
    """The hub's name of the checkpoint whose weight files have these digests (`weight_digests`), if one is known."""
    recipes = map(load_recipe, recipe_names())
    return next((recipe.base for recipe in recipes if recipe.sha256 and recipe.sha256 == sha256), None)


def _put(recipe: Recipe, base: Path, place: Callable[[Part], Path]) -> Recipe:
    """The same recipe with its base there, and where `place` says what it has of the hub's repositories."""

    def here(part: Part | None) -> Part | None:
        return replace(part, file=str(place(part)), repository=None) if part and part.repository else part

    return replace(recipe, base=str(base), unet=here(recipe.unet), lora=here(recipe.lora))


def _named(model: ModelRequest, source: str, root: Path) -> Checkpoint:
    if model.name == "embedded":
        return inspect_recipe(_as_wished(plain(EMBEDDED, Sampling()), model), source)
    if model.name in recipe_names() or model.name.endswith(".toml"):
        return _whole(_as_wished(load_recipe(model.name), model), source, root)
    path = Path(model.name)
    try:
        model.name.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source!r} is not UTF-8, and not for libraries to read: rename it") from error
    try:
        there, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"{source}: {path} cannot be looked into ({error.strerror})") from error
    if there:
        path = EMBEDDED if path.resolve() == EMBEDDED else path  # which the job knows more of, however it is named
        return inspect_recipe(_as_wished(plain(path, Sampling()), model), source)
    if file:
        raise CheckpointError(
            f"{source}: one file lacks what a checkpoint needs beside weights: write a recipe of two lines, "
            f'base = "OWNER/NAME" and weights = "{path.name}"'
        )
    if model.name.count("/") != 1 or model.name.startswith((".", "/", "~")):
        known = ", ".join(recipe_names())
        raise CheckpointError(
            f"{source}: there is no folder {model.name}, no recipe of that name ({known}), and a hub id has the form "
            "OWNER/NAME"
        )
    return _whole(_as_wished(plain(path, Sampling()), model), source, root)


def _whole(recipe: Recipe, source: str, root: Path) -> Checkpoint:
    """A recipe's checkpoint: of files that are here, if they are whole, else fetched."""
    try:
        return inspect_recipe(localise(recipe, root, local_files_only=True), source)
    except UsageError:
        raise
    except CheckpointError:
        return inspect_recipe(localise(recipe, root), source)


def _as_wished(recipe: Recipe, model: ModelRequest) -> Recipe:
    return replace(recipe, sampling=recipe.sampling.with_wishes(model.steps, model.guidance))
