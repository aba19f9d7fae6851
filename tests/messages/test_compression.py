"""Small messages: how far rounding goes, that feedback loses nothing, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.errors import ClientFailed
from fedlora.jobs import CompressedUpdate
from fedlora.lora import SIDES, LoRA
from fedlora.messages.compression import DTYPES, SMALLEST, compress, compress_with_error_feedback, decompress, restore
from fedlora.sections import Encoding
from fedlora.tensors import by_name, checksum
from tests.support.adapters import factors

ENCODINGS = st.sampled_from(["bfloat16", "int8"])
SEEDS = st.integers(0, 10**6)
SIZES = st.floats(-44, 38).map(lambda e: 10.0**e)  # from subnormal to nearly too large


def single(seed: int, size: float = 1.0) -> LoRA:
    """A float32 adapter whose numbers are about this large, none infinite."""
    most = torch.finfo(torch.float32).max
    drawn = factors(seed)
    return LoRA(**{s: {m: (t * size).clamp(-most, most).float() for m, t in drawn.side(s).items()} for s in SIDES})


def pairs(x: LoRA, y: LoRA) -> list[tuple[str, Tensor, Tensor]]:
    return [(s, t.double(), y.side(s)[m].double()) for s in SIDES for m, t in x.side(s).items()]


def rows(side: str, t: Tensor) -> Tensor:
    """What shares a scale, one a row."""
    return t.T if side == "B" else t.reshape(-1, t.shape[-1])


def same(x: CompressedUpdate, y: CompressedUpdate) -> bool:
    these, those = (by_name(p.numbers) | {f"scales {n}": t for n, t in by_name(p.scales).items()} for p in (x, y))
    return x.encoding == y.encoding and these.keys() == those.keys() and checksum(these) == checksum(those)


@given(SEEDS, SIZES)
def test_int8_is_off_by_half_a_scale_at_most(seed: int, size: float) -> None:
    delta = single(seed, size)
    packed = compress(delta, "int8")
    scales, numbers = by_name(packed.scales), by_name(packed.numbers)
    for (s, x, y), scale in zip(pairs(delta, decompress(packed)), scales.values(), strict=True):
        error = rows(s, x - y).abs().amax(1)
        assert bool((error <= (scale.double() / 2).clamp(min=127 * SMALLEST)).all())
    assert scales.keys() == numbers.keys() and all(bool((t.abs() <= 127).all()) for t in numbers.values())


@given(SEEDS, SIZES)
def test_bfloat16_is_off_by_one_part_in_256_at_most(seed: int, size: float) -> None:
    delta = single(seed, size)
    for _, x, y in pairs(delta, decompress(compress(delta, "bfloat16"))):
        assert bool(((x - y).abs() <= (x.abs() * 2.0**-8).clamp(min=2.0**-133)).all())


@given(SEEDS, SIZES, ENCODINGS)
def test_what_was_received_compresses_to_the_same(seed: int, size: float, encoding: Encoding) -> None:
    packed = compress(single(seed, size), encoding)
    assert same(compress(decompress(packed), encoding), packed)


@given(SEEDS, ENCODINGS, st.integers(1, 30), st.floats(-6, 3))
def test_with_feedback_what_was_received_adds_up_to_what_was_meant(
    seed: int, encoding: Encoding, rounds: int, size: float
) -> None:
    """The difference is the last residual, which is no larger after many rounds than after one."""
    start, residual, missed = single(seed), LoRA(), [0.0] * 8
    for t in range(rounds):
        trained = single(seed + t + 1, 10**size)
        packed, _, residual = compress_with_error_feedback(start, trained, residual, encoding)
        meant = LoRA(**{s: {m: x - start.side(s)[m] for m, x in trained.side(s).items()} for s in SIDES})
        missed = [e + x - y for e, (_, x, y) in zip(missed, pairs(meant, decompress(packed)), strict=True)]  # type: ignore[misc]
    for e, (_, left, _) in zip(missed, pairs(residual, residual), strict=True):
        largest = 10**size * 10 + 10  # of a change
        assert float((e - left).abs().max()) <= rounds * largest * 2.0**-22  # float32's own rounding
        assert float(left.abs().max()) <= largest / (253 if encoding == "int8" else 255)


def test_without_feedback_a_small_change_beside_a_large_one_is_never_received() -> None:
    """What feedback is for: 0.001 beside 1 is under half a scale, round after round."""
    lora, residual, plain, fed = LoRA(A={"q": torch.tensor([[1.0, 0.001]])}), LoRA(), 0.0, 0.0
    for _ in range(100):
        plain += float(decompress(compress(lora, "int8")).A["q"][0, 1])
        packed, _, residual = compress_with_error_feedback(LoRA(), lora, residual, "int8")
        fed += float(decompress(packed).A["q"][0, 1])
    assert plain == 0.0 and abs(fed - 0.1) < 1 / 127


def test_both_sides_have_the_same_numbers() -> None:
    start, lora = single(1), single(2).only("BH")
    packed, received, _ = compress_with_error_feedback(start, lora, LoRA(), "int8")
    assert all(torch.equal(x, y) for _, x, y in pairs(received, restore(start, packed)))
    assert not received.A and list(received.B) == list(lora.B)


def test_float32_leaves_nothing_over() -> None:
    packed, received, residual = compress_with_error_feedback(single(1), single(2), LoRA(), "float32")
    assert not any(bool(t.any()) for s in SIDES for t in residual.side(s).values())
    assert packed.nbytes == 4 * sum(t.numel() for t in by_name(packed.numbers).values())
    for _, x, y in pairs(received, single(2)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_a_residual_of_another_shape_counts_as_none() -> None:
    other = LoRA({m: t[:2] for m, t in single(3).A.items()}, H=single(3).H)
    packed, _, _ = compress_with_error_feedback(single(1), single(2).only("AB"), other, "int8")
    assert same(packed, compress_with_error_feedback(single(1), single(2).only("AB"), LoRA(), "int8")[0])


def test_a_scale_belongs_to_one_direction_of_the_rank() -> None:
    """A direction that hardly moved keeps its digits beside one that moved a lot."""
    A = torch.tensor([[100.0], [1.0], [1e-3]]) * torch.tensor([[0.3, -1.0, 0.7, 0.2]])
    back = decompress(compress(LoRA({"q": A}, {"q": A.T.contiguous()}), "int8"))
    for t, like in ((back.A["q"], A), (back.B["q"].T, A)):
        assert bool(((t - like).abs().amax(1) <= like.abs().amax(1) / 253).all())


def test_bytes_are_those_of_numbers_and_scales() -> None:
    delta, n = single(1), sum(x.numel() for _, x, _ in pairs(single(1), single(1)))
    assert compress(delta, "bfloat16").nbytes == 2 * n
    assert compress(delta, "int8").nbytes == n + 4 * (3 * 4 + 3 * 4 + 3 + 1)  # rank 4 on three modules; a head of 3


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (1, 5), (5, 1), (2, 3, 4), (0, 4), (4, 0), (0,)], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_any_shape_comes_back(shape: tuple[int, ...], side: str) -> None:
    t = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    for encoding in DTYPES:
        back = decompress(compress(LoRA(**{side: {"q": t}}), encoding)).side(side)["q"]
        assert back.shape == t.shape and back.dtype == torch.float32
        torch.testing.assert_close(back, t, rtol=2.0**-8, atol=1 / 250)


def test_a_row_of_one_number_is_kept_to_five_digits() -> None:
    t = torch.tensor([[3.14159], [-2e-30], [0.0], [3e38]])
    torch.testing.assert_close(decompress(compress(LoRA({"q": t}), "int8")).A["q"], t, rtol=2.0**-15, atol=0)


def test_a_row_of_zeros_has_no_scale_and_stays_zero() -> None:
    packed = compress(LoRA({"q": torch.tensor([[0.0, -0.0], [1.0, 2.0], [1e-45, 1e-38]])}), "int8")
    scales = packed.scales.A["q"]
    assert scales[0] == scales[2] == 0 < scales[1]
    assert not decompress(packed).A["q"][[0, 2]].any()


def test_the_largest_numbers_stay_finite() -> None:
    most = torch.finfo(torch.float32).max
    for encoding in DTYPES:
        back = decompress(compress(LoRA({"q": torch.tensor([[most, -most, 1.0]])}), encoding)).A["q"]
        assert bool(back.isfinite().all())
        assert float(back[0, 0]) == pytest.approx(most, rel=2.0**-8)


def test_what_is_too_small_for_a_scale_is_sent_when_it_has_added_up() -> None:
    lora, residual, received = LoRA({"q": torch.full((1, 2), 1e-36)}), LoRA(), []
    for _ in range(3):
        packed, _, residual = compress_with_error_feedback(LoRA(), lora, residual, "int8")
        received.append(float(decompress(packed).A["q"][0, 0]))
    assert received[0] == 0 and sum(received) + float(residual.A["q"][0, 0]) == pytest.approx(3e-36, rel=1e-5)


@pytest.mark.parametrize("encoding", DTYPES)
def test_an_empty_adapter_is_an_empty_message(encoding: Encoding) -> None:
    packed, received, residual = compress_with_error_feedback(single(1), LoRA(), LoRA(), encoding)
    assert packed.nbytes == 0 and not received and not residual and not decompress(packed)


@given(SEEDS, ENCODINGS)
def test_the_same_change_is_the_same_message(seed: int, encoding: Encoding) -> None:
    x, y = single(seed), single(seed)
    assert same(compress(x, encoding), compress(y, encoding))
    turned = LoRA(B={m: t.T.contiguous().T for m, t in x.B.items()})  # the same numbers, otherwise laid out
    assert same(compress(turned, encoding), compress(x.only("B"), encoding))


def test_the_arguments_are_left_as_they_were() -> None:
    start, lora, residual = single(1), single(2), single(3)
    compress_with_error_feedback(start, lora, residual, "int8")
    for x, seed in ((start, 1), (lora, 2), (residual, 3)):
        assert all(torch.equal(t, u) for _, t, u in pairs(x, single(seed)))


@pytest.mark.parametrize("encoding", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_not_finite_is_refused_by_its_matrix(bad: float, encoding: Encoding) -> None:
    lora = factors(1)
    lora.B["v"][2, 1] = bad
    with pytest.raises(ClientFailed, match="the change of B of v is not finite"):
        compress_with_error_feedback(single(2), lora, LoRA(), encoding)


def changed(part: LoRA, change: Callable[[Tensor], Tensor]) -> LoRA:
    """The adapter with the first matrix of A changed."""
    module, matrix = next(iter(part.A.items()))
    return LoRA({**part.A, module: change(matrix)}, part.B, part.H)


def test_a_message_that_no_compression_makes_is_refused() -> None:
    packed = compress(single(1), "int8")
    numbers, scales = packed.numbers, packed.scales
    for bad in (
        replace(packed, numbers=changed(numbers, lambda t: t[:-1])),
        replace(packed, numbers=changed(numbers, lambda t: t.short())),
        replace(packed, numbers=numbers.only("AB")),
        replace(packed, scales=changed(scales, lambda t: t[:-1])),
        replace(packed, scales=changed(scales, lambda t: -t)),
        replace(packed, scales=changed(scales, lambda t: t * math.nan)),
        replace(packed, scales=changed(scales, lambda t: t.double())),
        replace(packed, scales=scales.only("AH")),
        replace(packed, encoding="bfloat16"),
    ):
        with pytest.raises(ValueError, match=r"scale|came as"):
            decompress(bad)
