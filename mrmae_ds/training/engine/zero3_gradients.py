"""Edits of DeepSpeed's ZeRO-3 that handle gradients as lists: part of the patch ``zero3-host-time``.

They are added to buckets, scattered and accumulated together instead of one by one. No value changes.
"""

from mrmae_ds.training.engine.deepspeed_edits import Edit

_STAGE3, _OPTIMIZER = "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"
GRADIENTS = (
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.create_reduce_and_remove_grad_hooks",
        """\
                        if param.grad is None:
                            param.grad = torch.zeros_like(param)
                        self.reduce_ready_partitions_and_remove_grads(param)
""",
        """\
                        if param.grad is None:
                            param.grad = torch.zeros_like(param)
                    for param in self.__add_leaf_grads_to_ipg_buckets(params):
                        self.reduce_ready_partitions_and_remove_grads(param)
""",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.create_reduce_and_remove_grad_hooks",
        "        print_rank_0('[End] Create gradient reduction hooks')\n",
        """\
        print_rank_0('[End] Create gradient reduction hooks')

    def __add_leaf_grads_to_ipg_buckets(self, params: List[Parameter]) -> List[Parameter]:
        \"\"\"Add a leaf module's gradients to buckets together, unless buckets are copies of them.

        Returns the parameters that have to be added one by one.
        \"\"\"
        if (self.contiguous_gradients or self._coalesce_grad_reduction or self.zenflow
                or self.autoep_folding_tp_group is not None
                or not all(getattr(param, "ds_grad_is_ready", True) for param in params)):
            return params
        grouped = defaultdict(list)
        for param in params:
            grouped[self.get_param_comm_dtype(param), self._get_param_partition_group(param)].append(param)
        for (comm_dtype, process_group), group in grouped.items():
            bucket, elements = self.ipg_buckets[comm_dtype], sum(param.ds_numel for param in group)
            if bucket.params and (bucket.process_group != process_group
                                  or bucket.elements + elements > self.reduce_bucket_size):
                self.__reduce_and_partition_ipg_grads(comm_dtype)
            bucket.params += group
            bucket.process_group = process_group
            bucket.elements += elements
        return []
""",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.__add_grad_to_ipg_bucket",
        "        if not get_accelerator().resolves_data_dependency():\n",
        "        if self.contiguous_gradients and not get_accelerator().resolves_data_dependency():\n",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.__reduce_and_partition_ipg_grads",
        "        with get_accelerator().stream(self.reduce_and_partition_stream):\n            if self.enable_sanity",
        """\
        if not self.contiguous_gradients and not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())

        with get_accelerator().stream(self.reduce_and_partition_stream):
            if self.enable_sanity""",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.__avg_scatter_grads",
        "        full_grads_for_rank = [p.grad for p in params_to_reduce]\n",
        """\
        world_size = dist.get_world_size(group=process_group)
        if (self.all2all_process_group is None
                and not (self.postscale_gradients and self.gradient_predivide_factor != 1.0)
                and self._gradient_averaging_world_size(params_to_reduce, world_size) == world_size
                and not any(p.ds_numel % world_size for p in params_to_reduce)):
            # Nothing to scale or pad: cast all at once, then interleave all at once, a row for each rank.
            grads = [p.grad.reshape(-1) for p in params_to_reduce]
            sizes = [p.ds_numel // world_size for p in params_to_reduce]
            if world_size == 1 or communication_data_type != grads[0].dtype:
                numels = [p.ds_numel for p in params_to_reduce]
                flat = torch.empty(sum(numels), dtype=communication_data_type, device=grads[0].device)
                cast = flat.split(numels)
                torch._foreach_copy_(cast, grads)
                grads, rows = cast, flat.view(1, -1)
            if world_size > 1:
                rows = torch.cat([grad.view(world_size, -1) for grad in grads], dim=1)
            rows.div_(world_size)
            own = rows[dist.get_rank(group=process_group)]
            dist.reduce_scatter_fn(own, rows.view(-1), group=process_group)
            return list(own.to(self.gradient_accumulation_dtype).split(sizes))

        full_grads_for_rank = [p.grad for p in params_to_reduce]
""",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.partition_grads",
        """\
        buffers = []
        for param, grad_partition in""",
        """\
        buffers = []
        if not self.offload_optimizer and params_to_release:
            rank = self._get_param_partition_rank(params_to_release[0])
            stream = None if get_accelerator().is_synchronized_device() else get_accelerator().current_stream()
            partitions = []
            for param, grad_partition in zip(params_to_release, grad_partitions):
                if param.ds_tensor.ds_numel * rank < param.ds_numel:
                    self._offload_boundary_param_ids.add(param.ds_id)
                    buffer, numel = self.__param_id_to_grad_partition[param.ds_id], grad_partition.numel()
                    buffers.append(buffer if buffer.numel() == numel else buffer.narrow(0, 0, numel))
                    partitions.append(grad_partition.view(-1))
                if stream is not None and param.grad is not None:
                    param.grad.record_stream(stream)
                param.grad = None
            if buffers and self.micro_step_id == 0:  # don't accumulate
                torch._foreach_copy_(buffers, partitions, non_blocking=True)
            elif buffers:
                torch._foreach_add_(buffers, partitions)
            return buffers

        for param, grad_partition in""",
    ),
    Edit(
        _STAGE3,
        f"{_OPTIMIZER}.independent_gradient_partition_epilogue",
        "            self.reduce_and_partition_stream.synchronize()\n",
        """\
            if self.offload_optimizer:  # the host reads the gradients
                self.reduce_and_partition_stream.synchronize()
            else:
                get_accelerator().current_stream().wait_stream(self.reduce_and_partition_stream)
""",
    ),
)
