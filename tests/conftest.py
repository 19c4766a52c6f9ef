"""What holds for every test: no network, a fixed seed, and a reason for each GPU test that is skipped."""

import os

# Before anything imports transformers, datasets or wandb: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("WANDB_MODE", None)  # the tests say themselves what wandb is to do

import pytest
import torch


def pytest_collection_modifyitems(items):
    num_present = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        num_needed = marker.kwargs.get("devices", 1)
        if num_needed > num_present:
            reason = f"needs {num_needed} CUDA device{'s' * (num_needed > 1)}, this machine has {num_present}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch):
    """Fills what `torch.empty` and its kin return with NaN, so that an output which is never written fails."""

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_and_fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
