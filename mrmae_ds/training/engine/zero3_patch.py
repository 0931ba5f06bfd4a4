"""Patch of DeepSpeed's ZeRO-3 that spends less of the host's time per micro-batch.

Parameters stay gathered from one micro-batch of a step to the next, so that nothing is fetched and released in between;
:mod:`mrmae_ds.training.engine.zero3_gradients` has the gradients' part. No value changes.
docs/deepspeed_patches.md lists the reasons, benchmarks/host_time.py measures the time.
"""

from mrmae_ds.training.engine.deepspeed_edits import Edit, Patch
from mrmae_ds.training.engine.zero3_gradients import GRADIENTS

_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
_KEEP_GATHERED = (
    Edit(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine.forward",
        "            self.optimizer.clear_backward_seen_flag()\n",
        """\
            self.optimizer.clear_backward_seen_flag()
            if self.zero_optimization_partition_weights():
                self.optimizer.parameter_offload.get_param_coordinator().keep_gathered = (
                    self.module.training and torch.is_grad_enabled() and not self.is_gradient_accumulation_boundary())
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator.__init__",
        "        self.__active_backward_submodules: Dict[int, Module] = {}\n",
        """\
        self.__active_backward_submodules: Dict[int, Module] = {}
        # Set before a forward that is followed by another micro-batch of the same optimizer step.
        self.keep_gathered: bool = False
        # Modules and parameters of a complete trace, and whether the limits allow to keep them all.
        self.__trace_modules: Set[Module] = set()
        self.__trace_params: Set[Parameter] = set()
        self.__may_keep: bool = False
        # Whether this micro-batch keeps them, and whether it found them gathered, so that it fetches nothing.
        self.__keep: bool = False
        self.__resident: bool = False
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator.reset_step",
        "                self.__trace_mode = ZeRoTraceMode.COMPLETE\n",
        """\
                self.__trace_mode = ZeRoTraceMode.COMPLETE
                self.__trace_modules = set(self.__submodule_order)
                self.__trace_params = set(p.param for p in self.__param_order)
                self.__may_keep = (not self.__prefetch_nvme
                                   and sum(p.ds_numel for p in self.__trace_params) <= self.__max_n_available_params
                                   and sum(p.param.ds_numel
                                           for p in self.__param_order) <= self.__max_reuse_dist_in_numel)
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator.reset_step",
        "        self.__param_queue = collections.deque(self.__param_order)  # reset fetch queue\n",
        """\
        self.__resident = self.is_complete_trace() and self.__all_available()
        self.__keep = self.is_complete_trace() and self.keep_gathered and self.__may_keep
        # reset fetch queue
        self.__param_queue = collections.deque() if self.__resident else collections.deque(self.__param_order)
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator._invalidate_trace",
        """\
        self._clear_trace_structures()
        self._clean_inflight_param_registry()
""",
        """\
        self.__resident = self.__keep = False
        self._clear_trace_structures()
        self._clean_inflight_param_registry()

    def __all_available(self) -> bool:
        return all(p.ds_status == ZeroParamStatus.AVAILABLE for p in self.__trace_params)

    def is_idle(self) -> bool:
        \"\"\"Return True if every parameter is gathered and stays so until the next micro-batch.\"\"\"
        return self.__resident and self.__keep

    def is_traced(self, sub_module: Module) -> bool:
        \"\"\"Return True if a module is part of a complete trace.\"\"\"
        return sub_module in self.__trace_modules

    def needs_no_fetch(self, sub_module: Module, forward: bool) -> bool:
        \"\"\"Advance past a module if every parameter is gathered.\"\"\"
        if not forward and self.__keep and not self.__resident:
            self.__resident = self.__all_available()  # the forward gathered them
        if self.is_idle():
            return self.is_traced(sub_module)
        if self.__resident:
            self.trace_prologue(sub_module)  # may invalidate the trace
        if self.__resident:
            if not forward:
                self.__active_backward_submodules[sub_module.ds_id] = sub_module
            self.__step_id += 1
        return self.__resident

    def needs_no_release(self, sub_module: Module, forward: bool) -> bool:
        \"\"\"Leave a module if every parameter was gathered and is used again.\"\"\"
        return self.is_traced(sub_module) if self.is_idle() else self.__resident and forward
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator.release_sub_module",
        """\
            if param.ds_id in params_to_release and not param.is_external_param:
                self.__release_param(param, free_data)
            if not free_data:
""",
        """\
            if self.__keep:
                continue
            if param.ds_id in params_to_release and not param.is_external_param:
                self.__release_param(param, free_data)
            if not free_data:
""",
    ),
    Edit(
        _COORDINATOR,
        "PartitionedParameterCoordinator.release_backward_leftovers",
        "                if not param.ds_persist and not param.is_external_param:\n",
        "                if not param.ds_persist and not param.is_external_param and not self.__keep:\n",
    ),
)

_OFFLOAD, _REGISTER = "deepspeed.runtime.zero.parameter_offload", "DeepSpeedZeRoOffload._register_deepspeed_module"
_MODULE_HOOKS = (
    Edit(
        _OFFLOAD,
        "DeepSpeedZeRoOffload.setup_zero_stage3_hooks",
        "        self.hierarchy = 0\n",
        """\
        self.hierarchy = 0
        # Hook dictionaries from which hooks are detached, with their contents before.
        self._detached_hooks = []
""",
    ),
    Edit(
        _OFFLOAD,
        "DeepSpeedZeRoOffload.setup_zero_stage3_hooks",
        "            self.get_param_coordinator().reset_step()\n",
        """\
            self.get_param_coordinator().reset_step()
            if self.get_param_coordinator().is_idle() != bool(self._detached_hooks):
                self._toggle_module_hooks()
""",
    ),
    Edit(
        _OFFLOAD,
        "DeepSpeedZeRoOffload.setup_zero_stage3_hooks",
        "        FWD_MODULE_STACK.append(self.module)\n",
        """\
        FWD_MODULE_STACK.append(self.module)

    def _toggle_module_hooks(self):
        \"\"\"Detach the hooks of modules that neither fetch nor release, or attach them again.\"\"\"
        own = {handle.id for handle in (*self.forward_hooks, *self.backward_hooks)}
        if self._detached_hooks:
            for hooks, before in self._detached_hooks:
                now = dict(hooks)
                hooks.clear()
                hooks.update({key: hook for key, hook in before.items() if key in own or key in now})
                hooks.update(now)
            self._detached_hooks = []
            return
        for module in self.module.modules():
            if module is self.module or not self.get_param_coordinator().is_traced(module):
                continue
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                self._detached_hooks.append((hooks, dict(hooks)))
                for key in own.intersection(hooks):
                    del hooks[key]
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        "            self.pre_sub_module_forward_function(module)\n",
        """\
            if not self.zenflow and self.param_coordinator.needs_no_fetch(module, forward=True):
                FWD_MODULE_STACK.append(module)
            else:
                self.pre_sub_module_forward_function(module)
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        "            self.post_sub_module_forward_function(module)\n",
        """\
            if self.zenflow or not self.param_coordinator.needs_no_release(module, forward=True):
                self.post_sub_module_forward_function(module)
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        "                    self.pre_sub_module_backward_function(sub_module)\n",
        """\
                    if self.zenflow or not self.param_coordinator.needs_no_fetch(sub_module, forward=False):
                        self.pre_sub_module_backward_function(sub_module)
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        """\
                if sub_module.ds_grads_remaining == 0:
                    self.post_sub_module_backward_function(sub_module)
""",
        """\
                if sub_module.ds_grads_remaining == 0:
                    if self.zenflow or not self.param_coordinator.needs_no_release(sub_module, forward=False):
                        self.post_sub_module_backward_function(sub_module)
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        """\
                @staticmethod
                def forward(outputs):
                    return outputs.detach()

                @staticmethod
                def setup_context(ctx, inputs, output):
                    ctx.module = module
                    ctx.pre_backward_function = _run_before_backward_function
                    if "applied_pre_backward_ref_cnt" not in ctx.module.__dict__:
                        ctx.module.applied_pre_backward_ref_cnt = 0
                    ctx.module.applied_pre_backward_ref_cnt += 1
""",
        """\
                # With setup_context(), PyTorch would inspect the signature of forward() in every call.
                @staticmethod
                def forward(ctx, outputs):
                    ctx.module = module
                    ctx.pre_backward_function = _run_before_backward_function
                    if "applied_pre_backward_ref_cnt" not in ctx.module.__dict__:
                        ctx.module.applied_pre_backward_ref_cnt = 0
                    ctx.module.applied_pre_backward_ref_cnt += 1
                    return outputs.detach()

""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        """\
                @staticmethod
                def forward(output):
                    return output.detach()

                @staticmethod
                def setup_context(ctx, inputs, output):
                    (output_in, ) = inputs
                    ctx.module = module
                    if output_in.requires_grad:
""",
        """\
                @staticmethod
                def forward(ctx, output):
                    ctx.module = module
                    if output.requires_grad:
""",
    ),
    Edit(
        _OFFLOAD,
        _REGISTER,
        "                        ctx.post_backward_function = _run_after_backward_function\n",
        """\
                        ctx.post_backward_function = _run_after_backward_function
                    return output.detach()
""",
    ),
    Edit(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine._forward_prologue",
        """\
            for module in self.module.modules():
                ensure_zero_ordered_dict(module)
""",
        """\
            if self.micro_steps % self.gradient_accumulation_steps() == 0 or not hasattr(self, "_zero3_modules"):
                self._zero3_modules = [module for module in self.module.modules() if module._parameters]
            for module in self._zero3_modules:
                ensure_zero_ordered_dict(module)
""",
    ),
    Edit(
        "deepspeed.runtime.engine",
        "DeepSpeedEngine._forward_epilogue",
        "            for module in self.module.modules():\n",
        "            for module in self._zero3_modules:\n",
    ),
)

ZERO3_HOST_TIME = Patch(
    "zero3-host-time",
    "a micro-batch under ZeRO-3 takes three to four times the host time that it takes under ZeRO-1",
    (
        *_KEEP_GATHERED,
        *_MODULE_HOOKS,
        *GRADIENTS,
        Edit(
            "deepspeed.accelerator.cuda_accelerator",
            "CUDA_Accelerator.current_stream",
            "        return torch.cuda.current_stream(device_index)\n",
            """\
        # Without an index, PyTorch searches for the current device.
        return torch.cuda.current_stream(torch.cuda.current_device() if device_index is None else device_index)
""",
        ),
    ),
)
