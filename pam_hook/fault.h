/* A sentence that says what went wrong and with which object; filled where it is found, logged once at the edge. */
#ifndef ADOPT_FAULT_H
#define ADOPT_FAULT_H

struct fault {
	char text[224];
};

void fault_set(struct fault *fault, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same with ": " and the text of an errno value behind it. */
void fault_errno(struct fault *fault, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
