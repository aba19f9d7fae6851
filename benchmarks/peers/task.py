"""The model, the data and the training of the plain Flower app, as the `task.py` of Flower's templates has them.

This is what a user would write: nothing of fedlora is used but the environment variables that `benchmarks` sets. The
work is that of fedlora's runs in `benchmarks.like_for_like`: rank, rates, batches, clipping and the longest input are
the same.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from flwr_datasets.partitioner import IidPartitioner
from peft import LoraConfig, TaskType, get_peft_model
from transformers import Trainer, TrainingArguments

Settings = Mapping[str, Any]  # of a Flower `ConfigRecord`, which travels with every message
auto: Any = transformers  # untyped


@cache
def load_rows(path: str) -> Dataset:
    """The rows of a CSV or JSON lines file."""
    kind = "csv" if path.endswith(".csv") else "json"
    return load_dataset(kind, data_files=path, split="train")


@cache
def get_labels(path: str) -> list[str]:
    """The names of the classes, in order; empty where rows are questions and answers."""
    rows = load_rows(path)
    return sorted(set(rows["category"])) if "category" in rows.column_names else []


def load_partition(partition: int, partitions: int, path: str) -> Dataset:
    """The rows of one client, dealt out at random and evenly."""
    partitioner = IidPartitioner(num_partitions=partitions)
    partitioner.dataset = load_rows(path).shuffle(seed=0)
    return partitioner.load_partition(partition)


@cache
def get_tokenizer(model: str) -> Any:
    """The model's tokenizer, which can pad."""
    tokenizer = auto.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(rows: Dataset, settings: Settings) -> list[dict[str, Any]]:
    """Input ids and labels of rows: a class, or the answer's tokens with -100 in the question's place."""
    tokenizer, longest = get_tokenizer(settings["model"]), settings["max-length"]
    labels = get_labels(settings["data"])
    if labels:
        ids = tokenizer(list(rows["text"]), truncation=True, max_length=longest)["input_ids"]
        return [{"input_ids": i, "labels": labels.index(c)} for i, c in zip(ids, rows["category"], strict=True)]
    return [_answered(tokenizer, row, longest) for row in rows]


def _answered(tokenizer: Any, row: Mapping[str, str], longest: int) -> dict[str, Any]:
    """A question and its answer, through the model's chat template where it has one, with the loss on the answer."""
    asked = [{"role": "user", "content": row["question"]}]
    said = [*asked, {"role": "assistant", "content": row["answer"]}]
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(said, return_dict=False)
    else:
        prompt = tokenizer(row["question"] + "\n", add_special_tokens=False)["input_ids"]
        ids = [*prompt, *tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids[:longest], "labels": labels[:longest]}


def collate(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest example."""
    batch = dict(tokenizer.pad([{"input_ids": e["input_ids"]} for e in examples], return_tensors="pt"))
    labels = [e["labels"] for e in examples]
    if isinstance(labels[0], int):
        return batch | {"labels": torch.tensor(labels)}
    padded = [torch.tensor(label) for label in labels]
    return batch | {"labels": torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=-100)}


def get_model(settings: Settings) -> Any:
    """The base model with a fresh LoRA adapter, and a new head where there are classes."""
    labels = get_labels(settings["data"])
    if labels:
        base = auto.AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=len(labels))
    else:
        base = auto.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    task = TaskType.SEQ_CLS if labels else TaskType.CAUSAL_LM
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=settings["targets"].split(","), task_type=task)
    return get_peft_model(base, lora)


def get_trainer(model: Any, settings: Settings, examples: list[dict[str, Any]]) -> Trainer:
    """The trainer of one client for one round, as the template makes it."""
    tokenizer = get_tokenizer(settings["model"])
    arguments = TrainingArguments(
        output_dir=str(Path(gettempdir()) / "plain-flower"),
        learning_rate=settings["lr"],
        per_device_train_batch_size=settings["batch-size"],
        max_steps=settings["steps"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    data: Any = examples
    return Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=lambda batch: collate(tokenizer, batch)
    )


@torch.no_grad()
def scores(model: Any, settings: Settings, examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean loss over batches of 32, and the accuracy where there are classes."""
    model.eval()
    loss, right = 0.0, 0
    for i in range(0, len(examples), 32):
        batch = collate(get_tokenizer(settings["model"]), examples[i : i + 32])
        out = model(**batch)
        loss += float(out.loss) * len(batch["labels"])
        if batch["labels"].dim() == 1:
            right += int((out.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": loss / len(examples), "accuracy": right / len(examples)}
