/*
 * What a reply must be before anything in it is believed. Pure: bytes in, yes or a reason out; no socket, no clock.
 * The agent is root and vouched for by the kernel, but it is another program of another age: after an upgrade gone
 * wrong it may say anything, and what it says ends up in sshd.
 */
#ifndef ADOPT_REPLY_H
#define ADOPT_REPLY_H

#include <stdbool.h>
#include <stddef.h>

#include "adopt_wire.h"
#include "fault.h"

/* Whether reply is well formed and an answer to request. What follows the record is not looked at. */
bool reply_check(const struct adopt_reply *reply, const struct adopt_request *request, struct fault *fault);

/* Whether pairs is a sequence of NAME=value\0 whose names may be set in a login's PAM environment. */
bool environment_check(const char *pairs, size_t size, struct fault *fault);

#endif
