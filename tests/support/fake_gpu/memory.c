/* Streams, events, memory and copies.
 *
 * A copy from pinned memory to the device stays in flight until something waits for its stream. Its source is hashed
 * when the copy is issued and again when it is waited for: if they differ, a buffer was overwritten while, on a GPU, the
 * copy might still have read it.
 */
#define _GNU_SOURCE
#include "fake_cuda.h"
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "cuda_runtime_api.h"

#define OK cudaSuccess

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- streams and events: copies of a stream are numbered; those up to `done` have been waited for */

typedef struct Stream {
    long issued, done;
    int follows_others; /* it waited for an event of another stream: a wait for it is taken as one for all streams */
    struct Stream *next;
} Stream;
typedef struct { Stream *stream; long number; struct timespec at; } Event;
static Stream default_stream, *streams = &default_stream;

static Stream *stream_of(cudaStream_t stream) {
    return (uintptr_t)stream <= 2 ? &default_stream : (Stream *)stream; /* 1 and 2 are names of the default stream */
}

typedef struct Copy {
    Stream *stream;
    long number;
    const void *source;
    size_t size;
    uint64_t hash;
    struct Copy *next;
} Copy;
static Copy *in_flight;

static uint64_t hash_of(const void *data, size_t size) {
    const uint64_t prime = 1099511628211ull; /* FNV-1a, by words */
    uint64_t hash = 1469598103934665603ull, word;
    size_t at = 0;
    for (; at + sizeof word <= size; at += sizeof word) {
        memcpy(&word, (const char *)data + at, sizeof word);
        hash = (hash ^ word) * prime;
    }
    for (; at < size; at++) hash = (hash ^ ((const unsigned char *)data)[at]) * prime;
    return hash;
}

static void track_copy(Stream *stream, const void *source, size_t size) {
    Copy *copy = malloc(sizeof *copy);
    *copy = (Copy){stream, stream->issued, source, size, hash_of(source, size), in_flight};
    in_flight = copy;
}

static void end_copy(Copy **link) {
    Copy *copy = *link;
    if (hash_of(copy->source, copy->size) != copy->hash) {
        COUNT(RACE);
        fprintf(stderr, "GPU stand-in: RACE: %zu bytes of pinned memory at %p changed while their copy was in flight\n",
                copy->size, copy->source);
    }
    *link = copy->next;
    free(copy);
}

/* Mark a stream's work up to a number as done; all work of all streams without a stream. */
static void finish(Stream *stream, long number) {
    pthread_mutex_lock(&lock);
    for (Copy **link = &in_flight; *link;) {
        int waited_for = !stream || ((*link)->stream == stream && (*link)->number <= number);
        if (waited_for) end_copy(link);
        else link = &(*link)->next;
    }
    if (!stream) for (Stream *each = streams; each; each = each->next) each->done = each->issued;
    else if (stream->done < number) stream->done = number;
    pthread_mutex_unlock(&lock);
}

/* End a stream's copies out of memory that a later copy of the same stream writes: the stream orders the two. */
static void end_copies_of(Stream *stream, const char *at, size_t size) {
    pthread_mutex_lock(&lock);
    for (Copy **link = &in_flight; *link;) {
        const char *source = (*link)->source;
        if ((*link)->stream == stream && source < at + size && at < source + (*link)->size) end_copy(link);
        else link = &(*link)->next;
    }
    pthread_mutex_unlock(&lock);
}

static void finish_stream(Stream *stream, long number) {
    if (stream->follows_others) finish(NULL, 0);
    else finish(stream, number);
}

static cudaError_t new_stream(cudaStream_t *out) {
    Stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    stream->next = streams->next;
    streams->next = stream;
    pthread_mutex_unlock(&lock);
    *out = (cudaStream_t)stream;
    return OK;
}

static cudaError_t is_done(Stream *stream, long number) {
    return timing || stream->done >= number ? OK : cudaErrorNotReady;
}

cudaError_t cudaStreamCreate(cudaStream_t *s) { return new_stream(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return new_stream(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return new_stream(s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { *status = 0; return OK; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = 0;
    if (count) *count = 0;
    return OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return is_done(stream_of(s), stream_of(s)->issued); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    COUNT(STREAM_WAIT);
    finish_stream(stream_of(s), stream_of(s)->issued);
    return OK;
}
cudaError_t cudaDeviceSynchronize(void) { COUNT(OTHER_WAIT); finish(NULL, 0); return OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
    stream_of(s)->follows_others = 1;
    return OK;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)calloc(1, sizeof(Event));
    return OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
    Event *recorded = (Event *)event;
    recorded->stream = stream_of(s);
    recorded->number = recorded->stream->issued;
    clock_gettime(CLOCK_MONOTONIC, &recorded->at);
    return OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags) { return cudaEventRecord(event, s); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    Event *recorded = (Event *)event;
    return recorded->stream ? is_done(recorded->stream, recorded->number) : OK;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Event *recorded = (Event *)event;
    COUNT(OTHER_WAIT);
    if (recorded->stream) finish_stream(recorded->stream, recorded->number);
    return OK;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    struct timespec *from = &((Event *)start)->at, *to = &((Event *)end)->at;
    *ms = (to->tv_sec - from->tv_sec) * 1e3f + (to->tv_nsec - from->tv_nsec) * 1e-6f;
    return OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *data) { function(data); return OK; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t function, void *data, unsigned flags) {
    function(s, OK, data);
    return OK;
}

/* ---- memory: ranges are kept, sorted by address, to tell pageable, pinned and device memory apart */

enum kind { PAGEABLE, PINNED, DEVICE };
typedef struct { char *at; size_t size; enum kind kind; int device; } Range;
#define MAX_RANGES (1 << 18)
static Range ranges[MAX_RANGES];
static int num_ranges;

/* Number of ranges that begin at or before an address. Holds the lock. */
static int ranges_up_to(const void *at) {
    int low = 0, high = num_ranges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (ranges[middle].at <= (const char *)at) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void add_range(void *at, size_t size, enum kind kind) {
    pthread_mutex_lock(&lock);
    if (num_ranges == MAX_RANGES) {
        fprintf(stderr, "GPU stand-in: more than %d allocations at once: raise MAX_RANGES in memory.c\n", MAX_RANGES);
        abort();
    }
    int place = ranges_up_to(at);
    memmove(ranges + place + 1, ranges + place, (num_ranges - place) * sizeof *ranges);
    ranges[place] = (Range){at, size ? size : 1, kind, current_device};
    num_ranges++;
    pthread_mutex_unlock(&lock);
}

static Range range_of(const void *at) {
    Range found = {NULL, 0, PAGEABLE, 0};
    pthread_mutex_lock(&lock);
    int place = ranges_up_to(at) - 1;
    if (place >= 0 && (const char *)at < ranges[place].at + ranges[place].size) found = ranges[place];
    pthread_mutex_unlock(&lock);
    return found;
}

static int overlaps_range(const char *at, size_t size) {
    pthread_mutex_lock(&lock);
    int place = ranges_up_to(at);
    int found = (place > 0 && at < ranges[place - 1].at + ranges[place - 1].size)
                || (place < num_ranges && ranges[place].at < at + size);
    pthread_mutex_unlock(&lock);
    return found;
}

static void *allocate(size_t size, enum kind kind) {
    void *at = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    add_range(at, size, kind);
    return at;
}

static cudaError_t release(void *at, int unmap) {
    if (!at) return OK;
    Range range = range_of(at);
    if (range.kind == PINNED) finish(NULL, 0); /* its copies must be over */
    pthread_mutex_lock(&lock);
    int place = ranges_up_to(at) - 1;
    if (place >= 0 && ranges[place].at == at) {
        if (unmap) munmap(at, ranges[place].size);
        num_ranges--;
        memmove(ranges + place, ranges + place + 1, (num_ranges - place) * sizeof *ranges);
    }
    pthread_mutex_unlock(&lock);
    return OK;
}

cudaError_t cudaMalloc(void **at, size_t size) { *at = allocate(size, DEVICE); return OK; }
cudaError_t cudaFree(void *at) { return release(at, 1); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) { *at = allocate(size, PINNED); return OK; }
cudaError_t cudaFreeHost(void *at) { return release(at, 1); }
cudaError_t cudaHostRegister(void *at, size_t size, unsigned flags) {
    if (!at || !size) return cudaErrorInvalidValue;
    if (overlaps_range(at, size)) return cudaErrorHostMemoryAlreadyRegistered;
    add_range(at, size, PINNED);
    return OK;
}
cudaError_t cudaHostUnregister(void *at) { return release(at, 0); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = DEVICE_MEMORY;
    *free = DEVICE_MEMORY - (1ull << 30);
    return OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *at) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    Range range = range_of(at);
    *out = (struct cudaPointerAttributes){.type = types[range.kind], .device = range.device};
    out->devicePointer = range.kind == PAGEABLE ? NULL : (void *)at;
    out->hostPointer = range.kind == DEVICE ? NULL : (void *)at;
    return OK;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind direction, cudaStream_t s) {
    Stream *stream = stream_of(s);
    enum kind source = range_of(from).kind, target = range_of(to).kind;
    COUNT(source != DEVICE ? TO_DEVICE : target != DEVICE ? TO_HOST : ON_DEVICE);
    /* A copy to pageable memory blocks until the stream's work is done; one to pinned memory ends nothing. It is not
     * counted as a wait: PyTorch waits for the stream after it, which is. */
    if (source == DEVICE && target == PAGEABLE) finish_stream(stream, stream->issued);
    if (source == DEVICE && target == PINNED) end_copies_of(stream, to, size);
    if (!is_free(size) || (source != DEVICE && target != DEVICE)) memmove(to, from, size);
    pthread_mutex_lock(&lock);
    stream->issued++;
    if (!timing && source == PINNED && target == DEVICE) track_copy(stream, from, size);
    pthread_mutex_unlock(&lock);
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind direction) {
    cudaMemcpyAsync(to, from, size, direction, 0);
    COUNT(OTHER_WAIT);
    finish(NULL, 0);
    return OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t size, cudaStream_t s) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, s);
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t s) {
    if (!is_free(size)) memset(at, value, size);
    return OK;
}
cudaError_t cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return OK; }
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind direction) {
    return OK;
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { static char memory[1 << 16]; *at = memory; return OK; }
