"""Generated answers: what a plain loop writes, alone as in a batch, and nothing of the checkpoint's own sampling."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder
from fedlora.encoding.prompts import Prompt, prompts, shortened
from fedlora.errors import ConfigError
from fedlora.models.generation import end_tokens, generate
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support import encoder_decoders
from tests.support.models import make, random_adapter, tokenizer

RESPONSE = Schema("response", ("prompt", "response"))
DECODERS = ("llama", "gpt2")  # rotary positions, and learned ones
ENCODER_DECODERS = ("t5", "bart")  # relative positions, and learned ones
FOLDER = TemporaryDirectory(prefix="fedlora-generation-")


@cache
def model(kind: str) -> Model:
    """A random model with a random adapter, large enough that it has much to say."""
    maker = make if kind in DECODERS else encoder_decoders.make
    folder = maker(kind, Path(FOLDER.name) / kind)
    made = Model(ModelConfig(path=str(folder), max_length=32, device="cpu"), LoRAConfig(rank=2), RESPONSE, seed=0)
    made.set_adapter(random_adapter(made, 1, rank=2))
    with torch.no_grad():
        for p in made.net.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return made


def questions(kind: str, lengths: Sequence[int]) -> list[Prompt]:
    draw = Random(3)
    rows = [{"prompt": " ".join(draw.choices(["w1", "w2", "w3", "w4"], k=n)), "response": "w5 w6"} for n in lengths]
    return prompts(model(kind).encoder, rows)


@torch.no_grad()
def plainly(kind: str, prompt: Prompt, tokens: int) -> str:
    """The likeliest token after all that came before, again and again, with no cache and no batch."""
    net: Any = model(kind).net.eval()
    stops = end_tokens(model(kind), [prompt])
    written: list[int] = []
    start = getattr(net.config, "decoder_start_token_id", None)
    while len(written) < tokens:
        inputs = {"input_ids": torch.tensor([[*prompt.ids.tolist(), *written]])}
        if kind in ENCODER_DECODERS:
            inputs = {"input_ids": prompt.ids[None], "decoder_input_ids": torch.tensor([[start, *written]])}
        token = int(net(**inputs).logits[0, -1].argmax())
        if token in stops:
            break
        written.append(token)
    text: str = model(kind).encoder.processor.decode(written, skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_an_answer_is_what_a_plain_loop_writes_whatever_its_neighbours(kind: str) -> None:
    asked = questions(kind, [1, 9, 3, 5, 2])
    answers = [answer.text for answer in generate(model(kind), asked, max_new_tokens=8, batch_size=3)]
    assert answers == [plainly(kind, prompt, 8) for prompt in asked] and len({*answers}) > 2


def test_a_model_that_sees_padding_answers_each_prompt_as_if_it_were_alone(tmp_path: Path) -> None:
    """RWKV takes no attention mask: what stands on the left of a shorter prompt would move its state."""
    torch.manual_seed(1)
    config = RwkvConfig(vocab_size=120, hidden_size=16, num_hidden_layers=2, eos_token_id=3, bos_token_id=2)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    rwkv = Model(ModelConfig(path=str(tmp_path), max_length=32, device="cpu"), LoRAConfig(rank=2), RESPONSE, seed=0)
    with torch.no_grad():
        for p in rwkv.net.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    asked = questions("llama", [1, 9, 3, 9])
    together = generate(rwkv, asked, max_new_tokens=6, batch_size=4)
    assert together == [generate(rwkv, [one], max_new_tokens=6, batch_size=1)[0] for one in asked]


def test_a_prompt_without_room_keeps_the_token_that_opens_it() -> None:
    whole = torch.tensor([2, 5, 6, 7, 8])
    assert shortened(whole, 3, 2).tolist() == [2, 7, 8] and shortened(whole, 3, None).tolist() == [6, 7, 8]


def test_sampling_and_penalties_of_the_checkpoint_do_not_count() -> None:
    asked = questions("llama", [4, 6])
    net: Any = model("llama").net.get_base_model()
    before = net.generation_config
    plain = generate(model("llama"), asked, max_new_tokens=8, batch_size=2)
    try:
        net.generation_config = type(before)(do_sample=True, temperature=9.0, repetition_penalty=9.0, eos_token_id=3)
        assert generate(model("llama"), asked, max_new_tokens=8, batch_size=2) == plain
        assert net.generation_config.temperature == 9.0  # and they are left as they were
    finally:
        net.generation_config = before


def test_an_answer_ends_where_the_expected_ones_do() -> None:
    """A chat model's turns end on a token of their own, which its tokenizer may not call the end."""
    prompt = questions("llama", [3])[0]
    unseen = (*prompt.answer[:-1], 0)  # a special token that is not the tokenizer's end
    assert end_tokens(model("llama"), [prompt]) == {2, 3}  # the checkpoint's, and the tokenizer's
    assert end_tokens(model("llama"), [Prompt(prompt.ids, "", unseen)]) == {0, 2, 3}


def test_a_prompt_leaves_room_for_its_answer_among_the_positions() -> None:
    long = Prompt(torch.full((60,), 9), "", (9, 3))
    assert len(generate(model("gpt2"), [long], max_new_tokens=40, batch_size=1)) == 1  # 64 positions
    bart: Any = model("bart").net.config
    with pytest.raises(ConfigError, match=f"choose {bart.max_position_embeddings - 1} or fewer"):
        generate(model("bart"), questions("bart", [2]), max_new_tokens=bart.max_position_embeddings, batch_size=1)
    with pytest.raises(ConfigError, match=r"eval\.max_new_tokens = 60 leaves a prompt no room .* 56 or fewer"):
        generate(model("gpt2"), [long], max_new_tokens=60, batch_size=1)


def test_a_prompt_is_cut_on_its_left_but_for_the_token_that_opens_it() -> None:
    asked = questions("llama", [50])[0]
    whole = model("llama").encoder.processor("w5")["input_ids"][0]
    assert len(asked.ids) == 32 and int(asked.ids[0]) == whole == 2


def test_the_last_answer_of_a_conversation_is_asked_for_and_those_before_are_given() -> None:
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    words = tokenizer()
    words.chat_template = template
    encoder = Encoder(words, Schema("chat", ("messages",)), 64)
    said = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6"), ("user", "w7")]
    [found] = prompts(encoder, [{"messages": [{"role": role, "content": text} for role, text in said]}])
    assert found.expected == "w5 w6" and words.decode(found.answer).split() == ["w5", "w6", "</s>"]
    assert [word for word in words.decode(found.ids).split() if word.startswith("w")] == ["w1", "w2", "w3", "w4"]
    assert prompts(encoder, [{"messages": [{"role": "assistant", "content": "w1"}]}])[0].ids.tolist()
