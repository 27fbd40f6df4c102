"""PEFT: LoRA adapters."""

import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

import torchao8

pytest.importorskip("peft", reason="no peft: make test-clients")
pytest.importorskip("transformers", reason="no transformers: make test-clients")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer


def adapters(model: Any) -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.0)
    return get_peft_model(model, config)


def train(model: Any, optimizer: Any, rows: list[dict[str, list[int]]]) -> None:
    model.train()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make(cls: type, model: Any) -> Any:
    options = {} if cls is torch.optim.AdamW else {"min_8bit_size": 512}
    return cls([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    """The adapters by PEFT's own files, the optimizer by torch.save."""
    rows = runs.token_rows(6)
    model = adapters(runs.causal_lm())
    optimizer = make(cls, model)
    train(model, optimizer, rows[:3])
    model.save_pretrained(tmp_path)
    saved = runs.through_file(optimizer.state_dict())
    train(model, optimizer, rows[3:])

    resumed = PeftModel.from_pretrained(runs.causal_lm(), tmp_path, is_trainable=True)
    again = make(cls, resumed)
    again.load_state_dict(saved)
    train(resumed, again, rows[3:])
    runs.assert_same(runs.ended(model, optimizer), runs.ended(resumed, again))


def test_small_adapters_have_8_bits_when_asked() -> None:
    """By default, matrices of fewer than 4096 elements keep 32 bits, as in bitsandbytes."""
    model = adapters(runs.causal_lm())
    for options, codes in (({}, 0), ({"min_8bit_size": 512}, 12)):
        optimizer = torchao8.AdamW8bit(torchao8.param_groups(model), lr=1e-3, **options)
        train(model, optimizer, runs.token_rows(1))
        assert len(optimizer.state) == 12  # 3 modules of 2 layers, 2 matrices each
        assert sum("exp_avg_codes" in state for state in optimizer.state.values()) == codes


def test_loraplus_takes_classes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports bitsandbytes for every class named as one of its own."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    model, options = adapters(runs.causal_lm()), {"lr": 1e-3, "loraplus_lr_ratio": 16}
    with pytest.raises(ImportError):
        create_loraplus_optimizer(model, torchao8.AdamW8bit, **options)
    bits = {"optim_bits": 8, "min_8bit_size": 512}
    optimizer = create_loraplus_optimizer(model, torchao8.AdamW, **options, **bits)
    train(model, optimizer, runs.token_rows(1))
    assert all("exp_avg_codes" in state for state in optimizer.state.values())
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 16e-3}
