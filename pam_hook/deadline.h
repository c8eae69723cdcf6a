/* One budget for everything a phase waits for, as a point on CLOCK_MONOTONIC: setting the time of day moves nothing. */
#ifndef ADOPT_DEADLINE_H
#define ADOPT_DEADLINE_H

#include <stdint.h>
#include <time.h>

#define NS_PER_S  1000000000
#define NS_PER_MS 1000000
#define NS_PER_US 1000
#define US_PER_S  1000000

struct deadline {
	int64_t at_ns;
};

static inline int64_t monotonic_ns(void)
{
	struct timespec now;

	/* Cannot fail: the clock is there on every Linux and the pointer is ours. */
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

static inline struct deadline deadline_after_ms(uint32_t budget_ms)
{
	return (struct deadline){.at_ns = monotonic_ns() + (int64_t)budget_ms * NS_PER_MS};
}

/* Never negative, so that it can be handed to any call that waits. */
static inline int64_t deadline_left_ns(struct deadline deadline)
{
	const int64_t left_ns = deadline.at_ns - monotonic_ns();

	return left_ns > 0 ? left_ns : 0;
}

#endif
