"""Files of the Hugging Face hub."""

import os
from pathlib import Path

from calib_guidance.backend.shipped import find_file
from calib_guidance.errors import CheckpointError

PREFIX = "hf://"
_FORM = "expected hf://OWNER/REPO/PATH, with @REVISION after it if need be"
_ELSEWHERE = "download it elsewhere and name the local file"
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".json")


def fetch(path: str | os.PathLike[str]) -> Path:
    """Where a file or folder lies on this machine; what ``hf://OWNER/REPO/PATH@REVISION`` names is downloaded once.

    Of a folder, or a complete repository (no PATH), the ``.json`` and ``.safetensors`` files are fetched, and nothing else.
    """
    if not str(path).startswith(PREFIX):
        return find_file(path)
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    name, _, revision = str(path).removeprefix(PREFIX).partition("@")
    words = name.strip("/").split("/")
    if len(words) < 2 or "" in words or ".." in words:
        raise CheckpointError(f"{path}: {_FORM}")
    repo, inside = "/".join(words[:2]), "/".join(words[2:])
    try:
        is_index = inside.endswith(".index.json")
        if is_index:  # alone first: there may be none, and the parts of others are not wanted
            hf_hub_download(repo, inside, revision=revision or None)
        if is_index or Path(inside).suffix not in FILES:
            folder = inside.rpartition("/")[0] if is_index else inside
            patterns = [f"{folder}/*{end}" if folder else f"*{end}" for end in (".json", ".safetensors")]
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns)) / inside
        return Path(hf_hub_download(repo, inside, revision=revision or None))
    except Exception as error:  # a broken connection is another class in each version of the hub's HTTP library
        causes = {
            errors.HFValidationError: f"{_FORM} ({error})",
            errors.GatedRepoError: f"accept its terms at https://huggingface.co/{repo} and log in with `hf auth login`",
            errors.RevisionNotFoundError: f"{repo} has no revision {revision!r}",
            errors.RepositoryNotFoundError: f"no repository {repo}, or a private one: check the name, or run `hf auth login`",
            errors.LocalEntryNotFoundError: f"the hub cannot be reached and the file was not fetched before: {_ELSEWHERE}",
            errors.EntryNotFoundError: f"{repo} has no file {inside}",
            Exception: f"could not be fetched from the hub ({type(error).__name__}: {error}): {_ELSEWHERE}",
        }
        cause = next(message for kind, message in causes.items() if isinstance(error, kind))
        raise CheckpointError(f"{path}: {cause}") from error
