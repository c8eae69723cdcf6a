#include "report.h"

#include <stdarg.h>
#include <stdio.h>
#include <syslog.h>

#include <security/pam_ext.h>

/* The largest message of the wire format and some room for what the module writes around it. */
#define TEXT_BYTES 1024

/*
 * ASCII only: the terminal's character set is not known here, and both C1 control bytes (0x80 to 0x9f) and
 * bidirectional overrides hide in other encodings.
 */
static void scrub(char *text, bool keep_newlines)
{
	for (; *text; text++) {
		if ((*text < ' ' || *text > '~') && !(keep_newlines && *text == '\n'))
			*text = '?';
	}
}

static int priority_of(enum level level)
{
	if (level <= LEVEL_ERROR)
		return LOG_ERR;
	return level <= LEVEL_VERBOSE ? LOG_INFO : LOG_DEBUG;
}

void report(pam_handle_t *pamh, unsigned threshold, enum level level, const char *format, ...)
{
	char line[TEXT_BYTES];
	va_list arguments;

	if ((unsigned)level > threshold)
		return;
	va_start(arguments, format);
	vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	scrub(line, false);
	pam_syslog(pamh, LOG_AUTHPRIV | priority_of(level), "%s", line);
}

void report_word(char *word, size_t size, const char *text)
{
	size_t i = 0;

	for (; i + 1 < size && text[i]; i++)
		word[i] = text[i] > ' ' && text[i] <= '~' && text[i] != '"' && text[i] != '=' ? text[i] : '?';
	word[i] = '\0';
}

void tell_user(pam_handle_t *pamh, int flags, bool error, const char *text)
{
	char message[TEXT_BYTES];

	if ((unsigned)flags & PAM_SILENT)
		return;
	snprintf(message, sizeof(message), "%s", text);
	scrub(message, true);
	/* A conversation that cannot show it changes nothing: the verdict stands and is in the log. */
	if (error)
		(void)pam_error(pamh, "%s", message);
	else
		(void)pam_info(pamh, "%s", message);
}
