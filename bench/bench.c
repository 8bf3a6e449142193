// SPDX-License-Identifier: GPL-2.0-only
/*
 * What memory management costs, operation by operation: the guest's side of the
 * meter (meter.c), run as init.
 *
 * Usage: init [cold] PATTERN
 *
 * Each row is one operation on the same SIZE bytes, done once unmarked and then
 * once as a marked section; with "cold", the first time is the marked one.  It
 * prints "ROW name before after": the kB that smaps calls ContPteMapped before
 * and after, "-" where it has no such line.  PATTERN is for the rows to run, as
 * of fnmatch().  What a kernel cannot do has no row.
 *
 *   order0   anonymous memory, MADV_NOHUGEPAGE, written to in a shuffled order
 *   thp      anonymous THPs, mapped by PTEs
 *   mthp     anonymous folios of a contpte block, if the kernel has them
 *   shmem    tmpfs with huge=always, shared, mapped where no PMD fits
 *   xfs      XFS page cache made by readahead, shared, the same
 *   text     the same, private, executed
 *   hugetlb  a pool of huge pages, each as large as a PMD maps
 *   hvo      the same with vm.hugetlb_optimize_vmemmap=1, if the kernel has it
 *
 * map-64m is fault-around on LARGE bytes, text:read execution of what is not in
 * the page cache.  The pool has POOL bytes, or one page; demote makes as many out
 * of pages of 32M, where the kernel has these and finds the memory.
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
#include <sys/utsname.h>
#include <sys/wait.h>
#include "contpte_util.h"

#define SIZE		(8UL << 20)
#define LARGE		(64UL << 20)
#define POOL		(128UL << 20)
#define FILE_OFF	(2 * SIZE)	/* readahead has reached its largest folios */
#define TICKS_NS	20000000	/* a multiple of the tick for any HZ */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

enum src { ORDER0, THP, MTHP, SHMEM, XFS, TEXT, HUGETLB, HVO, NR_SRC };
#define ANON	(1 << ORDER0 | 1 << THP | 1 << MTHP)
#define FILES	(1 << SHMEM | 1 << XFS | 1 << TEXT)
#define POOLS	(1 << HUGETLB | 1 << HVO)

static const char * const src_name[] = {
	"order0", "thp", "mthp", "shmem", "xfs", "text", "hugetlb", "hvo"
};
static enum src src;
static int fd = -1;
static size_t page, block, pmd;
static size_t size;			/* of the memory to work on */
static char *area, *other;		/* reserved, aligned to a PMD */
static bool marked;
static long *before;			/* shared with children */
static unsigned short order[SIZE >> 12];	/* of the pages of SIZE */

static void must(bool ok, const char *what)
{
	if (!ok)
		err(1, "%s %s", src_name[src], what);
}

static long folded(const char *p)
{
	long bytes = p && cont_supported() ? cont_mapped(p, size) : -1;

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

	for (at = 0; at < size; at += page)
		cont_store(p + at, 1);
}

/*
 * Small folios are allocated one after the other.  Were they touched so, all of
 * them or none could be as aligned as their addresses, which is a question that
 * contpte asks, and any change to a kernel could change the answer.
 */
static void shuffle(void)
{
	size_t i, j;
	__u64 state = 0;

	for (i = 0; i < SIZE / page; i++) {
		j = cont_rand(&state) % (i + 1);
		order[i] = order[j];
		order[j] = i;
	}
}

static void touch_shuffled(char *p)
{
	size_t i;

	for (i = 0; i < SIZE / page; i++)
		cont_store(p + order[i] * page, 1);
}

/* cont_fill_file() has put a function at the start of each page. */
static void execute(char *p)
{
	size_t at;

	for (at = 0; at < size; at += page)
		((int (*)(void))(p + at))();
}

static char *map(void)
{
	int prot = PROT_READ | (src == TEXT ? PROT_EXEC : PROT_WRITE);
	int flags = MAP_FIXED | (fd < 0 ? MAP_ANONYMOUS : 0);
	size_t len = src == THP && pmd > size ? pmd : size, at;
	char *p = area;

	flags |= src == SHMEM || src == XFS ? MAP_SHARED : MAP_PRIVATE;
	if (1 << src & FILES)
		p += (FILE_OFF + block) % pmd;
	must(mmap(p, len, prot, flags, fd, fd < 0 ? 0 : FILE_OFF) == p, "mmap");
	if (src == ORDER0)
		madvise(p, len, MADV_NOHUGEPAGE);
	if (src == THP || src == MTHP)
		madvise(p, len, MADV_HUGEPAGE);
	if (src == THP) {
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
		touch_shuffled(p);
		break;
	case MTHP:
		touch(p);
		break;
	case THP:
		/* A VMA that ends inside of a THP cannot have a PMD for it. */
		for (at = 0; at < size; at += pmd)
			madvise(p + at + pmd / 2, page, MADV_NOHUGEPAGE);
		if (pmd > size)
			reserve(p + size, pmd - size);
		madvise(p, size, MADV_NOHUGEPAGE);	/* one VMA again */
		break;
	case TEXT:
		execute(p);
		break;
	default:
		cont_touch(p, size);
	}
}

/* XFS gives back the blocks of a file that is gone some time later. */
static void close_file(void)
{
	if (fd < 0)
		return;
	must(!ftruncate(fd, 0), "ftruncate");
	close(fd);
	fd = -1;
}

/* A new file for src: operations may have split the folios of the last one. */
static void make_file(bool cached)
{
	size_t len = FILE_OFF + size + SIZE;
	struct cont_map m = { .page = page };

	close_file();
	if (src == SHMEM) {
		fd = open("/huge", O_RDWR | O_TMPFILE, 0600);
		m.fd = fd;
		must(m.fd >= 0 && !ftruncate(m.fd, len + pmd) &&
		     cont_fill_file(&m, FILE_OFF, size), "file");
		return;
	}
	fd = cont_open_xfs();
	m.fd = fd;
	must(m.fd >= 0 && cont_fill_file(&m, 0, len) && !fsync(m.fd) &&
	     !posix_fadvise(m.fd, 0, 0, POSIX_FADV_DONTNEED), "file");
	if (cached)
		cont_read_ahead(&m, len);
	sync();
}

/* A file of the THPs of some size, or of the huge pages. */
static void size_file(char *buf, size_t len, const char *dir, size_t bytes, const char *file)
{
	snprintf(buf, len, "/sys/kernel/mm/%s/hugepages-%zukB/%s", dir, bytes >> 10, file);
}

static bool enable_thp(size_t bytes, const char *how)
{
	char path[128];

	size_file(path, sizeof(path), "transparent_hugepage", bytes, "enabled");
	return cont_write_str(path, how);
}

static bool set_pool(size_t bytes, const char *file, long to)
{
	char path[128], number[32];

	size_file(path, sizeof(path), "hugepages", bytes, file);
	snprintf(number, sizeof(number), "%ld", to);
	return cont_write_str(path, number);
}

static long pool(size_t bytes)
{
	char path[128], number[32];

	size_file(path, sizeof(path), "hugepages", bytes, "nr_hugepages");
	return cont_read_str(path, number, sizeof(number)) ? strtol(number, NULL, 10) : -1;
}

/* Does the kernel have what src is made of? */
static bool start(void)
{
	bool on;

	switch (src) {
	case MTHP:
		return enable_thp(block, "madvise") && enable_thp(pmd, "never");
	case HUGETLB:
	case HVO:
		on = cont_write_str("/proc/sys/vm/hugetlb_optimize_vmemmap",
				    src == HVO ? "1" : "0");
		return pool(pmd) >= 0 && (on || src == HUGETLB);
	default:
		return true;
	}
}

static void stop(void)
{
	close_file();
	if (src == MTHP) {
		enable_thp(block, "never");
		enable_thp(pmd, "inherit");
	}
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
	end(p, size == LARGE ? "map-64m" : src == THP ? "split-pmd" :
	    1 << src & ANON ? "touch" : "fault-around");
}

/* Waits for the disk. */
static void op_read(char *p)
{
	begin(p);
	fill(p);
	end(p, "read");
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
	munmap(p, size);
	end(p, "munmap");
}

static void advise(char *p, int advice, const char *op)
{
	begin(p);
	must(!madvise(p, size, advice), op);
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
	must(!mlock(p, size), "mlock");
	end(p, "mlock");
	must(!munlock(p, size), "munlock");
}

/* The writing of the disk is in it, so look at the TLBIs. */
static void op_writeback(char *p)
{
	touch(p);
	begin(p);
	must(!fdatasync(fd), "fdatasync");
	end(p, "writeback");
}

static void op_mprotect(char *p)
{
	begin(p);
	must(!mprotect(p, size, PROT_READ), "mprotect");
	end(p, "mprotect-ro");
	begin(p);
	must(!mprotect(p, size, PROT_READ | (src == TEXT ? PROT_EXEC : PROT_WRITE)), "mprotect");
	end(p, src == TEXT ? "mprotect-rx" : "mprotect-rw");
}

static void op_mremap(char *p)
{
	char *to = other + (p - area) + block;	/* no whole PMD can be moved */

	begin(p);
	must(mremap(p, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
	end(to, "mremap");
	reserve(to, size);
}

/* GUP-fast, 16 pages a call. */
static void op_gup(char *p)
{
	struct iovec iov = { p, size };
	int pipefd[2];

	must(!pipe(pipefd) && fcntl(pipefd[1], F_SETPIPE_SZ, size) > 0, "pipe");
	begin(p);
	must(vmsplice(pipefd[1], &iov, 1, 0) == (ssize_t)size, "vmsplice");
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

/* What khugepaged does, but now. */
static void op_collapse(char *p)
{
	if (pmd > size)
		return;
	must(!madvise(p, size, MADV_HUGEPAGE), "MADV_HUGEPAGE");
	begin(p);
	must(!madvise(p, size, MADV_COLLAPSE), "MADV_COLLAPSE");
	end(p, "collapse");
}

/*
 * What the lists of a CPU hold decides what freeing huge pages costs: they push it out.
 * Memory that is to go offline drains them first. It stays: arm64 refuses that for memory
 * of the boot.
 */
static void drain_lists(void)
{
	char path[64];
	int block = 0;

	do {
		snprintf(path, sizeof(path), "/sys/devices/system/memory/memory%d/state", block);
	} while (access(path, W_OK) && ++block < 1024);
	cont_write_str(path, "offline");
}

static void op_pool(char *unused)
{
	long nr = pmd < POOL ? POOL / pmd : 1;

	cont_make_room();
	begin(NULL);
	set_pool(pmd, "nr_hugepages", nr);
	end(NULL, "grow");
	must(pool(pmd) == nr, "grow");
	drain_lists();
	begin(NULL);
	set_pool(pmd, "nr_hugepages", 0);
	end(NULL, "shrink");
	must(!pool(pmd), "shrink");
}

static void op_demote(char *unused)
{
	size_t from = 16 * pmd;		/* contiguous PMDs, with 4K pages */
	long nr = POOL / from;

	cont_make_room();
	set_pool(from, "nr_hugepages", nr);
	if (pool(from) == nr) {
		begin(NULL);
		set_pool(from, "demote", nr);
		end(NULL, "demote");
		must(pool(pmd) == 16 * nr, "demote");
	}
	set_pool(from, "nr_hugepages", 0);
	set_pool(pmd, "nr_hugepages", 0);
}

/* Where the row is, for a pattern: an operation may have several. */
static const struct op {
	const char *rows;
	void (*run)(char *p);
	int srcs;
	bool maps;		/* by itself */
	bool spoils;		/* its file: it gets one of its own, last */
	bool uncached;		/* the file */
	size_t size;		/* if not SIZE */
} ops[] = {
	{ "touch",		op_fill,	1 << ORDER0 | 1 << MTHP, true },
	{ "split-pmd",		op_fill,	1 << THP,	true },
	{ "fault-around",	op_fill,	FILES,		true },
	{ "fork fork-exit",	op_fork,	ANON },
	{ "cow",		op_cow,		ANON },
	{ "write-after-fork",	op_reuse,	ANON },
	{ "exit",		op_exit,	ANON | FILES,	true },
	{ "munmap",		op_munmap,	ANON | FILES },
	{ "dontneed",		op_dontneed,	ANON | FILES },
	{ "free",		op_free,	ANON },
	{ "mprotect-ro mprotect-rw mprotect-rx", op_mprotect, ANON | FILES },
	{ "mremap",		op_mremap,	ANON | FILES },
	{ "gup",		op_gup,		ANON | FILES },
	{ "smaps",		op_smaps,	ANON | FILES },
	{ "mlock",		op_mlock,	ANON | FILES },
	{ "collapse",		op_collapse,	ANON },
	{ "cold",		op_cold,	ANON | FILES,	.spoils = true },
	{ "pageout",		op_pageout,	1 << XFS | 1 << TEXT, .spoils = true },
	{ "writeback",		op_writeback,	1 << XFS,	.spoils = true },
	{ "read",		op_read,	1 << TEXT,	.spoils = true, .uncached = true },
	{ "map-64m",		op_fill,	FILES,		true, true, .size = LARGE },
	{ "grow shrink",	op_pool,	POOLS,		true },
	{ "demote",		op_demote,	POOLS,		true },
};

#define NR_OPS	(sizeof(ops) / sizeof(*ops))

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

static bool wanted_src(const char *pattern)
{
	const struct op *op;

	for (op = ops; op < ops + NR_OPS; op++)
		if (wanted(op, pattern))
			return true;
	return false;
}

static void bench_op(const struct op *op, bool cold)
{
	char *p = NULL;
	int i;

	size = op->size ? op->size : SIZE;
	for (i = 0; i < 2 - cold; i++) {
		if (1 << src & FILES && (fd < 0 || op->spoils))
			make_file(!op->uncached);
		if (!op->maps) {
			p = map();
			if (!op->uncached)
				fill(p);
			must(src != MTHP || cont_block_is_one_folio(p), "folio");
		}
		marked = cold || i;
		op->run(p);
		reserve(area, other - area);
	}
}

static void bench(const char *pattern, bool cold)
{
	struct sched_param param = { .sched_priority = 50 };
	const struct op *op;
	bool ran = false;
	char *resv;

	page = cont_page_size();
	block = cont_size();
	pmd = cont_pmd_size();
	shuffle();
	resv = cont_reserve(5 * pmd + 2 * LARGE);
	must(pmd && resv != MAP_FAILED, "reserve");
	area = cont_align_up(resv, pmd);
	other = cont_align_up(area + LARGE + 2 * pmd, pmd);
	before = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	cont_write_str("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
		       "1000000");
	cont_write_str("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
	cont_write_str("/proc/sys/kernel/sched_rt_runtime_us", "-1");
	must(!sched_setscheduler(0, SCHED_FIFO, &param), "SCHED_FIFO");

	for (src = 0; src < NR_SRC; src++) {
		if (!wanted_src(pattern) || !start())
			continue;
		for (op = ops; op < ops + NR_OPS; op++)
			if (wanted(op, pattern))
				bench_op(op, cold);
		stop();
		ran = true;
	}
	if (!ran)
		errx(1, "no row matches %s", pattern);
}

static bool mount_xfs(void)
{
	int loop = open("/dev/loop0", O_RDWR), image = open("/xfs.img", O_RDWR);

	if (ioctl(loop, LOOP_SET_FD, image))
		return false;
	/* A kernel may refuse to mount what someone else can write to. */
	close(loop);
	return !mount("/dev/loop0", "/xfs", "xfs", 0, NULL);
}

int main(int argc, char **argv)
{
	struct utsname uts;
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
	uname(&uts);
	printf("LINUX %s, %zuK pages\n", uts.release, cont_page_size() >> 10);
	fflush(stdout);
	pid = fork();
	if (!pid) {
		bench(argc > 1 ? argv[argc - 1] : "*", argc > 2);
		exit(0);
	}
	waitpid(pid, &status, 0);
	if (status)
		printf("bench: wait status %x\n", status);
	sync();
	reboot(RB_POWER_OFF);
}
