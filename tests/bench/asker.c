/*
 * Asks an agent whose connection this is, again and again, and prints how long each answer took.
 *
 *   asker munge SOCKET HOST PORT SRC SPORT DST DPORT UID SECONDS
 *   asker key FILE ...
 *
 * It does all that an asking node does: a fresh nonce, a seal, a TCP connection, the reply, opening its seal, and the
 * comparison of nonce and outcome. In C, so that what is measured is the answering agent, as it is for slurmd.
 * stdout: one line of nanoseconds per answer, 0 where the agent was out of time: it closes, or says so. Ends with
 * status 1 at the first answer that is not this job.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE_MAX 4096
#define KEY_MAX     4096
#define TTL_S       10

/* libmunge's and libcrypto's ABI for the few functions used here: their headers are in packages of their own. */
extern void *munge_ctx_create(void);
extern int munge_ctx_set(void *context, int option, ...);
extern int munge_encode(char **credential, void *context, const void *data, int length);
extern int munge_decode(const char *credential, void *context, void **data, int *length, uint32_t *uid, uint32_t *gid);
extern const void *EVP_sha256(void);
extern unsigned char *HMAC(const void *type, const void *key, int key_length, const unsigned char *data, size_t length,
			   unsigned char *digest, unsigned int *digest_length);
extern int EVP_EncodeBlock(unsigned char *to, const unsigned char *from, int length);
extern int EVP_DecodeBlock(unsigned char *to, const unsigned char *from, int length);

enum { MUNGE_OPT_TTL = 4, MUNGE_OPT_SOCKET = 8, MUNGE_OPT_UID_RESTRICTION = 9 };

static void *munge_context;
static unsigned char key[KEY_MAX];
static int key_length;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "asker: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void nonce(char text[33])
{
	uint64_t words[2];

	if (getrandom(words, sizeof(words), 0) != (ssize_t)sizeof(words))
		fail("getrandom");
	snprintf(text, 33, "%016llx%016llx", (unsigned long long)words[0], (unsigned long long)words[1]);
}

/* base64url without padding (RFC 7515, 2). Returns the length. */
static size_t to_base64url(char *to, const void *from, size_t length)
{
	size_t size = (size_t)EVP_EncodeBlock((unsigned char *)to, from, (int)length);

	while (size > 0 && to[size - 1] == '=')
		size--;
	to[size] = '\0';
	for (size_t i = 0; i < size; i++)
		to[i] = to[i] == '+' ? '-' : to[i] == '/' ? '_' : to[i];
	return size;
}

static size_t from_base64url(char *to, const char *from, size_t length)
{
	char padded[MESSAGE_MAX];
	size_t size = length;

	if (length > sizeof(padded) - 4)
		return 0;
	for (size_t i = 0; i < length; i++)
		padded[i] = from[i] == '-' ? '+' : from[i] == '_' ? '/' : from[i];
	while (size % 4)
		padded[size++] = '=';
	const int decoded = EVP_DecodeBlock((unsigned char *)to, (unsigned char *)padded, (int)size);
	if (decoded < 0)
		return 0;
	to[decoded] = '\0';
	return (size_t)decoded;
}

static size_t seal_with_key(char *sealed, const char *payload)
{
	static const char header[] = "{\"alg\":\"HS256\",\"typ\":\"JWT\"}";
	unsigned char digest[32];
	unsigned int digest_length = sizeof(digest);
	char body[1024];
	char claims[2048];
	char jti[33];
	struct timespec wall;
	size_t at;

	clock_gettime(CLOCK_REALTIME, &wall);
	nonce(jti);
	to_base64url(body, payload, strlen(payload));
	snprintf(claims, sizeof(claims),
		 "{\"aud\":\"adoptd\",\"iat\":%lld.%06ld,\"exp\":%lld.%06ld,\"jti\":\"%s\",\"body\":\"%s\"}",
		 (long long)wall.tv_sec, wall.tv_nsec / 1000, (long long)wall.tv_sec + TTL_S, wall.tv_nsec / 1000, jti,
		 body);
	at = to_base64url(sealed, header, strlen(header));
	sealed[at++] = '.';
	at += to_base64url(sealed + at, claims, strlen(claims));
	HMAC(EVP_sha256(), key, key_length, (unsigned char *)sealed, at, digest, &digest_length);
	sealed[at++] = '.';
	return at + to_base64url(sealed + at, digest, digest_length);
}

static bool open_with_key(char *payload, const char *sealed)
{
	unsigned char digest[32];
	unsigned int digest_length = sizeof(digest);
	char signature[64];
	char claims[MESSAGE_MAX];
	const char *second = strrchr(sealed, '.');
	const char *first = strchr(sealed, '.');
	const char *body;

	if (!first || first == second)
		return false;
	HMAC(EVP_sha256(), key, key_length, (const unsigned char *)sealed, (size_t)(second - sealed), digest,
	     &digest_length);
	to_base64url(signature, digest, digest_length);
	if (strcmp(signature, second + 1) != 0 || !from_base64url(claims, first + 1, (size_t)(second - first - 1)))
		return false;
	body = strstr(claims, "\"body\":\"");
	return body && from_base64url(payload, body + 8, strcspn(body + 8, "\"")) > 0;
}

static size_t seal(char *sealed, const char *payload)
{
	char *credential = NULL;
	size_t length;

	if (!munge_context)
		return seal_with_key(sealed, payload);
	if (munge_encode(&credential, munge_context, payload, (int)strlen(payload)) != 0 || !credential)
		fail("munge_encode");
	length = strlen(credential);
	memcpy(sealed, credential, length);
	free(credential);
	return length;
}

static bool open_seal(char *payload, const char *sealed)
{
	void *data = NULL;
	uint32_t uid;
	uint32_t gid;
	int length = 0;
	int code;

	if (!munge_context)
		return open_with_key(payload, sealed);
	code = munge_decode(sealed, munge_context, &data, &length, &uid, &gid);
	if (data && length > 0 && length < MESSAGE_MAX) {
		memcpy(payload, data, (size_t)length);
		payload[length] = '\0';
	}
	free(data);
	return code == 0 && uid == 0 && length > 0;
}

static bool receive(int fd, char *to, size_t length)
{
	while (length > 0) {
		const ssize_t count = recv(fd, to, length, 0);

		if (count <= 0)
			return false;
		to += count;
		length -= (size_t)count;
	}
	return true;
}

/* False if the agent was out of time. */
static bool ask(const struct sockaddr_in *agent, char **argv)
{
	const struct linger at_once = {1, 0};
	const int on = 1;
	char payload[MESSAGE_MAX];
	char question[512];
	char message[MESSAGE_MAX + 4];
	char asked[33];
	char expected[64];
	uint32_t length;
	int fd;

	nonce(asked);
	snprintf(question, sizeof(question),
		 "{\"v\":1,\"type\":\"question\",\"nonce\":\"%s\",\"to\":\"%s\",\"src\":\"%s\",\"sport\":%s,\"dst\":\"%"
		 "s\","
		 "\"dport\":%s,\"uid\":%s}",
		 asked, argv[3], argv[5], argv[6], argv[7], argv[8], argv[9]);
	length = (uint32_t)seal(message + 4, question);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (const struct sockaddr *)agent, sizeof(*agent)) != 0)
		fail("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	const uint32_t prefix = htobe32(length);
	memcpy(message, &prefix, 4);
	if (send(fd, message, length + 4, MSG_NOSIGNAL) != (ssize_t)length + 4)
		fail("send");
	if (!receive(fd, (char *)&length, 4) || be32toh(length) >= MESSAGE_MAX ||
	    !receive(fd, message, be32toh(length))) {
		close(fd);
		return false;
	}
	length = be32toh(length);
	message[length] = '\0';
	close(fd);
	snprintf(expected, sizeof(expected), "\"nonce\":\"%s\"", asked);
	if (!open_seal(payload, message) || !strstr(payload, expected))
		fail("an answer that is not to the question");
	if (strstr(payload, "\"reason\":\"out_of_time\""))
		return false;
	if (!strstr(payload, "\"outcome\":\"job\"")) {
		fprintf(stderr, "asker: expected a job, was told %s\n", payload);
		exit(1);
	}
	return true;
}

int main(int argc, char **argv)
{
	struct sockaddr_in agent = {.sin_family = AF_INET};
	uint64_t end;

	if (argc != 11) {
		fprintf(stderr, "usage: asker munge|key PLACE HOST PORT SRC SPORT DST DPORT UID SECONDS\n");
		return 2;
	}
	if (strcmp(argv[1], "munge") == 0) {
		munge_context = munge_ctx_create();
		munge_ctx_set(munge_context, MUNGE_OPT_SOCKET, argv[2]);
		munge_ctx_set(munge_context, MUNGE_OPT_TTL, TTL_S);
		munge_ctx_set(munge_context, MUNGE_OPT_UID_RESTRICTION, (uint32_t)0);
	} else {
		FILE *file = fopen(argv[2], "rb");

		if (!file)
			fail(argv[2]);
		key_length = (int)fread(key, 1, sizeof(key), file);
		fclose(file);
	}
	agent.sin_port = htons((uint16_t)atoi(argv[4]));
	if (inet_pton(AF_INET, argv[3], &agent.sin_addr) != 1)
		fail(argv[3]);
	end = now_ns() + (uint64_t)(atof(argv[10]) * 1e9);
	for (uint64_t began = now_ns(); began < end;) {
		const bool answered = ask(&agent, argv);
		const uint64_t ended = now_ns();

		printf("%llu\n", answered ? (unsigned long long)(ended - began) : 0);
		began = ended;
	}
	return 0;
}
