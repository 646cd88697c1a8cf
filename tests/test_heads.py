"""What timm's models say of their widths is true after a cut, so that they can be given a new classifier."""

import pytest
import torch

import efreg

timm = pytest.importorskip("timm")

SLOW = ("levit_128s", "efficientnet_b0")
NETWORKS = ("resnet26d", "mobilenetv3_small_100", "convnext_atto", *SLOW)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def test_a_pruned_network_takes_a_new_classifier(name):
    """num_features is the width of `forward_features`, head_hidden_size that of the classifier's input."""
    size = 224 if name == "levit_128s" else 64
    model, x = timm.create_model(name, num_classes=9).eval(), torch.randn(2, 3, size, size)
    small = efreg.prune(model, efreg.plan(model, ratio=0.5, example_inputs=x), example_inputs=x).eval()
    features = small.forward_features(x)
    assert features.shape[-1 if features.ndim == 3 else 1] == small.num_features
    assert small.forward_head(features, pre_logits=True).shape == (2, small.head_hidden_size)
    if name != "convnext_atto":  # whose features a layer norm mixes: they stay
        assert small.num_features == -(-model.num_features // 2)
        assert small.head_hidden_size == -(-model.head_hidden_size // 2)
    small.reset_classifier(7)
    assert small(x).shape == (2, 7)


def test_widths_follow_what_they_are_of():
    """Two widths of one length: the features are cut, what the head makes of them is not."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_features = self.head_hidden_size = 8
            self.body = torch.nn.Conv2d(3, 8, 1)
            self.hidden, self.fc = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

        def get_classifier(self):
            return self.fc

        def forward_features(self, x):
            return self.body(x).relu()

        def forward(self, x):
            return self.fc(self.hidden(self.forward_features(x).mean((2, 3))).relu())

    model, x = Model(), torch.randn(2, 3, 4, 4)
    small = efreg.prune(model, efreg.plan(model, ratio=0.5, only="body", example_inputs=x), example_inputs=x)
    assert (small.num_features, small.head_hidden_size) == (4, 8)
    small = efreg.prune(
        model, efreg.plan(model, ratio=0.5, only="hidden", example_inputs=x), example_inputs=x
    )
    assert (small.num_features, small.head_hidden_size) == (8, 4)
    assert (model.num_features, model.head_hidden_size) == (8, 8)
    assert "forward_features" not in vars(model)
