"""transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import run_ranks

import torchao8

pytest.importorskip("transformers", reason="no transformers: make test-clients")
pytest.importorskip("accelerate", reason="no accelerate, which the Trainer needs")

from sharded_by_accelerate import force_fsdp2, of_rank
from transformers import Trainer, TrainingArguments

from torchao8.integrations.transformers import create_optimizer, trainer_optimizer


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(**runs.trainer_options(folder, **options))


def make(folder: Path, cls: type, **options: Any) -> Trainer:
    """A trainer with ours, or with the AdamW of torch that it makes itself."""
    args = arguments(folder, **options)
    ours = {} if cls is torch.optim.AdamW else {"optimizer_cls_and_kwargs": trainer_optimizer(args)}
    return Trainer(runs.causal_lm(), args, train_dataset=runs.token_rows(24), **ours)


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    runs.train_and_resume(lambda: make(tmp_path, cls, optim="adamw_torch"), tmp_path)


def test_numbers_and_groups_are_those_of_the_trainer(tmp_path: Path) -> None:
    classes = (torch.optim.AdamW, torchao8.AdamW8bit)
    trainers = [make(tmp_path, cls, optim="adamw_torch") for cls in classes]
    of_torch, ours = (trainer.create_optimizer() for trainer in trainers)
    assert type(ours) is torchao8.AdamW8bit

    def options(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        names = {p: name for name, p in trainer.model.named_parameters()}
        kept = ("lr", "betas", "eps", "weight_decay")
        return {
            names[p]: {k: group[k] for k in kept}
            for group in optimizer.param_groups
            for p in group["params"]
        }

    assert options(trainers[0], of_torch) == options(trainers[1], ours)
    assert options(trainers[1], ours)["lm_head.weight"] == {
        "lr": 3e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


def test_embeddings_have_32_bits_and_matrices_8(tmp_path: Path) -> None:
    trainer = make(tmp_path, torchao8.AdamW8bit, max_steps=1, save_strategy="no")
    trainer.train()
    optimizer, model = runs.unwrapped(trainer.optimizer), trainer.model
    assert "exp_avg" in optimizer.state[model.model.embed_tokens.weight]
    assert "exp_avg_codes" in optimizer.state[model.lm_head.weight]


def test_the_optimizer_itself_is_taken_too(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no")
    ends = []
    for is_given in (True, False):
        model = runs.causal_lm()
        given = (
            {"optimizers": (create_optimizer(model, args), None)}
            if is_given
            else {"optimizer_cls_and_kwargs": trainer_optimizer(args)}
        )
        trainer = Trainer(model, args, train_dataset=runs.token_rows(24), **given)
        trainer.train()
        ends.append(runs.ended(trainer.model, trainer.optimizer))
    runs.assert_same(*ends)


def test_other_classes_options_and_patterns(tmp_path: Path) -> None:
    args, model = arguments(tmp_path), runs.causal_lm()
    lion = create_optimizer(model, args, torchao8.Lion8bit, embeddings_in_32bit=False, seed=3)
    assert lion.defaults["betas"] == (0.9, 0.95)
    assert lion.defaults["seed"] == 3
    assert {group["optim_bits"] for group in lion.param_groups} == {8}
    slow = {"lm_head.*": {"lr": 1e-5, "weight_decay": 0.5}}
    ademamix = create_optimizer(model, args, torchao8.AdEMAMix8bit, patterns=slow, alpha=2.0)
    assert ademamix.defaults["betas"] == (0.9, 0.95, 0.9999)
    assert ademamix.defaults["alpha"] == 2.0
    (head,) = (g for g in ademamix.param_groups if g["params"][0] is model.lm_head.weight)
    assert (head["lr"], head["weight_decay"]) == (1e-5, 0.5)
    sgd = create_optimizer(model, args, torchao8.SGD8bit, momentum=0.9)
    assert (sgd.defaults["lr"], sgd.defaults["weight_decay"]) == (3e-3, 0.1)


def test_what_is_no_class_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cls: expected a class of torchao8"):
        create_optimizer(runs.causal_lm(), arguments(tmp_path), torch.optim.AdamW)


def test_bf16_gradient_accumulation_and_clipping(tmp_path: Path) -> None:
    options = {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    runs.train_and_resume(lambda: make(tmp_path, torchao8.AdamW8bit, **options), tmp_path)


def test_a_class_alone_ignores_the_arguments(tmp_path: Path) -> None:
    """Why there is an adapter at all."""
    model, args = runs.causal_lm(), arguments(tmp_path)
    alone = Trainer(model, args, optimizer_cls_and_kwargs=(torchao8.AdamW8bit, {}))
    optimizer = alone.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert {group["optim_bits"] for group in optimizer.param_groups} == {8}


def test_a_run_of_torch_goes_on_in_8_bits(tmp_path: Path) -> None:
    """Its file has no names, so the groups must be the same: no group for embeddings."""
    make(tmp_path, torch.optim.AdamW, optim="adamw_torch").train()
    args = arguments(tmp_path)
    for in_32bit in (True, False):
        optimizer = trainer_optimizer(args, embeddings_in_32bit=in_32bit)
        trainer = Trainer(
            runs.causal_lm(),
            args,
            train_dataset=runs.token_rows(24),
            optimizer_cls_and_kwargs=optimizer,
        )
        if in_32bit:
            with pytest.raises(ValueError, match="group"):
                trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
            continue
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
        states = runs.unwrapped(trainer.optimizer).state
        assert {int(state["step"]) for state in states.values()} == {6}
        assert "exp_avg_codes" in states[trainer.model.lm_head.weight]


def resume_sharded(rank: int, world_size: int, ours: bool, folder: str) -> None:
    force_fsdp2()
    cls = torchao8.AdamW8bit if ours else torch.optim.AdamW
    sharding = {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    }
    whole, halved = (
        make(Path(folder), cls, optim="adamw_torch", fsdp=True, fsdp_config=sharding)
        for _ in range(2)
    )
    whole.train()
    end = of_rank(whole.model, whole.optimizer)
    halved.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    runs.assert_same(end, of_rank(halved.model, halved.optimizer))


@pytest.mark.parametrize("ours", [False, True])
def test_fsdp2_resumes_to_the_bit(ours: bool, tmp_path: Path) -> None:
    run_ranks(2, resume_sharded, ours, str(tmp_path))
