"""diffusers: the loop of its training scripts, with accelerate and its average of the weights."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("diffusers", reason="no diffusers: make test-clients")
pytest.importorskip("accelerate", reason="no accelerate: make test-clients")

from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel


class Training:
    def __init__(self, cls: type) -> None:
        torch.manual_seed(1)
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        self.average = EMAModel(unet.parameters(), decay=0.9)
        optimizer = cls(unet.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=6)
        generator = torch.Generator().manual_seed(7)
        images = torch.randn(12, 3, 16, 16, generator=generator)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.register_for_checkpointing(self.average)
        self.unet, self.optimizer, self.data, self.schedule = self.accelerator.prepare(
            unet, optimizer, DataLoader(list(images), batch_size=4), schedule
        )

    def epoch(self) -> None:
        noising = DDPMScheduler(num_train_timesteps=100)
        for images in self.data:
            noise, times = torch.randn_like(images), torch.randint(0, 100, (len(images),))
            noised = noising.add_noise(images, noise, times)
            loss = nn.functional.mse_loss(self.unet(noised, times).sample, noise)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.step(self.unet.parameters())

    def end(self) -> dict[str, Any]:
        shadows = {f"average.{i}": p for i, p in enumerate(self.average.shadow_params)}
        return runs.ended(self.unet, self.optimizer) | shadows


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    whole = Training(cls)
    whole.epoch()
    whole.accelerator.save_state(tmp_path / "saved")
    whole.epoch()

    halved = Training(cls)
    halved.accelerator.load_state(tmp_path / "saved")
    halved.epoch()
    runs.assert_same(whole.end(), halved.end())
