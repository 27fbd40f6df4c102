"""Train a small GPT on the source of Python's standard library, with 32-bit and with 8-bit AdamW.

    python tutorials/train_gpt.py            # a minute or two on two cores
    python tutorials/train_gpt.py --full     # a larger model, compiled; times and memory, too
    python tutorials/train_gpt.py --help

The same model is trained from the same seed on the same batches by `torch.optim.AdamW` (fused),
`torchao8.AdamW` and `torchao8.AdamW8bit`. The 8-bit run is then repeated from the checkpoint that
it left half-way, to show that a restart changes no bit. Ctrl-C leaves a checkpoint, and the same
command continues from it.
"""

import _progress

_progress.start(__name__, "Loading PyTorch")

import argparse
import logging
import math
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from _gpt import GPT, GPTConfig, Text, cross_entropy, sample
from _progress import PULSE, Remaining
from _report import Result, command, machine, median_ms, peak_memory, plot, table
from torch import Tensor, nn

import torchao8

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": partial(torch.optim.AdamW, fused=True),
    "torchao8.AdamW": torchao8.AdamW,
    "torchao8.AdamW8bit": torchao8.AdamW8bit,
}
RESTARTED = "torchao8.AdamW8bit"  # the run whose second half is repeated from a checkpoint
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
WARMUP_SHARE = 0.1

# SMALL is large enough to compare losses as on a large model. FULL is large enough for times and
# memory to mean something.
SMALL = {"steps": 240, "layers": 2, "width": 128, "context": 64, "evaluations": 4,
         "held_out_batches": 16, "lr": 2e-3}  # fmt: skip
FULL = {"steps": 600, "layers": 3, "width": 256, "context": 128, "evaluations": 6,
        "held_out_batches": 32, "lr": 1e-3}  # fmt: skip
# Seconds of --full after the last step: compilations, three processes, 100 steps of each optimizer.
MEASURING = 40.0

# Compiled once: the graph takes the parameters as inputs, so it serves every model of these shapes.
compiled_cross_entropy = torch.compile(cross_entropy)


@dataclass(frozen=True)
class Settings:
    """All that a run's result depends on, apart from the optimizer."""

    steps: int
    batch: int
    lr: float
    layers: int
    width: int
    heads: int
    context: int
    dtype: str
    device: str
    seed: int
    compile: bool
    evaluations: int
    held_out_batches: int

    def model(self) -> GPT:
        torch.manual_seed(self.seed)
        model = GPT(GPTConfig(self.layers, self.width, self.heads, self.context))
        return model.to(self.device, getattr(torch, self.dtype))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up to `settings.lr`, then half a cosine down to zero after the last step."""
    warmup = max(1, round(WARMUP_SHARE * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Training:
    """A model, its optimizer, and their losses so far."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.model = settings.model()
        # A tensor lr is an input of the compiled step; a number would be a constant in it.
        lr = torch.tensor(settings.lr, device=settings.device)
        self.optimizer = OPTIMIZERS[name](
            self.model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.compiled_step = torch.compile(self.optimizer.step)
        self.step = 0
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    def train_step(self, text: Text) -> None:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"].fill_(learning_rate(self.step, settings))
        batch = text.batch(self.step, settings.seed, settings.batch, settings.context)
        loss = compiled_cross_entropy(self.model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.compiled_step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step += 1

    @torch.no_grad()
    def evaluate(self, text: Text) -> None:
        """Measure the held-out loss, eagerly: compiling would take longer than it saves."""
        s = self.settings
        batches = text.held_out_batches(s.held_out_batches, s.batch, s.context)
        losses = [cross_entropy(self.model, *batch).item() for batch in batches]
        self.held_out.append((self.step, statistics.fmean(losses)))

    def save(self, path: Path) -> None:
        """Write a checkpoint of plain values, which `torch.load(weights_only=True)` reads."""
        content = {
            "name": self.name,
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "held_out": self.held_out,
        }
        # Under another name first: if the run is killed here, the last checkpoint is still whole.
        unfinished = path.with_suffix(".unfinished")
        torch.save(content, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location=self.settings.device, weights_only=True)
        differing = {
            key: (content["settings"].get(key), value)
            for key, value in asdict(self.settings).items()
            if content["settings"].get(key) != value
        }
        if differing:
            changes = ", ".join(f"{key} {old} (now {new})" for key, (old, new) in differing.items())
            raise SystemExit(f"{path} was made with {changes}: use --fresh or another --out")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        self.losses = content["losses"]
        self.held_out = content["held_out"]

    def bits(self) -> dict[str, Tensor]:
        """Return every parameter and every state tensor by name."""
        tensors = dict(self.model.state_dict())
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer state {index} {key}": state[key] for key in state})
        return tensors

    def optimizer_bytes_per_parameter(self) -> float:
        states = self.optimizer.state_dict()["state"].values()
        state_bytes = sum(value.nbytes for state in states for value in state.values())
        return state_bytes / sum(parameter.numel() for parameter in self.model.parameters())


def show(title: str, training: Training, remaining: Remaining) -> None:
    """Print a line after the first step, which compiles, every few seconds, and after the last."""
    remaining.step()
    if len(training.losses) == 1 or training.finished or PULSE.due():
        total, loss = training.settings.steps, training.losses[-1]
        PULSE.say(f"{title}: step {training.step}/{total}, loss {loss:.3f}; {remaining}")


@contextmanager
def delayed_interrupt() -> Iterator[threading.Event]:
    """Delay Ctrl-C to the end of a step, when model and optimizer are at the same step."""
    requested = threading.Event()

    def handle(_number: int, _frame: object) -> None:
        requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not through PULSE: the signal may come while PULSE prints and holds its lock.
        print("\nStopping after this step; Ctrl-C again to stop at once.", flush=True)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    training: Training, text: Text, path: Path, halfway: Path | None, remaining: Remaining
) -> None:
    """Train to the end; save to `path` at evaluations and on Ctrl-C, and once to `halfway`."""
    steps, evaluations = training.settings.steps, training.settings.evaluations
    PULSE.doing(f"{path.stem}: training")
    with delayed_interrupt() as interrupt:
        while not training.finished and not interrupt.is_set():
            training.train_step(text)
            show(path.stem, training, remaining)
            if training.finished or training.step % max(1, steps // evaluations) == 0:
                training.evaluate(text)
                training.save(path)
            if halfway and training.step == max(1, steps // 2):
                training.save(halfway)
        training.save(path)
    if not training.finished:
        raise KeyboardInterrupt
    PULSE.say(f"{path.stem}: held-out loss {training.held_out[-1][1]:.4f}")


def checkpoints(out: Path, name: str) -> tuple[Path, Path, Path]:
    """Return the files of a run, of its state half-way, and of its repeated second half."""
    return out / f"{name}.pt", out / f"{name}.halfway.pt", out / f"{name}.restarted.pt"


def run(
    name: str,
    settings: Settings,
    text: Text,
    path: Path,
    remaining: Remaining,
    *,
    start: Path | None = None,
    halfway: Path | None = None,
) -> Training:
    """Train from the checkpoint at `path`, else from that at `start`, else from the beginning."""
    training = Training(name, settings)
    source = path if path.exists() else start
    if source:
        training.load(source)
        # Only the second half of a repeated run was counted.
        remaining.skip(training.step - (settings.steps // 2 if start else 0))
        what = "is finished in" if training.finished else f"continues at step {training.step} from"
        PULSE.say(f"{path.stem} {what} {source}")
    if not training.finished:
        train(training, text, path, halfway, remaining)
    return training


def differing_tensors(one: Training, other: Training) -> list[str]:
    """Return the names of the parameters and state tensors that are not the same bits."""
    ours, theirs = one.bits(), other.bits()
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def check_restart(training: Training, text: Text, out: Path, remaining: Remaining) -> bool:
    """Repeat the second half of a run in new objects, and compare every bit with the run's."""
    _, halfway, path = checkpoints(out, training.name)
    repeated = run(training.name, training.settings, text, path, remaining, start=halfway)
    differing = differing_tensors(training, repeated)
    if differing:
        named = ", ".join(differing[:5])
        PULSE.say(f"{path.stem} differs in {len(differing)} tensors: {named} ...")
    else:
        PULSE.say(f"{path.stem} has the same bits in all {len(training.bits())} tensors")
    return not differing


def step_times(names: list[str], settings: Settings, rounds: int = 100) -> dict[str, float]:
    """Return the median milliseconds of each optimizer's compiled step on this model."""
    calls = {}
    for name in names:
        training = Training(name, settings)
        for parameter in training.model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        training.compiled_step()  # compiles, and allocates the state
        calls[name] = training.compiled_step
    return median_ms(calls, settings.device, rounds)


def train_briefly(name: str, settings: Settings) -> None:
    """Take a few training steps: enough to reach the memory that a long training needs."""
    prepare(settings)
    text = Text.from_stdlib(settings.device)
    training = Training(name, settings)
    for _ in range(3):
        training.train_step(text)


def prepare(settings: Settings) -> None:
    # Without deterministic algorithms the order of threads decides the order of some sums in
    # gradients, and no two runs have the same bits. With them, cuBLAS needs the variable.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if not settings.compile:
        torch.compiler.set_stance("force_eager")
    # This logger warns at each compilation that the profiler's record of the step is ignored.
    logging.getLogger("torch._dynamo.variables.ctx_manager").setLevel(logging.ERROR)


def default_device() -> str:
    """Return "cuda" if there is a GPU that this build of torchao8 has kernels for, else "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    parameter = nn.Parameter(torch.zeros(1, device="cuda"))
    parameter.grad = torch.zeros_like(parameter)
    try:
        torchao8.AdamW([parameter]).step()
    except RuntimeError as error:
        PULSE.say(f"Training on the CPU, since the optimizer does not run on CUDA: {error}")
        return "cpu"
    return "cuda"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def make_parser(sizes: dict[str, float]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "(%(default)s)"
    add("--out", type=Path, default=Path("runs/gpt"), help=f"where files go {default}")
    add("--full", action="store_true", help="a larger model, compiled; measures times and memory")
    add("--fresh", action="store_true", help="remove the checkpoints in --out and start again")
    names = list(OPTIMIZERS)
    add("--optimizers", nargs="+", choices=names, default=names, help="those to train with")

    add = parser.add_argument_group("the run; a checkpoint needs the same values").add_argument
    add("--steps", type=positive, help=f"training steps {default}")
    add("--batch", type=positive, default=8, help=f"sequences in a step {default}")
    add("--lr", type=float, help=f"highest learning rate {default}")
    add("--layers", type=positive, help=f"transformer blocks {default}")
    add("--width", type=positive, help=f"size of the residual stream {default}")
    add("--heads", type=positive, default=4, help=f"attention heads {default}")
    add("--context", type=positive, help=f"bytes in a sequence {default}")
    dtypes = ["float32", "bfloat16"]
    add("--dtype", choices=dtypes, default=dtypes[0], help=f"dtype of the parameters {default}")
    add("--device", default="auto", help="such as cpu or cuda; auto is CUDA if there is a GPU")
    add("--seed", type=int, default=0, help=f"seed of the parameters and the batches {default}")
    add("--evaluations", type=positive, help=f"how often to measure the held-out loss {default}")
    add("--held-out-batches", type=positive, help=f"batches in an evaluation {default}")
    compiles = argparse.BooleanOptionalAction
    add("--compile", action=compiles, default=sizes is FULL, help="use torch.compile (--full does)")
    parser.set_defaults(**sizes)
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    given = sys.argv[1:] if argv is None else argv
    parser = make_parser(FULL if "--full" in given else SMALL)
    arguments = parser.parse_args(given)
    if arguments.width % (2 * arguments.heads):
        parser.error("--width must be a multiple of twice --heads: a head rotates pairs of numbers")
    if arguments.device == "auto":
        arguments.device = default_device()
    values = vars(arguments)
    return arguments, Settings(**{field.name: values[field.name] for field in fields(Settings)})


def train_all(
    names: list[str], settings: Settings, text: Text, out: Path, full: bool
) -> tuple[dict[str, Training], bool]:
    """Train with every optimizer; return the runs and whether the restart changed no bit."""
    trainings, same_bits = {}, True
    repeated = settings.steps - settings.steps // 2 if RESTARTED in names else 0
    remaining = Remaining(len(names) * settings.steps + repeated, MEASURING if full else 0.0)
    for name in names:
        path, halfway, _ = checkpoints(out, name)
        if name == RESTARTED:
            trainings[name] = run(name, settings, text, path, remaining, halfway=halfway)
            same_bits = check_restart(trainings[name], text, out, remaining)
        else:
            trainings[name] = run(name, settings, text, path, remaining)
    return trainings, same_bits


def measured(name: str, training: Training, step_ms: float | None, peak: int | None) -> Result:
    state = training.optimizer_bytes_per_parameter()
    return Result(name, training.losses, training.held_out, state, peak, step_ms)


def report(trainings: dict[str, Training], settings: Settings, out: Path, full: bool) -> None:
    """Show all results on the screen and in two files; with ``full``, also times and memory.

    Times and memory of a small model would say nothing: it fits into the caches, and takes less
    memory than Python and PyTorch do.
    """
    step_ms: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    if full:
        PULSE.say(f"Measuring times and memory, about {_progress.minutes(MEASURING)}")
        PULSE.doing("measuring the time of a step")
        step_ms = step_times(list(trainings), settings)
        for name in trainings:
            PULSE.doing(f"measuring the memory of {name}")
            peaks[name] = peak_memory(settings.device, train_briefly, name, settings)
    results = [
        measured(name, training, step_ms.get(name), peaks.get(name))
        for name, training in trainings.items()
    ]
    for name, training in trainings.items():
        if name.startswith("torchao8."):
            PULSE.say(f"\n{training.optimizer.memory()}")
    last = results[-1].name
    PULSE.doing(f"sampling from the GPT that {last} trained")
    PULSE.say(f"\nWritten by the GPT that {last} trained:\n{sample(trainings[last].model)}\n")
    text = f"{machine(settings.device)}\n`{command()}`\n\n{table(results)}\n"
    PULSE.say(text)
    (out / "table.md").write_text(text)
    PULSE.doing("drawing the loss curves")
    plot(results, out / "loss.png")
    PULSE.say(f"The table is in {out / 'table.md'}, the loss curves are in {out / 'loss.png'}")


def main(argv: list[str] | None = None) -> int:
    arguments, settings = parse_arguments(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        for name in OPTIMIZERS:
            for path in checkpoints(out, name):
                path.unlink(missing_ok=True)
    prepare(settings)
    PULSE.doing("reading the standard library")
    text = Text.from_stdlib(settings.device)
    millions = sum(parameter.numel() for parameter in settings.model().parameters()) / 1e6
    PULSE.say(f"A GPT of {millions:.1f} million parameters learns the standard library's source:")
    PULSE.say(f"{len(text.train):,} bytes to train on and {len(text.held_out):,} held out.")
    full = arguments.full
    try:
        trainings, same_bits = train_all(arguments.optimizers, settings, text, out, full)
        report(trainings, settings, out, full)
    except KeyboardInterrupt:
        PULSE.say(f"Stopped. The same command continues from the checkpoints in {out}.")
        return 130
    return 0 if same_bits else 1


if __name__ == "__main__":
    sys.exit(main())
