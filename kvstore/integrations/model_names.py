"""What a model is called: the key by which engines tell models apart, its folder, and its name for people."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.utils import hf_repo_to_path

# That of mlx_lm.server: (model path or Hugging Face id, adapter path, draft model path).
ModelKey = tuple[str | None, str | None, str | None]


def model_folder(path_or_repo: str) -> Path | None:
    """The local folder of a path or Hugging Face id; None when there is none (yet). Never downloads."""
    try:
        if (folder := Path(path_or_repo)).exists():
            return folder
        return Path(hf_repo_to_path(path_or_repo))
    except (OSError, ValueError):  # not to be looked at; not downloaded, or downloaded in part; not an id
        return None


def alias_of(path_or_repo: str) -> str:
    """What people call a model: its folder's name, or its Hugging Face id. What is not Unicode becomes "?"."""
    try:
        name = path.resolve().name if (path := Path(path_or_repo)).exists() else path_or_repo
    except (OSError, ValueError):  # not a name that a file can have
        name = path_or_repo
    return name.encode(errors="replace").decode()


def names_files(key: object) -> bool:
    """Whether a model key says where the model's files are: (path or id, adapter or None, draft model or None).

    Engines use anything that can be hashed to tell models apart. Of another shape it says nothing of the weights.
    """
    if not isinstance(key, tuple) or len(key) != 3:
        return False
    model, *others = key
    return isinstance(model, str) and all(part is None or isinstance(part, str) for part in others)


def paths_of(key: ModelKey) -> tuple[str, ...]:
    """The paths or ids in a key; empty for a key that names no files."""
    return tuple(path for path in key if path) if names_files(key) else ()


def name_of(key: ModelKey) -> str:
    """What people call the model of a key, for messages."""
    return alias_of(key[0] or "") if names_files(key) else repr(key)
