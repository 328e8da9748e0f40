"""A timm classifier, here a vision transformer: whole heads and hidden units go, the residual stream keeps its width."""

import torch
from show import show

import secateur as sc
from secateur.models import load_model

torch.manual_seed(0)
model = load_model("timm/vit_tiny_patch16_224").model  # timm.create_model(..., pretrained=True) for trained weights
x = torch.randn(2, 3, 224, 224)

# `sc.trace` shows what could go, by name; what is named in `ignore` stays whole.
graph = sc.trace(model, (x,))
stream = max(graph.groups.values(), key=lambda group: len(group.slots)).name
result = sc.prune(model, (x,), sc.MACs(at_most="60%"), ignore=[stream])

show("vit_tiny_patch16_224", model, result.model, (x,), result.proof)
print(f"  {stream} ({graph.groups[stream].size} wide) stayed whole")
for name, gone in list(result.plan.removed.items())[:4]:
    print(f"  {name}: {gone} of {graph.groups[name].size} went")
