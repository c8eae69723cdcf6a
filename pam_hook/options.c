#include "options.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/un.h>

#include "adopt_wire.h"
#include "report.h"

struct word {
	const char *text;
	uint8_t value;
};

/* An option whose value is one word of a list. The list ends with a word whose text is NULL. */
struct word_option {
	const char *prefix;
	const struct word *words;
	size_t offset; /* of its uint8_t in struct options */
	const char *expected;
};

static const struct word no_jobs_words[] = {{"deny", ADOPT_ACTION_DENY}, {"ignore", ADOPT_ACTION_IGNORE}, {NULL, 0}};
static const struct word unknown_words[] = {
	{"newest", ADOPT_ACTION_NEWEST}, {"allow", ADOPT_ACTION_ALLOW}, {"deny", ADOPT_ACTION_DENY}, {NULL, 0}};
static const struct word adopt_failure_words[] = {
	{"allow", ADOPT_ACTION_ALLOW}, {"deny", ADOPT_ACTION_DENY}, {NULL, 0}};
static const struct word generic_failure_words[] = {
	{"ignore", ADOPT_ACTION_IGNORE}, {"allow", ADOPT_ACTION_ALLOW}, {"deny", ADOPT_ACTION_DENY}, {NULL, 0}};
static const struct word mode_words[] = {{"enforce", ADOPT_MODE_ENFORCE}, {"observe", ADOPT_MODE_OBSERVE}, {NULL, 0}};
static const struct word bit_words[] = {{"0", 0}, {"1", 1}, {NULL, 0}};
static const struct word bool_words[] = {{"true", 1}, {"false", 0}, {NULL, 0}};
static const struct word level_words[] = {{"quiet", LEVEL_QUIET},
					  {"fatal", LEVEL_FATAL},
					  {"error", LEVEL_ERROR},
					  {"info", LEVEL_INFO},
					  {"verbose", LEVEL_VERBOSE},
					  {"debug", LEVEL_DEBUG},
					  {"debug2", LEVEL_DEBUG2},
					  {"debug3", LEVEL_DEBUG3},
					  {"debug4", LEVEL_DEBUG4},
					  {"debug5", LEVEL_DEBUG5},
					  {NULL, 0}};

static const struct word_option word_options[] = {
	{"action_no_jobs=", no_jobs_words, offsetof(struct options, action_no_jobs), "deny or ignore"},
	{"action_unknown=", unknown_words, offsetof(struct options, action_unknown), "newest, allow or deny"},
	{"action_adopt_failure=", adopt_failure_words, offsetof(struct options, action_adopt_failure), "allow or deny"},
	{"action_generic_failure=", generic_failure_words, offsetof(struct options, action_generic_failure),
	 "ignore, allow or deny"},
	{"ignore_root=", bit_words, offsetof(struct options, ignore_root), "0 or 1"},
	{"single_job_skip_rpc=", bit_words, offsetof(struct options, single_job_skip_rpc), "0 or 1"},
	{"disable_x11=", bit_words, offsetof(struct options, disable_x11), "0 or 1"},
	{"join_container=", bool_words, offsetof(struct options, join_container), "true or false"},
	{"mode=", mode_words, offsetof(struct options, mode), "enforce or observe"},
};

/* Options' names are taken in any case, as their values are. */
static const char *skip_prefix(const char *text, const char *prefix)
{
	const size_t length = strlen(prefix);

	return strncasecmp(text, prefix, length) == 0 ? text + length : NULL;
}

static bool parse_word(const struct word *words, const char *value, uint8_t *out)
{
	for (; words->text; words++) {
		if (strcasecmp(words->text, value) == 0) {
			*out = words->value;
			return true;
		}
	}
	return false;
}

/* A name, or a number as C writes it: decimal, 0x and 0. One above the highest level is the highest. */
static bool parse_level(const char *value, uint8_t *out)
{
	unsigned long number;
	char *end;

	if (parse_word(level_words, value, out))
		return true;
	/* Ten characters cannot overflow; strtoul() would take blanks and a sign before them. */
	if (*value < '0' || *value > '9' || strlen(value) > 10)
		return false;
	number = strtoul(value, &end, 0);
	if (*end)
		return false;
	*out = number < LEVEL_DEBUG5 ? (uint8_t)number : LEVEL_DEBUG5;
	return true;
}

static bool parse_timeout(const char *value, uint32_t *out)
{
	uint32_t number = 0;

	/* Five digits cannot overflow, and no number in the range has more. */
	if (!*value || strlen(value) > 5)
		return false;
	for (; *value; value++) {
		if (*value < '0' || *value > '9')
			return false;
		number = number * 10 + (uint32_t)(*value - '0');
	}
	if (number < TIMEOUT_MIN_MS || number > TIMEOUT_MAX_MS)
		return false;
	*out = number;
	return true;
}

static bool is_node_name(const char *value)
{
	static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
	const size_t length = strlen(value);

	return length > 0 && length < sizeof(((struct adopt_request *)NULL)->nodename) &&
	       strspn(value, allowed) == length;
}

static bool is_socket_path(const char *value)
{
	return value[0] == '/' && strlen(value) < sizeof(((struct sockaddr_un *)NULL)->sun_path);
}

/* NULL if the argument is right, else what was expected in its place. */
static const char *parse_argument(const char *argument, struct options *options)
{
	const char *value;

	for (size_t i = 0; i < sizeof(word_options) / sizeof(word_options[0]); i++) {
		const struct word_option *option = &word_options[i];

		value = skip_prefix(argument, option->prefix);
		if (value)
			return parse_word(option->words, value, (uint8_t *)options + option->offset) ? NULL
												     : option->expected;
	}
	value = skip_prefix(argument, "log_level=");
	if (value)
		return parse_level(value, &options->log_level)
			       ? NULL
			       : "quiet, fatal, error, info, verbose, debug, debug2 to debug5, or a number";
	value = skip_prefix(argument, "timeout_ms=");
	if (value)
		return parse_timeout(value, &options->timeout_ms) ? NULL : "a number of milliseconds from 50 to 30000";
	value = skip_prefix(argument, "service=");
	if (value) {
		if (!*value)
			return "the name of a PAM service, or *";
		options->service = value;
		return NULL;
	}
	value = skip_prefix(argument, "nodename=");
	if (value) {
		if (!is_node_name(value))
			return "a node name of 1 to 63 letters, digits, dots, dashes or underscores";
		options->nodename = value;
		return NULL;
	}
	value = skip_prefix(argument, "socket=");
	if (value) {
		if (!is_socket_path(value))
			return "an absolute path of at most 107 bytes";
		options->socket = value;
		return NULL;
	}
	return "an option of pam_adopt: action_no_jobs= action_unknown= action_adopt_failure= action_generic_failure= "
	       "ignore_root= single_job_skip_rpc= service= nodename= log_level= disable_x11= join_container= socket= "
	       "timeout_ms= mode=";
}

bool options_parse(pam_handle_t *pamh, int argc, const char **argv, struct options *options)
{
	bool sound = true;

	*options = (struct options){
		.action_no_jobs = ADOPT_ACTION_DENY,
		.action_unknown = ADOPT_ACTION_NEWEST,
		.action_adopt_failure = ADOPT_ACTION_ALLOW,
		.action_generic_failure = ADOPT_ACTION_IGNORE,
		.mode = ADOPT_MODE_ENFORCE,
		.log_level = LEVEL_INFO,
		.ignore_root = 1,
		.single_job_skip_rpc = 1,
		.disable_x11 = 0,
		.join_container = 1,
		.timeout_ms = TIMEOUT_DEFAULT_MS,
		.service = "sshd",
		.nodename = "",
		.socket = "/run/adoptd/pam.sock",
	};
	for (int i = 0; i < argc; i++) {
		const char *expected = parse_argument(argv[i], options);

		if (expected) {
			const size_t name_length = strcspn(argv[i], "=");

			report(pamh, LEVEL_QUIET, LEVEL_QUIET, "wrong option %.*s, value \"%s\": expected %s",
			       (int)name_length, argv[i], argv[i] + name_length + (argv[i][name_length] != '\0'),
			       expected);
			sound = false;
			/* A mode that cannot be read is not the one that lets everybody in. */
			if (skip_prefix(argv[i], "mode="))
				options->mode = ADOPT_MODE_ENFORCE;
		}
	}
	return sound;
}
