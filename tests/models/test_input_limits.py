"""What a base model can take: as many tokens as it has positions, the tokens that it knows, and no neighbour's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.schema import Schema
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.models.input_limits import input_limits, warnings
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import tokenizer

TEXT, LABEL = Schema("text", ("text",)), Schema("label", ("text", "label"), ("no", "yes"))
PAIR = Schema("label", ("one", "two", "label"), ("no", "yes"))
WIDE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
BART |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
OPT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24}
OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 16}
XLNET = {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "pad_token_id": 0}
GPTJ = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4}


def net(name: str, options: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**options))


def model(folder: Path, name: str, options: dict[str, Any], schema: Schema, t: Any = None, length: int = 16) -> Model:
    """The model as a run has it, from a folder."""
    net(name, options).save_pretrained(folder)
    (t or tokenizer()).save_pretrained(folder)
    config = ModelConfig(path=str(folder), max_length=length, device="cpu")
    return Model(config, LoRAConfig(rank=2, alpha=2.0), schema, seed=0)


@pytest.mark.parametrize(
    "name, options, positions",
    [
        ("BertForSequenceClassification", WIDE, 32),
        ("RobertaForSequenceClassification", WIDE | {"pad_token_id": 1}, 30),  # position 2 is that of its first token
        ("GPT2LMHeadModel", GPT2, 32),
        ("GPTJForCausalLM", GPTJ, 32),
        ("OPTForCausalLM", OPT, 32),
        ("BartForSequenceClassification", BART, 32),
        ("LlamaForCausalLM", WIDE, None),
        ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ],
)
def test_no_example_may_be_longer_than_the_models_positions(name: str, options: Any, positions: int | None) -> None:
    base, schema = net(name, options), LABEL if "Classification" in name else TEXT
    assert input_limits(base, tokenizer(), schema).positions == positions
    longest = positions or 100
    ids = torch.full((1, longest), 5)
    ids[0, -1] = 3
    base.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    if positions:
        with pytest.raises((IndexError, RuntimeError)):
            base(input_ids=ids[:, :1].expand(1, positions + 1), attention_mask=torch.ones(1, positions + 1))


@pytest.mark.parametrize(
    "name, options, schema",
    [("GPT2LMHeadModel", GPT2, TEXT), ("BertForSequenceClassification", WIDE, LABEL)],
)
def test_an_example_that_is_too_long_for_the_model_is_refused_and_a_shorter_one_is_not(
    tmp_path: Path, name: str, options: Any, schema: Schema
) -> None:
    learner = model(tmp_path, name, options, schema, length=128)
    assert learner.encoder([{"text": "w1", "label": "no"}])
    with pytest.raises(ConfigError, match=r"max_length = 128 is above the 32 positions .* an example has 62 tokens"):
        learner.encoder([{"text": "w1 " * 60, "label": "no"}])
    assert "above the 32 positions" in learner.notes[-1]


def test_a_length_that_a_model_was_not_made_for_is_told() -> None:
    t = tokenizer()
    t.model_max_length = 40
    assert warnings(net("LlamaForCausalLM", WIDE), t, TEXT, max_length=64) == (
        "model.max_length = 64 is above the 32 tokens that the model was made for",
        "model.max_length = 64 is above the 40 tokens that the tokenizer is made for",
    )
    assert warnings(net("LlamaForCausalLM", WIDE), t, TEXT, max_length=32) == ()


def test_a_pad_token_without_an_embedding_is_another_that_has_one(tmp_path: Path) -> None:
    t = tokenizer()
    t.add_special_tokens({"pad_token": "<new>"})
    learner = model(tmp_path, "LlamaForCausalLM", WIDE, TEXT, t)
    assert learner.encoder.processor.pad_token == "</s>"
    batch = learner.encoder.collate(learner.encoder([{"text": "w1"}, {"text": "w1 w2 w3"}]))
    assert learner.loss(batch).isfinite()


def test_a_word_without_an_embedding_is_named_with_its_text(tmp_path: Path) -> None:
    t = tokenizer()
    t.add_tokens(["<tool>"])
    learner = model(tmp_path, "LlamaForCausalLM", WIDE, TEXT, t)
    assert learner.encoder([{"text": "w1 w2"}])
    with pytest.raises(DataError, match=r'"<tool>" is token 64 .* ends at 63 \(in the text "w1 <tool>"\)'):
        learner.encoder([{"text": "w1 <tool>"}])
    assert learner.notes[-1].startswith(
        'the tokenizer has 1 token(s) that the model has no embedding for, from "<tool>"'
    )


def test_a_pair_has_no_token_types_in_a_model_that_knows_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    t = tokenizer()
    t.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    row = {"one": "w1", "two": "w2", "label": "yes"}
    one = model(tmp_path / "1", "RobertaForSequenceClassification", WIDE | {"type_vocab_size": 1}, PAIR, t)
    two = model(tmp_path / "2", "BertForSequenceClassification", WIDE, PAIR, t)
    for learner in (one, two):
        learner.encoder.processor.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" not in one.encoder([row])[0]
    assert two.encoder([row])[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1]


CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", WIDE),
    "gpt2": ("GPT2ForSequenceClassification", GPT2),
    "bart": ("BartForSequenceClassification", BART),
    "xlnet": ("XLNetForSequenceClassification", XLNET),
    "llama": ("LlamaForSequenceClassification", WIDE),
}
WORDS = st.sampled_from([*(f"w{i}" for i in range(9)), "</s>", "<s>", "[PAD]", "[UNK]", "\ud83d", "\u00e9", ""])


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {
        name: model(tmp_path_factory.mktemp(name), cls, options, LABEL) for name, (cls, options) in CLASSIFIERS.items()
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
@settings(max_examples=12, deadline=None)
@given(texts=st.lists(st.lists(WORDS, max_size=20).map(" ".join), min_size=2, max_size=4))
@torch.no_grad()
def test_a_text_has_one_answer_whatever_is_in_it_and_beside_it(
    classifiers: dict[str, Model], name: str, texts: list[str]
) -> None:
    learner = classifiers[name]
    learner.net.eval()
    examples = learner.encoder([{"text": text, "label": "yes"} for text in texts])
    together = learner.logits(learner.encoder.collate(examples))[0]
    alone = torch.cat([learner.logits(learner.encoder.collate([e]))[0] for e in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_an_empty_text_is_one_token_to_a_tokenizer_that_adds_none(tmp_path: Path) -> None:
    t: Any = tokenizer()
    t.backend_tokenizer.post_processor = None
    learner = model(tmp_path, "GPT2ForSequenceClassification", GPT2, LABEL, t)
    [example] = learner.encoder([{"text": "", "label": "no"}])
    assert (example["input_ids"].tolist(), example["attention_mask"].tolist()) == ([2], [1])


def test_classifiers_that_depend_on_neighbours_or_find_no_end_are_refused() -> None:
    fnet = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    with pytest.raises(ModelError, match="no attention mask"):
        input_limits(net("FNetForSequenceClassification", fnet), tokenizer(), LABEL)
    t = tokenizer()
    t.backend_tokenizer.post_processor = None
    with pytest.raises(ModelError, match="classifies by the end token"):
        input_limits(net("BartForSequenceClassification", BART), t, LABEL)
