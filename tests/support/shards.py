"""Small data sets in tar archives."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.support.sample_data import photograph

NAMES = ["finch", "wren"]
SAMPLES = [(number, number % 2) for number in range(8)]  # image and label


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    """Return one of several small images as the content of a file."""
    stream = io.BytesIO()
    photograph().crop((9 * number, 0, 9 * number + 40, 30)).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named contents as an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_webdataset(folder: Path) -> Path:
    """Write ``SAMPLES`` as two shards of three for training and one of two for validation."""

    def sample(number: int, label: int) -> list[tuple[str, bytes]]:
        text = [(f"a/{number}.cls", str(label).encode()), (f"a/{number}.json", json.dumps({"label": label}).encode())]
        return [(f"a/{number}.png", image_bytes(number)), text[number % 2], (f"a/{number}.txt", b"a caption")]

    for shard, part in enumerate(("train-000000", "train-000001", "validation-0")):
        rows = SAMPLES[3 * shard : 3 * shard + 3] if shard < 2 else SAMPLES[6:]
        write_tar(folder / f"{part}.tar", [file for number, label in rows for file in sample(number, label)])
    (folder / "names.txt").write_text("finch\nwren\n")
    return folder
