"""Fine-tune torchvision's ResNet-18 while half of it fades, cut, go on with its optimizer, export to ONNX.

python examples/finetune.py                                     # random weights, made-up images
python examples/finetune.py --weights DEFAULT --data FOLDER     # with a folder of images for each class in it
"""

import argparse

import onnxruntime
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import efreg


def load(data, size):
    """A folder of images, or made-up ones where there is none."""
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    if data:
        return datasets.ImageFolder(data, transform)
    return datasets.FakeData(256, (3, size, size), num_classes=10, transform=transform)


def train(model, optimizer, loader, epochs):
    device = next(model.parameters()).device
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss:.3f}")


def main(data=None, weights=None, size=64, epochs=2, out="small.onnx"):
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loader = DataLoader(load(data, size), batch_size=32, shuffle=True)
    model = models.resnet18(weights=weights)
    model.fc = torch.nn.Linear(model.fc.in_features, len(loader.dataset.classes) if data else 10)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    x = torch.randn(2, 3, size, size, device=device)
    print(efreg.inspect(model, x))
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    fade = efreg.Fade(steps=epochs * len(loader) // 2)
    with efreg.attach(model, law=fade, layers=plan):
        train(model, optimizer, loader, epochs)

    small = efreg.prune(model, plan, example_inputs=x, optimizer=optimizer)
    print(efreg.report(model, small, example_inputs=x))
    train(small, optimizer, loader, epochs)  # with the momentum that it had

    small.eval().cpu()
    torch.onnx.export(small, (x.cpu(),), out, input_names=["images"], dynamic_shapes=({0: "batch"},))
    x = torch.randn(5, 3, size, size)
    (output,) = onnxruntime.InferenceSession(out).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(x).detach(), rtol=1e-3, atol=1e-4)
    return small


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--data", help="a folder with a folder of images for each class")
    parser.add_argument("--weights", help="DEFAULT downloads torchvision's")
    parser.add_argument("--size", type=int, help="of an image, in pixels")
    parser.add_argument("--epochs", type=int, help="before the cut, and as many after it")
    parser.add_argument("--out", help="the ONNX file")
    main(**vars(parser.parse_args()))
