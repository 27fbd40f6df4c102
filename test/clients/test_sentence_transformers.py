"""sentence-transformers, whose trainer is one of transformers'."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch

pytest.importorskip("sentence_transformers", reason="no sentence-transformers: make test-clients")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.losses import MultipleNegativesRankingLoss, SoftmaxLoss
from sentence_transformers.models import Pooling, Transformer
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from transformers import BertConfig, BertModel

from torchao8.integrations.transformers import create_optimizer, trainer_optimizer


def model(folder: Path) -> SentenceTransformer:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(vocab_size=128, num_attention_heads=4, **sizes))
    bert.save_pretrained(folder / "bert")
    runs.tokenizer().save_pretrained(folder / "bert")
    words = Transformer(str(folder / "bert"), max_seq_length=32)
    return SentenceTransformer(modules=[words, Pooling(64)], device="cpu")


def arguments(folder: Path) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        **runs.trainer_options(folder / "runs", optim="adamw_torch")
    )


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"anchor": runs.sentences(24), "positive": runs.sentences(24, 6)})

    def make() -> Any:
        args = arguments(tmp_path)
        given = (
            {}
            if cls is torch.optim.AdamW
            else {"optimizer_cls_and_kwargs": trainer_optimizer(args)}
        )
        embedder = model(tmp_path)
        return SentenceTransformerTrainer(
            model=embedder,
            args=args,
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(embedder),
            **given,
        )

    runs.train_and_resume(make, tmp_path / "runs")


@pytest.mark.parametrize("is_made_for_the_loss", [True, False])
def test_a_loss_with_parameters(is_made_for_the_loss: bool, tmp_path: Path) -> None:
    """A class alone gets the model's parameters only: those of the loss stay as they are."""
    rows = Dataset.from_dict(
        {"a": runs.sentences(24), "b": runs.sentences(24, 6), "label": [0, 1, 2] * 8}
    )
    embedder, args = model(tmp_path), arguments(tmp_path)
    loss = SoftmaxLoss(embedder, sentence_embedding_dimension=64, num_labels=3)
    before = loss.classifier.weight.detach().clone()
    given = (
        {"optimizers": (create_optimizer(loss, args), None)}
        if is_made_for_the_loss
        else {"optimizer_cls_and_kwargs": trainer_optimizer(args)}
    )
    trainer = SentenceTransformerTrainer(
        model=embedder, args=args, train_dataset=rows, loss=loss, **given
    )
    trainer.train()
    assert torch.equal(before, loss.classifier.weight) != is_made_for_the_loss
