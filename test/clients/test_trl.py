"""trl: supervised finetuning, with LoRA and without, and DPO."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch

pytest.importorskip("trl", reason="no trl: make test-clients")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from torchao8.integrations.transformers import create_optimizer, trainer_optimizer


def ours(cls: type, args: Any, **options: Any) -> dict[str, Any]:
    if cls is torch.optim.AdamW:
        return {}
    return {"optimizer_cls_and_kwargs": trainer_optimizer(args, **options)}


@runs.both_optimizers
def test_sft_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    def make() -> Any:
        args = SFTConfig(
            **runs.trainer_options(tmp_path, optim="adamw_torch", bf16=False), max_length=32
        )
        return SFTTrainer(
            runs.causal_lm(),
            args,
            train_dataset=Dataset.from_dict({"text": runs.sentences(24)}),
            processing_class=runs.tokenizer(),
            **ours(cls, args),
        )

    runs.train_and_resume(make, tmp_path)


@runs.both_optimizers
def test_sft_with_lora_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="no peft: make test-clients")

    def make() -> Any:
        args = SFTConfig(
            **runs.trainer_options(tmp_path, optim="adamw_torch", bf16=False), max_length=32
        )
        torch.manual_seed(2)
        return SFTTrainer(
            runs.causal_lm(),
            args,
            train_dataset=Dataset.from_dict({"text": runs.sentences(24)}),
            processing_class=runs.tokenizer(),
            peft_config=peft.LoraConfig(r=16, target_modules=["q_proj", "up_proj"]),
            **ours(cls, args, min_8bit_size=1024),
        )

    trained = runs.train_and_resume(make, tmp_path)
    groups = runs.unwrapped(trained.optimizer).param_groups
    assert sum(len(group["params"]) for group in groups) == 8  # adapters only: 2 modules, 2 layers


@runs.both_optimizers
def test_dpo_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    """Its trainer has no ``optimizer_cls_and_kwargs``."""
    chosen, rejected = runs.sentences(48)[:24], runs.sentences(48)[24:]
    pairs = {"prompt": runs.sentences(24, 4), "chosen": chosen, "rejected": rejected}

    def make() -> Any:
        args = DPOConfig(**runs.trainer_options(tmp_path, optim="adamw_torch", bf16=False))
        model = runs.causal_lm()
        optimizer = None if cls is torch.optim.AdamW else create_optimizer(model, args)
        return DPOTrainer(
            model,
            ref_model=runs.causal_lm(),
            args=args,
            train_dataset=Dataset.from_dict(pairs),
            processing_class=runs.tokenizer(),
            optimizers=(optimizer, None),
        )

    runs.train_and_resume(make, tmp_path)
