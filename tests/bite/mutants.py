"""Ways to break the library that the tests must notice. `make bite` tries them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In ``file`` (below src/) put ``new`` for ``old``, which stands there exactly once; then ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# A few structures are enough to notice a wrong cut: `-x` stops at the first failure anyway.
CUT = "tests/structures/test_structures.py::test_cut_is_the_masked_original"
BUDGET = "tests/budget/test_budget.py"
CRITERIA = "tests/score/test_criteria.py"
REFERENCES = "tests/score/test_references.py"
CALIBRATION = "tests/calibrate/test_calibration.py"
PROOF = "tests/measure/test_proof.py"
PRUNE = "tests/test_prune.py"
SWEEP = "tests/test_sweep.py"
MOMENTS = "tests/calibrate/test_moments.py"
SOLVE = "tests/repair/test_solve.py"
FIT = "tests/repair/test_fit.py"
TARGET = "tests/repair/test_target.py"
FLOW = "tests/repair/test_flow.py"
REPAIR = "tests/repair/test_repair.py"
PATTERN = "tests/masks/test_pattern.py"
METHODS = "tests/masks/test_methods.py"
SPARSIFY = "tests/masks/test_sparsify.py"
STREAM = "tests/stream/test_stream.py"
GAUSS_NEWTON = "tests/repair/test_gauss_newton.py"
CODEC = "tests/pack/test_codec.py"
DAMAGE = "tests/pack/test_damage.py"

MUTANTS: list[Mutant] = [
    Mutant(
        "score negated",
        "secateur/score/__init__.py",
        "    return found\n",
        "    return {name: -values for name, values in found.items()}\n",
        (f"{CRITERIA}::test_the_least_unit_goes_first",),
    ),
    Mutant(
        "consumer keeps the wrong channels",
        "secateur/surgery/predict.py",
        "        kept = mask(d, keep)\n",
        "        kept = mask(d, keep) if i == 0 else mask(d, keep)[::-1]\n",
        (f"{PRUNE}::test_half_the_macs",),
    ),
    Mutant(
        "batch-norm statistics misaligned",
        "secateur/surgery/predict.py",
        "        kept = mask(d, keep)\n",
        "        kept = mask(d, keep)[:: 1 if isinstance(tensor, nn.Parameter) or tensor.dim() != 1 else -1]\n",
        (f"{PROOF}::test_a_right_cut_is_proven",),
    ),
    Mutant(
        "target overshot",
        "secateur/budget/allocate.py",
        "    return all(getattr(cost, t.figure) <= limit for t, limit in limits)\n",
        "    return all(getattr(cost, t.figure) <= 1.01 * limit for t, limit in limits)\n",
        (f"{BUDGET}::test_at_most_and_close",),
    ),
    Mutant(
        "budget off by one unit",
        "secateur/budget/allocate.py",
        "    keep = order.keep(scores, low)\n",
        "    keep = order.keep(scores, low + 1)\n",
        (f"{BUDGET}::test_the_search_stops_at_the_first_plan_that_fits",),
    ),
    Mutant(
        "keep polarity inverted",
        "secateur/trace/graph.py",
        "            out[self.axes[name]] = mask.numpy()\n",
        "            out[self.axes[name]] = ~mask.numpy()\n",
        (f"{CUT}[0-ConvChain]",),
    ),
    Mutant(
        "reshape constants not rewritten",
        "secateur/surgery/constants.py",
        "        return {name: [v if v == -1 else n for v, n in zip(old, new, strict=True)]}\n",
        "        return {}\n",
        (f"{PRUNE}::test_half_the_macs",),
    ),
    Mutant(
        "proof always passes",
        "secateur/measure/proof.py",
        "        return self.max_error <= self.tolerance\n",
        "        return True\n",
        (f"{PROOF}::test_one_wrong_tensor_is_noticed_and_refused",),
    ),
    Mutant(
        "proof looks at the wrong plan",
        "secateur/measure/proof.py",
        "masked_outputs(graph, keep, state",
        "masked_outputs(graph, {}, state",
        (f"{PROOF}::test_a_right_cut_is_proven",),
    ),
    Mutant(
        "attention is not counted",
        "secateur/measure/count.py",
        "    return 2 * prod(outer) * length * key[-2] * (depth + value[-1])\n",
        "    return 0\n",
        ("tests/measure/test_count.py::test_macs_by_hand",),
    ),
    Mutant(
        "batch-norm re-estimation takes the wrong variance",
        "secateur/repair/batch_norm.py",
        "        var.copy_((sum_var / n).to(var.dtype))\n",
        "        var.copy_((sum_var / n).roll(1).to(var.dtype))\n",
        ("tests/repair/test_batch_norm.py",),
    ),
    Mutant(
        "two plans composed in the wrong order",
        "secateur/plan.py",
        "            both[first] = later\n",
        "            both[first] = later.flip(0)\n",
        (f"{PRUNE}::test_then_is_one_cut",),
    ),
    Mutant(
        "optimizer state not cut alike",
        "secateur/surgery/optimizer.py",
        "            value = value.index_select(d, torch.from_numpy(index).to(value.device))\n",
        "            value = value.narrow(d, 0, len(index))\n",
        (f"{PRUNE}::test_the_optimizer_follows",),
    ),
    Mutant(
        "ignore is not obeyed",
        "secateur/trace/tracer.py",
        "            for d in graph.tensors.get(tensor, ()):\n                freeze(d, f\"ignored by {pattern!r}\")\n",
        "",
        (f"{PRUNE}::test_ignore_is_obeyed",),
    ),
    Mutant(
        "a convolution in groups pairs weights with the wrong channels",
        "secateur/calibrate/activations.py",
        ".transpose(1, 2).flatten(0, 1)",
        ".flatten(0, 1)",
        (f"{REFERENCES}::test_criterion_is_its_slow_twin[wanda-Grouped]",),
    ),
    Mutant(
        "units take the statistics of other positions",
        "secateur/calibrate/activations.py",
        "values[self.positions]",
        "values[self.units]",
        (f"{REFERENCES}::test_criterion_is_its_slow_twin[wanda-Grouped]",),
    ),
    Mutant(
        "a small batch counts as much as a large one",
        "secateur/calibrate/gradients.py",
        "mean.get(n, 0) + batch.rows * g\n",
        "mean.get(n, 0) + g\n",
        (f"{CALIBRATION}::test_batches_of_any_size_give_the_same_means",),
    ),
    Mutant(
        "parameters go on asking for gradients",
        "secateur/calibrate/gradients.py",
        "                p.requires_grad_(flag)\n",
        "                pass\n",
        (f"{CALIBRATION}::test_the_model_and_the_data_are_left_as_they_were",),
    ),
    Mutant(
        "synaptic flow of the model itself",
        "secateur/score/synflow.py",
        "    copy = doubled(model)\n",
        "    copy = model\n",
        (f"{CALIBRATION}::test_the_model_and_the_data_are_left_as_they_were",),
    ),
    Mutant(
        "patches in another order than the weight's columns",
        "secateur/calibrate/moments.py",
        "        rows = view.movedim(1, 1 + n)  # batch, *out, channels, *kernel\n",
        "        rows = view.movedim(1, -1)\n",
        (f"{MOMENTS}::test_patches_are_what_unfold_gives",),
    ),
    Mutant(
        "elimination leaves the other weights as they were",
        "secateur/repair/solve.py",
        "    w -= left @ change\n",
        "",
        (f"{SOLVE}::test_every_step_is_the_cheapest_and_its_error_is_the_true_one",),
    ),
    Mutant(
        "units of one step go by costs of before the step",
        "secateur/repair/solve.py",
        "        if not taken or cost <= 2 * most:\n",
        "        if True:\n",
        (f"{SOLVE}::test_of_two_equal_units_in_a_wide_layer_one_stays",),
    ),
    Mutant(
        "the ridge is ignored",
        "secateur/repair/solve.py",
        "    lam = ridge * mean if mean > 0 else 1.0\n",
        "    lam = 1e-12 * mean if mean > 0 else 1.0\n",
        (f"{SOLVE}::test_solution_is_that_of_least_squares_on_more_rows",),
    ),
    Mutant(
        "the batch norm is not folded into the layer",
        "secateur/repair/fit.py",
        "        w, b = w * s[..., None], (b - mean) * s + beta\n",
        "        b = (b - mean) * s + beta\n",
        (f"{FIT}::test_layer_and_norm_are_one_affine_map",),
    ),
    Mutant(
        "the target forgets the other branch",
        "secateur/repair/least_squares.py",
        "target.pull(self.dense.value(chunk, target.join) - other)",
        "target.pull(self.dense.value(chunk, target.join))",
        (f"{TARGET}::test_an_addition_is_what_the_dense_network_has_there_minus_what_the_pruned_one_has_already",),
    ),
    Mutant(
        "a layer beside an addition is counted on before it is fitted",
        "secateur/repair/least_squares.py",
        "        if node in layers:\n            found[node] = None\n",
        "",
        (f"{TARGET}::test_of_two_branches_that_meet_the_second_is_fitted_first",),
    ),
    Mutant(
        "an op in place writes into what others still read",
        "secateur/repair/flow.py",
        "                    env[value] = env[value].clone()  # other readers of the old value may still come\n",
        "                    pass\n",
        (f"{FLOW}::test_every_value_is_that_of_a_plain_run",),
    ),
    Mutant(
        "a fit is judged on the rows that it was made from",
        "secateur/repair/least_squares.py",
        "fit.error(self.held if self.held.rows else self.fit, outputs)",
        "fit.error(self.fit, outputs)",
        (f"{REPAIR}::test_next_to_no_data_does_no_harm",),
    ),
    Mutant(
        "a sweep collects its statistics anew at every budget",
        "secateur/prune.py",
        "        if id(graph) not in self.planners:\n",
        "        if True:\n",
        (f"{SWEEP}::test_the_model_is_traced_and_the_data_read_once",),
    ),
    Mutant(
        "a folder that was replaced is taken for a finished point",
        "secateur/explore.py",
        'return sha256(folder / row["folder"] / MARK) == row.get("plan_sha256")',
        "return True",
        (f"{SWEEP}::test_what_is_not_whole_or_of_another_sweep_is_computed_again",),
    ),
    Mutant(
        "measuring what BatchNorm alone would give leaves its statistics behind",
        "secateur/job.py",
        "            held.copy_(before[name])\n",
        "            pass\n",
        ("tests/test_cli.py::test_what_batch_norm_alone_would_give_leaves_no_trace",),
    ),
    Mutant(
        "figures of one row told of a call with two",
        "secateur/retrace.py",
        '"achieved": achieved(targets, before, after, plan)',
        '"achieved": plan.why["achieved"]',
        ("tests/test_cli.py::test_a_rewritten_graph_takes_any_batch",),
    ),
    Mutant(
        "a branch is fitted away from what is missing",
        "secateur/repair/gauss_newton.py",
        "self.wanted(chunk) - y.detach()",
        "y.detach() - self.wanted(chunk)",
        (f"{GAUSS_NEWTON}::test_products_are_those_of_the_whole_jacobian",),
    ),
    Mutant(
        "a step on a branch is taken whatever the held-out chunks say",
        "secateur/repair/gauss_newton.py",
        "        if not smallest < best:\n            break\n",
        "",
        (f"{GAUSS_NEWTON}::test_a_step_that_is_worse_on_held_out_chunks_is_not_taken",),
    ),
    Mutant(
        "a fitted branch is written back one position off",
        "secateur/repair/branch.py",
        '        new[torch.meshgrid(*where, indexing="ij")] = value.to(new.dtype)\n',
        '        new[torch.meshgrid(*where, indexing="ij")] = value.roll(1, 0).to(new.dtype)\n',
        (f"{GAUSS_NEWTON}::test_spread_puts_a_cut_tensor_back_where_it_came_from",),
    ),
    Mutant(
        "a branch reaches past values that others read",
        "secateur/repair/branch.py",
        "or any(r not in below for r in readers)",
        "or all(r not in below for r in readers)",
        (f"{GAUSS_NEWTON}::test_nothing_outside_looks_into_a_branch",),
    ),
    Mutant(
        "values from before a branch was fitted are read after it",
        "secateur/repair/flow.py",
        "                self.values[chunk][node] = values[node]\n",
        "                self.values[chunk][node] = values[node] * 1.01\n",
        (f"{GAUSS_NEWTON}::test_the_flow_goes_on_with_the_new_weights",),
    ),
    Mutant(
        "N:M keeps one weight more in each group",
        "secateur/pattern.py",
        "top(groups, pattern.n)",
        "top(groups, pattern.n + 1)",
        (f"{PATTERN}::test_a_mask_is_exact_legal_and_whole_where_nothing_divides",),
    ),
    Mutant(
        "of equal scores the last stay",
        "secateur/pattern.py",
        "equal.nonzero()[: int(missing), 0]",
        "equal.nonzero().flip(0)[: int(missing), 0]",
        (f"{PATTERN}::test_top_is_the_first_of_a_stable_sort",),
    ),
    Mutant(
        "SparseGPT does not pass errors on to later columns of its set",
        "secateur/masks/sparsegpt.py",
        "now[j:].addr_(u[j, j:], lost, alpha=-1)",
        "now[j] = torch.where(mask[j], now[j], 0.0)",
        (f"{METHODS}::test_sparsegpt_is_column_by_column_elimination",),
    ),
    Mutant(
        "OBC does not take a removed weight out of the inverse",
        "secateur/masks/obc.py",
        "    z.baddbmm_(rows.mT, across, alpha=-1)\n",
        "",
        (f"{METHODS}::test_obc_removes_what_a_search_over_all_would",),
    ),
    Mutant(
        "a refit forgets the mask in its residual",
        "secateur/masks/refit.py",
        "hd = torch.where(stays, d @ h, zero)",
        "hd = d @ h",
        (f"{METHODS}::test_refit_is_least_squares_on_the_support",),
    ),
    Mutant(
        "the damping makes dead inputs count",
        "secateur/masks/sparsegpt.py",
        "    p = p.without_dead()\n",
        "",
        (f"{METHODS}::test_weights_of_inputs_that_are_always_zero_go_first",),
    ),
    Mutant(
        "ADMM forgets its multiplier",
        "secateur/masks/alps.py",
        "        v = v + rho * (b - d)\n",
        "",
        (f"{METHODS}::test_golden_errors",),
    ),
    Mutant(
        "masks of a convolution are told in another order than its weights",
        "secateur/masks/network.py",
        "new[:, back], found.stays[:, back]",
        "new[:, back], found.stays[:, order]",
        (f"{SPARSIFY}::test_masks_are_exact_and_the_model_given_is_unchanged", f"{SPARSIFY}::test_a_saved_model_is_loaded_and_verified"),
    ),
    Mutant(
        "a weight that the mask removed is not looked for",
        "secateur/masks/exact.py",
        "w[~stays.to(w.device)] != 0",
        "w[stays.to(w.device)] != w[stays.to(w.device)]",
        (f"{SPARSIFY}::test_one_weight_too_many_is_found",),
    ),
    Mutant(
        "momentum of removed weights is let grow",
        "secateur/masks/hold.py",
        "            p.grad.masked_fill_(held.gone(name), 0)\n",
        "            pass\n",
        ("tests/masks/test_hold.py::test_zeros_stay_zero_and_the_others_learn",),
    ),
    Mutant(
        "every block is called as the first one is",
        "secateur/stream/run.py",
        '.read_text())[index] for i',
        '.read_text())[0] for i',
        (f"{STREAM}::test_block_by_block_is_what_the_whole_model_in_memory_gives",),
    ),
    Mutant(
        "the next block is given what the dense block gave",
        "secateur/stream/run.py",
        '                put(module, "weight", stored[key].float())\n',
        "",
        (f"{STREAM}::test_block_by_block_is_what_the_whole_model_in_memory_gives",),
    ),
    Mutant(
        "progress is told before the shard is written",
        "secateur/stream/run.py",
        "        write(shard, stored)\n        self.done.append",
        "        self.done.append",
        (f"{STREAM}::test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes",),
    ),
    Mutant(
        "a plan between two adds the worst units first",
        "secateur/budget/between.py",
        "torch.argsort(worth[n][units], descending=True, stable=True)",
        "torch.randperm(len(units))",
        ("tests/test_reach.py::test_between_two_plans",),
    ),
    Mutant(
        "a streamed layer that is sparse already is filled again",
        "secateur/stream/block.py",
        "None if bool(there.all()) else there, name",
        "None, name",
        (f"{STREAM}::test_zeros_that_were_there_stay_in_a_second_run",),
    ),
    Mutant(
        "a stored buffer of another shape is spread over the model's",
        "secateur/stream/skeleton.py",
        "if value.shape != buffer.shape:",
        "if False:",
        (f"{STREAM}::test_a_stored_buffer_of_another_shape_is_refused",),
    ),
    Mutant(
        "the lock of a stream outlives an error",
        "secateur/stream/run.py",
        "                self.lock.close()\n",
        "                pass\n",
        (f"{STREAM}::test_an_error_that_is_kept_does_not_keep_the_folder_locked",),
    ),
    Mutant(
        "wanda zeroes weights that stay because their inputs were always zero",
        "secateur/masks/ranked.py",
        "return _by_row(p, live.w.square()",
        "return _by_row(live, live.w.square()",
        (f"{METHODS}::test_weights_that_stay_are_as_they_were_even_of_inputs_that_were_always_zero",),
    ),
    Mutant(
        "a cut passes over single weights in its plan",
        "secateur/surgery/cut.py",
        "    if plan.weights:\n",
        "    if False:\n",
        (f"{SPARSIFY}::test_a_cut_is_no_mask_and_a_mask_no_cut",),
    ),
    Mutant(
        "SparseGPT does not pass errors on to later sets of columns",
        "secateur/masks/sparsegpt.py",
        "now = p.w[:, cols] + (gone[:, :start] @ r[:start, cols]) @ u",
        "now = p.w[:, cols] + 0.0",
        (f"{METHODS}::test_sparsegpt_is_column_by_column_elimination",),
    ),
    Mutant(
        "exchanged columns are counted without what they displace",
        "secateur/masks/permute.py",
        "into_b = total_b[..., None, :] + (a[..., :, None] - least_b[..., None, :]).clamp_min(0)",
        "into_b = total_b[..., None, :] + a[..., :, None]",
        ("tests/masks/test_permute.py::test_the_gain_of_an_exchange_is_what_trying_gives",),
    ),
    Mutant(
        "what writes a group keeps its order",
        "secateur/masks/permute.py",
        "        for slot in graph.groups[one.group].slots:\n",
        "        for slot in [s for s in graph.groups[one.group].slots if s.dim == 1]:\n",
        ("tests/masks/test_permute.py::test_the_reordered_model_is_the_same_function_and_loses_less",),
    ),
    Mutant(
        "a child takes more than a layer can give",
        "secateur/masks/search.py",
        "max(0, min(step, child[giver] - least[giver], sizes[taker] - child[taker]))",
        "step",
        ("tests/masks/test_search.py::test_a_child_has_as_many_weights",),
    ),
    Mutant(
        "the worst child is the next parent",
        "secateur/masks/search.py",
        "            if judged < value:\n",
        "            if judged > value:\n",
        ("tests/masks/test_search.py::test_what_is_wanted_is_found",),
    ),
    Mutant(
        "windows of text are longer than a model's positions",
        "secateur/models/text.py",
        "positions -= (config.pad_token_id or 0) + 1",
        "pass",
        ("tests/masks/test_command.py::test_windows_are_as_long_as_the_model_can_take",),
    ),
    Mutant(
        "packing drops the sign of -0",
        "secateur/pack/codec.py",
        "    mask = bits != 0\n    how",
        "    mask = (tensor != 0).reshape(-1).numpy()\n    how",
        (f"{CODEC}::test_minus_zero_is_a_value",),
    ),
    Mutant(
        "an index may end anywhere before its tensor does",
        "secateur/pack/places.py",
        "    if not reached <= size < reached + ESCAPE:\n",
        "    if not reached <= size:\n",
        (f"{DAMAGE}::test_an_index_beyond_the_tensor",),
    ),
    Mutant(
        "a code behind the last pattern is looked up",
        "secateur/pack/places.py",
        "(worst := int(codes.max())) >= len(known)",
        "(worst := int(codes.max())) > len(known)",
        (f"{DAMAGE}::test_a_code_that_stands_for_nothing",),
    ),
    Mutant(
        "a small file may fill the memory",
        "secateur/pack/header.py",
        "    elif header.nbytes > most(",
        "    elif 0 > most(",
        (f"{DAMAGE}::test_what_unfolds_beyond_measure_is_refused_before_it_does",),
    ),
    Mutant(
        "places are inflated without a limit",
        "secateur/pack/entropy.py",
        "stage.decompress(held.tobytes(), size + 1)",
        "stage.decompress(held.tobytes())",
        (f"{DAMAGE}::test_no_more_is_inflated_than_is_said",),
    ),
    Mutant(
        "the parts of a packed tensor take the place of a real one",
        "secateur/pack/archive.py",
        "not parts.keys() & tensors.keys() and ",
        "",
        (f"{DAMAGE}::test_real_tensors_with_the_names_of_parts",),
    ),
    Mutant(
        "a folder takes the zeros it finds for those of its plan",
        "secateur/models/plan_file.py",
        'elif hashlib.sha256(held := bits_of(tensors[name])).hexdigest() == entry["sha256"]:',
        "elif held := bits_of(tensors[name]):",
        (f"{SPARSIFY}::test_another_weight_in_the_place_of_one_is_found",),
    ),
    Mutant(
        "an order that changes the function is taken",
        "secateur/masks/permute.py",
        "    if why := _differs(made, model, others):\n",
        "    if why := \"\":\n",
        ("tests/masks/test_permute.py::test_an_order_that_changes_the_function_is_left_out",),
    ),
    Mutant(
        "windows of a convolution are grouped across places",
        "secateur/masks/permute.py",
        ".movedim(2, 1).reshape(-1, group.size)",
        ".reshape(-1, group.size)",
        ("tests/masks/test_permute.py::test_what_an_order_is_said_to_keep_is_what_masks_keep",),
    ),
    Mutant(
        "one batch decides between budgets",
        "secateur/masks/search.py",
        "for judged, child in ((_finite(apart(c, batches)), c) for c in firsts):",
        "for judged, child in ((_finite(apart(c, 1)), c) for c in firsts):",
        ("tests/masks/test_search.py::test_all_batches_decide",),
    ),
    Mutant(
        "infinite moments pass for finite ones",
        "secateur/masks/problem.py",
        "for v in torch.aminmax(t))",
        "for v in torch.aminmax(t)[:1])",
        ("tests/masks/test_search.py::test_finite_is_what_isfinite_says",),
    ),
    Mutant(
        "embeddings in half precision make the stream half precise",
        "secateur/stream/skeleton.py",
        "            return found.float()\n",
        "            return found\n",
        (f"{STREAM}::test_embeddings_that_are_stored_in_half_precision_are_as_good_as_copied",),
    ),
    Mutant(
        "a kernel forgets the bias of a later set of columns",
        "secateur/runtime/csrc/kernels.cpp",
        "const float* bias = set == 0 ? first : nullptr;",
        "const float* bias = first;",
        ("tests/runtime/test_kernels.py",),
    ),
    Mutant(
        "a line of a padded image is one pixel short",
        "secateur/runtime/csrc/kernels.cpp",
        "line = std::max(line, w.out_width);",
        "line = w.out_width;",
        ("tests/runtime/test_kernels.py",),
    ),
    Mutant(
        "column numbers are not checked",
        "secateur/runtime/csrc/ops.cpp",
        "< std::min(set, columns - q * set)",
        "< 65537",
        ("tests/runtime/test_kernels.py::test_what_does_not_belong_together_is_refused",),
    ),
    Mutant(
        "the derivative of values is that of the whole matrix's other rows",
        "secateur/runtime/ops.py",
        "    return padded[b, :, k]\n",
        "    return padded[b.flip(0), :, k]\n",
        ("tests/runtime/test_layers.py::test_the_same_outputs_and_derivatives",),
    ),
    Mutant(
        "a slower model is handed back",
        "secateur/runtime/convert.py",
        "    if after > SLOWER * before and",
        "    if False and",
        ("tests/runtime/test_layers.py::test_a_model_that_is_slower_as_a_whole_is_not_handed_back",),
    ),
]
