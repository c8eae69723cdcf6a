#include "fault.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void fault_set(struct fault *fault, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(fault->text, sizeof(fault->text), format, arguments);
	va_end(arguments);
}

void fault_errno(struct fault *fault, int error, const char *format, ...)
{
	char words[96];
	va_list arguments;
	size_t length;

	va_start(arguments, format);
	vsnprintf(fault->text, sizeof(fault->text), format, arguments);
	va_end(arguments);

	/* strerror() may share its buffer with other threads of the program that called us. */
	length = strlen(fault->text);
	snprintf(fault->text + length, sizeof(fault->text) - length, ": %s", strerror_r(error, words, sizeof(words)));
}
