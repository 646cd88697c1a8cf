"""A Lightning callback with plain arguments, so that a config file can name it: attach, log, cut at the end.

python examples/lightning_callback.py

- class_path: lightning_callback.Force
  init_args: {network: net, ratio: 0.5, law: "ladder:power=2", alpha: 0.1}
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import efreg


class Force(lightning.Callback):
    """Pulls an attribute of a module, its network, while it is fitted, and cuts it; alpha falls to zero."""

    def __init__(self, network: str = "net", ratio: float = 0.5, law: str = "ladder", alpha: float = 0.1):
        self.network, self.ratio, self.law, self.alpha = network, ratio, law, alpha

    def setup(self, trainer, module, stage):  # not later: a checkpoint has the force's state, too
        if stage == "fit":
            network = module.get_submodule(self.network)
            self.plan = efreg.plan(network, ratio=self.ratio, example_inputs=module.example_input_array)
            alpha = efreg.schedules.linear(self.alpha, steps=trainer.estimated_stepping_batches)
            whole = {"layers": self.plan, "scope": "filter", "update": "proximal"}
            self.force = efreg.attach(network, alpha, law=self.law, **whole)

    def on_train_epoch_end(self, trainer, module):
        dead = self.plan.dead(module.get_submodule(self.network)).values()
        self.log_dict({"energy": self.force.energy(), "dead": float(sum(map(len, dead)))}, prog_bar=True)

    def on_fit_end(self, trainer, module):
        self.force.detach()
        network, x = module.get_submodule(self.network), module.example_input_array.to(module.device)
        module.set_submodule(self.network, efreg.prune(network, self.plan, example_inputs=x))

    def state_dict(self):
        return self.force.state_dict()

    def load_state_dict(self, state):
        self.force.load_state_dict(state)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()
        self.net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        self.example_input_array = torch.rand(2, 1, 8, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs=10):
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels), 32, shuffle=True)
    module, trainer = Digits(), lightning.Trainer(max_epochs=epochs, callbacks=[Force()])
    trainer.fit(module, loader)
    print(module)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int)
    main(**vars(parser.parse_args()))
