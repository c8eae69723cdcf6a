/*
 * Entering a job's namespaces. Only the process itself can do it, so the agent sends descriptors and sshd, through us,
 * joins. Each call is all or nothing: a session half inside a container is worse than one outside.
 */
#ifndef ADOPT_NAMESPACES_H
#define ADOPT_NAMESPACES_H

#include <stdbool.h>
#include <stddef.h>

#include "fault.h"

/* Whether every descriptor is a namespace, each of a kind of its own. */
bool namespaces_check(const int *descriptors, size_t count, struct fault *fault);

enum join { JOIN_DONE, JOIN_UNDONE, JOIN_TORN };

/*
 * Moves the calling process into the namespaces. JOIN_UNDONE: it failed, and the process is where it was. JOIN_TORN:
 * it failed, and so did going back; the process must not become a session. fault says why in both cases.
 */
enum join namespaces_join(const int *descriptors, size_t count, struct fault *fault);

#endif
