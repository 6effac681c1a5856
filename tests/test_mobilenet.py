"""The MobileNetV2 that is built without torchvision is torchvision's."""

import torch
import torchvision

from capray.model.mobilenet import mobilenet_v2_features


def test_it_has_torchvisions_tensors_and_computes_the_same():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(weights=None).features.eval()
    ours = mobilenet_v2_features().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(image))
