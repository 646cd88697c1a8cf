"""From scratch on scikit-learn's digits: train with a force, then cut at several ratios and train no more.

The ladder puts the filters of a group in an order and pulls the lower ones to zero: it can be cut anywhere.

python examples/digits.py
python examples/digits.py --alpha 0             # without the force, to compare
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import efreg


def digits():
    """Training and test images, [1, 8, 8] each, with their labels."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    return random_split(TensorDataset(images, labels), [0.8, 0.2], torch.Generator().manual_seed(0))


def network():
    def layer(c_in, c_out, stride=1):
        return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()

    convolutions = *layer(1, 32), *layer(32, 64, stride=2), *layer(64, 64)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model, data):
    images, labels = next(iter(DataLoader(data, len(data))))
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(epochs=20, alpha=0.15, ratios=(0.3, 0.5, 0.7)):
    train, test = digits()
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    steps = epochs * len(loader)
    model, x = network(), torch.rand(2, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    plan = efreg.plan(model, ratio=0.5, example_inputs=x)  # the ladder pulls its groups, whatever the ratio
    ladder = efreg.Ladder(efreg.schedules.linear(alpha, steps // 2))
    with efreg.attach(model, law=ladder, layers=plan, scope="filter", update="proximal"):
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                scheduler.step()

    accuracies = {0: accuracy(model, test)}
    print(f"before: {accuracies[0]:.1%} of the test images, {efreg.macs(model, x):,} MACs")
    for ratio in ratios:
        plan = efreg.plan(model, ratio=ratio, example_inputs=x)
        small = efreg.prune(model, plan, example_inputs=x)
        accuracies[ratio] = accuracy(small, test)
        print(f"without {ratio:.0%} of the filters: {accuracies[ratio]:.1%}, {efreg.macs(small, x):,} MACs")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--alpha", type=float, help="strength of the force")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of the filters that go")
    main(**vars(parser.parse_args()))
