"""fastai."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn
from torch.utils.data import DataLoader

import torchao8

pytest.importorskip("fastai", reason="no fastai: make test-clients")

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401 (both add methods to Learner)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper


def learner(cls: type, folder: Path) -> Any:
    load = DataLoader(runs.batches(3), batch_size=None)
    return Learner(
        DataLoaders(load, load),
        runs.Net(),
        loss_func=nn.functional.cross_entropy,
        opt_func=partial(OptimWrapper, opt=cls),
        lr=1e-2,
        path=folder,
        train_bn=False,
    )


@pytest.mark.filterwarnings("error:Could not load the optimizer state")
@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    whole = learner(cls, tmp_path)
    with whole.no_bar(), whole.no_logging():
        whole.fit(2)
        whole.save("half", with_opt=True)
        whole.fit(2)
    end = runs.ended(whole.model, whole.opt)

    resumed = learner(cls, tmp_path)
    with resumed.no_bar(), resumed.no_logging():
        resumed.load("half", with_opt=True)
        resumed.fit(2)
    runs.assert_same(end, runs.ended(resumed.model, resumed.opt))


def test_one_cycle_sets_the_numbers_of_the_groups(tmp_path: Path) -> None:
    """fastai's schedule of learning rate and momentum reaches the optimizer itself."""
    trained = learner(torchao8.AdamW8bit, tmp_path)
    with trained.no_bar(), trained.no_logging():
        trained.fit_one_cycle(2, 1e-2)
    (group,) = runs.unwrapped(trained.opt).param_groups
    assert group["lr"] == trained.opt.hypers[-1]["lr"]
    assert group["lr"] not in (1e-2, 1e-2 / 25)  # neither the highest nor the first one
    assert group["betas"][0] == trained.opt.hypers[-1]["mom"]
    assert type(runs.unwrapped(trained.opt)) is torchao8.AdamW8bit
    assert torch.isfinite(trained.model.last.weight).all()
