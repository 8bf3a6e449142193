// SPDX-License-Identifier: GPL-2.0
/*
 * Process 1 of the guest: reads a byte of a page of 16M, twice as often as there are
 * pages, in order and at random, between the marks of the simulator.  The memory is
 * that of anonymous THPs mapped by page table entries: 64K at a time where the kernel
 * sets the hint.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE	4096UL
#define HUGE	(2UL << 20)
#define NR_HUGE	16
#define USED	(HUGE / 2)		/* of each: the rest splits it */
#define PASSES	2

#define NR	(PASSES * NR_HUGE * USED / PAGE)

static unsigned int order[NR];

static void enable(const char *file, const char *value)
{
	int fd = open(file, O_WRONLY);

	if (fd < 0 || write(fd, value, strlen(value)) < 0)
		perror(file);
	close(fd);
}

static void show(const char *file, const char *word)
{
	char line[512];
	FILE *f = fopen(file, "r");
	long sum = 0;

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, word, strlen(word)))
			sum += atol(line + strlen(word));
	printf("MISSES %s %ld\n", word, sum);
	if (f)
		fclose(f);
}

static void run(const char *mem)
{
	unsigned int i;

	asm volatile("hint #0x70" ::: "memory");
	for (i = 0; i < NR; i++) {
		unsigned long offset = order[i] * PAGE;

		*(volatile const char *)(mem + offset / USED * HUGE + offset % USED);
	}
	asm volatile("hint #0x71" ::: "memory");
}

int main(void)
{
	unsigned int i;
	uint64_t random = 1;
	char *mem;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	enable("/sys/kernel/mm/transparent_hugepage/enabled", "always");
	mem = mmap(NULL, (NR_HUGE + 1) * HUGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		return 1;
	mem = (char *)(((uintptr_t)mem + HUGE - 1) & ~(HUGE - 1));
	for (i = 0; i < NR_HUGE; i++) {
		mem[i * HUGE] = 1;
		/* A mapping that ends inside cannot have one entry for all of it. */
		mprotect(mem + i * HUGE + USED, HUGE - USED, PROT_READ);
	}
	for (i = 0; i < NR; i++)
		order[i] = i % (NR / PASSES);
	run(mem);
	for (i = 0; i < NR; i++) {
		random = random * 6364136223846793005ULL + 1442695040888963407ULL;
		order[i] = (random >> 33) % (NR / PASSES);
	}
	run(mem);
	show("/proc/self/smaps", "ContPteMapped:");
	show("/proc/self/smaps", "AnonHugePages:");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	return 0;
}
