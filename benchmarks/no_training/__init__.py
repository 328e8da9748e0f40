"""Accuracy that is left after pruning without any training: one row per task, ratio, method and seed.

    python -m benchmarks.no_training --task resnet20 --method ours magnitude --resume
    python -m benchmarks.no_training.table

Rows go to `benchmarks/results/no_training/TASK.jsonl` as they come.
"""
