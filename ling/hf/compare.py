"""The comparison of two models' outputs on the same tokens, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

TOLERANCE = 3e-5
"""Largest difference of two logits in fp32, for logits of root mean square 1 or less; larger ones may differ more."""
_TIE = 1e-6  # selection scores nearer than this may be ordered either way in fp32
_LEAST_COMPARED = 0.5


@dataclass
class Outputs:
    """What a model says of tokens `[B, S]`.

    logits, mtp_logits: `[B, S, V]`.
    chosen: experts `[B, S, K]` of every router, in the order of the layers.
    selection: scores `[B, S, E]` that the choice was made by, of every router; one of the two sides has them.
    """

    logits: torch.Tensor
    mtp_logits: torch.Tensor | None
    chosen: list[torch.Tensor]
    selection: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Verdict:
    """`problems` is empty where both sides agree; `lines` are the figures."""

    problems: list[str]
    lines: list[str]

    @property
    def text(self) -> str:
        """All of it."""
        last = "NOT the same model" if self.problems else "verified: both sides compute the same"
        return "\n".join([*self.lines, *self.problems, last])


def compare(ours: Outputs, theirs: Outputs) -> Verdict:
    """Compare logits, MTP logits and chosen experts.

    Where two experts' scores are equal but for rounding, either may be chosen: such a token and those after it, which
    see it, are left out. At least half of the tokens must remain.
    """
    verdict = Verdict([], [])
    counted = torch.ones(ours.logits.shape[:2], dtype=torch.bool)
    if len(ours.chosen) != len(theirs.chosen):
        verdict.problems.append(f"{len(ours.chosen)} routers, and {len(theirs.chosen)} in the model directory")
    else:
        counted = _compare_choices(ours, theirs, verdict)
    if ours.logits.shape != theirs.logits.shape:
        shapes = f"{list(ours.logits.shape)}, in the model directory {list(theirs.logits.shape)}"
        verdict.problems.append(f"logits of shape {shapes}")
        return verdict
    if (ours.mtp_logits is None) != (theirs.mtp_logits is None):
        verdict.problems.append("only one side has MTP logits")
    _compare_logits("logits", ours.logits, theirs.logits, counted, verdict)
    if ours.mtp_logits is not None and theirs.mtp_logits is not None:
        _compare_logits("MTP logits", ours.mtp_logits, theirs.mtp_logits, counted, verdict)
    return verdict


def _compare_choices(ours: Outputs, theirs: Outputs, verdict: Verdict) -> torch.Tensor:
    """Note differing choices that are no ties; returns which tokens `[B, S]` no tie has touched."""
    counted = torch.ones(ours.logits.shape[:2], dtype=torch.bool)
    scores = theirs.selection or ours.selection
    differing = 0
    for layer, (mine, other) in enumerate(zip(ours.chosen, theirs.chosen, strict=True)):
        mine, other = mine.sort(-1).values, other.sort(-1).values
        for sequence, position in ((mine != other).any(-1) & counted).nonzero().tolist():
            if not counted[sequence, position]:
                continue
            a, b = set(mine[sequence, position].tolist()), set(other[sequence, position].tolist())
            row = scores[layer][sequence, position]
            gap = float(row[sorted(a ^ b)].max() - row[sorted(a ^ b)].min())
            if gap <= _TIE:
                counted[sequence, position:] = False
                continue
            if not differing:
                verdict.problems.append(
                    f"router {layer} (of those with experts), sequence {sequence}, position {position}: experts "
                    f"{sorted(a)}, in the model directory {sorted(b)}"
                )
            differing += 1
    total = sum(chosen[..., 0].numel() for chosen in ours.chosen)
    if total:
        left_out = int((~counted).sum())
        note = f", {left_out} tokens left out after ties" if left_out else ""
        verdict.lines.append(f"chosen experts: {total - differing} of {total} choices agree{note}")
    if counted.float().mean() < _LEAST_COMPARED:
        verdict.problems.append("more than half of the tokens follow ties between experts; compare on other data")
    return counted


def _compare_logits(
    what: str, ours: torch.Tensor, theirs: torch.Tensor, counted: torch.Tensor, verdict: Verdict
) -> None:
    scale = float(ours.square().mean().sqrt())
    allowed = TOLERANCE * max(1.0, scale)
    difference = (ours - theirs).abs()
    difference[~counted] = 0
    worst = int(difference.argmax())
    sequence, position, token = (int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
    largest = float(difference.flatten()[worst])
    same = float((ours.argmax(-1) == theirs.argmax(-1))[counted].float().mean())
    line = (
        f"{what}: largest difference {largest:.2e} (allowed {allowed:.1e}, rms {scale:.3g}) at sequence {sequence}, "
        f"position {position}, token {token}: {float(ours[sequence, position, token]):.6g} and "
        f"{float(theirs[sequence, position, token]):.6g}; likeliest token the same at {same:.1%}"
    )
    verdict.lines.append(line)
    if not largest <= allowed:  # also where it is nan
        verdict.problems.append(f"{what} differ by {largest:.2e}, more than {allowed:.1e}")
