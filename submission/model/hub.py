"""Files of the hub's repositories: from its cache, or fetched, into that cache or a folder."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten

from submission.errors import CheckpointError
from submission.model.checkpoint import WEIGHTS
from submission.model.recipe import Part

# What is fetched beside weights: of a repository, and of each component.
TEXTS = ("model_index.json", "training.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*")
CONFIGS = ("config.json", "*.index*.json")
# Endings of weights, whole or in shards, those in half precision first. Others in a repository, such as `.non_ema`, are
# not used.
ENDINGS = ((".fp16.safetensors", ".fp16-*.safetensors"), (".safetensors", "-*.safetensors"))


def fetch(
    hub_id: str,
    components: Collection[str],
    *,
    without: Collection[str] = (),
    revision: str | None = None,
    folder: Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Brings the files of a repository in diffusers' layout into `folder`, or into the hub's cache, and returns the
    folder they are in: each component's weights in half precision, or in full where there are no others; and no weights
    of the components in `without`.

    With `local_files_only` they have to be there already. Raises CheckpointError.
    """
    found, missing = Path(), [component for component in components if component not in without]
    for endings in ENDINGS:
        patterns = [*TEXTS, *(f"{component}/{name}" for component in components for name in CONFIGS)]
        patterns += [pattern for component in missing for pattern in _weights(component, endings)]
        with _hub(hub_id):
            from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, and only needed here

            found = Path(
                snapshot_download(
                    hub_id,
                    revision=revision,
                    local_dir=folder,
                    allow_patterns=patterns,
                    local_files_only=local_files_only,
                )
            )
        missing = [one for one in missing if not any(list(found.glob(name)) for name in _weights(one, endings))]
        if not missing:
            break
    return found


def fetch_part(part: Part, *, folder: Path | None = None, local_files_only: bool = False) -> Path:
    """Brings one file of a repository, as `fetch` does. Raises CheckpointError."""
    assert part.repository is not None
    with _hub(part.repository):
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  # slow to import, and only needed here

        return Path(
            hf_hub_download(
                part.repository,
                part.file,
                revision=part.revision,
                local_dir=folder,
                local_files_only=local_files_only,
            )
        )


def wanted(sizes: Mapping[str, int], components: Collection[str], without: Collection[str]) -> dict[str, int]:
    """Of a repository's files with their sizes, the weights that `fetch` takes."""
    taken: dict[str, int] = {}
    for component in set(components) - set(without):
        for endings in ENDINGS:
            names = [name for name in sizes for pattern in _weights(component, endings) if fnmatch(name, pattern)]
            if names:
                taken |= {name: sizes[name] for name in names}
                break
    return taken


def _weights(component: str, endings: Sequence[str]) -> list[str]:
    return [f"{component}/{WEIGHTS[component]}{ending}" for ending in endings]


def file_sizes(hub_id: str, revision: str | None) -> dict[str, int]:
    """Bytes of each file of a repository. Raises CheckpointError."""
    with _hub(hub_id):
        from huggingface_hub import HfApi  # noqa: PLC0415  # slow to import, and only needed here

        there = HfApi().model_info(hub_id, revision=revision, files_metadata=True).siblings or []
        return {one.rfilename: one.size or 0 for one in there}


@contextmanager
def _hub(hub_id: str) -> Iterator[None]:
    """Turns whatever goes wrong into one line: errors of the hub, of the network and of proxies have many classes."""
    try:
        from huggingface_hub.utils import logging  # noqa: PLC0415

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would tell of every try
        yield
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor to be had from the hub ({reason}); what has come of it is kept for "
            "another try"
        ) from error
