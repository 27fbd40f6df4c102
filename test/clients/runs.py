"""What the tests of clients share: the optimizers they compare, small models, bits of a run.

Every test trains without interruption and, in a second run, stops half-way, saves, makes all
objects anew, loads and goes on. It does so with an optimizer of torch first: where the client
itself repeats its bits with that one, it must with ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import environment  # noqa: F401 (before any client)
import pytest
import torch
from torch import Tensor, nn

import torchao8

both_optimizers = pytest.mark.parametrize("cls", [torch.optim.AdamW, torchao8.AdamW8bit])


class Net(nn.Module):
    """A net of 64 inputs and 4 classes, whose two matrices have 8-bit state, its vectors 32-bit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 128)
        self.last = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def batches(n: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same n batches of inputs and classes for every run."""
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 64, generator=generator),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(n)
    ]


def ended(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """All tensors at the end of a run: weights by name, state by the number of the parameter.

    Where the optimizer is ours, some of the state must have 8 bits.
    """
    state = optimizer.state_dict()["state"]
    tensors = dict(model.state_dict())
    for number, states in state.items():
        tensors.update({f"{number}.{k}": v for k, v in states.items() if isinstance(v, Tensor)})
    assert any(".exp_avg" in name for name in tensors)
    has_codes = any(name.endswith("_codes") for name in tensors)
    assert has_codes == (type(unwrapped(optimizer)).__module__.startswith("torchao8."))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where a client keeps it in an object of its own."""
    while not type(optimizer).__module__.startswith(("torchao8.", "torch.optim.")):
        optimizer = getattr(optimizer, "optimizer", None) or optimizer.opt
    return optimizer


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same tensors, bit by bit."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not _same_bits(a[name], b[name])]
    assert differing == []


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


# -- a language model without a download ----------------------------------------------------------

WORDS = [f"w{i}" for i in range(120)]


def causal_lm() -> Any:
    """A Llama of 2 layers and 64 dimensions, for 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """A tokenizer that splits at spaces, for the words of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def sentences(n: int, length: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(len(WORDS), (n, length), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in numbers.tolist()]


def token_rows(n: int, length: int = 16) -> list[dict[str, list[int]]]:
    """A dataset for a causal language model."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(4, 124, (n, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_options(folder: Any, **options: Any) -> dict[str, Any]:
    """Arguments for every ``TrainingArguments``: 6 steps on the CPU, a checkpoint after 3."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        **options,
    }


def train_and_resume(make: Callable[[], Any], folder: Any) -> Any:
    """Trains with a Trainer of transformers' kind, goes on from its third step with another one.

    Args:
        make: a new trainer with a new model, of 6 steps.

    Returns:
        The first trainer, after both have been compared.
    """
    whole, halved = make(), make()
    whole.train()
    end = ended(whole.model, whole.optimizer)
    halved.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    assert halved.state.global_step == 6
    assert_same(end, ended(halved.model, halved.optimizer))
    return whole


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Plain training."""
    for x, y in data:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_file(value: Any) -> Any:
    """Saved and loaded, with nothing that would run code from the file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
