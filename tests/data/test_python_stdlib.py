"""The standard library as data: what is trained on, what is shared among clients, and what is held out."""

from collections import Counter
from collections.abc import Iterable

import pytest

from fedlora.data import python_stdlib
from fedlora.data.python_stdlib import Document, clients, heldout, packages, pretraining


def text_by_path(documents: Iterable[Document]) -> dict[str, str]:
    """Join the pieces of each file in the order in which they come."""
    joined: dict[str, str] = {}
    for document in documents:
        joined[document.path] = joined.get(document.path, "") + document.text
    return joined


def test_no_federated_file_was_in_pretraining() -> None:
    federated = {path for paths in packages().values() for path in paths}
    assert federated and pretraining()
    assert federated.isdisjoint(pretraining())


def test_no_test_code_or_generated_table_is_taken() -> None:
    parts = {part for document in [*heldout(), *clients(1)[0]] for part in document.path.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "site-packages"})


@pytest.mark.parametrize("n", [1, 7, 50])
def test_every_client_gets_about_the_same_amount_of_text(n: int) -> None:
    sizes = [sum(len(document.text) for document in share) for share in clients(n)]
    assert len(sizes) == n
    assert max(sizes) - min(sizes) < 1000


def test_the_clients_and_the_heldout_set_hold_every_file_exactly_once() -> None:
    shared = text_by_path(document for share in clients(50) for document in share)
    held = text_by_path(heldout())
    assert shared.keys().isdisjoint(held)
    written = {document.path for share in clients(1) for document in share} | held.keys()
    assert shared.keys() | held.keys() == written
    sources = {path for paths in packages().values() for path in paths}
    assert Counter((shared | held).values()) == Counter(path.read_text(encoding="utf-8") for path in sources)


def test_a_client_has_neighbouring_packages_and_not_a_mixture() -> None:
    seen = [document.package for share in clients(50) for document in share]
    assert seen == sorted(seen)


def test_every_package_of_three_files_is_in_the_heldout_set() -> None:
    assert {name for name, paths in packages().items() if len(paths) >= 3} == {doc.package for doc in heldout()}


def test_the_heldout_set_is_a_small_part_of_the_text() -> None:
    held = sum(len(document.text) for document in heldout())
    shared = sum(len(document.text) for document in clients(1)[0])
    assert 0.04 < held / (held + shared) < 0.16


def test_two_calls_give_the_same_partition() -> None:
    assert clients(7) == clients(7)
    assert heldout() == heldout()


def test_as_many_clients_as_the_text_supplies_each_have_text() -> None:
    most = sum(len(document.text) for document in clients(1)[0]) // python_stdlib.SMALLEST_SHARE
    assert all(sum(len(document.text) for document in share) > 3000 for share in clients(most))
    with pytest.raises(ValueError, match=f"1 to {most} clients, .* among {most + 1}"):
        clients(most + 1)


def test_no_clients_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="among 0"):
        clients(0)
