"""Scores of generated texts: what counts as a match, in numbers worked by hand, and against a slow or a public one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.text_scores import extractor, longest_common_subsequence, rouge_l, score, token_f1, tokens

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("It costs $1,200.50.", "1200.5"),
        ("so 10-3 is 7, and 7-12=-5", "-5"),
        ("10-3", "3"),
        ("between 1,2345", "2345"),
        ("about .50", "0.5"),
        ("100", "100"),
        ("a debt of -$20.00", "-20"),
        ("1e3 grams", "1000"),
        ("none", ""),
        ("-0", "0"),
    ],
)
def test_the_last_number_is_compared_as_a_number(text: str, number: str) -> None:
    assert extractor("number")(text) == number


def test_a_text_matches_without_regard_to_case_and_blanks_and_a_dosage_keeps_its_point() -> None:
    whole = extractor("text")
    assert whole(" Yes,  the\nliver. ") == whole("yes, the liver")
    assert whole("1.5 mg") != whole("15 mg")


def test_a_pattern_takes_its_first_group_of_the_last_match() -> None:
    choice = extractor(r"regex:answer is \(?([A-E])")
    assert choice("The answer is A. No: the answer is (C).") == choice("answer is C") == "c"
    assert score("I cannot tell", "The answer is C", choice).exact_match == 0
    assert score("I cannot tell", "nor can I", choice).exact_match == 0  # nothing equals nothing, and is no match


@pytest.mark.parametrize("name", ["nummer", "regex:("])
def test_an_extractor_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.extract"):
        extractor(name)


def test_token_f1_and_rouge_l_are_those_worked_by_hand() -> None:
    generated, expected = "the dose is 5 mg daily", "a daily dose: 5 mg"
    assert token_f1(generated, expected) == pytest.approx(2 * 4 / (5 + 4))
    assert rouge_l(generated, expected) == pytest.approx(2 * 3 / (6 + 5))  # dose 5 mg
    assert token_f1("", "") == rouge_l("", "") == 1 and token_f1("", "x") == rouge_l("x", "") == 0


def test_letters_of_every_script_count() -> None:
    assert rouge_l("Schädel größer", "schädel grösser") == 1.0
    assert tokens("頭蓋骨 骨折") == list("頭蓋骨骨折") and 0 < token_f1("頭蓋骨", "頭蓋骨骨折") < 1


@given(WORDS, WORDS)
def test_the_common_subsequence_is_as_long_as_the_plain_table_says(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(a, b) == table[-1][-1]


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_package_on_english(a: list[str], b: list[str]) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    if a or b:
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(
            scorer.score(" ".join(b), " ".join(a))["rougeL"].fmeasure
        )
