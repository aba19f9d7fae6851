"""What was exported, as a repository of the Hugging Face hub, by huggingface_hub with the token that it finds."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, and in no __all__

from fedlora.errors import ConfigError, ExportError

SAID = 200  # characters of what the hub says


def check_repository(option: str, name: str) -> None:
    """Raise `ConfigError` where the value of an option is no hub id of the form ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise ConfigError(f"{option} {name} is no name that the hub takes: {e}") from e
    if name.count("/") != 1:
        raise ConfigError(f"{option} {name}: write the name on the hub as ORG/NAME")


def push_lines(folder: Path, repository: str, *, public: bool) -> list[str]:
    """What a push would do, a line for the repository and one for each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [f"  {path.relative_to(folder)}, {path.stat().st_size:,} bytes" for path in files]
    return [f"{repository}: a {'public' if public else 'private'} model repository with {len(files)} files", *sizes]


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Make the repository where it is not there yet, put the files of `folder` into it, and return its address.

    A repository that is there stays as public or private as it is. Raises `ExportError` where the hub cannot be reached
    or refuses.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of fedlora")
    except (OSError, httpx.HTTPError, ValueError) as e:  # those of the hub and of the token are OSErrors
        said = " ".join(str(e).split())[:SAID]
        raise ExportError(
            f"{folder} was not pushed to {repository}: {said}; log in with hf auth login, or set HF_TOKEN, then: hf "
            f"upload {repository} {folder}"
        ) from e
    return str(made)
