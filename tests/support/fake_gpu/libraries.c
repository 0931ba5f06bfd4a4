/* Libraries above the runtime: cuBLAS, whose calls succeed without computing; NCCL, which answers at once; the driver. */
#include "fake_cuda.h"
#include <stdlib.h>
#include <string.h>
#include "cuda_runtime_api.h"
/* Half-precision types, for which the headers would need more than the packages ship. No function here uses them. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#include "nccl.h"

/* ---- cuBLAS and cuBLASLt. Their headers are not included: a function that ignores its arguments needs no list of them. */
#define COUNTED(name) int name(void) { COUNT(LIBRARY_CALL); return 0; }
#define QUIET(name) int name(void) { return 0; }
static long handle[64];
int cublasCreate_v2(void **h) { *h = handle; return 0; }
QUIET(cublasDestroy_v2) QUIET(cublasSetStream_v2) QUIET(cublasSetWorkspace_v2) QUIET(cublasSetMathMode)
QUIET(cublasSetPointerMode_v2) QUIET(cublasSetSmCountTarget)
int cublasGetMathMode(void *h, int *m) { (void)h; *m = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *m) { (void)h; *m = 0; return 0; }
COUNTED(cublasSgemm_v2) COUNTED(cublasDgemm_v2) COUNTED(cublasSgemmEx) COUNTED(cublasGemmEx) COUNTED(cublasGemmStridedBatchedEx)
COUNTED(cublasSgemmStridedBatched) COUNTED(cublasDgemmStridedBatched) COUNTED(cublasSgemv_v2) COUNTED(cublasDgemv_v2)
COUNTED(cublasSdot_v2) COUNTED(cublasDdot_v2) COUNTED(cublasDotEx) COUNTED(cublasLtMatmul)
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **d, int c, int t) { (void)c; (void)t; *d = handle; return 0; }
int cublasLtMatmulPreferenceCreate(void **d) { *d = handle; return 0; }
int cublasLtMatrixLayoutCreate(void **d) { *d = handle; return 0; }
QUIET(cublasLtMatmulDescDestroy) QUIET(cublasLtMatmulDescSetAttribute) QUIET(cublasLtMatmulPreferenceDestroy)
QUIET(cublasLtMatmulPreferenceSetAttribute) QUIET(cublasLtMatrixLayoutDestroy) QUIET(cublasLtMatrixLayoutSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int wanted, void *out, int *found) {
    (void)h; (void)d; (void)a; (void)b; (void)c; (void)e; (void)p; (void)wanted; (void)out; *found = 1; return 0;
}

/* ---- NCCL: a rank receives from every other rank what it sends itself. That is right for one rank, and lets the time of
 * rank 0 of several be measured without the others. */
typedef struct ncclComm { int size, rank; } Communicator;
static size_t bytes_of(ncclDataType_t type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}
static void move(const void *from, void *to, size_t bytes) {
    if (from != to && !is_free(bytes)) memmove(to, from, bytes);
}
static ncclResult_t new_communicator(ncclComm_t *comm, int size, int rank) {
    *comm = malloc(sizeof **comm);
    **comm = (Communicator){size, rank};
    return ncclSuccess;
}
ncclResult_t ncclGetVersion(int *v) { *v = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 7, sizeof *id); return ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t *c, int size, ncclUniqueId id, int rank) { return new_communicator(c, size, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return new_communicator(c, size, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int size, int rank, int n, ncclUniqueId *ids, ncclConfig_t *config) {
    return new_communicator(c, size, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t *out, ncclConfig_t *config) {
    return new_communicator(out, c->size, c->rank);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) { *error = ncclSuccess; return ncclSuccess; }
const char *ncclGetErrorString(ncclResult_t error) { return "none"; }
const char *ncclGetLastError(ncclComm_t c) { return "none"; }
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) { *n = c->size; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *n) { *n = c->rank; return ncclSuccess; }
ncclResult_t ncclCommCuDevice(const ncclComm_t c, int *n) { *n = current_device; return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t c) { return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t c) { return ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t c) { return ncclSuccess; }
ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
ncclResult_t ncclCommRegister(const ncclComm_t c, void *at, size_t size, void **out) { *out = at; return ncclSuccess; }
ncclResult_t ncclCommDeregister(const ncclComm_t c, void *at) { return ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type, ncclScalarResidence_t where, ncclComm_t c) {
    *op = ncclSum; return ncclSuccess;
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t c) { return ncclSuccess; }
#define STREAM ncclComm_t c, cudaStream_t s
ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, STREAM) {
    COUNT(LIBRARY_CALL); move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, int root, STREAM) {
    COUNT(LIBRARY_CALL); if (c->rank == root) move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, STREAM) {
    COUNT(LIBRARY_CALL); if (c->rank == root) move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclBcast(void *at, size_t n, ncclDataType_t type, int root, STREAM) { COUNT(LIBRARY_CALL); return ncclSuccess; }
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, STREAM) {
    COUNT(LIBRARY_CALL);
    for (int rank = 0; rank < c->size; rank++) move(from, (char *)to + rank * n * bytes_of(type), n * bytes_of(type));
    return ncclSuccess;
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, STREAM) {
    COUNT(LIBRARY_CALL); move((const char *)from + c->rank * n * bytes_of(type), to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t type, int peer, STREAM) { COUNT(LIBRARY_CALL); return ncclSuccess; }
ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t type, int peer, STREAM) { COUNT(LIBRARY_CALL); return ncclSuccess; }

/* ---- the driver, as far as PyTorch looks for it by name */
int cuInit(unsigned f) { (void)f; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { (void)d; *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = handle; return 0; }
int cuCtxGetCurrent(void **c) { *c = handle; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetCount(int *n) { *n = num_devices; return 0; }
QUIET(cuCtxSetCurrent) QUIET(cuCtxPushCurrent_v2) QUIET(cuCtxPopCurrent_v2)
#define MISSING(name) int name(void) { return 801; }
MISSING(cuFuncSetCacheConfig) MISSING(cuGetErrorName) MISSING(cuGetErrorString) MISSING(cuLaunchCooperativeKernel)
MISSING(cuLaunchKernel) MISSING(cuLaunchKernelEx) MISSING(cuLinkAddData_v2) MISSING(cuLinkCreate_v2) MISSING(cuLinkComplete)
MISSING(cuModuleLoadData) MISSING(cuModuleLoadDataEx) MISSING(cuModuleGetFunction) MISSING(cuModuleGetGlobal_v2)
MISSING(cuModuleUnload) MISSING(cuFuncGetAttribute) MISSING(cuFuncSetAttribute) MISSING(cuDeviceGetUuid)
MISSING(cuOccupancyMaxActiveBlocksPerMultiprocessor) MISSING(cuPointerGetAttribute) MISSING(cuTensorMapEncodeTiled)
MISSING(cuMemGetAddressRange_v2) MISSING(cuDeviceGetAttribute)
