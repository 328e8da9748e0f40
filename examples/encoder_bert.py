"""A BERT encoder: heads, head dimensions and hidden units go; what `last_hidden_state` gives keeps its width."""

import torch
from show import show

import secateur as sc
from secateur.models.hf import import_transformers

transformers = import_transformers()  # `import transformers`, also where torchvision was built for another torch
torch.manual_seed(0)
config = transformers.BertConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
model = transformers.BertModel(config, add_pooling_layer=False).eval()  # or BertModel.from_pretrained(...)

ids = torch.randint(0, 1000, (2, 32))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.randint(0, 1000, (4, 4, 32))]  # your texts

result = sc.prune(model, (), sc.MACs(at_most="60%"), kwargs=inputs, data=batches)

show("BERT, 3 layers, 32 tokens", model, result.model, (), result.proof, inputs)
for i, layer in enumerate(result.model.encoder.layer):
    own = layer.attention.self
    print(f"  layer {i}: {own.num_attention_heads} heads of {own.attention_head_size}, {layer.intermediate.dense.out_features} hidden units")
