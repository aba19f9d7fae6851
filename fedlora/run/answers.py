"""Answers that a run's model generates to held-out prompts, scored, and kept to be read."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from statistics import fmean

from fedlora.data.rows import Rows, take
from fedlora.encoding.prompts import Prompt, prompts
from fedlora.errors import ConfigError
from fedlora.lora import LoRA
from fedlora.metrics import HEADLINES
from fedlora.models.generation import GeneratedText, generate
from fedlora.models.model import Model
from fedlora.own_code import find_own
from fedlora.sections import EvalConfig
from fedlora.storage.files import write_durably
from fedlora.text_scores import TextScore, extractor, score

ANSWERED = ("response", "chat")  # kinds of data whose rows have a prompt and an answer
OURS = {*HEADLINES, "loss", "token_accuracy", "unfinished", *(field.name for field in fields(TextScore))}
OwnMetric = Callable[[str, str], float]
log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class ScoredAnswer:
    """A line of `answers/round-NNNN.jsonl`: a prompt, what was expected and what came, and how near it is."""

    prompt: str
    expected: str
    generated: str
    scores: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class AnswerEvaluation:
    """The held-out prompts of a run, and how a model's answers to them are scored."""

    model: Model
    settings: EvalConfig
    prompts: Sequence[Prompt]

    def answers(self, lora: LoRA) -> list[ScoredAnswer]:
        """The model's answer to every prompt under this adapter, with its scores."""
        self.model.set_adapter(lora)
        return self.present_answers()

    def present_answers(self) -> list[ScoredAnswer]:
        """The answers of the model with the adapter that it has."""
        chosen = self.settings
        texts = generate(self.model, self.prompts, max_new_tokens=chosen.max_new_tokens, batch_size=chosen.batch_size)
        return [self._scored(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]

    def _scored(self, prompt: Prompt, text: GeneratedText) -> ScoredAnswer:
        tokenizer = self.model.encoder.processor
        scores = asdict(score(text.text, prompt.expected, extractor(self.settings.extract)))
        scores["unfinished"] = float(not text.is_finished)
        if self.settings.metric:
            name, metric = own_metric(self.settings.metric)
            scores[name] = _own_score(self.settings.metric, metric, text.text, prompt.expected)
        return ScoredAnswer(tokenizer.decode(prompt.ids), prompt.expected, text.text, scores)


def answer_evaluation(model: Model, settings: EvalConfig, heldout: Rows) -> AnswerEvaluation | None:
    """How a run generates answers; none where it is not to. Raises `ConfigError` where its data or model have none."""
    if not settings.generate:
        return None
    kind = model.schema.kind
    if kind not in ANSWERED:
        raise ConfigError(
            f"eval.generate has held-out prompts answered, and data of kind {kind} have no answers; set data.prompt "
            "and data.response, or data.messages, or leave eval.generate out"
        )
    if not len(heldout):
        raise ConfigError("eval.generate finds no held-out examples; set data.eval, or data.eval_share above 0")
    if settings.metric:
        own_metric(settings.metric)
    chosen = prompts(model.encoder, spread_evenly(heldout, settings.limit))
    _check_extractor(settings.extract, [prompt.expected for prompt in chosen])
    return AnswerEvaluation(model, settings, chosen)


def spread_evenly(rows: Rows, limit: int) -> Rows:
    """So many of the rows, evenly spread; all of them where the limit is 0."""
    count = min(limit or len(rows), len(rows))
    return take(rows, [i * len(rows) // count for i in range(count)])


def _check_extractor(name: str, expected: Sequence[str]) -> None:
    """Raise `ConfigError` where the extractor finds nothing in any expected answer, and warn where in some."""
    extract = extractor(name)
    empty = [text for text in expected if not extract(text)]
    if len(empty) == len(expected):
        example = f', as in "{" ".join(empty[0].split())[:60]}"' if empty else ""
        raise ConfigError(f"eval.extract = {name} finds nothing in any of {len(expected)} expected answers{example}")
    if empty:
        log.warning(
            "eval.extract = %s finds nothing in %d of %d expected answers; they count as wrong",
            name,
            len(empty),
            len(expected),
        )


def own_metric(spec: str) -> tuple[str, OwnMetric]:
    """The name of a user's own score, and its function. Raises `ConfigError` where there is none."""
    name = spec.partition(":")[2]
    if name in OURS:
        raise ConfigError(f'eval.metric = "{spec}": "{name}" is the name of a figure of the run; give it another')
    return name, find_own("eval.metric", spec)


def _own_score(spec: str, metric: OwnMetric, generated: str, expected: str) -> float:
    try:
        figure = float(metric(generated, expected))
        if not isfinite(figure):
            raise ValueError(f"it gave {figure}")
        return figure
    except Exception as e:  # whatever a user's function raises
        raise ConfigError(
            f"eval.metric = {spec} failed on a generated and an expected text: {type(e).__name__}: {e}"
        ) from e


def means(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """The mean of every score over the answers."""
    names = answers[0].scores if answers else ()
    return {name: fmean(answer.scores[name] for answer in answers) for name in names}


def keep(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """Write the answers, a line each, in the place of those before."""
    lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    write_durably(path, "".join(lines).encode(errors="replace"))
