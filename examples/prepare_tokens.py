"""Text to tokens for training and evaluation: NAME-train.npy and NAME-held-out.npy, split by file.

    python examples/prepare_tokens.py --package python3.11-doc --name python-docs --out data   # Debian or Ubuntu
    python examples/prepare_tokens.py --text FOLDER --name mine --out data
    python examples/prepare_tokens.py --name topics --out data      # Python's own reference: on every machine

One file in ten (``--one-in``) is held out, chosen by its name; of files with the same text only the first counts. So no
text is on both sides, however often this runs. A package is downloaded with apt and unpacked, never installed; texts
stay under their own licences and are not shipped. Files ending in .txt, .rst and .md are read, .gz unpacked
(python3.11-doc, linux-doc-6.1, jargon-text, ...).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_flash_mc.megacontext.evaluate import SUFFIXES
from hf_flash_mc.megacontext.training import save_tokens

SHORTEST = 200  # characters of a file that counts


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    folder = options.model
    if folder is None:
        from smollm2 import smollm2_folder

        folder = str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        if options.package:
            texts = distinct(read_folder(unpack(options.package, Path(scratch))))
        else:
            texts = distinct(read_folder(Path(options.text)) if options.text else sorted(topics.items()))
    out, sides = Path(options.out), {}
    for side in ("train", "held-out"):
        sides[side] = [name for name in sorted(texts) if held_out(name, options.one_in) == (side == "held-out")]
    if not all(sides.values()):
        counts = " and ".join(f"{len(names)} ({side})" for side, names in sides.items())
        raise SystemExit(
            f"expected files of at least {SHORTEST} characters on both sides, got {counts}; give more text, or another "
            "--one-in"
        )
    for side, names in sides.items():
        path = out / f"{options.name}-{side}.npy"
        count = save_tokens(path, (encode(tokenizer, texts[name]) for name in names))
        print(f"{path}: {count} tokens of {len(names)} files")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--package", help="a Debian package of text")
    source.add_argument("--text", help="a folder of text")
    parser.add_argument("--name", required=True, help="what the files are called")
    parser.add_argument("--out", default="data")
    parser.add_argument("--one-in", type=int, default=10, help="hold out one file in so many (default 10)")
    parser.add_argument("--model", help="whose tokenizer (default: SmolLM2-135M)")
    options = parser.parse_args(arguments)
    if options.one_in < 2:
        parser.error(f"--one-in: expected at least 2, got {options.one_in}")
    if options.text and not Path(options.text).is_dir():
        parser.error(f"--text: expected a folder, got {options.text}")
    return options


def distinct(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Texts by name, each text once: packages ship some of their files twice, under two names."""
    names: dict[bytes, str] = {}
    kept = {}
    for name, text in texts:
        if names.setdefault(hashlib.sha256(text.encode()).digest(), name) == name:
            kept[name] = text
    return kept


def held_out(name: str, one_in: int) -> bool:
    """Whether a file is held out: by its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0


def unpack(package: str, scratch: Path) -> Path:
    """Download a package and unpack its files."""
    if subprocess.call(["apt-get", "download", "--quiet", package], cwd=scratch, stdout=subprocess.DEVNULL):
        raise SystemExit(f"--package: apt-get found no {package} (above is why); name another, or give --text FOLDER")
    (archive,) = scratch.glob("*.deb")
    subprocess.check_call(["dpkg-deb", "--extract", str(archive), str(scratch / "files")])
    return scratch / "files"


def read_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Name (within the folder) and text of every text file."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        name = path.name.removesuffix(".gz")
        if not name.endswith(SUFFIXES):
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode(errors="replace")
        if len(text) >= SHORTEST:
            yield str(path.relative_to(folder)), text


def encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


if __name__ == "__main__":
    main()
