"""Accelerate: prepare, attach, train on accumulated gradients, unwrap, cut, save.

python examples/accelerate_loop.py
accelerate launch --num_processes 2 examples/accelerate_loop.py --mixed-precision bf16
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import efreg


def digits():
    """Images, [1, 8, 8] each, with their labels."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    return TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)


def network():
    convolutions = (
        nn.Conv2d(1, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.BatchNorm2d(64),
    )
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main(epochs=10, mixed_precision="no", accumulation=2, out="small.safetensors"):
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(digits(), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    x = torch.rand(2, 1, 8, 8, device=accelerator.device)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    updates = epochs * -(-len(loader) // accumulation)  # the force is served once an update
    with efreg.attach(model, law=efreg.Fade(steps=updates // 2), layers=plan):
        for epoch in range(epochs):
            for images, labels in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.print(f"epoch {epoch}: loss {loss:.3f}")

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    small = efreg.prune(model, plan, example_inputs=x)
    accelerator.print(efreg.report(model, small, example_inputs=x))
    if accelerator.is_main_process:
        efreg.save(small, out)
    return small


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--accumulation", type=int, help="batches whose gradients make one update")
    parser.add_argument("--out", help="the file of the small network")
    main(**vars(parser.parse_args()))
