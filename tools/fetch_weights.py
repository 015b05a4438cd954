"""SDXL-Turbo's files, fp16 variant, fetched where they are not there yet and held to their published SHA-256.

    ./run.sh fetch-weights models/sdxl-turbo

The image is built with it, before the rest of the code is there: it needs nothing but
`submission/model/checkpoint.py` and the command line.
"""

from collections.abc import Sequence
from pathlib import Path

from submission.arguments import Parser, exit_code_of
from submission.errors import CheckpointError
from submission.model.checkpoint import (
    SDXL_TURBO,
    SDXL_TURBO_REVISION,
    SDXL_TURBO_SHA256,
    fetch,
    inspect,
    weight_digests,
)


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh fetch-weights",
        description=f"Leaves the files of {SDXL_TURBO} in a folder (fp16 variant, 7 GB): fetches those that are "
        f"missing, at revision {SDXL_TURBO_REVISION[:7]}, and checks the weights by SHA-256.",
        epilog="example:\n  ./run.sh fetch-weights models/sdxl-turbo\n\n"
        "exit codes: 0 all there; 2 usage; 4 they are not to be had, or others than the published ones",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="new, or with some or all of the files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: fetch_weights(options.folder))


def fetch_weights(folder: Path) -> None:
    """Completes `folder`; asks the hub only where a file is missing or cut short. Raises CheckpointError."""
    try:
        found = inspect(folder, "fetch-weights")
    except CheckpointError as error:
        print(f"{error}; fetching what is missing of {SDXL_TURBO}", flush=True)
        found = inspect(fetch(SDXL_TURBO, revision=SDXL_TURBO_REVISION, folder=folder), "fetch-weights")
    for name, digest in weight_digests(found).items():
        if digest != SDXL_TURBO_SHA256.get(name):
            raise CheckpointError(
                f"{folder / name} is not SDXL-Turbo's fp16 file as published (SHA-256 {digest}): remove it, try again"
            )
        print(f"{folder / name}: as published", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
