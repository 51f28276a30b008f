"""Text for the training examples: documents packed into rows, and the rows of each step."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

HELD_OUT = 10  # every tenth document is for evaluation
SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_documents(folder: Path | None, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the documents to train on and of those held out: the text files of a folder, or Python's reference.

    Raises:
        ValueError: where there are fewer than two.
    """
    if folder is None:
        texts = [topics[name] for name in sorted(topics)]
    else:
        files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        texts = [p.read_text(errors="replace") for p in files]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        found = f"{len(texts)} with text" if folder is None or folder.is_dir() else "no folder"
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"--data: expected a folder with at least two {kinds} files, got {folder}: {found}")
    documents = [ids + end for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
    if len(documents) < HELD_OUT:
        return documents[:-1], documents[-1:]
    return [d for i, d in enumerate(documents, 1) if i % HELD_OUT], documents[HELD_OUT - 1 :: HELD_OUT]


def pack(documents: list[list[int]], length: int, part: str = "text") -> dict[str, Tensor]:
    """Rows ``input_ids, position_ids, labels: [N, length]`` of one document after another, without the last tokens.

    ``part``: what an error calls the documents.

    Position ids start anew with each document and each row, which is what keeps documents apart. The label of a token
    is the next token of its document, or -100.

    Raises:
        ValueError: where the documents do not fill a row.
    """
    ids = torch.tensor([token for d in documents for token in d])
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"--length {length}: the {part} has {len(ids)} tokens ({len(documents)} documents), which fill no row; "
            "give more text or shorter rows"
        )
    place = torch.cat([torch.arange(len(d)) for d in documents])
    labels = torch.cat([ids[1:], ids.new_tensor([-100])])
    labels[:-1][place[1:] == 0] = -100
    ids, place, labels = (x[: count * length].view(count, length) for x in (ids, place, labels))
    return {"input_ids": ids, "position_ids": place.minimum(torch.arange(length)), "labels": labels}


def rows_of_step(step: int, size: int, rows: int, seed: int) -> Tensor:
    """Numbers of the ``size`` rows of a step, by the arguments alone; every pass over the rows has its own order."""
    places = torch.arange(step * size, (step + 1) * size)
    passes = places // rows
    orders = {
        n: torch.randperm(rows, generator=torch.Generator().manual_seed(seed + n)) for n in passes.unique().tolist()
    }
    return torch.stack([orders[n][place % rows] for n, place in zip(passes.tolist(), places, strict=True)])
