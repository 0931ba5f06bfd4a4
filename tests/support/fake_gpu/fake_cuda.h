/* Parts of the stand-in that its files share. */
#pragma once
#include <stddef.h>

/* In the order of COUNTERS in report.py. A stream wait is one for all work of a stream; other waits are for an event, for
 * the device, or in a blocking copy. */
enum counter { LAUNCH, TO_DEVICE, TO_HOST, ON_DEVICE, STREAM_WAIT, OTHER_WAIT, RACE, LIBRARY_CALL, NUM_COUNTERS };
extern long counters[NUM_COUNTERS];
#define COUNT(counter) __atomic_add_fetch(&counters[counter], 1, __ATOMIC_RELAXED)

#define DEVICE_MEMORY (80ull << 30)
extern int num_devices, timing;
extern __thread int current_device;

/* True for work that a GPU does beside the host and that must not cost the host's time when that is measured. Small
 * values are moved in any case: they may steer the host. */
int is_free(size_t bytes);
