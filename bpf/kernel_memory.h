/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The helpers that read the kernel's own memory, by numbers of the ABI and under names of our own.
 *
 * BCC looks its name for the first up in /proc/kallsyms, and where it finds no address there makes every call one of the
 * older bpf_probe_read, which only tracing programs may make, and not on every architecture. Addresses are shown to
 * CAP_SYSLOG, or where kernel.perf_event_paranoid is below 2: what is read here must not depend on that.
 */
#ifndef ADOPT_KERNEL_MEMORY_H
#define ADOPT_KERNEL_MEMORY_H

/* 0, or negative if it cannot be read; then ``to`` is zeroed. */
static long (*read_kernel)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_kernel;
/* Up to and with the zero at its end: its length, or negative. */
static long (*read_kernel_str)(void *to, u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_kernel_str;

#endif
