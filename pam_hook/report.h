/*
 * Everything the module says: to the log (LOG_AUTHPRIV, through pam_syslog) and to the user (through the conversation).
 * The only place that does either, so that nothing unscrubbed leaves and nothing ever goes to stdout or stderr.
 */
#ifndef ADOPT_REPORT_H
#define ADOPT_REPORT_H

#include <stdbool.h>
#include <stddef.h>

#include <security/pam_modules.h>

#include "options.h"

/* Logs one line if level is not above threshold. Bytes that are not printable ASCII become '?'. */
void report(pam_handle_t *pamh, unsigned threshold, enum level level, const char *format, ...)
	__attribute__((format(printf, 4, 5)));

/*
 * Copies text for use as one value in a key=value line: what could end the value or begin another becomes '?', and
 * what does not fit is cut.
 */
void report_word(char *word, size_t size, const char *text);

/* Shows text to the user, as an error or as information, unless PAM_SILENT is in flags. Newlines stay. */
void tell_user(pam_handle_t *pamh, int flags, bool error, const char *text);

#endif
