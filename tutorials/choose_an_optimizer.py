"""Which optimizer, and how many bits? A lesson of a minute or two, with a tiny GPT.

    python tutorials/choose_an_optimizer.py
    python tutorials/choose_an_optimizer.py --help

Three questions, in the order in which they matter:

1. How much memory does the optimizer take? Adam keeps two numbers for each parameter, 8 bytes in 32
   bits. For most models that is more than the weights themselves.
2. Is the loss with 8 bits worse? Train the same model on the same batches with 8 and with 32 bits,
   from several seeds. Seeds change the loss, too: a difference smaller than theirs says nothing.
3. Is another rule better, or as good with less memory? Lion and SGD keep one number for each
   parameter, AdEMAMix keeps three. Muon keeps one for each element of the matrices inside of the
   model; AdamW trains the rest.

Everything is measured here, and the advice at the end follows from the measured numbers. With
another model, text or learning rate the advice may be another. Replace `GPT` and `Text` by your own
to get advice for your own problem.

Advice needs a model that has learned something: before that, all optimizers are alike. So there is
no advice if the model predicts no better than the frequencies of the bytes would, or if seeds
differ so much that they hide nearly every difference.
"""

import _progress

_progress.start(__name__, "Loading PyTorch")

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from _gpt import GPT, GPTConfig, Text, cross_entropy
from _progress import PULSE, Remaining
from torch import nn

import torchao8

CLIP_NORM = 1.0
# A share of the loss: if seeds differ by more, the runs are too short to compare optimizers.
LARGEST_SPREAD = 0.02
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Choice:
    """An optimizer one may choose: its name, and how to make it for a model."""

    name: str
    make: Callable[[nn.Module], torch.optim.Optimizer]


# Each rule needs its own learning rate. These were found by trying, on this model; try again when
# you change the rule. Between 32 and 8 bits the rate need not change: the rule is the same.
ADAM = {"lr": 3e-3, "weight_decay": 0.1}
YARDSTICK = Choice("AdamW, 32 bits", lambda m: torchao8.AdamW(m.parameters(), **ADAM))
EIGHT_BITS = Choice("AdamW8bit", lambda m: torchao8.AdamW8bit(m.parameters(), **ADAM))
# A row of an embedding gets a gradient only when its token occurs. `param_groups` gives embeddings
# 32-bit state. decay_vectors=True keeps the decay of vectors, so that only this one thing changes.
EMBEDDINGS = Choice(
    "AdamW8bit, embeddings in 32 bits",
    lambda m: torchao8.AdamW8bit(torchao8.param_groups(m, decay_vectors=True), **ADAM),
)
CHOICES = [
    YARDSTICK,
    EIGHT_BITS,
    EMBEDDINGS,
    # `muon=True` says which parameters are matrices inside of the model. Both rules share AdamW's
    # learning rate.
    Choice(
        "MuonAdamW8bit",
        lambda m: torchao8.MuonAdamW8bit(torchao8.param_groups(m, muon=True), **ADAM),
    ),
    Choice("AdEMAMix8bit", lambda m: torchao8.AdEMAMix8bit(m.parameters(), **ADAM, alpha=2.0)),
    Choice("RMSprop8bit", lambda m: torchao8.RMSprop8bit(m.parameters(), lr=1e-3)),
    Choice("Lion8bit", lambda m: torchao8.Lion8bit(m.parameters(), lr=5e-4, weight_decay=0.5)),
    Choice("SGD8bit, momentum", lambda m: torchao8.SGD8bit(m.parameters(), lr=0.1, momentum=0.9)),
]


@dataclass
class Result:
    """What was measured of a choice: memory, and for each seed the held-out loss."""

    name: str
    state_bytes: int
    parameters: int
    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        return statistics.stdev(self.losses)


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The model and the training, the same for every choice."""

    steps: int
    seeds: int
    batch: int
    layers: int
    width: int
    heads: int
    context: int
    held_out_batches: int


def train(
    choice: Choice, seed: int, text: Text, settings: Settings, remaining: Remaining
) -> tuple[float, int, int]:
    """Train a new model; return its held-out loss, the bytes of state, and its parameters.

    The seed sets the model's first parameters and the batches. So all choices start from the same
    parameters and see the same text: a difference at the end comes from the optimizer.
    """
    s = settings
    torch.manual_seed(seed)
    model = GPT(GPTConfig(s.layers, s.width, s.heads, s.context))
    optimizer = choice.make(model)
    highest = [group["lr"] for group in optimizer.param_groups]
    for step in range(s.steps):
        # A short warm-up, then a linear decay to zero.
        warm = (step + 1) / max(1, round(WARMUP_SHARE * s.steps))
        share = min(warm, (s.steps - step) / s.steps)
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = share * lr
        cross_entropy(model, *text.batch(step, seed, s.batch, s.context)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        remaining.step()
        if PULSE.due():
            PULSE.say(f"{choice.name}, seed {seed}: step {step + 1}/{s.steps}; {remaining}")
    with torch.no_grad():
        batches = text.held_out_batches(s.held_out_batches, s.batch, s.context)
        held_out = statistics.fmean(cross_entropy(model, *batch).item() for batch in batches)
    return held_out, state_bytes(optimizer), sum(p.numel() for p in model.parameters())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state, as a checkpoint holds them."""
    states = optimizer.state_dict()["state"].values()
    return sum(value.nbytes for state in states for value in state.values())


def measure(choice: Choice, text: Text, settings: Settings, remaining: Remaining) -> Result:
    """Train with a choice from every seed."""
    PULSE.doing(f"{choice.name}: training")
    runs = [train(choice, seed, text, settings, remaining) for seed in range(settings.seeds)]
    _, memory, parameters = runs[0]
    return Result(choice.name, memory, parameters, [loss for loss, _, _ in runs])


# --- advice from the numbers --------------------------------------------------------------------


def difference(one: Result, other: Result) -> float:
    """How much larger the mean loss of one is than that of the other."""
    return one.loss - other.loss


def as_good(result: Result, yardstick: Result) -> bool:
    """Whether the loss exceeds the yardstick's by at most the yardstick's spread over seeds."""
    return difference(result, yardstick) <= yardstick.spread


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table; differences are from the first."""
    first = results[0]
    lines = [["optimizer", "state, bytes", "a parameter", "held-out loss", "difference", "as good"]]
    for result in results:
        off = "" if result is first else f"{difference(result, first):+.4f}"
        verdict = "" if result is first else "yes" if as_good(result, first) else "no"
        share = f"{result.state_bytes / result.parameters:.2f}"
        loss = f"{result.loss:.4f} ± {result.spread:.4f}"
        lines.append([result.name, f"{result.state_bytes:,}", share, loss, off, verdict])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in lines
    )


def advice_on_bits(yardstick: Result, eight: Result, embeddings: Result) -> str:
    """Answer the second question: whether 8 bits cost anything."""
    factor = yardstick.state_bytes / eight.state_bytes
    off, spread = difference(eight, yardstick), yardstick.spread
    memory = f"{eight.name} keeps {factor:.1f} times less state than {yardstick.name}"
    if as_good(eight, yardstick):
        how = "and lower" if off < -spread else "and no different"
        return (
            f"{memory}. Its loss is {off:+.4f} from there, {how} by the measure of the seeds, "
            f"which differ by {spread:.4f}: 8 bits cost nothing that these runs could show."
        )
    worse = (
        f"{memory}, but its loss is {off:+.4f} from there, more than the {spread:.4f} by which "
        "seeds differ."
    )
    helped = difference(embeddings, yardstick)
    if as_good(embeddings, yardstick):
        saved = yardstick.state_bytes / embeddings.state_bytes
        return (
            f"{worse} With embeddings in 32 bits it is {helped:+.4f}, at "
            f"{saved:.1f} times less state: give embeddings 32 bits (torchao8.param_groups)."
        )
    return (
        f"{worse} Embeddings in 32 bits do not help enough ({helped:+.4f}): keep 32 bits here, or "
        "look for the parameters that need them, group by group."
    )


def advice_on_rule(results: list[Result]) -> str:
    """Answer the third question: the least memory that loses nothing, and the lowest loss."""
    yardstick = results[0]
    good = [result for result in results if as_good(result, yardstick)]
    least = min(good, key=lambda result: result.state_bytes)
    best = min(results, key=lambda result: result.loss)
    share = least.state_bytes / least.parameters
    if least is yardstick:
        text = f"Nothing with less state is as good as {yardstick.name}: keep it."
    else:
        text = f"The least state that loses nothing: {least.name}, {share:.2f} bytes a parameter."
    off = difference(best, yardstick)
    if best is yardstick:
        return f"{text} No choice has a lower loss than {yardstick.name}."
    if off < -yardstick.spread:
        return f"{text} The lowest loss: {best.name}, {off:+.4f} from {yardstick.name}."
    return (
        f"{text} The lowest loss, {best.name}'s, is {off:+.4f} from that of {yardstick.name}: "
        "too little to choose by."
    )


def loss_of_frequencies(text: Text) -> float:
    """Return the loss, in nats per byte, of predicting each byte by its frequency."""
    share = torch.bincount(text.train.long(), minlength=256).double() / len(text.train)
    return -torch.special.xlogy(share, share).sum().item()


def advice(results: list[Result], least: float) -> str:
    """Return the advice that the measured numbers support, or why they support none.

    Args:
        results: in the order of CHOICES.
        least: a model whose loss is not below this has learned nothing.
    """
    if results[0].loss >= least:
        return (
            f"No advice: the loss of {results[0].name}, {results[0].loss:.4f}, is not below "
            f"{least:.4f}, that of predicting each byte by its frequency. In so few steps no model "
            "has learned enough to compare optimizers: raise --steps."
        )
    largest = LARGEST_SPREAD * results[0].loss
    if results[0].spread > largest:
        return (
            f"No advice: the losses of {results[0].name} from several seeds differ by "
            f"{results[0].spread:.4f}, more than {largest:.4f}. That would hide a difference "
            "between optimizers: raise --steps, or --seeds."
        )
    by_name = {result.name: result for result in results}
    three = (by_name[choice.name] for choice in (YARDSTICK, EIGHT_BITS, EMBEDDINGS))
    return f"Bits: {advice_on_bits(*three)}\n\nRule: {advice_on_rule(results)}"


# --- the lesson ---------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parse_arguments(argv: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "(%(default)s)"
    add("--steps", type=positive, default=300, help=f"training steps {default}")
    add("--seeds", type=positive, default=3, help=f"runs of each choice, 2 or more {default}")
    add("--batch", type=positive, default=8, help=f"sequences in a step {default}")
    add("--layers", type=positive, default=2, help=f"transformer blocks {default}")
    add("--width", type=positive, default=64, help=f"size of the residual stream {default}")
    add("--heads", type=positive, default=2, help=f"attention heads {default}")
    add("--context", type=positive, default=64, help=f"bytes in a sequence {default}")
    add("--held-out-batches", type=positive, default=32, help=f"batches for the loss {default}")
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.seeds < 2:
        parser.error("--seeds must be 2 or more: one run does not show how much runs differ")
    if settings.width % (2 * settings.heads):
        parser.error("--width must be a multiple of twice --heads: a head rotates pairs of numbers")
    return settings


def main(argv: list[str] | None = None) -> int:
    settings = parse_arguments(argv)
    PULSE.doing("reading the standard library")
    text = Text.from_stdlib("cpu")
    PULSE.say(
        f"A GPT of {settings.layers} layers learns the source of Python's standard library, "
        f"{settings.steps} steps from each of {settings.seeds} seeds."
    )
    results = []
    remaining = Remaining(len(CHOICES) * settings.seeds * settings.steps)
    for choice in CHOICES:
        results.append(measure(choice, text, settings, remaining))
        last = results[-1]
        memory = f"{last.state_bytes:,} bytes of state"
        PULSE.say(f"{last.name}: {memory}, held-out loss {last.loss:.4f}; {remaining}")
    print(f"\n{table(results)}\n")
    print("± is the standard deviation over seeds; as good: at most that above the first row.")
    print(f"\n{advice(results, loss_of_frequencies(text))}\n")
    print("For the memory of a model of your size: python -m torchao8 estimate --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
