"""Faults that `mutations.py` plants into the code that cuts networks, each by replacing one text in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A fault: a text that occurs once in a file of the package, and the wrong text in its place."""

    name: str  # a plain sentence
    file: str  # relative to the package
    old: str
    new: str

    def plant_(self, package: Path) -> None:
        """Change the file in a copy of the package."""
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: the text to replace occurs {text.count(self.old)} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


_PLAN = "channels/plan.py"
_CLONING, _BOUND = "models/cloning.py", "models/bound_functions.py"
_WRAPPERS, _CALLS = "models/wrappers.py", "models/function_calls.py"
_TENSORS, _SLIM, _SIZES = "slimming/tensors.py", "slimming/slim.py", "slimming/size_attributes.py"
_MASKED, _NORMS, _REDUCTIONS = "slimming/masked.py", "slimming/masked_norms.py", "slimming/masked_reductions.py"
_BLOCKS, _SUBSTITUTES, _BRANCHES = "channels/blocks.py", "slimming/substitutes.py", "slimming/masked_branches.py"
_OUTPUTS, _SELECTED = "slimming/fixed_outputs.py", "models/selected_channels.py"
_VERIFY, _STRUCTURE = "slimming/verify.py", "slimming/structure.py"

MUTATIONS = (
    # The plan
    Mutation("kept and removed channels are swapped", _PLAN, "np.flatnonzero(~is_kept)", "np.flatnonzero(is_kept)"),
    Mutation(
        "one removed channel too few",
        _PLAN,
        "np.flatnonzero(~is_kept)",
        "np.flatnonzero(~is_kept)[: group.width - len(self.kept[group.name]) - 1]",
    ),
    Mutation(
        "a width is the largest kept index",
        _PLAN,
        "widths = {name: len(kept) for name, kept in self.kept.items()}",
        "widths = {name: kept[-1] for name, kept in self.kept.items()}",
    ),
    # Tensors
    Mutation(
        "the last slot of a group is forgotten",
        _TENSORS,
        "            for slot in group.slots:\n                found[",
        "            for slot in group.slots[:-1]:\n                found[",
    ),
    Mutation(
        "slots that scale channels are forgotten",
        _TENSORS,
        "                found[slot.tensor, slot.dim].add(slot.index, channels)",
        "                if slot.is_output or slot.is_input:\n"
        "                    found[slot.tensor, slot.dim].add(slot.index, channels)",
    ),
    Mutation(
        "only the first place of a channel is cut",
        _TENSORS,
        "found[slot.tensor, slot.dim].add(slot.index, channels)",
        "found[slot.tensor, slot.dim].add(slot.index[:, :1], channels)",
    ),
    Mutation("kept indices are off by one", _TENSORS, "stays[removed] = False", "stays[removed - 1] = False"),
    Mutation(
        "of two groups in one dimension the first is cut",
        _TENSORS,
        "for index, channels in self._parts]\n        return found[0]",
        "for index, channels in self._parts[:1]]\n        return found[0]",
    ),
    Mutation(
        "one dimension of two is cut",
        _TENSORS,
        "        whole = cut[name].detach()\n",
        "        whole = tensors[name].detach()\n",
    ),
    Mutation(
        "buffers are not cut",
        _TENSORS,
        "        if name not in cut:\n",
        "        if not isinstance(cut.get(name), nn.Parameter):\n",
    ),
    Mutation(
        "biases are not cut",
        _TENSORS,
        "        if name not in cut:\n",
        '        if name not in cut or name.endswith("bias"):\n',
    ),
    Mutation(
        "running variances are not cut",
        _TENSORS,
        "        if name not in cut:\n",
        '        if name not in cut or name.endswith("running_var"):\n',
    ),
    Mutation(
        "the memory order is lost",
        _TENSORS,
        "smaller.contiguous(memory_format=memory_order(whole))",
        "smaller.contiguous()",
    ),
    Mutation(
        "requires_grad is lost",
        _TENSORS,
        "return parameter_like(old, own)",
        "return nn.Parameter(own)",
    ),
    Mutation(
        "tensors that are not cut share memory with the original",
        _TENSORS,
        "own = values.detach().clone() if is_shared else values.detach()",
        "own = values.detach()",
    ),
    Mutation(
        "after a cut, statistics count removed channels",
        _TENSORS,
        "number[kept] = torch.arange(len(kept))",
        "number[kept] = kept",
    ),
    # slim
    Mutation(
        "layers look at the second dimension for lost groups",
        _SLIM,
        "removed.get((name, 0), NOTHING)",
        "removed.get((name, 1), NOTHING)",
    ),
    Mutation(
        "size attributes are not written",
        _SLIM,
        "        write_size_attribute_(smaller, attribute, value)\n",
        "        pass\n",
    ),
    Mutation(
        "layers keep their old size attributes",
        _SLIM,
        "        update_size_attributes_(module, lambda weight: gone.get(id(weight)))\n",
        "        pass\n",
    ),
    # Size attributes
    Mutation("sizes are those before the cut", _SIZES, "for group in groups} | kept", "for group in groups}"),
    Mutation(
        "an entry of a list of sizes is inserted instead of replaced",
        _SIZES,
        "*old[size.index + 1 :]]",
        "*old[size.index :]]",
    ),
    Mutation(
        "the group count of a grouped convolution stays",
        _SIZES,
        "            module.groups = first_dim // (size // module.groups)\n",
        "            pass\n",
    ),
    Mutation(
        "a grouped convolution always loses whole groups",
        _SIZES,
        "return bool((lost == size // groups).any())",
        "return True",
    ),
    Mutation(
        "a transposed convolution counts inputs as an ordinary one",
        _SIZES,
        "module.in_channels = inputs if transposed else inputs * module.groups",
        "module.in_channels = inputs * module.groups",
    ),
    Mutation(
        "features of a linear layer are swapped",
        _SIZES,
        "module.out_features, module.in_features = weight.shape",
        "module.in_features, module.out_features = weight.shape",
    ),
    Mutation(
        "num_features of a batch norm stays", _SIZES, "            module.num_features = len(weight)\n".strip(), "pass"
    ),
    Mutation("normalized_shape of a layer norm stays", _SIZES, "module.normalized_shape = tuple(weight.shape)", "pass"),
    Mutation("num_groups of a group norm stays", _SIZES, "module.num_groups = len(weight) // per_group", "pass"),
    Mutation("num_channels of a group norm stays", _SIZES, "module.num_channels = len(weight)", "pass"),
    Mutation("num_parameters of a PReLU stays", _SIZES, "module.num_parameters = len(weight)", "pass"),
    Mutation(
        "dimensions of an embedding are swapped",
        _SIZES,
        "module.num_embeddings, module.embedding_dim = weight.shape",
        "module.embedding_dim, module.num_embeddings = weight.shape",
    ),
    Mutation("a GRU has the gates of an LSTM", _SIZES, '"GRU": 3', '"GRU": 4'),
    Mutation("hidden_size of a recurrent layer counts its gates", _SIZES, " // _GATES.get(module.mode, 1)", ""),
    # The masked network
    Mutation(
        "masking also clears buffers",
        _MASKED,
        "            if isinstance(state.get(name), nn.Parameter):  #",
        "            if name in state:  #",
    ),
    Mutation(
        "masking leaves the inputs of consumers",
        _MASKED,
        "            if isinstance(state.get(name), nn.Parameter):  #",
        "            if isinstance(state.get(name), nn.Parameter) and dim == 0:  #",
    ),
    Mutation(
        "norms go over removed channels",
        _MASKED,
        "return restrict_norms_(reference, kept, _existing",
        "return restrict_norms_(reference, {}, _existing",
    ),
    Mutation(
        "statistics go over the removed channels",
        _MASKED,
        "exists, owners = ~torch.isin(",
        "exists, owners = torch.isin(",
    ),
    Mutation(
        "of two groups in a statistic the last counts",
        _MASKED,
        "exists = exists & other.exists",
        "exists = exists.clone()",
    ),
    Mutation("a layer norm divides by all channels", _NORMS, "    count = kept.sum()\n", "    count = kept.numel()\n"),
    Mutation(
        "an RMS norm divides by all channels", _NORMS, "keepdim=True) / kept.sum()", "keepdim=True) / kept.numel()"
    ),
    Mutation(
        "the variance of a group norm includes removed channels",
        _NORMS,
        "centred = (inside - mean) * present",
        "centred = inside - mean",
    ),
    Mutation(
        "standardised weights are divided by all inputs",
        _NORMS,
        "    count = kept.sum(2, keepdim=True).clamp_min(1)\n",
        "    count = kept.size(2)\n",
    ),
    Mutation(
        "a mask covers one dimension only",
        _NORMS,
        "        for dim, indices in self.removed.items():\n",
        "        for dim, indices in list(self.removed.items())[:1]:\n",
    ),
    Mutation("outputs without weights are not masked", _MASKED, "    mask_outputs_(reference, groups, plan)\n", ""),
    # Outputs of modules without weights, and plain tensors
    Mutation("channels of an output are off by one", _OUTPUTS, "stays[gone] = False", "stays[gone - 1] = False"),
    Mutation(
        "channels of an output are selected in another order",
        _SELECTED,
        "self.register_buffer(name, index)\n\n",
        "self.register_buffer(name, index.flip(0))\n\n",
    ),
    Mutation(
        "channels of an output are selected along another dimension",
        _SELECTED,
        "output.index_select(dim, self.get_buffer(name))",
        "output.transpose(dim, -1).index_select(-1, self.get_buffer(name))",
    ),
    Mutation(
        "what is selected from a selection is counted anew",
        _SELECTED,
        "before[index.to(before.device)]",
        "index.to(before.device)",
    ),
    Mutation(
        "plain tensors are not cut", _SLIM, "for name in names & plain.keys()}", "for name in names - plain.keys()}"
    ),
    Mutation("a softmax is masked with zero", _REDUCTIONS, "-torch.inf if func in MAX_FUNCTIONS else 0.0", "0.0"),
    Mutation(
        "a mean is not rescaled", _REDUCTIONS, "exists.numel() / int(exists.sum())", "exists.numel() / len(exists)"
    ),
    Mutation("a statistic is masked along its neighbour", _REDUCTIONS, "[1] * (-1 - one.dim)", "[1] * (-2 - one.dim)"),
    # Reductions that a module calls
    Mutation(
        "all statistics of a module are its first one",
        _CALLS,
        "self._call_counts[self.module] = number + 1",
        "self._call_counts[self.module] = number",
    ),
    Mutation(
        "statistics belong to the outermost module",
        _CALLS,
        'return self.running[-1] if self.running else ""',
        'return self.running[0] if self.running else ""',
    ),
    # Copies of networks
    Mutation(
        "a shared parameter is listed under all its names",
        _CLONING,
        "                if tensor is not None and id(tensor) not in seen:\n",
        "                if tensor is not None:\n",
    ),
    Mutation(
        "a shared parameter is no longer shared",
        _CLONING,
        "None if old_id is None else memo[old_id]) for key, old_id in ids)",
        'copy.copy(memo.get(old_id)) if name == "_parameters" else memo.get(old_id)) for key, old_id in ids)',
    ),
    Mutation(
        "hooks are not copied",
        _CLONING,
        "if _is_empty_dict(value) and id(value) in unshared:",
        "if type(value) in _DICT_TYPES and name not in _TABLES:",
    ),
    Mutation(
        "copies share their tables of hooks with the original",
        _CLONING,
        "            attributes[name] = dict_type()\n",
        "            pass\n",
    ),
    Mutation(
        "attributes are shared with the original",
        _CLONING,
        "attributes[name] = copy.deepcopy(value, memo)",
        "attributes[name] = value",
    ),
    Mutation(
        "the call of nn.Module.compile is carried along",
        _CLONING,
        ").pop(COMPILED_CALL, None)",
        ").get(COMPILED_CALL, None)",
    ),
    Mutation(
        "a computed weight is copied with its graph",
        _CLONING,
        "        memo |= {id(tensor): tensor.detach().clone() for tensor in self._computed}\n",
        "",
    ),
    Mutation(
        "functions of instances are not rebound",
        _CLONING,
        "        for module, attribute in self._bound:\n",
        "        for module, attribute in ():\n",
    ),
    # Functions that an instance carries
    Mutation("a rebound closure holds the original", _BOUND, "    return memo[id(content)]\n", "    return content\n"),
    Mutation(
        "a closed-over method stays bound to the original",
        _BOUND,
        "_copied_content(content.__func__, memo), copy.deepcopy(content.__self__, memo))",
        "_copied_content(content.__func__, memo), content.__self__)",
    ),
    Mutation(
        "a bound method stays bound to the original",
        _BOUND,
        "_copied(value.__func__, memo), copy.deepcopy(value.__self__, memo))",
        "_copied(value.__func__, memo), value.__self__)",
    ),
    Mutation(
        "a rebound function loses its defaults",
        _BOUND,
        "function.__name__, function.__defaults__, cells)",
        "function.__name__, None, cells)",
    ),
    Mutation(
        "a rebound function loses its keyword defaults",
        _BOUND,
        "    new.__kwdefaults__ = function.__kwdefaults__\n",
        "",
    ),
    Mutation(
        "a partial loses its keywords",
        _BOUND,
        "*parts, **{k: _copied(v, memo) for k, v in value.keywords.items()})",
        "*parts)",
    ),
    Mutation(
        "a weak reference is not rebound", _BOUND, "        return ref(memo[id(value())])\n", "        return value\n"
    ),
    # Wrappers
    Mutation(
        "an averaged model is not unwrapped",
        _WRAPPERS,
        "DataParallel | DistributedDataParallel | AveragedModel)",
        "DataParallel | DistributedDataParallel)",
    ),
    Mutation(
        "only the outermost wrapper is taken off",
        _WRAPPERS,
        "    while (attribute := _attribute_of_wrapped(model)) is not None:\n",
        "    if (attribute := _attribute_of_wrapped(model)) is not None:\n",
    ),
    # Blocks
    Mutation(
        "a module goes whole although one of its blocks stays",
        _BLOCKS,
        "    stay = {chain for block in blocks if block.name not in gone for chain in block.chains}\n",
        "    stay = set()\n",
    ),
    Mutation(
        "a module goes whole although a block stays that has a smaller module of its own",
        _BLOCKS,
        "if block.name not in gone for chain in block.chains}",
        "if block.name not in gone for chain in block.chains[:1]}",
    ),
    Mutation(
        "the last skipped block is forgotten",
        _BLOCKS,
        "    return [block for block in blocks if block.name in skipped]",
        "    return [block for block in blocks if block.name in tuple(skipped)[:-1]]",
    ),
    Mutation(
        "only the last module of a block is replaced",
        _BLOCKS,
        "whole[:1] or block.replacements",
        "whole[:1] or block.replacements[-1:]",
    ),
    Mutation("a skipped block still costs", _PLAN, "presence(name): 0 for", "presence(name): 1 for"),
    Mutation(
        "modules of skipped blocks are not replaced",
        _SLIM,
        "    replace_modules_(smaller, replacements_of(blocks, plan.skipped))\n",
        "",
    ),
    Mutation(
        "a network rebuilt from tensors has modules of skipped blocks",
        _SLIM,
        "    replace_modules_(model, replacements)\n",
        "",
    ),
    Mutation(
        "sizes inside of skipped blocks are written",
        _SIZES,
        "        if not any(is_inside(attribute.module, module) for module in replaced)\n",
        "",
    ),
    Mutation(
        "the ReLU after an addition is forgotten",
        _SUBSTITUTES,
        '    if replacement.by == "identity":',
        '    if replacement.by in ("identity", "relu"):',
    ),
    Mutation("a zero is a one", _SUBSTITUTES, "x.new_zeros((1,)", "x.new_ones((1,)"),
    Mutation("zeros are the input", _SUBSTITUTES, "        return torch.zeros_like(x)\n", "        return x\n"),
    Mutation(
        "a tuple has an entry too few",
        _SUBSTITUTES,
        "[None] * (self.entries - 1)",
        "[None] * (self.entries - 2)",
    ),
    Mutation(
        "what replaces a module is in training mode", _SUBSTITUTES, "substitute.train(old.training)", "substitute"
    ),
    Mutation(
        "of a group what goes with blocks is left",
        _SUBSTITUTES,
        "if slot.tensor not in gone)",
        "if slot.tensor in gone)",
    ),
    Mutation(
        "the input is muted instead of the branch",
        _BRANCHES,
        "summands[branch] = self._change(summands[branch], summands[1 - branch]",
        "summands[1 - branch] = self._change(summands[1 - branch], summands[branch]",
    ),
    Mutation(
        "a branch that is added to in place is not muted itself",
        _BRANCHES,
        "    return branch.zero_() if is_in_place else torch.zeros_like(branch)",
        "    return torch.zeros_like(branch)",
    ),
    Mutation(
        "of several additions in a module the first is muted",
        _BRANCHES,
        "(one.module, one.call_index): one.branch",
        "(one.module, 0): one.branch",
    ),
    Mutation(
        "branches stay muted after the pass",
        _BRANCHES,
        "            self._entered.pop().close()\n",
        "            self._entered.pop()\n",
    ),
    # The check itself, which cannot find its own faults
    Mutation(
        "values that are not a number are no error",
        "slimming/agreement.py",
        'return error if error == error else float("inf")',
        "return error if error == error else 0.0",
    ),
    Mutation(
        "zeroed parameters are not restored",
        _VERIFY,
        "            parameter.data.copy_(saved[name])\n",
        "            pass\n",
    ),
    Mutation(
        "weights that are left of a block are no error",
        _STRUCTURE,
        "    if fault := _skipping_fault(smaller, cut, skipped):\n        return fault\n",
        "",
    ),
)
