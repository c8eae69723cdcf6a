/* One question to the agent and its answer, within one deadline, whatever the agent does. */
#ifndef ADOPT_EXCHANGE_H
#define ADOPT_EXCHANGE_H

#include <stdbool.h>
#include <stddef.h>

#include "adopt_wire.h"
#include "deadline.h"
#include "fault.h"

struct answer {
	struct adopt_reply reply;
	char *environment; /* reply.environment_bytes bytes of NAME=value\0, NULL if there are none */
	size_t descriptor_count;
	int descriptors[ADOPT_WIRE_DESCRIPTORS_MAX]; /* close-on-exec, namespaces of different kinds */
};

#define ANSWER_EMPTY ((struct answer){.descriptor_count = 0})

/*
 * Sends request, with what is then left of the deadline in its timeout_ms, to the agent at path. True: answer holds a
 * reply that keeps every rule of adopt_wire.h. False: fault says which step failed. answer must be ANSWER_EMPTY
 * before, and released with answer_release() in both cases. An agent that ends without a word is asked once more, on
 * a new connection, within the same deadline.
 */
bool exchange_ask(const char *path, struct deadline deadline, struct adopt_request *request, struct answer *answer,
		  struct fault *fault);

void answer_release(struct answer *answer);

#endif
