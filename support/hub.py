"""Folders on the Hugging Face hub: hf://OWNER/NAME in place of a run's folder."""

import re
from pathlib import Path
from types import ModuleType

from formats import meta_file
from support import exports
from support.runtime import first_line

PREFIX = "hf://"
FOLDER = Path("out/hub")    # where downloads go, as OWNER/NAME


def client() -> ModuleType:
    """The hub's own client, which only these functions need."""
    try:
        import huggingface_hub
    except ImportError:
        raise SystemExit(
            "the Hugging Face hub needs its client: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def check_name(name: str) -> str:
    """OWNER/NAME, which also names a folder here."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise SystemExit(f"{name} is not OWNER/NAME, as models on the Hugging Face hub are named")
    return name


def local_folder(run: str | Path) -> Path:
    """A run's folder; hf://OWNER/NAME is downloaded to out/hub/OWNER/NAME first."""
    if not str(run).startswith(PREFIX):
        return Path(run)
    name = check_name(str(run).removeprefix(PREFIX))
    folder = FOLDER / name
    download(name, folder, [exports.CONFIG, exports.WEIGHTS])
    if kept := kept_names(folder):
        download(name, folder, kept)
    return folder


def download(name: str, folder: Path, files: list[str]) -> None:
    """These files alone: what is sampled into the folder stays as it is."""
    snapshot_download = client().snapshot_download
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=files)
    except Exception as error:                          # the client raises a dozen kinds
        line = first_line(error)
        raise SystemExit(f"{PREFIX}{name} cannot be downloaded: {line}") from None


def kept_names(folder: Path) -> list[str]:
    """Files of decoder and tokenizer by a config.json that is not checked yet."""
    try:
        meta = exports.read_values(folder).get("meta")
    except ValueError:                                  # which load_run says
        return []
    if not isinstance(meta, dict) or meta_file.kept_error(meta):
        return []
    return [meta[key]["file"] for key in meta_file.KEPT if key in meta]


def refuse_decoder(folder: Path, path: Path | None) -> None:
    """A stranger's decoder is code, which runs only where it is named."""
    if path and folder.resolve().is_relative_to(FOLDER.resolve()):
        raise SystemExit(
            f"{path} is code from the hub, which is not run unasked: if you trust it, add "
            f"--decoder {path}"
        )


def upload(folder: Path, name: str, files: list[str]) -> str:
    """These files of a folder, to a model of that name, made if it is new.  -> its address"""
    api = client().HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Export"
        )
    except Exception as error:                          # the client raises a dozen kinds
        raise SystemExit(f"{name} cannot be uploaded: {first_line(error)}") from None
    return str(address)
