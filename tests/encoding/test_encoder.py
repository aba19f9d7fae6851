"""Rows as tensors: what the model sees, and which tokens it is to learn."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from fedlora.data.federated import load
from fedlora.data.rows import Rows
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder
from fedlora.errors import DataError
from fedlora.sections import DataConfig
from tests.support.models import tokenizer

BOS, EOS, FIRST = 2, 3, 4  # <s>, </s>, w0
TEXT, ANSWER, CHAT = Schema("text", ("text",)), Schema("response", ("ask", "answer")), Schema("chat", ("messages",))
MARKED = (
    "{% for m in messages %}w5 {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %} {% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def encode(schema: Schema, rows: Rows, max_length: int = 32, template: str = "") -> list[tuple[list[int], list[int]]]:
    """Input ids and labels of every example."""
    t = tokenizer()
    t.chat_template = template or None
    examples = Encoder(t, schema, max_length)(rows)
    assert all(e["attention_mask"].tolist() == [1] * len(e["input_ids"]) for e in examples)
    return [(e["input_ids"].tolist(), e["labels"].tolist()) for e in examples]


def test_text_is_opened_closed_and_learned_whole() -> None:
    assert encode(TEXT, [{"text": words(0, 1)}]) == [([BOS, 4, 5, EOS], [BOS, 4, 5, EOS])]


def test_long_text_is_cut_into_consecutive_blocks_and_a_short_rest_is_dropped() -> None:
    whole = [BOS, *range(4, 44), EOS]  # 42 tokens
    assert [ids for ids, _ in encode(TEXT, [{"text": words(*range(40))}], 16)] == [whole[:16], whole[16:32], whole[32:]]
    assert [ids for ids, _ in encode(TEXT, [{"text": words(*range(40))}], 20)] == [whole[:20], whole[20:40]]


def test_a_text_without_words_gives_no_example() -> None:
    assert len(encode(TEXT, [{"text": ""}, {"text": "w1"}])) == 1
    with pytest.raises(DataError, match="of 1 examples none has a token to learn"):
        encode(TEXT, [{"text": ""}])


def test_no_rows_of_a_classifier_are_no_examples() -> None:
    assert Encoder(tokenizer(), Schema("label", ("text", "label"), ("a", "b")), 8)([]) == []


def test_no_rows_are_no_examples() -> None:
    assert encode(TEXT, []) == []


def test_the_loss_is_on_the_response_and_its_end() -> None:
    [(ids, labels)] = encode(ANSWER, [{"ask": words(0, 1), "answer": words(2)}])
    assert ids == [BOS, 4, 5, 6, EOS]
    assert labels == [-100, -100, -100, 6, EOS]


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    [(ids, labels)] = encode(ANSWER, [{"ask": words(*range(20)), "answer": words(30)}], 8)
    assert ids == [BOS, 19, 20, 21, 22, 23, 34, EOS]
    assert labels == [-100] * 6 + [34, EOS]


def test_a_response_that_is_too_long_loses_its_end() -> None:
    [(ids, labels)] = encode(ANSWER, [{"ask": "w1", "answer": words(*range(20))}], 8)
    assert ids == [BOS, *range(4, 11)]
    assert labels == [-100, *range(4, 11)]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "found"])
def test_in_a_chat_the_assistants_turns_are_learned(template: str) -> None:
    talk = [*TALK, {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w6"}]
    [(ids, labels)] = encode(CHAT, [{"messages": talk}], template=template)
    assert ids == [9, 5, 9, 6, 7, EOS, 9, 8, 9, 10, EOS]
    assert labels == [-100, -100, -100, 6, 7, EOS, -100, -100, -100, 10, EOS]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "found"])
def test_a_chat_that_is_too_long_keeps_its_end(template: str) -> None:
    talk = [{"role": "user", "content": words(*range(20))}, {"role": "assistant", "content": "w2 w3"}]
    [(ids, labels)] = encode(CHAT, [{"messages": talk}], 8, "<s> " + template)
    assert ids == [BOS, 21, 22, 23, 9, 6, 7, EOS]
    assert labels == [-100] * 5 + [6, 7, EOS]


def test_a_chat_that_does_not_open_with_a_token_of_its_own_keeps_nothing_of_its_beginning() -> None:
    [(ids, _)] = encode(CHAT, [{"messages": [{"role": "user", "content": words(*range(20))}, TALK[1]]}], 8, PLAIN)
    assert ids == [20, 21, 22, 23, 9, 6, 7, EOS]


def test_the_first_token_alone_is_nothing_to_learn() -> None:
    t = tokenizer()
    t.backend_tokenizer.post_processor = None
    t.bos_token = t.eos_token = None
    assert len(Encoder(t, TEXT, 8)([{"text": "w1"}, {"text": "w1 w2"}])) == 1


def test_a_newline_stands_between_prompt_and_response() -> None:
    from transformers import AutoTokenizer

    from fedlora.models.source import TINY

    t = AutoTokenizer.from_pretrained(TINY)
    [example] = Encoder(t, replace(ANSWER, template="plain"), 32)([{"ask": "def f():", "answer": "return 1"}])
    assert t.decode(example["input_ids"], skip_special_tokens=True) == "def f():\nreturn 1"


def test_a_template_that_writes_a_turn_otherwise_once_it_is_old_still_masks_the_question() -> None:
    """As Qwen3's, which opens a thought for the answer to come and drops it from the answers that were given."""
    template = PLAIN.replace("w5 {% endif %}", "w5 w9 {% endif %}")
    [(_, labels)] = encode(CHAT, [{"messages": TALK}], template=template)
    assert labels == [-100, -100, -100, 6, 7, EOS]


def test_a_tokenizer_without_a_template_cannot_chat() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        encode(CHAT, [{"messages": TALK}])


def test_a_template_that_refuses_a_conversation_is_quoted() -> None:
    with pytest.raises(DataError, match="conversation of user, assistant: no, never"):
        encode(CHAT, [{"messages": TALK}], template="{{ raise_exception('no, never') }}")


def test_labels_are_numbers_whether_they_were_names_or_numbers() -> None:
    schema = Schema("label", ("text", "label"), ("no", "yes"))
    examples = Encoder(tokenizer(), schema, 8)([{"text": "w1", "label": x} for x in ("yes", "no", 1, "0")])
    assert [e["labels"].item() for e in examples] == [1, 0, 1, 0]
    assert examples[0]["labels"].dtype == torch.int64
    assert examples[0]["labels"].shape == ()


def test_numbers_are_class_names_before_they_are_positions() -> None:
    schema = Schema("label", ("text", "label"), ("-1", "0", "1"))
    examples = Encoder(tokenizer(), schema, 8)([{"text": "w1", "label": x} for x in (-1, 0, "1")])
    assert [e["labels"].item() for e in examples] == [0, 1, 2]


def test_a_pair_of_texts_is_one_example_with_token_types() -> None:
    t = tokenizer()
    t.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    schema = Schema("label", ("a", "b", "label"), ("0", "1"))
    [example] = Encoder(t, schema, 16)([{"a": "w1", "b": "w2 w3", "label": 1}])
    assert example["input_ids"].tolist() == [BOS, 5, EOS, 6, 7, EOS]
    assert example["token_type_ids"].shape == (6,)


def test_a_text_to_classify_is_cut_to_the_longest_allowed() -> None:
    schema = Schema("label", ("text", "label"), ("0", "1"))
    [example] = Encoder(tokenizer(), schema, 8)([{"text": words(*range(20)), "label": 0}])
    assert len(example["input_ids"]) == 8


def test_a_batch_is_padded_on_the_right_to_its_longest() -> None:
    encoder = Encoder(tokenizer(), TEXT, 16)
    batch = encoder.collate(encoder([{"text": "w0"}, {"text": "w0 w1"}]))
    assert batch["input_ids"].tolist() == [[BOS, 4, EOS, 0], [BOS, 4, 5, EOS]]
    assert batch["labels"].tolist() == [[BOS, 4, EOS, -100], [BOS, 4, 5, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_batch_of_classified_texts_has_a_row_of_labels() -> None:
    encoder = Encoder(tokenizer(), Schema("label", ("text", "label"), ("0", "1")), 16)
    batch = encoder.collate(encoder([{"text": "w0 w1", "label": 1}, {"text": "w0", "label": 0}]))
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4)


def processor() -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def test_images_are_read_from_files_bytes_and_memory_alike(tmp_path: Path) -> None:
    path, picture = tmp_path / "a.png", Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    picture.save(path)
    sources = [str(path), picture, {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    encoder = Encoder(processor(), Schema("image", ("image", "label"), ("cat", "dog")), 0)
    batch = encoder.collate(encoder([{"image": s, "label": "dog"} for s in sources]))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert (batch["pixel_values"] == batch["pixel_values"][0]).all()
    assert batch["labels"].tolist() == [1] * 4


def test_a_datasets_image_column_is_read(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    Image.new("L", (4, 4)).save(tmp_path / "a.png")  # grey
    features = Features({"image": Picture(), "label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"image": [str(tmp_path / "a.png")] * 70, "label": [1] * 70}, features=features)
    examples = Encoder(processor(), Schema("image", ("image", "label"), ("cat", "dog")), 0)(cast(Rows, rows))
    assert len(examples) == 70
    assert examples[69]["pixel_values"].shape == (3, 8, 8)


@pytest.mark.parametrize("content", [None, b"no image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        Encoder(processor(), Schema("image", ("image", "label"), ("a", "b")), 0)([{"image": str(path), "label": "a"}])


def test_encoding_leaves_the_random_state_alone() -> None:
    def states() -> str:
        return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    before = states()
    encode(CHAT, [{"messages": TALK}], template=PLAIN)
    assert states() == before


def test_sst2_is_encoded_row_by_row_by_a_real_encoder(real_data: Path, minilm: Path) -> None:
    from transformers import AutoTokenizer

    data = DataConfig(path=str(real_data / "sst2" / "val.jsonl"), eval_share=0.0)
    federated = load(data, "auto", clients=1, seed=0)
    t = AutoTokenizer.from_pretrained(minilm)
    examples = Encoder(t, federated.schema, 128)(federated.clients[0])
    assert len(examples) == 872
    first = str(t.decode(examples[0]["input_ids"], skip_special_tokens=True))
    assert first.startswith("it ' s a charming")
