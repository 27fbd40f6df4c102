"""A small byte-level GPT and the text it learns, for the tutorials."""

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Skipped: directories that are not the library's own source, or hold tables, not programs.
SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
HELD_OUT_SHARE = 0.05
VOCABULARY = 256


def stdlib_files() -> list[Path]:
    """Return the source files of this Python's standard library, sorted by their path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(
        path for path in files if SKIPPED_DIRECTORIES.isdisjoint(path.relative_to(root).parts)
    )


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Shuffle the files and return those to train on and those held out.

    The split is by file, so that no held-out text continues a text that was trained on. The split
    depends only on the files, so that runs with different seeds are measured on the same text.
    """
    shuffled = sorted(files)
    random.Random(0).shuffle(shuffled)
    held_out = max(1, round(HELD_OUT_SHARE * len(shuffled)))
    return shuffled[held_out:], shuffled[:held_out]


@dataclass
class Text:
    """Training and held-out text, each one 1-d `uint8` tensor of bytes."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def from_stdlib(cls, device: str) -> "Text":
        """Read the standard library's source."""
        parts = split_files(stdlib_files())
        train, held_out = (b"\n".join(path.read_bytes() for path in part) for part in parts)
        return cls(to_bytes_tensor(train, device), to_bytes_tensor(held_out, device))

    def batch(self, step: int, seed: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets, both int64 of shape (size, context), of one step.

        They depend only on the seed and the step. So every optimizer sees the same batches, and a
        restarted run continues with the right one.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        return windows(self.train, starts, context)

    def held_out_batches(self, count: int, size: int, context: int) -> list[tuple[Tensor, Tensor]]:
        """Return windows spread evenly over the held-out text: always the same ones."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, count * size).long()
        return [windows(self.held_out, chunk, context) for chunk in starts.split(size)]


def to_bytes_tensor(text: bytes, device: str) -> Tensor:
    # frombuffer needs writable memory, as a bytearray has.
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cut a window of context + 1 bytes at each start; the targets are one byte later."""
    index = starts[:, None] + torch.arange(context + 1)
    window = text[index.to(text.device)].long()
    return window[:, :-1], window[:, 1:]


@dataclass(frozen=True)
class GPTConfig:
    layers: int
    width: int
    heads: int
    context: int


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding of x, (..., length, size), by angles that grow with the position.

    `rotation` holds the angles' cosines and sines, (2, length, size / 2). Source: "RoFormer:
    Enhanced Transformer with Rotary Position Embedding", Su et al.
    """
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def rotations(length: int, size: int) -> Tensor:
    """Return `rotation` for `rotate`: vectors of this size at positions 0 to length - 1."""
    frequencies = 1000.0 ** -torch.linspace(0, 1, size // 2)
    angles = torch.outer(torch.arange(length), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


class Block(nn.Module):
    """Causal self-attention, then an MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // config.heads)
        self.key_norm = nn.RMSNorm(width // config.heads)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def attention(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query = rotate(self.query_norm(query), rotation)
        key = rotate(self.key_norm(key), rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """A decoder-only transformer: bytes, int64 (batch, length), to logits (batch, length, 256)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        rotation = rotations(config.context, config.width // config.heads)
        self.register_buffer("rotation", rotation, persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's initialization: layers that add to the residual start smaller in a deep model."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds_to_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                depth = 2 * self.config.layers if adds_to_residual else 1
                nn.init.normal_(parameter, std=0.02 / depth**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        rotation = self.rotation[:, : inputs.shape[1]]
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


def cross_entropy(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats per byte (0-d float32)."""
    logits = model(inputs).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


PROMPT = """class Reader:
    def read(self, size):
        """


@torch.no_grad()
def sample(model: GPT, prompt: str = PROMPT, length: int = 400, temperature: float = 0.7) -> str:
    """Continue the prompt by `length` bytes and return both."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor(list(prompt.encode()))
    for _ in range(length):
        inputs = text[None, -model.config.context :].to(device)
        logits = model(inputs)[0, -1].float().cpu()
        chances = torch.softmax(logits / temperature, dim=0)
        text = torch.cat([text, torch.multinomial(chances, 1, generator=generator)])
    return bytes(text.tolist()).decode(errors="replace")
