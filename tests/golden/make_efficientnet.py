"""Writes what efficientnet-lite-pytorch answers, and files of torch.save to be read.

efficientnet.npz: logits [1, 10] of EfficientNet-lite0 for an image of 60x60 pixels. The
weights are made anew from the seed by the tests (see seeded.py), so the file holds
names, shapes and the answer alone. state.pth, state_old.pth: the tensors below in both
formats of torch. To make them again:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps efficientnet-lite-pytorch==0.1.0
    python tests/golden/make_efficientnet.py
"""

from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from seeded import images, weights

SEED, SIZE = 0, 60
FOLDER = Path(__file__).parent


def tensors():
    """A state dict with views of one storage, and other types."""
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "table": table,
        "transposed": table.T[1:],
        "count": torch.tensor(7),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }


@torch.no_grad()
def main():
    changes = {"image_size": SIZE, "num_classes": 10}
    net = EfficientNet.from_name("efficientnet-lite0", **changes).eval()
    kept = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    names, shapes = list(kept), [value.shape for value in kept.values()]
    made = weights(names, shapes, SEED)
    net.load_state_dict({k: torch.tensor(v) for k, v in made.items()}, strict=False)
    image = torch.tensor(np.resize(images(SEED), (1, 3, SIZE, SIZE)))
    logits = net(image).numpy()
    print(logits)
    saved = {"seed": SEED, "names": names, "logits": logits}
    saved["shapes"] = [" ".join(map(str, shape)) for shape in shapes]
    np.savez_compressed(FOLDER / "efficientnet.npz", **saved)
    torch.save(tensors(), FOLDER / "state.pth")
    old = {"_use_new_zipfile_serialization": False}
    torch.save(tensors(), FOLDER / "state_old.pth", **old)


if __name__ == "__main__":
    main()
