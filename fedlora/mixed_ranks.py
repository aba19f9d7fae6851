"""What strategies share that have clients of different ranks, or whose factors an SVD orders by size."""

from collections.abc import Mapping, Sequence

import torch

from .lora import LoRA, at_least_float32

Ranks = Mapping[str, int]  # module -> rank


def ranks_of(lora: LoRA) -> dict[str, int]:
    """The rank of every module."""
    return {m: a.shape[0] for m, a in lora.A.items()}


def beyond(lora: LoRA, ranks: Ranks) -> LoRA:
    """The rows of A and columns of B after the first so many; modules with none are left out, and so is the head."""
    longer = [m for m, a in lora.A.items() if a.shape[0] > ranks[m]]
    return LoRA({m: lora.A[m][ranks[m] :] for m in longer}, {m: lora.B[m][:, ranks[m] :] for m in longer})


def filled(lora: LoRA, first: LoRA) -> LoRA:
    """The leading directions at exactly the ranks of `first`: its rows and zero columns stand where there are fewer.

    A direction whose singular value is rounding counts as none: with zeros in A and in B no gradient would move it.
    """
    A, B = {}, {}
    for m, fresh in first.A.items():
        b, a = lora.B[m], lora.A[m]
        sizes = b.norm(dim=0) * a.norm(dim=1)  # (k,), the singular values
        r, rounding = fresh.shape[0], torch.finfo(sizes.dtype).eps * max(*b.shape, a.shape[1])
        k = min(r, int((sizes > rounding * sizes.max()).sum())) if len(sizes) else 0
        A[m] = torch.cat([a[:k], at_least_float32(fresh[k:])])  # (r, d_in)
        B[m] = torch.nn.functional.pad(b[:, :k], (0, r - k))  # (d_out, r)
    return LoRA(A, B)


def smallest_ranks(updates: Sequence[LoRA], before: Ranks | None) -> Ranks:
    """The smallest rank of each module in these updates and in those before, of which there are none at first."""
    ranks = [*map(ranks_of, updates), *([before] if before else [])]
    return {m: min(r[m] for r in ranks) for m in updates[0].A}


def energy_in_smallest_rank(lora: LoRA, smallest: Ranks | None, largest: Ranks) -> dict[str, float]:
    """The note of this name: the share of energy in the directions that every client holds, as a mean over modules.

    Energy is the sum of the squared singular values. At 1 all beyond the smallest rank has died out, and higher ranks
    cost numbers that hold nothing. The factors are as an SVD leaves them: orthogonal columns in B, orthogonal rows in
    A, largest first. There is no note where all clients have had the largest rank, or nothing has been learnt.
    """
    shares = []
    smallest = smallest or largest
    for m in (m for m in lora.B if smallest[m] < largest[m]):
        energies = (lora.B[m].double().norm(dim=0) * lora.A[m].double().norm(dim=1)).square()  # (r,)
        if energies.any():
            shares.append(float(energies[: smallest[m]].sum() / energies.sum()))
    return {"energy_in_smallest_rank": sum(shares) / len(shares)} if shares else {}
