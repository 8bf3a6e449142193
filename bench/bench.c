// SPDX-License-Identifier: GPL-2.0-only
/*
 * What memory management costs, operation by operation: the guest's side of the
 * meter (meter.c), run as init.
 *
 * Each row is one operation on the same SIZE bytes, done once unmarked and then
 * once as a marked section.  It prints "ROW name before after": the kB that
 * smaps calls ContPteMapped before and after, "-" where it has no such line.
 * An argument is a pattern for the rows to run, as of fnmatch().
 *
 *   order0  anonymous memory, MADV_NOHUGEPAGE, written to
 *   thp     anonymous THPs, mapped by PTEs
 *   shmem   tmpfs with huge=always, shared, mapped where no PMD fits
 *   xfs     XFS page cache made by readahead, shared, the same
 *
 * The XFS is on a loop device, in the initramfs: a disk of QEMU would answer at
 * a time of its own.  SCHED_FIFO keeps everything but interrupts out of a section,
 * and each starts at the same distance from a timer tick.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fnmatch.h>
#include <sched.h>
#include <signal.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include "contpte_util.h"

#define SIZE		(8UL << 20)
#define FILE_SIZE	(4 * SIZE)
#define FILE_OFF	(2 * SIZE)	/* readahead has reached its largest folios */
#define TICKS_NS	20000000	/* a multiple of the tick for any HZ */

enum src { ORDER0, THP, SHMEM, XFS, NR_SRC };
#define ANON	(1 << ORDER0 | 1 << THP)
#define FILES	(1 << SHMEM | 1 << XFS)

static const char * const src_name[] = { "order0", "thp", "shmem", "xfs" };
static enum src src;
static int fd[NR_SRC] = { -1, -1, -1, -1 };
static size_t page, block, pmd;
static char *area, *other;		/* reserved, aligned to a PMD */
static bool marked;
static long *before;			/* shared with children */

static void must(bool ok, const char *what)
{
	if (!ok)
		err(1, "%s %s", src_name[src], what);
}

static long folded(const char *p)
{
	long bytes = cont_supported() ? cont_mapped(p, SIZE) : -1;

	return bytes < 0 ? -1 : bytes >> 10;
}

/* Let the kernel's own threads finish, and wake up between two ticks. */
static void settle(void)
{
	struct timespec ts;
	long ns;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	ns = ts.tv_nsec / TICKS_NS * TICKS_NS + 3 * TICKS_NS + 500000;
	ts.tv_sec += ns / 1000000000;
	ts.tv_nsec = ns % 1000000000;
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

static void begin(const char *p)
{
	*before = folded(p);
	settle();
	if (marked)
		asm volatile("hint #0x70" ::: "memory");
}

static void end(const char *p, const char *op)
{
	long after;

	if (!marked)
		return;
	asm volatile("hint #0x71" ::: "memory");
	after = folded(p);
	printf("ROW %s:%s", src_name[src], op);
	printf(*before < 0 ? " -" : " %ld", *before);
	printf(after < 0 ? " -\n" : " %ld\n", after);
	fflush(stdout);
}

/* ---- the memory -------------------------------------------------------- */

static void reserve(char *p, size_t len)
{
	must(mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
		  -1, 0) == p, "reserve");
}

static void touch(char *p)
{
	size_t at;

	for (at = 0; at < SIZE; at += page)
		cont_store(p + at, 1);
}

static char *map(void)
{
	size_t len = src == THP && pmd > SIZE ? pmd : SIZE, at;
	char *p = area;

	if (1 << src & FILES)
		p += (FILE_OFF + block) % pmd;
	must(mmap(p, len, PROT_READ | PROT_WRITE, MAP_FIXED | (1 << src & FILES ? MAP_SHARED :
		  MAP_PRIVATE | MAP_ANONYMOUS), fd[src], fd[src] < 0 ? 0 : FILE_OFF) == p, "mmap");
	if (src == ORDER0)
		madvise(p, len, MADV_NOHUGEPAGE);
	if (src == THP) {
		madvise(p, len, MADV_HUGEPAGE);
		for (at = 0; at < len; at += pmd)
			cont_store(p + at, 1);
		must(cont_smaps(p, len, "AnonHugePages:") == (long)len, "THP");
	}
	return p;
}

/* From what map() leaves to all of it mapped by PTEs. */
static void fill(char *p)
{
	size_t at;

	switch (src) {
	case ORDER0:
		touch(p);
		break;
	case THP:
		/* A VMA that ends inside of a THP cannot have a PMD for it. */
		for (at = 0; at < SIZE; at += pmd)
			madvise(p + at + pmd / 2, page, MADV_NOHUGEPAGE);
		if (pmd > SIZE)
			reserve(p + SIZE, pmd - SIZE);
		madvise(p, SIZE, MADV_NOHUGEPAGE);	/* one VMA again */
		break;
	default:
		cont_touch(p, SIZE);
	}
}

/* A new file for src: operations may have split the folios of the last one. */
static void make_file(void)
{
	struct cont_map m = { .page = page };

	close(fd[src]);
	if (src == SHMEM) {
		fd[src] = m.fd = open("/huge", O_RDWR | O_TMPFILE, 0600);
		must(m.fd >= 0 && !ftruncate(m.fd, FILE_SIZE + pmd) &&
		     cont_fill_file(&m, FILE_OFF, SIZE), "file");
		return;
	}
	fd[src] = m.fd = cont_open_xfs();
	must(m.fd >= 0 && cont_fill_file(&m, 0, FILE_SIZE) && !fsync(m.fd) &&
	     !posix_fadvise(m.fd, 0, 0, POSIX_FADV_DONTNEED), "file");
	cont_read_ahead(&m, FILE_SIZE);
	sync();
}

/* ---- the operations ---------------------------------------------------- */

static void op_fork(char *p)
{
	pid_t pid;

	begin(p);
	pid = fork();
	if (!pid) {
		begin(p);
		_exit(0);
	}
	end(p, "fork");
	waitpid(pid, NULL, 0);
	end(p, "fork-exit");
}

static void op_exit(char *unused)
{
	pid_t pid = fork();

	if (!pid) {
		char *p = map();

		fill(p);
		begin(p);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	end(area, "exit");
}

static void op_fill(char *unused)
{
	char *p = map();

	begin(p);
	fill(p);
	end(p, src == THP ? "split-pmd" : src == ORDER0 ? "touch" : "fault-around");
}

static void op_cow(char *p)
{
	pid_t pid = fork();

	if (!pid)
		for (;;)
			pause();
	begin(p);
	touch(p);
	end(p, "cow");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static void op_reuse(char *p)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	waitpid(pid, NULL, 0);
	begin(p);
	touch(p);
	end(p, "write-after-fork");
}

static void op_munmap(char *p)
{
	begin(p);
	munmap(p, SIZE);
	end(p, "munmap");
}

static void advise(char *p, int advice, const char *op)
{
	begin(p);
	must(!madvise(p, SIZE, advice), op);
	end(p, op);
}

static void op_dontneed(char *p)
{
	advise(p, MADV_DONTNEED, "dontneed");
}

static void op_free(char *p)
{
	advise(p, MADV_FREE, "free");
}

static void op_cold(char *p)
{
	advise(p, MADV_COLD, "cold");
}

static void op_pageout(char *p)
{
	advise(p, MADV_PAGEOUT, "pageout");
}

static void op_mlock(char *p)
{
	begin(p);
	must(!mlock(p, SIZE), "mlock");
	end(p, "mlock");
	must(!munlock(p, SIZE), "munlock");
}

/* The writing of the disk is in it, so look at the TLBIs. */
static void op_writeback(char *p)
{
	touch(p);
	begin(p);
	must(!fdatasync(fd[src]), "fdatasync");
	end(p, "writeback");
}

static void op_mprotect(char *p)
{
	begin(p);
	must(!mprotect(p, SIZE, PROT_READ), "mprotect");
	end(p, "mprotect-ro");
	begin(p);
	must(!mprotect(p, SIZE, PROT_READ | PROT_WRITE), "mprotect");
	end(p, "mprotect-rw");
}

static void op_mremap(char *p)
{
	char *to = other + (p - area) + block;	/* no whole PMD can be moved */

	begin(p);
	must(mremap(p, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
	end(to, "mremap");
	reserve(to, SIZE);
}

/* GUP-fast, 16 pages a call. */
static void op_gup(char *p)
{
	struct iovec iov = { p, SIZE };
	int pipefd[2];

	must(!pipe(pipefd) && fcntl(pipefd[1], F_SETPIPE_SZ, SIZE) > 0, "pipe");
	begin(p);
	must(vmsplice(pipefd[1], &iov, 1, 0) == (ssize_t)SIZE, "vmsplice");
	end(p, "gup");
	close(pipefd[0]);
	close(pipefd[1]);
}

static void op_smaps(char *p)
{
	static char buf[1 << 16];
	int smaps = open("/proc/self/smaps", O_RDONLY);

	begin(p);
	while (read(smaps, buf, sizeof(buf)) > 0)
		;
	end(p, "smaps");
	close(smaps);
}

/* Where the row is, for a pattern: an operation may have several. */
static const struct op {
	const char *rows;
	void (*run)(char *p);
	int srcs;
	bool maps;		/* by itself */
	bool spoils;		/* splits the folios of the file, or writes to it */
} ops[] = {
	{ "touch",		op_fill,	1 << ORDER0,	true },
	{ "split-pmd",		op_fill,	1 << THP,	true },
	{ "fault-around",	op_fill,	FILES,		true },
	{ "fork fork-exit",	op_fork,	ANON },
	{ "cow",		op_cow,		ANON },
	{ "write-after-fork",	op_reuse,	ANON },
	{ "exit",		op_exit,	ANON | FILES,	true },
	{ "munmap",		op_munmap,	ANON | FILES },
	{ "dontneed",		op_dontneed,	ANON | FILES },
	{ "free",		op_free,	ANON },
	{ "mprotect-ro mprotect-rw", op_mprotect, ANON | FILES },
	{ "mremap",		op_mremap,	ANON | FILES },
	{ "gup",		op_gup,		ANON | FILES },
	{ "smaps",		op_smaps,	ANON | FILES },
	{ "mlock",		op_mlock,	ANON | FILES },
	{ "cold",		op_cold,	ANON | FILES,	.spoils = true },
	{ "pageout",		op_pageout,	1 << XFS,	.spoils = true },
	{ "writeback",		op_writeback,	1 << XFS,	.spoils = true },
};

static bool wanted(const struct op *op, const char *pattern)
{
	char rows[64], row[64], *s, *save;

	strcpy(rows, op->rows);
	for (s = strtok_r(rows, " ", &save); s; s = strtok_r(NULL, " ", &save)) {
		snprintf(row, sizeof(row), "%s:%s", src_name[src], s);
		if (1 << src & op->srcs && !fnmatch(pattern, row, 0))
			return true;
	}
	return false;
}

static void bench(const char *pattern)
{
	const struct op *end = ops + sizeof(ops) / sizeof(*ops), *op;
	struct sched_param param = { .sched_priority = 50 };
	char *resv, *p;
	int i;

	page = cont_page_size();
	block = cont_size();
	pmd = cont_pmd_size();
	resv = cont_reserve(5 * pmd + 3 * SIZE);
	must(pmd && resv != MAP_FAILED, "reserve");
	area = cont_align_up(resv, pmd);
	other = cont_align_up(area + SIZE + 2 * pmd, pmd);
	before = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	cont_write_str("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	cont_write_str("/proc/sys/kernel/sched_rt_runtime_us", "-1");
	must(!sched_setscheduler(0, SCHED_FIFO, &param), "SCHED_FIFO");

	for (src = 0; src < NR_SRC; src++)
		for (op = ops; op < end; op++)
			for (i = 0; i < 2 && wanted(op, pattern); i++) {
				if (1 << src & FILES && (fd[src] < 0 || op->spoils))
					make_file();
				p = op->maps ? NULL : map();
				if (p)
					fill(p);
				marked = i;
				op->run(p);
				reserve(area, other - area);
			}
}

static bool mount_xfs(void)
{
	int loop = open("/dev/loop0", O_RDWR), image = open("/xfs.img", O_RDWR);

	return !ioctl(loop, LOOP_SET_FD, image) && !mount("/dev/loop0", "/xfs", "xfs", 0, NULL);
}

int main(int argc, char **argv)
{
	int status = 0;
	pid_t pid;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/huge", 0755);
	mkdir("/xfs", 0755);
	if (mount("proc", "/proc", "proc", 0, NULL) || mount("sys", "/sys", "sysfs", 0, NULL) ||
	    mount("dev", "/dev", "devtmpfs", 0, NULL) ||
	    mount("tmpfs", "/huge", "tmpfs", 0, "huge=always") ||
	    !mount_xfs())
		warn("mount");
	pid = fork();
	if (!pid) {
		bench(argc > 1 ? argv[argc - 1] : "*");
		exit(0);
	}
	waitpid(pid, &status, 0);
	if (status)
		printf("bench: wait status %x\n", status);
	sync();
	reboot(RB_POWER_OFF);
}
