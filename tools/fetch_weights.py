"""A recipe's files, fetched where they are not there yet and held to their published SHA-256.

    ./run.sh fetch-weights sdxl-turbo

The image is built with it, before the rest of the code is there: it needs nothing but the command line and what finds
checkpoints in `submission/model/`.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from submission.arguments import Parser, exit_code_of
from submission.errors import CheckpointError, OutputError, UsageError
from submission.model.checkpoint import Checkpoint, inspect_recipe, published_digests, weight_digests
from submission.model.choice import COMPONENTS, SDXL_TURBO, in_folder, models_folder, without
from submission.model.hub import fetch, fetch_part, file_sizes, wanted
from submission.model.recipe import Recipe, load_recipe, recipe_names

# What the files' digests are written to, in the form of sha256sum.
SUMS = "SHA256SUMS"


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh fetch-weights",
        description="Leaves a recipe's files in a folder, models/NAME if none is named: fetches those that are "
        "missing, and checks weights by SHA-256, as published or, where that is not known, as its file "
        f"{SUMS} has kept them.",
        epilog="example:\n  ./run.sh fetch-weights sd-turbo\n  ./run.sh cifar100 --model sd-turbo\n\n"
        "exit codes: 0 all there; 2 usage; 4 they are not to be had, or others than the published ones; "
        "5 cannot be written",
    )
    names = ", ".join(recipe_names())
    parser.add_argument("recipe", metavar="NAME", help=f"a recipe ({names}) or the path of its .toml")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="new, or with some or all of the files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    named = options.recipe in recipe_names() or options.recipe.endswith(".toml")
    folder = "/" in options.recipe or Path(options.recipe).is_dir()
    misspelt = not folder and get_close_matches(options.recipe, recipe_names())
    if not named and options.folder is None and not misspelt:  # as it was before there were recipes: the folder alone
        options.recipe, options.folder = SDXL_TURBO, Path(options.recipe)
    return exit_code_of(lambda: fetch_weights(options.recipe, options.folder), file_error=OutputError)


def fetch_weights(name: str, folder: Path | None) -> None:
    """Completes the folder; asks the hub only where a file is missing or cut short.

    Raises UsageError, CheckpointError, OSError.
    """
    if name not in (known := recipe_names()) and not name.endswith(".toml"):
        raise UsageError(
            f"no recipe is called {name!r}: there are {', '.join(known)}, or give the path of a .toml file; "
            f"./{name} is a folder for SDXL-Turbo"
        )
    recipe = load_recipe(name)
    folder = folder or models_folder(recipe)
    try:
        found = inspect_recipe(in_folder(recipe, folder), "fetch-weights")
    except UsageError:
        raise
    except CheckpointError as error:
        print(f"{error}; fetching what is missing of {recipe.name}", flush=True)
        found = _complete(recipe, folder)
    _check(weight_digests(found), folder, published_digests(found))


def _complete(recipe: Recipe, folder: Path) -> Checkpoint:
    parts = [part for part in (recipe.unet, recipe.lora) if part and part.repository]
    there = Path(recipe.base).is_dir()
    size = sum(file_sizes(str(part.repository), part.revision).get(part.file, 0) for part in parts)
    if not there:
        size += sum(wanted(file_sizes(recipe.base, recipe.revision), COMPONENTS, without(recipe)).values())
    print(f"{size / 1e9:.1f} GB of weights into {folder}; licence: {recipe.licence or 'not known'}", flush=True)
    if not there:
        fetch(recipe.base, COMPONENTS, without=without(recipe), revision=recipe.revision, folder=folder)
    for part in parts:
        fetch_part(part, folder=folder)
    return inspect_recipe(in_folder(recipe, folder), "fetch-weights")


def _check(digests: Mapping[str, str], folder: Path, published: Mapping[str, str]) -> None:
    """Holds weights to what is published of them, or was written down before, and writes down what is new."""
    sums = folder / SUMS
    kept = _read_sums(sums)
    for name, digest in digests.items():
        if name in published and digest != published[name]:
            raise CheckpointError(
                f"{folder / name} is not the file as published (SHA-256 {digest}): remove it, try again"
            )
        if name not in published and digest != kept.get(name, digest):
            raise CheckpointError(
                f"{folder / name} is another file than when it was fetched (SHA-256 {digest}): remove it, try again"
            )
        print(f"{folder / name}: {'as published' if name in published else f'SHA-256 {digest}'}", flush=True)
    if new := {name: digest for name, digest in digests.items() if name not in published | kept.keys()}:
        folder.mkdir(parents=True, exist_ok=True)  # all may lie elsewhere
        sums.write_text("".join(f"{digest}  {name}\n" for name, digest in (kept | new).items()), "utf-8")


def _read_sums(file: Path) -> dict[str, str]:
    """Digests by files, as sha256sum writes them, too: with an asterisk for files that it has read as binary."""
    try:
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is damaged ({error}): remove it, and what is there is written down") from error
    kept = {}
    for number, line in enumerate(lines, 1):
        if not (match := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)):
            raise CheckpointError(f"{file}:{number}: no digest of a file: remove it, and what is there is written down")
        kept[match[2]] = match[1]
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
