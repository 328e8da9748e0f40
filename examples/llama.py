"""A small Llama with grouped queries: four query heads share a key and value head, and live and die with it."""

import torch
from show import show

import secateur as sc
from secateur.models.hf import import_transformers

transformers = import_transformers()  # `import transformers`, also where torchvision was built for another torch
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, use_cache=False,
)  # fmt: skip
model = transformers.LlamaForCausalLM(config).eval()  # or from_pretrained(...); models too large for memory: `secateur mask --stream`

ids = torch.randint(0, 256, (2, 48))
batches = [{"input_ids": rows} for rows in torch.randint(0, 256, (4, 4, 48))]  # your texts as tokens

result = sc.prune(model, (), sc.MACs(at_most="70%"), kwargs={"input_ids": ids}, data=batches)

show("Llama, 3 layers, 48 tokens", model, result.model, (), result.proof, {"input_ids": ids})
for i, layer in enumerate(result.model.model.layers):
    q, k, up = layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features, layer.mlp.up_proj.out_features
    print(f"  layer {i}: queries {q} of 128, keys {k} of 32, hidden units {up} of 352")
text = result.model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
print(f"  it still writes, with its cache: {text[0, 8:].tolist()}")
