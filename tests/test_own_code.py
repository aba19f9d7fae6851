"""Code of a user's own goes by the path at which it is found again."""

from dataclasses import dataclass

import pytest

from fedlora.errors import ConfigError
from fedlora.own_code import check_path, find_own, is_path, path_of


@dataclass(frozen=True)
class Scaled:
    by: float

    def __call__(self, x: float) -> float:
        return self.by * x


def double(x: float) -> float:
    return 2 * x


triple = Scaled(3.0)


@pytest.mark.parametrize(("code", "name"), [(double, "double"), (Scaled, "Scaled"), (triple, "triple")])
def test_a_function_a_class_and_an_object_are_found_again(code: object, name: str) -> None:
    path = path_of("train.loss", code)
    assert path == f"{__name__}:{name}" and find_own("train.loss", path) is code


@pytest.mark.parametrize("code", [Scaled(4.0), lambda x: x, Scaled.__call__])
def test_what_stands_nowhere_at_the_top_is_refused(code: object) -> None:
    with pytest.raises(ConfigError, match="is not to be found at the top of"):
        path_of("train.loss", code)


@pytest.mark.parametrize(
    "text", ["", "f", "a.b", "a:b c", "a:b()", "a:b:c", ".a:b", "a/b:c", "a:b\n", "a:" + "b" * 200]
)
def test_what_is_no_path_is_told_apart(text: str) -> None:
    assert not is_path(text) and is_path("lab.losses:focal")


def test_who_names_a_file_is_told_how_it_is_written_and_where_to_run() -> None:
    with pytest.raises(ConfigError, match=r"write losses:focal, and run from the folder that losses\.py lies in"):
        check_path("train.loss", "lab/losses.py:focal")
