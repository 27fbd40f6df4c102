"""Train a small GPT that is sharded over several processes (FSDP2), with 8-bit AdamW.

    torchrun --nproc-per-node 2 tutorials/train_fsdp2.py --steps 40
    torchrun --nproc-per-node 3 tutorials/train_fsdp2.py --steps 80    # continues at step 40
    python tutorials/train_fsdp2.py --help                             # one process works, too

Every process, called a rank, keeps a part of each parameter and of its optimizer state. 8-bit AdamW
makes the state a fourth of its size, and FSDP2 divides it among the ranks. DCP, PyTorch's
distributed checkpoint, saves the parts, and any number of ranks can load them: the optimizer state
has the same bytes on any number of ranks.

The batches do not depend on the number of ranks either. So a run that continues with more or fewer
ranks has the same losses, except that float32 numbers are added in another order. A run that is
killed, by Ctrl-C or otherwise, continues from the last complete checkpoint.
"""

import os

import _progress

if int(os.environ.get("RANK", 0)) == 0:  # only one rank prints
    _progress.start(__name__, "Loading PyTorch")

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _gpt import GPT, GPTConfig, Text, cross_entropy
from _progress import PULSE, Remaining
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchao8
from torchao8.checkpoint import load_dcp

WARMUP_STEPS = 10
CLIP_NORM = 1.0
# After loading, the held-out loss may differ from that before saving only by rounding: a rank with
# more or fewer sequences may add the same products in another order. One rounding is 6e-8; this
# allows many. A training step changes the loss by 1e-3 and more.
LOSS_TOLERANCE = 1e-5
# The losses of a run depend on these, and not on the number of ranks.
SETTINGS = ("batch", "lr", "layers", "width", "heads", "context", "seed", "held_out_batches")


def start_ranks(device_type: str | None) -> torch.device:
    """Join the ranks that torchrun names in the environment; return the device of this one."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device_type is None:
        device_type = "cuda" if torch.cuda.device_count() >= local_ranks else "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # started without torchrun: a group of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(device_type, local_rank if device_type == "cuda" else 0)


def leave(status: int, why: str = "") -> NoReturn:
    """End this process without Python's shutdown: gloo's threads may still hold tensors then, on a
    busy machine, and abort a process that has done its work."""
    if why:
        print(why, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(text: str) -> None:
    """Print on one rank; all ranks call this."""
    if dist.get_rank() == 0:
        PULSE.say(text)


def make_model(arguments: argparse.Namespace, device: torch.device) -> GPT:
    """Return the model, of which each rank keeps its shard."""
    # All ranks make the same whole model, so that its values do not depend on how it is sharded. A
    # model too large for that is made on the meta device and sharded, and gets its values then.
    torch.manual_seed(arguments.seed)
    sizes = GPTConfig(arguments.layers, arguments.width, arguments.heads, arguments.context)
    model = GPT(sizes).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # A sharded module gathers its parameters when it runs and frees them after. Each block is
    # sharded by itself, so that one at a time is whole. The root has the rest: embedding and head.
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def my_share(batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
    """Return this rank's sequences of a batch, and which share of the batch they are.

    Every rank draws the whole batch, which is small, so that it is the same at any world size. If
    the number of ranks does not divide the batch, some ranks have one sequence more.
    """
    inputs, targets = batch
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return (inputs[mine], targets[mine]), len(inputs[mine]) / len(inputs)


class Training:
    """A model, its optimizer, and their progress."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.settings = {name: getattr(arguments, name) for name in SETTINGS}
        self.text = Text.from_stdlib(str(device))
        self.model = make_model(arguments, device)
        # After fully_shard, which replaces the parameters by sharded ones. A tensor lr is an input
        # of the compiled step; a number that changes would recompile it.
        lr = torch.tensor(arguments.lr, device=device)
        self.optimizer = torchao8.AdamW8bit(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.optimizer_step = self.optimizer.step
        if arguments.compile:
            self.optimizer_step = torch.compile(self.optimizer.step, fullgraph=True)
        self.step = 0
        self.held_out = float("nan")

    def train_step(self) -> None:
        a = self.arguments
        # No decay to the last step, or earlier steps would depend on --steps.
        for group in self.optimizer.param_groups:
            group["lr"].fill_(a.lr * min(1.0, (self.step + 1) / WARMUP_STEPS))
        mine, share = my_share(self.text.batch(self.step, a.seed, a.batch, a.context))
        # The loss is the mean over the whole batch: the sum of the ranks' means, each times its
        # share. FSDP2 takes the mean of the ranks' gradients, not the sum: hence the last factor.
        loss = cross_entropy(self.model, *mine) * share * dist.get_world_size()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)  # norm over all shards
        self.optimizer_step()
        self.optimizer.zero_grad()
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean held-out loss, the same number on every rank."""
        a = self.arguments
        total = torch.zeros((), dtype=torch.float64, device=self.text.train.device)
        for batch in self.text.held_out_batches(a.held_out_batches, a.batch, a.context):
            mine, share = my_share(batch)
            total += cross_entropy(self.model, *mine) * share
        dist.all_reduce(total)
        return total.item() / a.held_out_batches

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: shards as DTensors, by the names of the parameters."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        parts = {"model": model, "optimizer": optimizer}
        return {**parts, "progress": self.progress(), "settings": self.settings}

    def progress(self) -> dict[str, Any]:
        """Return the step to continue from, and the loss to compare with then."""
        return {"step": self.step, "held_out": self.held_out, "ranks": dist.get_world_size()}

    def save(self) -> None:
        """Write a checkpoint into a folder, and rename the folder when it is complete."""
        folder = self.arguments.out / f"step-{self.step:08}"
        unfinished = folder.with_suffix(".unfinished")
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
            shutil.rmtree(folder, ignore_errors=True)  # incomplete: it was not loaded
        dist.barrier()
        # Each rank writes its shards, and waits until all have.
        dcp.save(self.state_dict(), checkpoint_id=unfinished)
        if dist.get_rank() == 0:
            unfinished.replace(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint, and check that the model has the loss that it had."""
        # DCP reads only the entries of this dict, and writes them into it.
        saved = {"settings": dict(self.settings)}
        dcp.load(saved, checkpoint_id=folder)
        for name, value in saved["settings"].items():
            if value != self.settings[name]:
                leave(1, f"{folder} was made with {name} {value}: use another --out")
        # Each rank reads its own shards from whichever files: the number of ranks may change.
        state = {"model": get_model_state_dict(self.model), "progress": self.progress()}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        load_dcp(self.model, self.optimizer, folder)
        progress = state["progress"]
        self.step, before = progress["step"], progress["held_out"]
        self.held_out = self.evaluate()
        ranks = "1 rank" if progress["ranks"] == 1 else f"{progress['ranks']} ranks"
        say(f"{folder}, saved by {ranks}: held-out loss {before:.6f}")
        say(f"loaded by {dist.get_world_size()}: held-out loss {self.held_out:.6f}")
        if not abs(self.held_out - before) <= LOSS_TOLERANCE * before:
            leave(1, "the losses differ: this is not the model that was saved")

    def train(self) -> None:
        remaining = Remaining(self.arguments.steps - self.step)
        PULSE.doing("training")
        while self.step < self.arguments.steps:
            self.train_step()
            remaining.step()
            if PULSE.due():
                say(f"step {self.step}/{self.arguments.steps}; {remaining}")
            if self.step % self.arguments.save_every == 0 or self.step == self.arguments.steps:
                self.held_out = self.evaluate()
                say(f"step {self.step}: held-out loss {self.held_out:.6f}")
                self.save()

    def report_memory(self) -> None:
        """Print each rank's bytes of optimizer state, and the bytes of two float32 an element."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values()]
        shards = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        # The optimizer's: in the model, FSDP2 leaves the root's own ones whole after an evaluation.
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        elements = sum(p.to_local().numel() for p in params)
        mine = sum(shard.nbytes for shard in shards), 8 * elements
        of_all = [mine] * dist.get_world_size()
        dist.all_gather_object(of_all, mine)
        for rank, (ours, theirs) in enumerate(of_all):
            say(f"rank {rank}: {ours:,} bytes of optimizer state; AdamW takes {theirs:,}")


def newest_checkpoint(out: Path) -> Path | None:
    """Return the newest complete folder. DCP writes .metadata last."""
    return max((path.parent for path in out.glob("step-????????/.metadata")), default=None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "(%(default)s)"
    add("--out", type=Path, default=Path("runs/fsdp2"), help=f"where checkpoints go {default}")
    add("--steps", type=int, default=40, help=f"train up to this step {default}")
    add("--save-every", type=int, default=20, help=f"steps between checkpoints {default}")
    add("--compile", action="store_true", help="torch.compile the optimizer's step")
    add("--device", choices=["cpu", "cuda"], help="by default cuda if there is a GPU for each rank")

    add = parser.add_argument_group("the run; a checkpoint needs the same values").add_argument
    add("--batch", type=int, default=12, help=f"sequences a step, on all ranks {default}")
    add("--lr", type=float, default=1e-3, help=f"learning rate after the warm-up {default}")
    add("--layers", type=int, default=2, help=f"transformer blocks {default}")
    add("--width", type=int, default=128, help=f"size of the residual stream {default}")
    add("--heads", type=int, default=4, help=f"attention heads {default}")
    add("--context", type=int, default=64, help=f"bytes in a sequence {default}")
    add("--seed", type=int, default=0, help=f"seed of the parameters and the batches {default}")
    add("--held-out-batches", type=int, default=8, help=f"batches in an evaluation {default}")
    arguments = parser.parse_args()
    if arguments.width % (2 * arguments.heads):
        parser.error("--width must be a multiple of twice --heads: a head rotates pairs of numbers")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a torch that is built for it")
    if arguments.batch < int(os.environ.get("WORLD_SIZE", 1)):
        parser.error("--batch must have a sequence for each rank")
    if min(arguments.save_every, arguments.held_out_batches) < 1:
        parser.error("--save-every and --held-out-batches must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    training = Training(arguments, start_ranks(arguments.device))
    if checkpoint := newest_checkpoint(arguments.out):
        training.load(checkpoint)
    training.train()
    training.report_memory()
    dist.barrier()  # no rank leaves while another still communicates
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
