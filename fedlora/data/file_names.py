"""What the names of files say of them, where each file is taken for a client's."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

TRAINING = {"train", "training"}
TESTS = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
PART = re.compile(r"(.*?)[-_.]?\d+-of-\d+")  # as datasets names the parts of what it saves: train-00000-of-00002


def odd_names(files: Sequence[str]) -> Iterator[str]:
    """Yield a sentence where the files, of which each is to be a client, seem to be parts of one dataset."""
    names = [Path(file).name for file in files]
    parts = [PART.fullmatch(name.partition(".")[0]) for name in names]
    words = [(part[1] if part else name.partition(".")[0]).lower() for name, part in zip(names, parts, strict=True)]
    by_word = dict(zip(words, names, strict=True))
    training, tests = by_word.keys() & TRAINING, by_word.keys() & TESTS
    if training and tests and by_word.keys() == training | tests:
        yield (
            f"{by_word[min(training)]} and {by_word[min(tests)]} seem to be what to train on and what to test on, and "
            "each is a client here: if so, give the one as --data and the other as --eval-data"
        )
    elif all(parts) and len(by_word) == 1:
        yield (
            f"{names[0]} and {names[-1]} seem to be parts of one dataset, and each is a client here: if so, "
            "--partition iid pools them and deals them to --clients"
        )
