"""One config, the same keys everywhere."""

from pathlib import Path

import pytest

from fedlora.cli.options import dotted, pair
from fedlora.config import build, dumps, flatten, read, section_meanings, setting_key, settings
from fedlora.errors import ConfigError


def test_a_config_written_as_toml_reads_back_the_same(tmp_path: Path) -> None:
    config = build({"lora.rank": 4, "data.text": ["a", "b"], "option.lam": 0.5, "strategy": "ffa_lora"})
    (tmp_path / "run.toml").write_text(dumps(config))
    assert build(read(tmp_path / "run.toml")) == config


def test_toml_and_command_line_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('seed = 3\n[lora]\nrank = 4\ntargets = ["q_proj", "v_proj"]\n[train]\nlr = 2e-3')
    words = ["--seed", "3", "--lora.rank=4", "--lora.targets", "q_proj,v_proj", "--train.lr", "2e-3"]
    assert build(read(tmp_path / "run.toml")) == build(dotted(words))


def test_a_list_on_the_command_line_may_be_written_as_json() -> None:
    for written in ("no, yes", '["no","yes"]', '["no", "yes"]'):
        assert build({"data.labels": written, "data.label": "diagnosis"}).data.labels == ("no", "yes")
    assert build({"client.egress": "[AB] *"}).client.egress == ("[AB] *",), "which is a pattern"


def test_hyphens_are_as_good_as_underscores(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('eval-data = "x"\n[train]\nbatch-size = 4')
    words = ["--data.eval", "x", "--train.batch_size=4"]
    assert read(tmp_path / "run.toml") == {"data.eval": "x", "train.batch_size": 4}
    assert build(read(tmp_path / "run.toml")) == build(dotted(words))
    assert dotted(["--train.batch-size", "4"]) == {"train.batch_size": "4"} and pair("a-b=c-d") == ("a_b", "c-d")


def test_no_key_has_a_hyphen_of_its_own() -> None:
    assert not [s.key for s in settings() if "-" in s.key]


def test_a_short_name_means_the_same_everywhere() -> None:
    assert dotted(["--dp-epsilon", "3"]) == {"dp.epsilon": "3"} == {setting_key("dp_epsilon"): "3"}


def test_every_section_says_what_it_is_about() -> None:
    assert section_meanings().keys() == {s.section for s in settings()}
    assert all(meaning.endswith(".") for meaning in section_meanings().values())


def test_later_layers_win() -> None:
    assert build({"seed": 1, "rounds": 3}, {"seed": 2}).seed == 2


def test_a_flag_alone_is_true() -> None:
    assert build(dotted(["--lora.rslora", "--seed", "4"])).lora.rslora


def test_flowers_run_config_takes_a_line_of_options() -> None:
    assert build({"option": "lam=0.5, period=2"}).option == build({"option.lam": "0.5", "option.period": "2"}).option


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lora.rnk", 4, 'unknown key "lora.rnk"; did you mean "lora.rank"?'),
        ("lora_r", 4, 'unknown key "lora_r"; here it is lora.rank'),
        ("lr", 4, 'unknown key "lr"; did you mean "train.lr" or "aggregate.lr" or "personal.lr"?'),
        ("round", 4, 'unknown key "round"; did you mean "rounds"?'),
        ("lora.rank", "four", "lora.rank = 'four': input should be a valid integer"),
        ("rounds", 1.5, "rounds = 1.5"),
        ("train.lr", -1.0, "train.lr = -1.0: input should be greater than 0"),
        ("engine", "gpu", "engine = 'gpu': input should be 'auto', 'serial', 'stacked' or 'flower'"),
        ("server.quorum", 2, "server.quorum = 2"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({key: value})
    assert says in str(error.value)


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML.*line 1"):
        read(tmp_path / "bad.toml")


def test_a_section_where_a_value_belongs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[seed]\nx = 1")
    with pytest.raises(ConfigError, match=r'unknown key "seed\.x"'):
        build(read(tmp_path / "bad.toml"))


@pytest.mark.parametrize("words", [["lora.rank"], ["--seed", "1", "stray"]])
def test_stray_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="belongs to no option"):
        dotted(words)


def test_an_option_is_written_key_equals_value() -> None:
    assert pair("lam=0.5") == ("lam", "0.5")
    with pytest.raises(ConfigError, match="key=value"):
        pair("lam")


def test_every_setting_says_what_it_means() -> None:
    every = list(settings())
    assert all(s.help for s in every)
    assert {s.key for s in every} == {*flatten(build()), "option"}


def test_a_file_that_notepad_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfrounds = 3\r\n")
    assert read(path) == {"rounds": 3}
