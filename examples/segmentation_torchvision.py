"""A segmentation net of torchvision: a mobile backbone, two heads on two scales, and a dictionary as the output."""

import torch
from show import show

import secateur as sc
from secateur.models import load_model

torch.manual_seed(0)
model = load_model("torchvision/lraspp_mobilenet_v3_large").model
x = torch.randn(2, 3, 96, 96)

# Several budgets are all met, each exactly where it can be counted.
result = sc.prune(model, (x,), sc.MACs(at_most="60%"), sc.Params(at_most="60%"))

show("lraspp_mobilenet_v3_large, 96x96 pixels", model, result.model, (x,), result.proof)
print(f"  output {({name: tuple(value.shape) for name, value in result.model(x).items()})}; handed back by {result.cut.how}")
