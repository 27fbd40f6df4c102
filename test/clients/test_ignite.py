"""PyTorch-Ignite."""

from pathlib import Path

import pytest
import runs
from torch import nn

pytest.importorskip("ignite", reason="no pytorch-ignite: make test-clients")

from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    data = runs.batches(3)

    def made() -> tuple[nn.Module, object, Engine]:
        model = runs.Net()
        optimizer = cls(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            create_supervised_trainer(model, optimizer, nn.functional.cross_entropy),
        )

    model, optimizer, trainer = made()
    saved = {"model": model, "optimizer": optimizer, "trainer": trainer}
    saver = DiskSaver(str(tmp_path), require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), Checkpoint(saved, saver))
    trainer.run(data, max_epochs=4)

    (file,) = tmp_path.glob("*.pt")
    halved, resumed, again = made()
    objects = {"model": halved, "optimizer": resumed, "trainer": again}
    Checkpoint.load_objects(objects, checkpoint=file)
    again.run(data, max_epochs=4)
    assert again.state.iteration == 12
    runs.assert_same(runs.ended(model, optimizer), runs.ended(halved, resumed))
