"""Transformers' Trainer: half of a ViT's heads and hidden units fade while it is trained; then they are cut.

The Trainer needs no callback for that: the force sits on the step of whatever optimizer it makes.

python examples/transformers_trainer.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import efreg

CONFIG = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    num_labels=10,
)


def digits():
    """Images [1, 8, 8] by the names of the model's arguments."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


def main(epochs=10, out="vit-digits"):
    data = digits()
    model = ViTForImageClassification(CONFIG)
    arguments = TrainingArguments(
        out,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    options = {"args": arguments, "eval_dataset": data[1440:], "compute_metrics": accuracy}
    trainer = Trainer(model, train_dataset=data[:1440], **options)

    x = {"pixel_values": torch.rand(2, 1, 8, 8, device=model.device)}
    plan = efreg.plan(model, ratio=0.5, only=["*.q_proj", "*.fc1"], example_inputs=x)  # heads, hidden units
    print(plan)
    steps = epochs * len(trainer.get_train_dataloader())
    with efreg.attach(model, law=efreg.Fade(steps=steps // 2), layers=plan):
        trainer.train()

    small = efreg.prune(model, plan, example_inputs=x)
    print(efreg.report(model, small, example_inputs=x))
    print(trainer.evaluate(), Trainer(small, **options).evaluate(), sep="\n")

    efreg.save(small, f"{out}/small.safetensors")  # not save_pretrained: the config has the widths of before
    return efreg.load(ViTForImageClassification(CONFIG), f"{out}/small.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", help="a folder")
    main(**vars(parser.parse_args()))
