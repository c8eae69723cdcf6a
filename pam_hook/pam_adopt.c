/*
 * pam_adopt.so: asks the agent which job an ssh login belongs to, and obeys. No policy of its own beyond the order
 * below, which is the security argument: whose line is this, who is the user, is it root, is the line right, and only
 * then is anything opened or anybody asked.
 *
 * It runs inside sshd as root. It must never touch signals, fork, write to stdout or stderr, keep state between
 * calls, or wait longer than timeout_ms=.
 *
 * Two phases ask: with keyboard-interactive logins sshd runs the account phase in a short-lived child, and the session
 * phase runs in the process that becomes the session's parent, after pam_systemd may have moved it.
 */
#include <inttypes.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include <security/pam_ext.h>
#include <security/pam_modules.h>
#include <security/pam_modutil.h>

#include "adopt_wire.h"
#include "connection.h"
#include "deadline.h"
#include "exchange.h"
#include "fault.h"
#include "namespaces.h"
#include "options.h"
#include "report.h"

#define EXPORTED __attribute__((visibility("default")))

#define MESSAGE_MISCONFIGURED \
	"Access denied: the login configuration of this node has an error. Please tell its administrator."
#define MESSAGE_NO_ANSWER                                                                                        \
	"Access denied: this node cannot find out about your jobs at the moment. Please try again, or tell its " \
	"administrator."
#define MESSAGE_NOT_JOINED "Access denied: your session could not enter the container of your job."
#define MESSAGE_DENIED     "Access denied."

/* One call of one PAM function. */
struct login {
	pam_handle_t *pamh;
	int flags;
	const char *phase; /* for the log */
	int64_t began_ns;
	struct options options;
	bool sound; /* whether every option was right */
	const char *service;
	const char *user;
	uid_t uid;
	bool known; /* whether the user is, and so uid */
};

static int return_value_of_verdict(uint8_t verdict)
{
	if (verdict == ADOPT_VERDICT_SUCCESS)
		return PAM_SUCCESS;
	return verdict == ADOPT_VERDICT_IGNORE ? PAM_IGNORE : PAM_PERM_DENIED;
}

static int return_value_of_action(uint8_t action)
{
	if (action == ADOPT_ACTION_ALLOW)
		return PAM_SUCCESS;
	return action == ADOPT_ACTION_IGNORE ? PAM_IGNORE : PAM_PERM_DENIED;
}

static const char *word_of_return_value(int rc)
{
	switch (rc) {
	case PAM_SUCCESS:
		return "success";
	case PAM_IGNORE:
		return "ignore";
	case PAM_PERM_DENIED:
		return "deny";
	case PAM_SESSION_ERR:
		return "session_err";
	case PAM_SERVICE_ERR:
		return "service_err";
	default:
		return "error";
	}
}

static bool is_observing(const struct login *login)
{
	return login->options.mode == ADOPT_MODE_OBSERVE;
}

/* The end of every path that concerns this service: one line, grants and denials alike, and the value for libpam. */
static int finish(const struct login *login, enum level level, int rc, const char *details)
{
	const int64_t took_ns = monotonic_ns() - login->began_ns;
	char user[sizeof(((struct adopt_request *)NULL)->user)];
	char uid[24] = "";
	char would[32] = "";
	int returned = rc;

	report_word(user, sizeof(user), login->user ? login->user : "");
	if (login->known)
		snprintf(uid, sizeof(uid), " uid=%u", login->uid);
	if (is_observing(login)) {
		snprintf(would, sizeof(would), " mode=observe would=%s", word_of_return_value(rc));
		returned = PAM_IGNORE;
	}
	report(login->pamh, login->options.log_level, level,
	       "phase=%s user=%s%s verdict=%s%s %s ms=%" PRId64 ".%02" PRId64, login->phase, user, uid,
	       word_of_return_value(returned), would, details, took_ns / NS_PER_MS,
	       took_ns % NS_PER_MS / (NS_PER_MS / 100));
	return returned;
}

static void tell(const struct login *login, bool error, const char *text)
{
	if (!is_observing(login) && *text)
		tell_user(login->pamh, login->flags, error, text);
}

/*
 * What is decided before anything is opened or anybody asked. True: the decision is in *rc.
 *
 * A line with a wrong option lets nobody in but root, who is to repair it: even where ignore_root=0, for that line
 * cannot be carried out. mode=observe, if that word was right, keeps its promise all the same: it never refuses.
 */
static bool is_decided_here(struct login *login, int *rc)
{
	const struct passwd *entry;
	const void *item = NULL;

	if (pam_get_item(login->pamh, PAM_SERVICE, &item) == PAM_SUCCESS && item)
		login->service = item;
	if (strcmp(login->options.service, "*") != 0 && strcasecmp(login->options.service, login->service) != 0) {
		report(login->pamh, login->options.log_level, LEVEL_DEBUG, "phase=%s service %s is not ours",
		       login->phase, login->service);
		*rc = PAM_IGNORE;
		return true;
	}

	/* Not pam_get_user(): it would ask for a name, and whoever has come this far has one. */
	item = NULL;
	if (pam_get_item(login->pamh, PAM_USER, &item) == PAM_SUCCESS && item)
		login->user = item;
	entry = login->user && strlen(login->user) < sizeof(((struct adopt_request *)NULL)->user)
			? pam_modutil_getpwnam(login->pamh, login->user)
			: NULL;
	/* (uid_t)-1 is "no uid" to every system call that takes one. */
	if (!entry || entry->pw_uid == (uid_t)-1) {
		*rc = finish(login, LEVEL_INFO, PAM_SESSION_ERR, "reason=unknown_user");
		return true;
	}
	login->uid = entry->pw_uid;
	login->known = true;

	if (login->uid == 0 && (login->options.ignore_root || !login->sound)) {
		*rc = finish(login, LEVEL_INFO, PAM_IGNORE, "reason=root");
		return true;
	}
	if (!login->sound) {
		tell(login, true, MESSAGE_MISCONFIGURED);
		*rc = finish(login, LEVEL_ERROR, PAM_SERVICE_ERR, "reason=wrong_option");
		return true;
	}
	return false;
}

/* Too long is cut: these are for the log of the agent. What decides is the uid. */
static void copy_text(char *field, size_t size, const char *text)
{
	snprintf(field, size, "%s", text);
}

static void fill_request(const struct login *login, enum adopt_phase phase, const struct connection *connection,
			 struct adopt_request *request)
{
	*request = (struct adopt_request){
		.magic = ADOPT_WIRE_MAGIC,
		.version = ADOPT_WIRE_VERSION,
		.size = sizeof(*request),
		.phase = (uint8_t)phase,
		.mode = login->options.mode,
		.action_no_jobs = login->options.action_no_jobs,
		.action_unknown = login->options.action_unknown,
		.action_adopt_failure = login->options.action_adopt_failure,
		.action_generic_failure = login->options.action_generic_failure,
		.single_job_skip_rpc = login->options.single_job_skip_rpc,
		.join_container = login->options.join_container,
		.disable_x11 = login->options.disable_x11,
		.family = connection->family,
		.remote_port = connection->remote_port,
		.local_port = connection->local_port,
		.uid = login->uid,
	};
	memcpy(request->remote_address, connection->remote_address, sizeof(request->remote_address));
	memcpy(request->local_address, connection->local_address, sizeof(request->local_address));
	copy_text(request->service, sizeof(request->service), login->service);
	copy_text(request->user, sizeof(request->user), login->user);
	copy_text(request->nodename, sizeof(request->nodename), login->options.nodename);
}

static bool set_environment(pam_handle_t *pamh, const char *pairs, size_t size)
{
	for (size_t offset = 0; offset < size; offset += strlen(pairs + offset) + 1) {
		if (pam_putenv(pamh, pairs + offset) != PAM_SUCCESS)
			return false;
	}
	return true;
}

/*
 * Joins the namespaces that the agent sent. It sends them in the session phase, and in the account phase only where the
 * service has no session line of ours: sshd's own process is then in the job's namespaces while it opens the session,
 * which is better than a session that never is.
 */
static int obey(const struct login *login, const struct answer *answer)
{
	const struct adopt_reply *reply = &answer->reply;
	int rc = return_value_of_verdict(reply->verdict);
	char job[sizeof(reply->job)];
	char details[512];
	struct fault fault = {""};
	int length;

	report_word(job, sizeof(job), reply->job);
	length = snprintf(details, sizeof(details), "adopted=%u%s%s%s%s", reply->adopted, *job ? " job=" : "", job,
			  *reply->summary ? " " : "", reply->summary);

	if (is_observing(login))
		return finish(login, LEVEL_INFO, rc, details);

	if (login->options.join_container && answer->descriptor_count) {
		const enum join join = namespaces_join(answer->descriptors, answer->descriptor_count, &fault);

		if (join != JOIN_DONE) {
			snprintf(details + length, sizeof(details) - (size_t)length, " join=%s fault=\"%s\"",
				 join == JOIN_TORN ? "torn" : "failed", fault.text);
			rc = join == JOIN_TORN ? PAM_PERM_DENIED
					       : return_value_of_action(login->options.action_adopt_failure);
			if (rc == PAM_PERM_DENIED)
				tell(login, true, MESSAGE_NOT_JOINED);
			return finish(login, LEVEL_ERROR, rc, details);
		}
	}
	if (rc == PAM_SUCCESS && !set_environment(login->pamh, answer->environment, reply->environment_bytes)) {
		/* No memory: nothing that is half done may look like success. */
		return finish(login, LEVEL_ERROR, PAM_BUF_ERR, details);
	}
	if (rc == PAM_PERM_DENIED)
		tell(login, true, *reply->message ? reply->message : MESSAGE_DENIED);
	else
		tell(login, false, reply->message);
	return finish(login, LEVEL_INFO, rc, details);
}

/* No valid reply in time: the administrator has said what then. */
static int obey_generic_failure(const struct login *login, const struct fault *fault)
{
	const int rc = return_value_of_action(login->options.action_generic_failure);
	char details[sizeof(fault->text) + 64];

	snprintf(details, sizeof(details), "adopted=0 reason=generic_failure fault=\"%s\"", fault->text);
	if (rc == PAM_PERM_DENIED)
		tell(login, true, MESSAGE_NO_ANSWER);
	return finish(login, LEVEL_ERROR, rc, details);
}

static struct login begin(pam_handle_t *pamh, int flags, int argc, const char **argv, const char *phase)
{
	struct login login = {.pamh = pamh, .flags = flags, .phase = phase, .began_ns = monotonic_ns(), .service = ""};

	login.sound = options_parse(pamh, argc, argv, &login.options);
	return login;
}

static void find_connection(const struct login *login, struct deadline deadline, struct connection *connection)
{
	struct fault fault = {""};

	if (connection_find(deadline, connection, &fault)) {
		char text[CONNECTION_TEXT_BYTES];

		connection_text(connection, text);
		report(login->pamh, login->options.log_level, LEVEL_DEBUG, "phase=%s connection %s", login->phase,
		       text);
	} else {
		report(login->pamh, login->options.log_level, LEVEL_INFO, "phase=%s connection not known: %s",
		       login->phase, fault.text);
	}
}

/* PAM_SUCCESS, PAM_PERM_DENIED, PAM_IGNORE, PAM_SESSION_ERR (unknown user), PAM_SERVICE_ERR (wrong option), PAM_BUF_ERR. */
static int run_phase(pam_handle_t *pamh, int flags, int argc, const char **argv, enum adopt_phase phase)
{
	struct login login = begin(pamh, flags, argc, argv, phase == ADOPT_PHASE_ACCOUNT ? "account" : "session");
	struct answer answer = ANSWER_EMPTY;
	struct connection connection;
	struct adopt_request request;
	struct deadline deadline;
	struct fault fault = {""};
	int rc;

	if (is_decided_here(&login, &rc))
		return rc;
	/* From here: name services may have been slow, and that is not the agent's fault. */
	deadline = deadline_after_ms(login.options.timeout_ms);
	find_connection(&login, deadline, &connection);
	fill_request(&login, phase, &connection, &request);
	if (exchange_ask(login.options.socket, deadline, &request, &answer, &fault))
		rc = obey(&login, &answer);
	else
		rc = obey_generic_failure(&login, &fault);
	answer_release(&answer);
	return rc;
}

/*
 * For a line in the auth stack, where this module does nothing. PAM_SUCCESS there might let somebody in without a
 * password ("sufficient"), and PAM_IGNORE would leave the administrator believing that sessions are adopted. So it is
 * treated like any other wrong line: said in the log, closed to everyone but root.
 */
static int refuse_misplaced(pam_handle_t *pamh, int flags, int argc, const char **argv, const char *function)
{
	struct login login = begin(pamh, flags, argc, argv, function);
	int rc;

	if (is_decided_here(&login, &rc))
		return rc;
	tell(&login, true, MESSAGE_MISCONFIGURED);
	return finish(&login, LEVEL_ERROR, PAM_SERVICE_ERR,
		      "reason=misplaced fault=\"pam_adopt belongs in the account and session stacks, not in auth\"");
}

EXPORTED int pam_sm_acct_mgmt(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	return run_phase(pamh, flags, argc, argv, ADOPT_PHASE_ACCOUNT);
}

EXPORTED int pam_sm_open_session(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	return run_phase(pamh, flags, argc, argv, ADOPT_PHASE_SESSION);
}

/* Nothing was opened here that this could close, and the job's end is the job manager's: so it cannot fail. */
EXPORTED int pam_sm_close_session(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)pamh;
	(void)flags;
	(void)argc;
	(void)argv;
	return PAM_SUCCESS;
}

EXPORTED int pam_sm_authenticate(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	return refuse_misplaced(pamh, flags, argc, argv, "authenticate");
}

EXPORTED int pam_sm_setcred(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	return refuse_misplaced(pamh, flags, argc, argv, "setcred");
}
