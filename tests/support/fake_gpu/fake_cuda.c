/* A CUDA runtime without a GPU: memory is the host's, copies are real, kernels do nothing.
 *
 * Preloaded (LD_PRELOAD) it stands in front of libcudart, libcublas, libcublasLt and libnccl, so that PyTorch believes in
 * one Hopper-class device. Values are meaningless; what is exact is everything the host decides: devices of operands,
 * dtypes, which library call or kernel is chosen, how often the host waits, and how many kernels a step launches.
 *
 * Pinned host-to-device copies stay "in flight" until something waits for their stream. The source is hashed when the
 * copy is issued and again when it is waited for: a difference is a buffer overwritten under an asynchronous copy.
 *
 * Build: see build.sh. Counters are read with ctypes: fake_cuda_counts(long out[8]), fake_cuda_reset().
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "cuda_runtime_api.h"
/* Half-precision types, for which the headers would need more than the packages ship. No function here uses them. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#include "nccl.h"

#define OK cudaSuccess
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int timing; /* FAKE_CUDA_TIMING: what a GPU would do beside the host costs the host nothing here either */
static int is_free(size_t bytes) { return timing && bytes >= 65536; } /* small values may steer the host */

/* ---- counters: launches, H2D, D2H, D2D, waits for a stream, waits for an event or the device, races, library calls */
enum { LAUNCH, H2D, D2H, D2D, STREAM_WAIT, OTHER_WAIT, RACE, LIBRARY, COUNTS };
static long counts[COUNTS];
#define COUNT(what) __atomic_add_fetch(&counts[what], 1, __ATOMIC_RELAXED)
void fake_cuda_counts(long *out) { memcpy(out, counts, sizeof counts); }

/* ---- kernels by name */
#define KERNELS (1 << 17)
static struct { const void *host; const char *name; long launches; } kernels[KERNELS];
static unsigned slot_of(const void *host) {
    unsigned h = (unsigned)(((uintptr_t)host >> 3) * 2654435761u) & (KERNELS - 1);
    while (kernels[h].host && kernels[h].host != host) h = (h + 1) & (KERNELS - 1);
    return h;
}
void fake_cuda_reset(void) {
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < KERNELS; i++) kernels[i].launches = 0;
}
int fake_cuda_kernels(const char *path) { /* lines of "launches<TAB>mangled name" */
    FILE *file = fopen(path, "w");
    if (!file) return 1;
    for (int i = 0; i < KERNELS; i++)
        if (kernels[i].launches) fprintf(file, "%ld\t%s\n", kernels[i].launches, kernels[i].name ? kernels[i].name : "?");
    return fclose(file);
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; (void)binary; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b,
                            void *c, void *d, int *e) {
    (void)handle; (void)device; (void)limit; (void)a; (void)b; (void)c; (void)d; (void)e;
    unsigned h = slot_of(host);
    kernels[h].host = host; kernels[h].name = name;
}
void __cudaRegisterVar(void **h, char *host, char *device, const char *name, int ext, size_t size, int constant, int global) {
    (void)h; (void)host; (void)device; (void)name; (void)ext; (void)size; (void)constant; (void)global;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call[8];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call[depth & 7].grid = grid; call[depth & 7].block = block;
    call[depth & 7].shared = shared; call[depth & 7].stream = stream;
    depth++;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    depth--;
    *grid = call[depth & 7].grid; *block = call[depth & 7].block; *shared = call[depth & 7].shared;
    *(void **)stream = call[depth & 7].stream;
    return OK;
}
static cudaError_t launched(const void *kernel) {
    __atomic_add_fetch(&counts[LAUNCH], 1, __ATOMIC_RELAXED);
    unsigned h = slot_of(kernel);
    kernels[h].host = kernel;
    __atomic_add_fetch(&kernels[h].launches, 1, __ATOMIC_RELAXED);
    return OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    (void)g; (void)b; (void)a; (void)s; (void)t; return launched(k);
}
cudaError_t cudaLaunchKernel(const void *k, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    (void)g; (void)b; (void)a; (void)s; (void)t; return launched(k);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *k, void **a) { (void)c; (void)a; return launched(k); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *f) {
    (void)f; memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024; out->numRegs = 32; out->binaryVersion = 90; out->ptxVersion = 90;
    out->maxDynamicSharedSizeBytes = 232448;
    return OK;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { (void)f; (void)a; (void)v; return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned x) {
    (void)f; (void)s; (void)x; *n = b > 0 ? 2048 / b : 2; return OK;
}

/* ---- the device */
static int devices = 1;
static __thread int current_device;
cudaError_t cudaGetDeviceCount(int *n) { *n = devices; return OK; }
cudaError_t cudaGetDevice(int *n) { *n = current_device; return OK; }
cudaError_t cudaSetDevice(int n) {
    if (n < 0 || n >= devices) return cudaErrorInvalidDevice;
    current_device = n;
    return OK;
}
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return OK; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return OK; }
#define MEMORY (80ull << 30)
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int n) {
    (void)n; memset(p, 0, sizeof *p);
    strcpy(p->name, "Fake H100 (no arithmetic)");
    p->totalGlobalMem = MEMORY; p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472; p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536; p->warpSize = 32;
    p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->l2CacheSize = 50 << 20; p->memoryBusWidth = 5120;
    p->unifiedAddressing = 1; p->concurrentKernels = 1; p->textureAlignment = 512; p->asyncEngineCount = 3;
    return OK;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int n) {
    (void)n;
    switch ((int)a) {
    case 16: *v = 132; break; case 39: *v = 2048; break; case 1: *v = 1024; break; case 10: *v = 32; break;
    case 75: *v = 9; break; case 76: *v = 0; break; case 97: *v = 232448; break; case 8: *v = 49152; break;
    case 5: *v = 2147483647; break; case 6: case 7: *v = 65535; break; case 81: *v = 233472; break;
    default: *v = 0;
    }
    return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int n) { (void)n; snprintf(id, length, "0000:01:00.0"); return OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { if (low) *low = 0; if (high) *high = -5; return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *v, int a, int b) { (void)a; (void)b; *v = 0; return OK; }
cudaError_t cudaGetLastError(void) { return OK; }
cudaError_t cudaPeekAtLastError(void) { return OK; }
static int unsupported(void) { return 801; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    (void)name; (void)v; (void)flags; *f = (void *)unsupported; if (found) *found = 0; return OK;
}

/* ---- streams and events: numbered work; what is not waited for is not known to be done */
typedef struct Stream { long issued, done; int waits_for_others; struct Stream *next; } Stream;
typedef struct { Stream *stream; long number; struct timespec at; } Event;
static Stream null_stream, *streams = &null_stream;
static Stream *stream_of(void *s) { return (uintptr_t)s <= 2 ? &null_stream : (Stream *)s; }

typedef struct Copy { Stream *stream; long number; const void *from; size_t size; uint64_t hash; struct Copy *next; } Copy;
static Copy *in_flight;
static uint64_t hash_of(const void *p, size_t size) {
    const uint64_t *w = p; uint64_t h = 1469598103934665603ull; size_t n = size / 8;
    for (size_t i = 0; i < n; i++) h = (h ^ w[i]) * 1099511628211ull;
    for (size_t i = n * 8; i < size; i++) h = (h ^ ((const unsigned char *)p)[i]) * 1099511628211ull;
    return h;
}
void fake_cuda_race(void) {} /* for a debugger */
static void land(Copy **at) {
    Copy *copy = *at;
    if (hash_of(copy->from, copy->size) != copy->hash) {
        counts[RACE]++;
        fprintf(stderr, "fake_cuda: RACE: %zu bytes of pinned memory at %p changed while their copy was in flight\n",
                copy->size, copy->from);
        fake_cuda_race();
    }
    *at = copy->next;
    free(copy);
}
static void finish(Stream *s, long number) {
    pthread_mutex_lock(&lock);
    for (Copy **at = &in_flight; *at;)
        if ((s == NULL || ((*at)->stream == s && (*at)->number <= number))) land(at); else at = &(*at)->next;
    if (s) { if (s->done < number) s->done = number; }
    else for (Stream *t = streams; t; t = t->next) t->done = t->issued;
    pthread_mutex_unlock(&lock);
}
static void finish_stream(Stream *s) { s->waits_for_others ? finish(NULL, 0) : finish(s, s->issued); }
static cudaError_t new_stream(cudaStream_t *out) {
    Stream *s = calloc(1, sizeof *s);
    pthread_mutex_lock(&lock); s->next = streams->next; streams->next = s; pthread_mutex_unlock(&lock);
    *out = (cudaStream_t)s; return OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { (void)f; return new_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { (void)f; (void)p; return new_stream(s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { (void)s; return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { (void)s; *p = 0; return OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *v) { (void)s; *v = 0; return OK; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *v, unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
    (void)s; (void)id; (void)g; (void)d; (void)e; *v = 0; if (n) *n = 0; return OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { (void)m; return OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) { Stream *t = stream_of(s); return timing || t->done >= t->issued ? OK : cudaErrorNotReady; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { counts[STREAM_WAIT]++; finish_stream(stream_of(s)); return OK; }
cudaError_t cudaDeviceSynchronize(void) { counts[OTHER_WAIT]++; finish(NULL, 0); return OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { (void)e; (void)f; stream_of(s)->waits_for_others = 1; return OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { (void)f; *e = (cudaEvent_t)calloc(1, sizeof(Event)); return OK; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { (void)e; return OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    Event *v = (Event *)e; v->stream = stream_of(s); v->number = v->stream->issued; clock_gettime(CLOCK_MONOTONIC, &v->at); return OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { (void)f; return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) { Event *v = (Event *)e; return timing || !v->stream || v->stream->done >= v->number ? OK : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    Event *v = (Event *)e; counts[OTHER_WAIT]++;
    if (v->stream) { if (v->stream->waits_for_others) finish(NULL, 0); else finish(v->stream, v->number); }
    return OK;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    Event *x = (Event *)a, *y = (Event *)b;
    *ms = (y->at.tv_sec - x->at.tv_sec) * 1e3f + (y->at.tv_nsec - x->at.tv_nsec) * 1e-6f; return OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *d) { (void)s; f(d); return OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *d, unsigned x) { (void)x; f(s, OK, d); return OK; }

/* ---- memory: ranges are remembered, so that pinned and device memory can be told apart */
#define RANGES 65536
static struct { char *at; size_t size; int kind, device; } ranges[RANGES];
static int used;
static void *take(size_t size, int kind) {
    void *p = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < used && ranges[i].at) i++;
    if (i == RANGES) abort();
    if (i == used) used++;
    ranges[i].at = p; ranges[i].size = size; ranges[i].kind = kind; ranges[i].device = current_device;
    pthread_mutex_unlock(&lock);
    return p;
}
static int kind_and_device_of(const void *p, int *device) {
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++)
        if (ranges[i].at && (char *)p >= ranges[i].at && (char *)p < ranges[i].at + (ranges[i].size ? ranges[i].size : 1)) { kind = ranges[i].kind; *device = ranges[i].device; break; }
    pthread_mutex_unlock(&lock);
    return kind;
}
static int kind_of(const void *p) { int device; return kind_and_device_of(p, &device); }
static cudaError_t give(void *p, int unmap) {
    if (!p) return OK;
    if (kind_of(p) == 1) finish(NULL, 0); /* pinned: its copies must be over */
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++)
        if (ranges[i].at == p) { if (unmap) munmap(p, ranges[i].size ? ranges[i].size : 1); ranges[i].at = NULL; break; }
    pthread_mutex_unlock(&lock);
    return OK;
}
enum { PAGEABLE, PINNED, DEVICE };
__attribute__((constructor)) static void read_environment(void) {
    timing = getenv("FAKE_CUDA_TIMING") != NULL;
    if (getenv("FAKE_CUDA_DEVICES")) devices = atoi(getenv("FAKE_CUDA_DEVICES"));
}
cudaError_t cudaMalloc(void **p, size_t n) { *p = take(n, DEVICE); return OK; }
cudaError_t cudaFree(void *p) { return give(p, 1); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { (void)f; *p = take(n, PINNED); return OK; }
cudaError_t cudaFreeHost(void *p) { return give(p, 1); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) {
    (void)f;
    pthread_mutex_lock(&lock);
    int i = 0; while (i < used && ranges[i].at) i++;
    if (i == used) used++;
    ranges[i].at = p; ranges[i].size = n; ranges[i].kind = PINNED;
    pthread_mutex_unlock(&lock);
    return OK;
}
cudaError_t cudaHostUnregister(void *p) { return give(p, 0); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = MEMORY - (1ull << 30); *total = MEMORY; return OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    int kind = kind_and_device_of(p, &a->device);
    a->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = kind == PAGEABLE ? NULL : (void *)p; a->hostPointer = kind == DEVICE ? NULL : (void *)p;
    return OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
    Stream *stream = stream_of(s);
    int source = kind_of(from), target = kind_of(to);
    (void)k;
    counts[source != DEVICE ? H2D : target != DEVICE ? D2H : D2D]++;
    if (source == DEVICE && target != DEVICE) finish_stream(stream); /* the host reads it after its own wait */
    if (!is_free(n) || (source != DEVICE && target != DEVICE)) memmove(to, from, n);
    pthread_mutex_lock(&lock);
    stream->issued++;
    if (!timing && source == PINNED && target == DEVICE) {
        Copy *copy = malloc(sizeof *copy);
        *copy = (Copy){stream, stream->issued, from, n, hash_of(from, n), in_flight};
        in_flight = copy;
    }
    pthread_mutex_unlock(&lock);
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) {
    cudaMemcpyAsync(to, from, n, k, 0); counts[OTHER_WAIT]++; finish(NULL, 0); return OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { (void)a; (void)b; return cudaMemcpyAsync(to, from, n, 3, s); }
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { (void)s; if (!is_free(n)) memset(p, v, n); return OK; }
cudaError_t cudaMemset(void *p, int v, size_t n) { memset(p, v, n); return OK; }
cudaError_t cudaMemcpyToSymbol(const void *s, const void *f, size_t n, size_t o, enum cudaMemcpyKind k) { (void)s; (void)f; (void)n; (void)o; (void)k; return OK; }
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { (void)s; static char memory[1 << 16]; *p = memory; return OK; }

/* ---- cuBLAS and cuBLASLt: calls succeed. Argument lists do not matter to a function that ignores them. */
#define NOTHING(name) int name(void) { __atomic_add_fetch(&counts[LIBRARY], 1, __ATOMIC_RELAXED); return 0; }
#define QUIET(name) int name(void) { return 0; }
static long handle[64];
int cublasCreate_v2(void **h) { *h = handle; return 0; }
QUIET(cublasDestroy_v2) QUIET(cublasSetStream_v2) QUIET(cublasSetWorkspace_v2) QUIET(cublasSetMathMode)
QUIET(cublasSetPointerMode_v2) QUIET(cublasSetSmCountTarget)
int cublasGetMathMode(void *h, int *m) { (void)h; *m = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *m) { (void)h; *m = 0; return 0; }
NOTHING(cublasSgemm_v2) NOTHING(cublasDgemm_v2) NOTHING(cublasSgemmEx) NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx)
NOTHING(cublasSgemmStridedBatched) NOTHING(cublasDgemmStridedBatched) NOTHING(cublasSgemv_v2) NOTHING(cublasDgemv_v2)
NOTHING(cublasSdot_v2) NOTHING(cublasDdot_v2) NOTHING(cublasDotEx) NOTHING(cublasLtMatmul)
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **d, int c, int t) { (void)c; (void)t; *d = handle; return 0; }
int cublasLtMatmulPreferenceCreate(void **d) { *d = handle; return 0; }
int cublasLtMatrixLayoutCreate(void **d) { *d = handle; return 0; }
QUIET(cublasLtMatmulDescDestroy) QUIET(cublasLtMatmulDescSetAttribute) QUIET(cublasLtMatmulPreferenceDestroy)
QUIET(cublasLtMatmulPreferenceSetAttribute) QUIET(cublasLtMatrixLayoutDestroy) QUIET(cublasLtMatrixLayoutSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int wanted, void *out, int *found) {
    (void)h; (void)d; (void)a; (void)b; (void)c; (void)e; (void)p; (void)wanted; (void)out; *found = 1; return 0;
}

/* ---- NCCL that answers at once: what a rank sends is what it receives from every other rank. Right for one rank; for
 * rank 0 of several it is what the host's time depends on, without the others. */
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
    COUNT(LIBRARY); move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, int root, STREAM) {
    COUNT(LIBRARY); if (c->rank == root) move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, STREAM) {
    COUNT(LIBRARY); if (c->rank == root) move(from, to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclBcast(void *at, size_t n, ncclDataType_t type, int root, STREAM) { COUNT(LIBRARY); return ncclSuccess; }
ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, STREAM) {
    COUNT(LIBRARY);
    for (int rank = 0; rank < c->size; rank++) move(from, (char *)to + rank * n * bytes_of(type), n * bytes_of(type));
    return ncclSuccess;
}
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, STREAM) {
    COUNT(LIBRARY); move((const char *)from + c->rank * n * bytes_of(type), to, n * bytes_of(type)); return ncclSuccess;
}
ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t type, int peer, STREAM) { COUNT(LIBRARY); return ncclSuccess; }
ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t type, int peer, STREAM) { COUNT(LIBRARY); return ncclSuccess; }

/* ---- the driver, as far as PyTorch looks for it by name */
int cuInit(unsigned f) { (void)f; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { (void)d; *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = handle; return 0; }
int cuCtxGetCurrent(void **c) { *c = handle; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetCount(int *n) { *n = devices; return 0; }
QUIET(cuCtxSetCurrent) QUIET(cuCtxPushCurrent_v2) QUIET(cuCtxPopCurrent_v2)
#define MISSING(name) int name(void) { return 801; }
MISSING(cuFuncSetCacheConfig) MISSING(cuGetErrorName) MISSING(cuGetErrorString) MISSING(cuLaunchCooperativeKernel)
MISSING(cuLaunchKernel) MISSING(cuLaunchKernelEx) MISSING(cuLinkAddData_v2) MISSING(cuLinkCreate_v2) MISSING(cuLinkComplete)
MISSING(cuModuleLoadData) MISSING(cuModuleLoadDataEx) MISSING(cuModuleGetFunction) MISSING(cuModuleGetGlobal_v2)
MISSING(cuModuleUnload) MISSING(cuFuncGetAttribute) MISSING(cuFuncSetAttribute) MISSING(cuDeviceGetUuid)
MISSING(cuOccupancyMaxActiveBlocksPerMultiprocessor) MISSING(cuPointerGetAttribute) MISSING(cuTensorMapEncodeTiled)
MISSING(cuMemGetAddressRange_v2) MISSING(cuDeviceGetAttribute)
