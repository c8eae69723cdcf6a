#include "reply.h"

#include <string.h>

/* Longest name shown in a fault; names are bounded only by the environment. */
#define NAME_SHOWN_MAX 32

/*
 * Names that no reply may set. Modules below us in the stack run programs as root with the PAM environment (pam_exec
 * does), and the environment of a job is written by its user: a LD_PRELOAD in it would be the user's code run as root,
 * and so would a SLURM_CONF be where such a program asks Slurm, whose plugins are where that file says. TMPDIR is not
 * among them: jobs are given one, their sessions need the same, and nothing is run or trusted for lying in it unless a
 * program of root's is careless there; whoever lists it knows those below us. Refused, not left out: an agent that
 * sends one is not the one we know.
 * A name that ends in '*' is a prefix.
 */
static const char *const forbidden_names[] = {
	/* The C library: those that it drops for setuid programs (sysdeps/generic/unsecvars.h), but for TMPDIR. */
	"LD_*",
	"GCONV_PATH",
	"GETCONF_DIR",
	"GLIBC_TUNABLES",
	"HOSTALIASES",
	"LOCALDOMAIN",
	"LOCPATH",
	"MALLOC_*",
	"NIS_PATH",
	"NLSPATH",
	"RESOLV_HOST_CONF",
	"RES_OPTIONS",
	"TZDIR",
	/* Shells. */
	"PATH",
	"IFS",
	"ENV",
	"BASH_*",
	"BASHOPTS",
	"SHELLOPTS",
	"PS4",
	"CDPATH",
	"GLOBIGNORE",
	"ZDOTDIR",
	"FPATH",
	"NULLCMD",
	"READNULLCMD",
	"TMPPREFIX",
	/* Interpreters. */
	"PYTHON*",
	"PERL*",
	"RUBY*",
	"GEM_*",
	"BUNDLE_*",
	"LUA_*",
	"TCL*",
	"PHP*",
	"NODE_OPTIONS",
	"NODE_PATH",
	"JAVA_TOOL_OPTIONS",
	"JDK_JAVA_OPTIONS",
	"_JAVA_OPTIONS",
	"CLASSPATH",
	/* Who the user is, which sshd has set by then. Of pam_exec's own there would be two, and most read the first. */
	"HOME",
	"SHELL",
	"USER",
	"LOGNAME",
	"SSH_*",
	"SUDO_*",
	"PAM_*",
	/* Slurm's commands: the configuration that names their plugins, keys, whom they ask, */
	"SLURM_CONF*",
	"SLURM_JWT",
	"SLURM_SACK_*",
	"SLURM_CLUSTERS",
	"SLURM_WORKING_CLUSTER",
	/* what srun runs and writes, */
	"SLURM_PROLOG",
	"SLURM_EPILOG",
	"SLURM_TASK_PROLOG",
	"SLURM_TASK_EPILOG",
	"SLURM_STD*",
	"SLURM_BCAST*",
	"SLURM_CONTAINER*",
	"SLURM_EXPORT_ENV",
	"SLURM_SPANK_*",
	"_SLURM_SPANK_*",
	"SRUN_CONTAINER*",
	"SRUN_EXPORT_ENV",
	/* and their options: what a script of root's reads from squeue, or has scancel end. */
	"SLURM_TIME_FORMAT",
	"SACCT_*",
	"SALLOC_*",
	"SBATCH_*",
	"SCANCEL_*",
	"SCONTROL_*",
	"SINFO_*",
	"SQUEUE_*",
	/* Environment modules, which are programs. */
	"MODULE*",
	"LMOD_*",
	"_ModuleTable*",
	/* Libraries that load others, or trust or write what is named. */
	"OPENSSL_*",
	"SSL_CERT_*",
	"SSLKEYLOGFILE",
	"GNUTLS_*",
	"P11_KIT_*",
	"KRB5*",
	"GSS_*",
	"SASL_*",
	"LDAP*",
	"GIO_*",
	"DBUS_*",
	"XDG_*",
	"TERMINFO*",
	"TERMCAP",
	"TERMPATH",
	/* Programs, by what they run, read first or ask. */
	"GIT_*",
	"SYSTEMD_*",
	"RSYNC_*",
	"TAR_OPTIONS",
	"MAKEFILES",
	"MAKEFLAGS",
	"EDITOR",
	"VISUAL",
	"PAGER",
	"LESS*",
	"MAILRC",
	"GNUPGHOME",
	"CURL_*",
	"WGETRC",
	"http_proxy",
	"https_proxy",
	"all_proxy",
	"HTTP_PROXY",
	"HTTPS_PROXY",
	"ALL_PROXY",
};

/* Text that ends within its field and has only NULs behind its end: one text has one spelling. */
static bool is_padded(const char *field, size_t size)
{
	const size_t length = strnlen(field, size);

	if (length == size)
		return false;
	for (size_t i = length; i < size; i++) {
		if (field[i])
			return false;
	}
	return true;
}

static bool is_forbidden(const char *name, size_t length)
{
	for (size_t i = 0; i < sizeof(forbidden_names) / sizeof(forbidden_names[0]); i++) {
		const char *forbidden = forbidden_names[i];
		const size_t forbidden_length = strlen(forbidden);

		if (forbidden[forbidden_length - 1] == '*') {
			if (length >= forbidden_length - 1 && memcmp(name, forbidden, forbidden_length - 1) == 0)
				return true;
		} else if (length == forbidden_length && memcmp(name, forbidden, length) == 0) {
			return true;
		}
	}
	return false;
}

static bool is_name(const char *name, size_t length)
{
	if (length == 0 || (name[0] >= '0' && name[0] <= '9'))
		return false;
	for (size_t i = 0; i < length; i++) {
		const char c = name[i];

		if (c != '_' && !(c >= 'A' && c <= 'Z') && !(c >= 'a' && c <= 'z') && !(c >= '0' && c <= '9'))
			return false;
	}
	return true;
}

bool reply_check(const struct adopt_reply *reply, const struct adopt_request *request, struct fault *fault)
{
	if (reply->magic != ADOPT_WIRE_MAGIC)
		fault_set(fault, "reply magic is 0x%08x", reply->magic);
	else if (reply->version != ADOPT_WIRE_VERSION)
		fault_set(fault, "reply version is %u, expected %u", reply->version, ADOPT_WIRE_VERSION);
	else if (reply->size != sizeof(*reply))
		fault_set(fault, "reply size is %u, expected %zu", reply->size, sizeof(*reply));
	else if (reply->verdict < ADOPT_VERDICT_SUCCESS || reply->verdict > ADOPT_VERDICT_IGNORE)
		fault_set(fault, "reply verdict is %u", reply->verdict);
	else if (reply->adopted > 1)
		fault_set(fault, "reply adopted is %u", reply->adopted);
	else if (reply->descriptors > ADOPT_WIRE_DESCRIPTORS_MAX)
		fault_set(fault, "reply announces %u descriptors", reply->descriptors);
	else if (reply->reserved != 0)
		fault_set(fault, "reply reserved is %u", reply->reserved);
	else if (reply->environment_bytes > ADOPT_WIRE_ENVIRONMENT_MAX)
		fault_set(fault, "reply announces %u bytes of environment", reply->environment_bytes);
	else if (!is_padded(reply->job, sizeof(reply->job)))
		fault_set(fault, "reply job is not NUL-padded text");
	else if (!is_padded(reply->summary, sizeof(reply->summary)))
		fault_set(fault, "reply summary is not NUL-padded text");
	else if (!is_padded(reply->message, sizeof(reply->message)))
		fault_set(fault, "reply message is not NUL-padded text");
	else if (reply->adopted && reply->verdict != ADOPT_VERDICT_SUCCESS)
		fault_set(fault, "reply says adopted, but verdict is %u", reply->verdict);
	else if (reply->adopted && !reply->job[0])
		fault_set(fault, "reply says adopted, but names no job");
	else if (reply->adopted && request->mode == ADOPT_MODE_OBSERVE)
		fault_set(fault, "reply says adopted, but was asked only to observe");
	else if (!reply->adopted && (reply->environment_bytes || reply->descriptors))
		fault_set(fault, "reply has an environment or descriptors without an adoption");
	else
		return true;
	return false;
}

bool environment_check(const char *pairs, size_t size, struct fault *fault)
{
	size_t offset = 0;

	while (offset < size) {
		const char *pair = pairs + offset;
		const size_t length = strnlen(pair, size - offset);
		const char *equals = memchr(pair, '=', length);
		const size_t name_length = equals ? (size_t)(equals - pair) : 0;

		if (length == size - offset) {
			fault_set(fault, "reply environment does not end with NUL");
			return false;
		}
		if (!equals || !is_name(pair, name_length)) {
			fault_set(fault, "reply environment has no NAME=value at byte %zu", offset);
			return false;
		}
		if (is_forbidden(pair, name_length)) {
			fault_set(fault, "reply environment sets %.*s",
				  (int)(name_length < NAME_SHOWN_MAX ? name_length : NAME_SHOWN_MAX), pair);
			return false;
		}
		offset += length + 1;
	}
	return true;
}
