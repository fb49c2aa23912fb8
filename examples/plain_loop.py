"""Train with a loop of one's own: nothing but `mf.nn`, torch and the embedded digits.

usage: python examples/plain_loop.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F

import multifire as mf

TIMESTEPS, BATCH = 4, 64


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    digits = mf.datasets.load("digits")
    images = torch.from_numpy(digits.train.images).float() / 255
    labels = torch.from_numpy(digits.train.labels)
    network = mf.build_model("ds_resnet8", in_channels=1, width=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        index = torch.randint(len(images), (BATCH,))
        x = images[index].expand(TIMESTEPS, -1, -1, -1, -1)  # a still image, shown at every time step
        loss = F.cross_entropy(network(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    network.eval()
    test = torch.from_numpy(digits.test.images).float() / 255
    with torch.no_grad():
        predicted = network(test.expand(TIMESTEPS, -1, -1, -1, -1)).argmax(1)
    print(f"held-out accuracy {100 * (predicted == torch.from_numpy(digits.test.labels)).float().mean():.1f} %")


if __name__ == "__main__":
    main()
