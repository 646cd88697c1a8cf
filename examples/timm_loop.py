"""A loop as timm has it: AdamW, averaged weights, mixed precision, warm-up; model and average cut half-way.

python examples/timm_loop.py
python examples/timm_loop.py --model resnet18 --epochs 30
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import efreg


def digits():
    """Training and test images, [1, 32, 32] each, with their labels."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, scale_factor=4)
    return TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])


def main(model="test_resnet", epochs=10):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    train, test = digits()
    test_images, test_labels = (part.to(device) for part in test.tensors)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = timm.create_model(model, num_classes=10, in_chans=1).to(device)
    ema = ModelEmaV3(model, decay=0.9999, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    steps = epochs * len(loader)
    scheduler = CosineLRScheduler(
        optimizer, steps, warmup_t=steps // 10, warmup_lr_init=1e-5, t_in_epochs=False
    )
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # bfloat16 needs none

    x = torch.randn(2, 1, 32, 32, device=device)
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    fade = efreg.Fade(steps=steps // 4)  # is proximal, as AdamW needs; with another law say update="proximal"
    force = efreg.attach(model, law=fade, layers=plan)
    step = 0
    for epoch in range(epochs):
        if epoch == epochs // 2:
            force.detach()
            model = efreg.prune(model, plan, example_inputs=x, optimizer=optimizer)
            ema.module = efreg.prune(ema.module, plan, example_inputs=x)
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            ema.update(model, step)
            scheduler.step_update(step)
        with torch.no_grad():
            (right,) = accuracy(ema.module(test_images), test_labels)
        print(f"epoch {epoch}: loss {loss:.3f}, average {right:.1f} %, {efreg.macs(ema.module, x):,} MACs")
    return ema.module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--model", help="timm's name for it")
    parser.add_argument("--epochs", type=int)
    main(**vars(parser.parse_args()))
