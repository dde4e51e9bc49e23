"""Pictures in larger files: WebDataset tars, and datasets that `save_to_disk` wrote."""

import functools
import tarfile
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Bytes in a larger file, or a row of a dataset on disk."""
    file: str
    start: int              # byte, or row
    n_bytes: int            # 0: a row


class Entry(NamedTuple):
    path: Path              # of the larger file, then the name there
    class_name: str
    place: Place


def find_in_tars(tars: list[Path], endings: set[str]) -> list[Entry]:
    """All pictures of uncompressed tars. A picture's class is the number or word in the .cls file
    of the same key, or else the folder that it lies in."""
    entries = []
    for tar in tars:
        entries += find_in_tar(tar, endings)
    if not entries:
        raise SystemExit(f"{tars[0].parent} holds {len(tars)} tars without pictures")
    return entries


def find_in_tar(path: Path, endings: set[str]) -> list[Entry]:
    entries = []
    class_names = {}            # key -> the text of its .cls file
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []            # or it keeps them all
                if not member.isfile():
                    continue
                key, ending = split_name(member.name)
                if ending == ".cls":
                    class_names[key] = tar.extractfile(member).read(100).decode().strip()
                elif ending in endings:
                    name = Path(member.name)
                    place = Place(str(path), member.offset_data, member.size)
                    entries.append(Entry(path / name, name.parent.name, place))
    except (OSError, tarfile.TarError, UnicodeError) as error:
        raise SystemExit(f"{path} cannot be read as an uncompressed tar: {error}") from None
    return [with_class(entry, path, class_names) for entry in entries]


def split_name(name: str) -> tuple[str, str]:
    """-> what WebDataset calls the key, up to the first dot of the file's name; the last ending"""
    path = Path(name)
    return str(path.parent / path.name.split(".")[0]), path.suffix.lower()


def with_class(entry: Entry, tar: Path, class_names: dict[str, str]) -> Entry:
    key, _ = split_name(str(entry.path.relative_to(tar)))
    return entry._replace(class_name=class_names.get(key, entry.class_name))


def is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def find_in_dataset(folder: Path) -> list[Entry]:
    """The rows of a dataset's column of images, with the names of its column of labels."""
    rows = open_dataset(str(folder))
    import datasets

    labels = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) > 1:
        raise SystemExit(f"{folder} has several columns of labels: {', '.join(labels)}")
    class_names = [""] * len(rows)
    if labels:
        names = rows.features[labels[0]].names
        class_names = [names[i] if i >= 0 else "" for i in rows[labels[0]]]
    entries = []
    for row, class_name in enumerate(class_names):
        place = Place(str(folder), row, 0)
        entries.append(Entry(folder / f"{row}.image", class_name, place))
    return entries


@functools.cache
def open_dataset(folder: str):
    """The rows of a dataset on disk, or of its split "train"; its images stay files or bytes."""
    try:
        import datasets
    except ImportError:
        raise SystemExit(f"{folder} is a dataset of the library datasets: "
                         "pip install datasets") from None
    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:      # it raises many kinds
        raise SystemExit(f"{folder} cannot be read as a dataset: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise SystemExit(f"{folder} has no split train, only {', '.join(found)}")
        found = found["train"]
    column = image_column(folder, found.features)
    return found.cast_column(column, datasets.Image(decode=False))


def image_column(folder: str, features) -> str:
    import datasets

    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise SystemExit(f"{folder} has {len(columns)} columns of images, not one")
    return columns[0]


def row_bytes(place: Place) -> bytes:
    """The file that a row of a dataset holds or names."""
    rows = open_dataset(place.file)
    value = rows[place.start][image_column(place.file, rows.features)]
    return value["bytes"] or Path(value["path"]).read_bytes()
