/* A CUDA runtime without a GPU: device memory is the host's, copies are real, kernels are counted and do nothing.
 *
 * Preloaded, it stands in front of libcudart, so that PyTorch sees Hopper-class GPUs. Everything that the host decides is
 * exact: devices and dtypes of operands, the choice of kernels, launches, copies, and waits.
 *
 * Environment: FAKE_CUDA_DEVICES is the number of GPUs. With FAKE_CUDA_TIMING, the GPU is infinitely fast: all work is
 * done at once, large copies are left out, and races are not looked for.
 *
 * This file has kernels and devices; memory.c has streams, events, memory and copies; libraries.c what lies above.
 */
#include "fake_cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda_runtime_api.h"

#define OK cudaSuccess

long counters[NUM_COUNTERS];
int num_devices = 1, timing;
__thread int current_device;

__attribute__((constructor)) static void read_environment(void) {
    const char *devices = getenv("FAKE_CUDA_DEVICES");
    if (devices) num_devices = atoi(devices);
    timing = getenv("FAKE_CUDA_TIMING") != NULL;
}

int is_free(size_t bytes) { return timing && bytes >= 65536; }

/* ---- kernels, by the address of their host function */

#define MAX_KERNELS (1 << 17)
static struct { const void *host; const char *name; long launches; } kernels[MAX_KERNELS];

static unsigned kernel_slot(const void *host) {
    unsigned slot = (unsigned)(((uintptr_t)host >> 3) * 2654435761u) & (MAX_KERNELS - 1);
    while (kernels[slot].host && kernels[slot].host != host) slot = (slot + 1) & (MAX_KERNELS - 1);
    return slot;
}

static cudaError_t count_launch(const void *kernel) {
    COUNT(LAUNCH);
    unsigned slot = kernel_slot(kernel);
    kernels[slot].host = kernel;
    __atomic_add_fetch(&kernels[slot].launches, 1, __ATOMIC_RELAXED);
    return OK;
}

/* What Python calls: see report.py. */
void fake_cuda_counts(long *out) { memcpy(out, counters, sizeof counters); }

void fake_cuda_reset(void) {
    memset(counters, 0, sizeof counters);
    for (int i = 0; i < MAX_KERNELS; i++) kernels[i].launches = 0;
}

int fake_cuda_kernels(const char *path) { /* writes lines of "launches<TAB>mangled name" */
    FILE *file = fopen(path, "w");
    if (!file) return 1;
    for (int i = 0; i < MAX_KERNELS; i++)
        if (kernels[i].launches) fprintf(file, "%ld\t%s\n", kernels[i].launches, kernels[i].name ? kernels[i].name : "?");
    return fclose(file);
}

/* Calls that the CUDA compiler puts into every library: registration of its kernels, and the <<<...>>> of a launch. */
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid_size, int *warp_size) {
    unsigned slot = kernel_slot(host);
    kernels[slot].host = host;
    kernels[slot].name = name;
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } calls[8];
static __thread int depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    calls[depth & 7].grid = grid;
    calls[depth & 7].block = block;
    calls[depth & 7].shared = shared;
    calls[depth & 7].stream = stream;
    depth++;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    depth--;
    *grid = calls[depth & 7].grid;
    *block = calls[depth & 7].block;
    *shared = calls[depth & 7].shared;
    *(void **)stream = calls[depth & 7].stream;
    return OK;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    return count_launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
    return count_launch(kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return count_launch(kernel);
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) { return OK; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
    *out = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90,
                                       .maxDynamicSharedSizeBytes = 232448};
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = threads > 0 ? 2048 / threads : 2;
    return OK;
}

/* ---- devices: an H100's numbers, by which PyTorch chooses kernels */

cudaError_t cudaGetDeviceCount(int *count) { *count = num_devices; return OK; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return OK; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices) return cudaErrorInvalidDevice;
    current_device = device;
    return OK;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return OK; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    *out = (struct cudaDeviceProp){
        .name = "GPU stand-in (computes nothing)", .major = 9, .minor = 0, .multiProcessorCount = 132, .warpSize = 32,
        .totalGlobalMem = DEVICE_MEMORY, .l2CacheSize = 50 << 20, .memoryBusWidth = 5120,
        .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472,
        .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
        .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
        .unifiedAddressing = 1, .concurrentKernels = 1, .textureAlignment = 512, .asyncEngineCount = 3,
    };
    return OK;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp device_properties;
    cudaGetDeviceProperties(&device_properties, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = device_properties.maxThreadsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *value = device_properties.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = device_properties.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)device_properties.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)device_properties.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)device_properties.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = device_properties.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = device_properties.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device_properties.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device_properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device_properties.minor; break;
    default: *value = 0;
    }
    return OK;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:%02x:00.0", device + 1); return OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return OK; }
cudaError_t cudaGetLastError(void) { return OK; }
cudaError_t cudaPeekAtLastError(void) { return OK; }

static int not_supported(void) { return cudaErrorNotSupported; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    *function = (void *)not_supported;
    if (found) *found = cudaDriverEntryPointSuccess;
    return OK;
}

