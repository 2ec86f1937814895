"""watch() as a Lightning callback: `Trainer(callbacks=[WatchBatchNorm("runs/a")])`.

Needs Lightning: pip install batchnorm[lightning].
"""

from __future__ import annotations

import os
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise ImportError("the Lightning callback needs Lightning: pip install batchnorm[lightning]") from error

from batchnorm.recording.steps import Schedule
from batchnorm.recording.watch import Recorder, watch


class WatchBatchNorm(Callback):
    """Records `Trainer.fit` into a Run, and logs the training loss of each batch as "loss".

    Args:
        path, schedule, force: as in `batchnorm.watch`.

    `run` is the Run, from the start of the recording on.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, schedule: Schedule | None = None, force: bool = False
    ) -> None:
        super().__init__()
        self.run: Recorder | None = None
        self._path, self._schedule, self._force = path, schedule, force

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run = watch(pl_module, self._path, schedule=self._schedule, force=self._force).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.run is not None and loss is not None:
            self.run.log(loss=loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close("interrupted" if trainer.interrupted else "complete")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close("interrupted" if isinstance(exception, KeyboardInterrupt) else "failed")

    def _close(self, status: str) -> None:
        if self.run is not None:
            self.run.close(status)
