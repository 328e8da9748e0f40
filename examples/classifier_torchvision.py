"""A torchvision classifier: half of the MACs, kept close to the dense network by a few unlabelled batches."""

import torch
from show import settled, show

import secateur as sc
from secateur.models import load_model

torch.manual_seed(0)
# torchvision.models.mobilenet_v3_small(weights="DEFAULT") is the trained one; it is downloaded, so random ones do here (without `settled` then)
x = torch.randn(2, 3, 64, 64)
model = settled(load_model("torchvision/mobilenet_v3_small").model, x)
batches = [torch.randn(8, 3, 64, 64) for _ in range(2)]  # your images as in training, a few hundred; no labels are needed

# Without `repair` stretches of layers are fitted as well, which is better and slower. `ignore` names modules that keep their shape.
result = sc.prune(model, (x,), sc.MACs(at_most="50%"), data=batches, repair="least_squares", ignore=["classifier"])

show("mobilenet_v3_small, 64x64 pixels", model, result.model, (x,), result.proof)
widest = max(result.plan.removed.items(), key=lambda item: item[1])
print(f"  {sum(result.plan.removed.values())} channels went, most of them from {widest[0]} ({widest[1]})")
assert type(result.model) is type(model)  # still a torchvision MobileNetV3, with other numbers of channels
