"""accelerate with the fused loss over all devices: `python examples/accelerate_clip.py`, or under torchrun."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from llm2clip.training.gloo_workers import wait_for_workers
from llm2clip_kernels import infonce_loss


class TwoTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(48, 16), torch.nn.Linear(32, 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return normalize(self.image(image)), normalize(self.text(text)), self.logit_scale.exp()


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    shared = torch.randn(128, 8)
    pairs = TensorDataset(shared @ torch.randn(8, 48), shared @ torch.randn(8, 32))
    model = TwoTowers()
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        DataLoader(pairs, batch_size=128 // accelerator.num_processes, shuffle=True),
    )
    for _ in range(30):
        for image, text in loader:
            image_features, text_features, scale = model(image, text)
            # every device's pairs are negatives; the gradients are meant for DDP's averaging
            loss = infonce_loss(image_features, text_features, scale, gather=accelerator.num_processes > 1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss:.4f}")
    wait_for_workers()  # on a CPU: a rank whose gloo threads still hold tensors may abort as it ends
    accelerator.end_training()


if __name__ == "__main__":
    main()
