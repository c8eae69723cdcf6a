/*
 * The ssh connection, found among the descriptors of the process that called the module. Never a guess: a daemon also
 * holds connections of its own making (LDAP, for one), and naming the wrong one would put a login into another's job.
 */
#ifndef ADOPT_CONNECTION_H
#define ADOPT_CONNECTION_H

#include <stdbool.h>
#include <stdint.h>

#include "deadline.h"
#include "fault.h"

struct connection {
	uint8_t family; /* 4 or 6; IPv4-mapped IPv6 addresses are held as IPv4 */
	uint16_t remote_port;
	uint16_t local_port;
	uint8_t remote_address[16]; /* network byte order, an IPv4 address in the first 4 bytes, the rest 0 */
	uint8_t local_address[16];
};

/*
 * The one inbound TCP connection of this process. False, with the reason in fault, if there is none, if there is more
 * than one, or if the kernel cannot be asked which ports are being served.
 */
bool connection_find(struct deadline deadline, struct connection *connection, struct fault *fault);

/* "10.0.0.1:40000 > 10.0.0.2:22", for the log. */
#define CONNECTION_TEXT_BYTES 128
void connection_text(const struct connection *connection, char text[CONNECTION_TEXT_BYTES]);

#endif
