"""Lightning with the fused loss over all devices: `python examples/lightning_clip.py`, or under torchrun."""

import os

import lightning
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from llm2clip.training.gloo_workers import wait_for_workers
from llm2clip_kernels import infonce_loss


class TwoTowers(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(48, 16), torch.nn.Linear(32, 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        image, text = normalize(self.image(batch[0])), normalize(self.text(batch[1]))
        # every device's pairs are negatives; the gradients are meant for DDP's averaging
        loss = infonce_loss(image, text, self.logit_scale.exp(), gather=self.trainer.world_size > 1)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = torch.randn(128, 8)
    pairs = TensorDataset(shared @ torch.randn(8, 48), shared @ torch.randn(8, 32))
    trainer = lightning.Trainer(max_epochs=30, devices=devices, logger=False, enable_checkpointing=False)
    trainer.fit(TwoTowers(), DataLoader(pairs, batch_size=128 // devices, shuffle=True))
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss']:.4f}")
    wait_for_workers()  # on a CPU: a rank whose gloo threads still hold tensors may abort as it ends


if __name__ == "__main__":
    main()
