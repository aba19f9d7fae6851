"""SCAFFOLD: FedIT whose clients correct every step by what sets their gradients apart from those of all.

Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (ICML 2020),
https://arxiv.org/abs/1910.06378

    y_i <- y_i - eta (g_i(y_i) - c_i + c),   c_i <- c_i - c + (x - y_i) / (K eta)      (Algorithm 1, option II)
    x <- sum_i p_i y_i,                      c <- sum_i p_i c_i

Clients keep and send nothing more than in FedIT: the server knows x, y_i and the sum K eta of a client's learning
rates, so it keeps the c_i itself and sends c - c_i, where the paper's clients send c_i too. Steps are plain gradient
descent without a clip, as c_i is read off them. c is the mean over the clients that were asked so far, by the weights
of x (where these differ, the paper's plain mean is no fixed point), and a client that never was has c_i = c, not 0.
State and checkpoints hold one c_i a client. A and B are corrected apart, as FedIT averages them apart.

Under DP-SGD c_i is the mean of clipped and noised gradients, and the correction comes after the noise: DP-SCAFFOLD
(Noble et al., AISTATS 2022, https://arxiv.org/abs/2111.09278).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.lora import LoRA, at_least_float32, average, map_factors
from fedlora.strategy import Client, Job, Sender, Strategy

PLAIN_DESCENT: Mapping[str, float | str] = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "lora_plus": 1.0,
    "head_lr": 0.0,
    "clip": 0.0,
}


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # x
    common: LoRA  # c, the mean gradient of all clients
    own: Mapping[int, LoRA]  # client -> c_i, its mean gradient over the last round it was in
    weights: Mapping[int, float]  # client -> its weight in that round


@dataclass(frozen=True)
class Scaffold(Strategy[State]):
    """Averages both factors, and corrects the drift of every client by its control variate."""

    needs_senders = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = "r * (d_in + d_out)"
    down = "2 * r * (d_in + d_out)"

    def init(self, lora: LoRA) -> State:
        zero = map_factors(lambda t: torch.zeros_like(at_least_float32(t)), lora)
        return State(lora, zero, {}, {})

    def client_init(self, state: State, client: Client) -> Job:
        own = state.own.get(client.id, state.common)
        return Job(state.lora, correction=map_factors(torch.sub, state.common, own), overrides=PLAIN_DESCENT)

    def aggregate(
        self, state: State, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> State:
        own, share = dict(state.own), dict(state.weights)
        for y, weight, sender in zip(updates, weights, senders, strict=True):
            own[sender.id] = _mean_gradient(state, y, sender)
            share[sender.id] = weight
        common = average(list(own.values()), [share[i] for i in own])
        return State(average(updates, weights), common, own, share)

    def adapter(self, state: State) -> LoRA:
        return state.lora


def _mean_gradient(state: State, y: LoRA, sender: Sender) -> LoRA:
    """A client's mean gradient over its steps from x to y: what it followed, less the correction in it."""

    def gradient(y: Tensor, x: Tensor, c: Tensor, own: Tensor) -> Tensor:
        return own - c + (x - at_least_float32(y)) / sender.sum_of_rates

    return map_factors(gradient, y, state.lora, state.common, state.own.get(sender.id, state.common))
