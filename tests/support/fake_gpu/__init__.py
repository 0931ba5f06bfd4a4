"""Stand-in for a GPU: PyTorch's CUDA build runs on it without a GPU, and what the host decides can be counted.

    python -m tests.support.fake_gpu [--out REPORT.json] train.py --ds_config ...

The C files replace the CUDA runtime, cuBLAS and NCCL. Device memory is host memory, copies are real, kernels are
counted and do nothing. Exact are: devices and dtypes of operands, PyTorch's choice of kernels for compute capability
9.0, waits of the host, numbers of launches and copies, and pinned buffers that are overwritten while a copy reads them.
Operators on at most a million elements are computed on the CPU after they were issued (``compute.py``), so that the
values of tiny models are real; those of larger ones are meaningless, and so are all GPU times.

Limits: no cuDNN, no Triton (``torch.compile`` returns its argument), no CUDA graphs. NCCL serves one rank; several use
gloo. Operators run in the order in which they are issued, so that a missing wait between two streams goes unnoticed, as
does reading pinned memory before its copy from the device was waited for. A copy to pageable memory blocks as on a GPU;
it is counted through the wait for its stream that PyTorch adds.
"""
