/*
 * Asks a slurmd whose connection this is, again and again, and prints how long each answer took.
 *
 *   slurm_asker SRC SPORT DST DPORT SECONDS
 *
 * Through libslurm's own function, as pam_slurm_adopt does; `scontrol callerid` would be a process per question.
 * stdout: one line of nanoseconds per answer. Ends with status 1 at the first answer that names no job.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <slurm/slurm.h>
#include <slurm/slurm_errno.h>

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int main(int argc, char **argv)
{
	network_callerid_msg_t question = {.af = AF_INET};
	uint64_t end;

	if (argc != 6) {
		fprintf(stderr, "usage: slurm_asker SRC SPORT DST DPORT SECONDS\n");
		return 2;
	}
	if (inet_pton(AF_INET, argv[1], question.ip_src) != 1 || inet_pton(AF_INET, argv[3], question.ip_dst) != 1)
		return 2;
	question.port_src = (uint32_t)atoi(argv[2]);
	question.port_dst = (uint32_t)atoi(argv[4]);
	slurm_init(NULL);
	end = now_ns() + (uint64_t)(atof(argv[5]) * 1e9);
	for (uint64_t began = now_ns(); began < end;) {
		char node[256] = "";
		uint32_t job = NO_VAL;
		uint64_t ended;

		if (slurm_network_callerid(question, &job, node, sizeof(node)) != SLURM_SUCCESS || job == NO_VAL) {
			fprintf(stderr, "slurm_asker: no job: %s\n", slurm_strerror(errno));
			return 1;
		}
		ended = now_ns();
		printf("%llu\n", (unsigned long long)(ended - began));
		began = ended;
	}
	return 0;
}
