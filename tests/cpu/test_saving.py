"""The copy of a state that is written while the training continues."""

from collections import OrderedDict

import torch

from lrsa_ds.train.saving import on_host


def test_a_copy_on_the_host_is_the_state_of_its_moment():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    state = {
        "module": OrderedDict(weight=weight, column=weight.detach()[:, 1]),
        "shapes": [OrderedDict(weight=weight.shape)],
        "groups": ({"lr": 1.0, "params": [0]}, None, "text"),
    }
    before = weight.detach().clone()
    copied = on_host(state)
    with torch.no_grad():
        weight.zero_()
    state["groups"][0]["params"].append(1)
    assert torch.equal(copied["module"]["weight"], before) and not copied["module"]["weight"].requires_grad
    assert torch.equal(copied["module"]["column"], before[:, 1])
    assert isinstance(copied["module"], OrderedDict) and isinstance(copied["shapes"][0]["weight"], torch.Size)
    assert copied["groups"] == ({"lr": 1.0, "params": [0]}, None, "text")
    assert torch.equal(weight, torch.zeros(3, 4))
