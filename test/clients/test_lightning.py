"""Lightning."""

from pathlib import Path

import pytest
import runs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="no lightning: make test-clients")

import lightning


class Module(lightning.LightningModule):
    def __init__(self, cls: type, **options: object) -> None:
        super().__init__()
        self.net, self.cls, self.options = runs.Net(), cls, options

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.cls(self.parameters(), lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(
    cls: type,
    epochs: int,
    folder: Path,
    precision: str,
    resume: str | None = None,
    **options: object,
) -> Module:
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=epochs,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(cls, **options)
    trainer.fit(module, DataLoader(runs.batches(3), batch_size=None), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, precision: str, tmp_path: Path) -> None:
    whole = fit(cls, 4, tmp_path, precision)
    end = runs.ended(whole.net, whole.optimizers(use_pl_optimizer=False))
    fit(cls, 2, tmp_path, precision)
    resumed = fit(cls, 4, tmp_path, precision, str(tmp_path / "2.ckpt"))
    runs.assert_same(end, runs.ended(resumed.net, resumed.optimizers(use_pl_optimizer=False)))


@runs.both_optimizers
def test_clipping_refuses_fused(cls: type, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fused"):
        fit(cls, 1, tmp_path, "bf16-mixed", fused=True)
