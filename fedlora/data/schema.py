"""Which columns of a table hold texts, labels, images or conversations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from fedlora.errors import ConfigError, DataError, cut, nearest
from fedlora.sections import DataConfig

from .guesses import likely_settings
from .tables import Table

TEXT = ("text", "sentence", "sentence1", "content", "review", "utterance")
LABEL = ("label", "category", "labels", "intent", "target", "class")
IMAGE = ("image", "img")
CHAT = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
TEXT_PAIRS = (  # two texts that a label is about
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("claim", "evidence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
RESPONSES = (  # what asks, in this order, and last what answers
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("instruction", "context", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("context", "question", "answer"),
    ("passage", "question", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("input", "output"),
)
PREFERENCES = (("prompt", "chosen", "rejected"), ("question", "chosen", "rejected"), ("chosen", "rejected"))
KINDS = {  # by model.task
    "lm": ("chat", "response", "text"),
    "seq2seq": ("response",),
    "classify": ("label",),
    "regression": ("label", "image"),
    "multilabel": ("label", "image"),
    "image": ("image",),
    "preference": ("preference",),
}
NEEDS = {"lm": "data.text, data.messages, or data.prompt and data.response", "classify": "data.text and data.label"}
NEEDS |= {"regression": "data.text or data.image, and data.label"}
NEEDS |= {
    "multilabel": "data.text or data.image, and data.label; or data.labels, if each label has a column of its own"
}
NEEDS |= {"image": "data.image and data.label", "seq2seq": "data.prompt and data.response"}
NEEDS |= {"preference": "columns prompt, chosen and rejected"}
ANY_NEEDS = "data.text, with data.label if it has classes; data.messages; data.prompt and data.response; or data.image"
Target = Literal["class", "number", "labels"]  # one class of several, a number, or any of several labels
MOST_COLUMNS = {"chat": 2, "image": 2, "label": 3, "text": 1, "preference": 3}  # that a kind can have; others: any

Kind = Literal["text", "response", "chat", "preference", "label", "image"]


@dataclass(frozen=True)
class Schema:
    """The meaning of a table's columns, by which rows become examples.

    By kind the columns are (text,); ([system,] prompt, ..., response); ([system,] messages) or ([system,] prompt,
    completion) as lists of messages; ([system,] [prompt,] chosen, rejected); (text[, text2], label); (image, label).
    """

    kind: Kind
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()  # class names, of "label" and "image"; a number in the data is a place among them
    target: Target = "class"  # what the label column holds, of "label" and "image"
    template: Literal["auto", "chat", "plain"] = "auto"  # how prompt and response become one text, as data.template
    system: str = ""  # which of the columns holds the system's message, if one does
    separator: str = ""  # what stands between several labels in a text
    outputs: tuple[str, ...] = ()  # the same names in the order of the model's outputs, where that is another

    @property
    def has_head(self) -> bool:
        """Does a model need a head of its own for these data, beside its backbone?"""
        return self.kind in ("label", "image")

    @property
    def label_column(self) -> str | None:
        """The column that holds what a head is to learn, if the data have one."""
        return self.columns[-1] if self.has_head else None

    @property
    def spoken(self) -> tuple[str, ...]:
        """The columns without the system's."""
        return tuple(name for name in self.columns if name != self.system)

    @property
    def asking(self) -> tuple[str, ...]:
        """The columns of the prompt; none where the conversation is in one column, or nobody answers."""
        answers = {"response": 1, "chat": 1, "preference": 2}.get(self.kind, len(self.columns))
        return self.spoken[:-answers]

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that a row may leave empty, or lack: the system's, and each of several prompts."""
        system = (self.system,) if self.system else ()
        return (*self.asking, *system) if len(self.asking) > 1 else system

    @property
    def class_order(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return self.outputs or self.labels

    def classes(self) -> dict[str, int]:
        """The model's output of a class by the strings that stand for the class in the data.

        These are its name, and its place among `labels` if no name is a number.
        """
        by_name = {name: i for i, name in enumerate(self.class_order)}
        if any(map(is_whole, by_name)):
            return by_name
        return {str(i): by_name[name] for i, name in enumerate(self.labels)} | by_name


DECLARED = {  # by model.task, without classes
    "seq2seq": Schema("response", ("prompt", "response")),
    "preference": Schema("preference", PREFERENCES[0]),
    "regression": Schema("label", ("text", "label"), target="number"),
}
PLAIN_TEXT = Schema("text", ("text",))  # of Python's standard library, the data that are embedded


def is_whole(name: str) -> bool:
    """Whether a class's name is a whole number."""
    return name.removeprefix("-").isascii() and name.removeprefix("-").isdigit()


def declared_schema(data: DataConfig, task: str) -> Schema:
    """The schema that the settings declare to a server that has no data; columns have their usual names."""
    if task in DECLARED:
        return DECLARED[task]
    if not data.labels:
        if task in ("auto", "lm"):
            return PLAIN_TEXT
        raise ConfigError(f"model.task = {task}: the server has no data to find the classes in; set data.labels")
    if task == "image":
        return Schema("image", ("image", "label"), data.labels)
    target: Target = "labels" if task == "multilabel" else "class"
    return Schema("label", ("text", "label"), data.labels, target)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of all tables together, found by their usual names; the order of the tables does not matter."""

    tables: Sequence[Table]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all columns."""
        return tuple(dict.fromkeys(name for table in self.tables for name in table.columns))

    @cached_property
    def _plain(self) -> dict[str, str]:
        """The columns by their names without blanks and capitals; the first of several."""
        return {plain(name): name for name in reversed(self.names)}

    def find(self, usual: str) -> str:
        """The column of this name, or else of one that is equal but for blanks and capitals; empty for none."""
        return usual if usual in self.names else self._plain.get(usual, "")

    def first(self, usual: Iterable[str]) -> str:
        """The column of the first of these names that there is; empty for none."""
        return next(filter(None, map(self.find, usual)), "")

    def all(self, usual: Iterable[str]) -> tuple[str, ...]:
        """The columns of all these names; none if one of them is not there, or is empty beside the first."""
        found = tuple(map(self.find, usual))
        return found if all(found) and all(self.value(name) is not None for name in found[1:]) else ()

    def value(self, name: str) -> Any:
        """The first value of a column that is neither null nor empty; null for none."""
        return next((value for table in self.tables if (value := table.first_value(name)) is not None), None)


def plain(name: str) -> str:
    """A name without what people write now so, now so: blanks around it, and capitals."""
    return name.strip().casefold()


def find_schema(data: DataConfig, task: str, tables: Sequence[Table]) -> Schema:
    """What the columns mean by the settings, and else by their names, the likeliest first; classes have no names yet.

    Raises `DataError` for a column that is not there, or if nothing says what to learn, and `ConfigError` if all that
    could be learned is for another task.
    """
    columns = Columns(tables)
    named = _named_columns(data)
    for key, name in named:
        if name not in columns.names:
            raise DataError(
                f'{tables[0].name}: no column "{name}", as data.{key} has it; {nearest(name, columns.names)}'
            )
    schemas = _by_likelihood(data, named, columns)
    for schema in schemas:
        if schema.kind in KINDS.get(task, (schema.kind,)):
            return _for_language_models(schema, columns)
    there = f"{tables[0].name} has the columns {cut(', '.join(columns.names), 200)}"
    guess = likely_settings(tables[0], data.label or columns.first(LABEL))
    if schemas:
        needs = f"set {NEEDS[task]}, or another task"
        raise ConfigError(f"model.task = {task} does not go with the data: {there}; {needs}{guess}")
    raise DataError(f"{there}, which do not say what to learn; set {NEEDS.get(task, ANY_NEEDS)}{guess}")


def _for_language_models(schema: Schema, columns: Columns) -> Schema:
    """The schema with the column of the system's message, if there is one and somebody answers it."""
    system = columns.first(SYSTEM) if schema.kind in ("chat", "response", "preference") else ""
    if not isinstance(columns.value(system), str) or system in schema.columns:
        return schema
    return replace(schema, columns=(system, *schema.columns), system=system)


def _named_columns(data: DataConfig) -> list[tuple[str, str]]:
    """The columns that the settings name, each with the key that names it."""
    settings = [*(("text", name) for name in data.text), *(("prompt", name) for name in data.prompts)]
    settings += [("label", data.label), ("response", data.response), ("messages", data.messages), ("image", data.image)]
    return [(key, name) for key, name in settings if name]


def _by_likelihood(data: DataConfig, named: Sequence[tuple[str, str]], columns: Columns) -> list[Schema]:
    """The schemas that have all columns that the settings name, the likeliest first."""
    wanted = {name for key, name in named if key != "label"}
    schemas = [schema for schema in possible_schemas(data, columns) if wanted <= {*schema.columns}]
    if not data.label:
        return schemas
    # whoever names a label wants it learned, except by a language model, where it serves to tell the clients apart
    return sorted(schemas, key=lambda schema: data.label not in schema.columns)


def possible_schemas(data: DataConfig, columns: Columns) -> list[Schema]:
    """Every schema that these columns can have, without the names of classes."""
    text = columns.first(TEXT)
    label = data.label or columns.first(LABEL)
    exchange = _prompts_and_response(data, columns)
    is_chat = any(isinstance(columns.value(name), list | dict) for name in exchange)
    pair = next(filter(None, map(columns.all, TEXT_PAIRS)), ())
    schemas = [
        Schema("chat", (data.messages or columns.first(CHAT),)),
        Schema("chat" if is_chat else "response", exchange),
        Schema("image", (data.image or columns.first(IMAGE), label)),
        Schema("label", (*(data.text or pair), label)),
        Schema("label", (*(data.text or (text,)), label)),
        Schema("text", data.text or (text,)),
        Schema("preference", next(filter(None, map(columns.all, PREFERENCES)), ())),
    ]
    return list(filter(_is_whole_schema, schemas))


def _is_whole_schema(schema: Schema) -> bool:
    """Does the schema have all columns that its kind needs, and no more?"""
    few = 2 if schema.label_column or schema.kind in ("response", "preference") else 1
    most = MOST_COLUMNS.get(schema.kind, len(schema.columns))
    return all(schema.columns) and few <= len(schema.columns) <= most


def _prompts_and_response(data: DataConfig, columns: Columns) -> tuple[str, ...]:
    """The columns of the prompts and of the response: as chosen, and else the first usual ones that are all there."""
    if data.prompts:
        return (*data.prompts, data.response or columns.first(form[-1] for form in RESPONSES))
    if data.response:
        asking = (columns.all(form[:-1]) for form in RESPONSES)
        return (*next((names for names in asking if names and data.response not in names), ()), data.response)
    return next(filter(None, map(columns.all, RESPONSES)), ())
