// SPDX-License-Identifier: GPL-2.0-only
/*
 * Processes die with folded memory while others still work on that memory.
 *
 * Claim: whatever reaps, walks, moves or swaps the memory of a dying process, and
 * wherever the teardown of its page tables happens to stop for a while, no page
 * is freed that is in use, no page of another process changes, and what the
 * process stored to a shared file mapping before it died is in the file.
 *
 * Oracle: children store generations to the pages of a file through a shared
 * mapping and note each in memory of their own (struct ctl), before and after.
 * When a child is dead its pages are read with read(2): each word must be of a
 * generation between the two. Where the point is the dirty bit, what is not known
 * to be dirty is thrown out of the page cache first. All children are forks that
 * share anonymous memory with this process; here, and in a process that lives on
 * (the survivor), its pattern is verified all the time.
 *
 * Breaks on: an unfold that brings back entries which the teardown had cleared
 * (use after free, Bad page, wrong rss), a block of which only some entries are
 * cleared being taken for a whole one, a dirty bit dropped with its block, an
 * entry that the rmap walkers do not find. Bad page, Bad rss-counter and
 * page_table_check speak on the console, which the caller has to look at.
 *
 * zap_pte_range() stops in the middle of a block when it is to reschedule and, for
 * file pages that are dirty, to flush. Threads of high priority (hog()) that wake
 * up all the time on each CPU see to the first, the file mapping to the second.
 *
 * Options: -n seconds of each case, -t threads (half of them have children, the
 * others disturb), -s seed. Needs root.
 */
#include "race_util.h"
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef __NR_pidfd_open
#define __NR_pidfd_open		434
#endif
#ifndef __NR_process_madvise
#define __NR_process_madvise	440
#endif
#ifndef __NR_process_mrelease
#define __NR_process_mrelease	448
#endif

#ifndef FALLOC_FL_KEEP_SIZE
#define FALLOC_FL_KEEP_SIZE	1
#define FALLOC_FL_PUNCH_HOLE	2
#endif
#ifndef PTRACE_EVENT_EXIT
#define PTRACE_EVENT_EXIT	6
#endif
#ifndef PTRACE_O_EXITKILL
#define PTRACE_O_EXITKILL	0x100000
#endif

#define MAX_BLOCKS	4	/* of each window */
#define MAX_PAGES	(2 * 128)
#define MAX_DRIVERS	(RACE_MAX_THREADS / 2)
#define MAX_CPUS	64
/* Generations that a look at a page which is being written may span. */
#define MAX_GAP		16
/* Huge pages that are larger are too much work for each child. */
#define MAX_THP		(64UL << 20)
/* A child that does nothing for so long hangs. */
#define PATIENCE_MS	60000
/* The OOM reaper comes two seconds after the kill; do not wait for ever. */
#define REAPER_SECONDS	6

/* what a case does */
#define MRELEASE	CONT_BIT(0)
#define REFS		CONT_BIT(1)
#define MIGRATE		CONT_BIT(2)
#define SWAP		CONT_BIT(3)
#define UNMAP		CONT_BIT(4)	/* a thread of the child does */
#define SYNC		CONT_BIT(5)
#define OOM		CONT_BIT(6)
#define FORGET		CONT_BIT(7)	/* throw out of the page cache what is clean */

struct test {
	const char *name;
	unsigned int what;
	enum cont_source src;	/* of the file; others do where FORGET is not set */
};

static const struct test tests[] = {
	{ "exit against process_mrelease", MRELEASE, CONT_SHMEM },
	{ "exit against the OOM reaper", OOM, CONT_SHMEM },
	{ "exit against idle tracking and clear_refs", REFS, CONT_SHMEM },
	{ "exit against migration and compaction", MIGRATE, CONT_XFS },
	{ "exit against swap-out", SWAP, CONT_SHMEM },
	{ "exit against munmap in another thread", UNMAP | MRELEASE, CONT_XFS },
	{ "stores to shmem outlive their process", FORGET | REFS | MRELEASE,
	  CONT_SHMEM },
	{ "stores to XFS outlive their process", FORGET | SYNC | REFS | MRELEASE,
	  CONT_XFS },
};

/* Shared with all children. */
struct ctl {
	int stop;			/* the survivor is to end */
	int bad;
	char why[200];			/* valid once bad is 2 */
	char *own[MAX_DRIVERS];		/* window of the child's own; NULL: none */
	unsigned int clean;		/* children that found the file clean */
	/* generations, of each page of the file window */
	__u64 started[MAX_PAGES];
	__u64 published[MAX_PAGES];
};

/* A child, as the disturbing threads see it. */
struct slot {
	pthread_rwlock_t lock;	/* while it is held for reading, pid stays taken */
	pid_t pid;		/* 0: none */
	int pidfd;
	int proc;		/* /proc/pid */
};

static struct ctl *ctl;
static struct race race;
static struct slot slots[MAX_DRIVERS];
static unsigned int nr_drivers;
static const struct test *cur;

/* Windows that this process and all children have at the same address. */
static struct cont_map anon, file;
/* The file has no large folios but holes at first: generation 0 is zeroes. */
static bool holes;

static char cg_dir[160];	/* empty: none */
static char cg_root[96];
static bool cg_mounted, cg_enabled;
static int cg_procs = -1;
static pid_t main_pid;

/* ---- reports ---------------------------------------------------------- */

/* From a child: the first report is kept for this process to find. */
static void __attribute__((format(printf, 1, 2))) child_bad(const char *fmt, ...)
{
	va_list ap;
	int none = 0;

	if (!__atomic_compare_exchange_n(&ctl->bad, &none, 1, false,
					 __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return;
	va_start(ap, fmt);
	vsnprintf(ctl->why, sizeof(ctl->why), fmt, ap);
	va_end(ap);
	__atomic_store_n(&ctl->bad, 2, __ATOMIC_RELEASE);
}

/* Make a report of a child one of the case. True if there is one. */
static bool child_was_bad(void)
{
	if (__atomic_load_n(&ctl->bad, __ATOMIC_ACQUIRE) != 2)
		return false;
	race_fail(&race, "%s", ctl->why);
	return true;
}

static void on_fault(int sig, siginfo_t *si, void *uc)
{
	const char *name = sig == SIGSEGV ? "SIGSEGV" : "SIGBUS";
	char buf[160];
	int n;

	(void)uc;
	if (getpid() != main_pid) {
		child_bad("%s at %p in child %d", name, si->si_addr, getpid());
		_exit(KSFT_FAIL);
	}
	n = snprintf(buf, sizeof(buf), "Bail out! %s at %p in thread %ld of %s\n",
		     name, si->si_addr, (long)syscall(__NR_gettid),
		     cur ? cur->name : "the set-up");
	if (write(STDOUT_FILENO, buf, n) != n)
		_exit(KSFT_FAIL);
	_exit(KSFT_FAIL);
}

/* Leave the CPU, of which there may be few, to the children. */
static void rest(__u64 r, unsigned int us)
{
	struct timespec ts = { .tv_nsec = (1 + r % us) * 1000 };

	nanosleep(&ts, NULL);
}

/* ---- what a page of the file has to hold ------------------------------ */

static __u64 file_word(unsigned int i, __u64 gen, size_t at)
{
	if (holes && !gen)
		return 0;
	return cont_word(file.seed, cont_index(&file, i), gen, at);
}

/* Is each word of one of the generations lo to hi? */
static bool file_page_ok(const char *page, unsigned int i, __u64 lo, __u64 hi)
{
	size_t at;
	__u64 gen;

	for (at = CONT_STRIDE; at < file.page; at += CONT_STRIDE) {
		__u64 word = cont_load(page + at);

		for (gen = hi; gen > lo && file_word(i, gen, at) != word; gen--)
			;
		if (file_word(i, gen, at) != word)
			return false;
	}
	return true;
}

/* A look at page i of the file, which may be written just now. */
static bool file_look(const char *page, unsigned int i, __u64 *lo, __u64 *hi)
{
	__u64 words[65536 / CONT_STRIDE], gen;
	size_t at;

	*lo = __atomic_load_n(&ctl->published[i], __ATOMIC_ACQUIRE);
	for (at = CONT_STRIDE; at < file.page; at += CONT_STRIDE)
		words[at / CONT_STRIDE] = cont_load(page + at);
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	*hi = __atomic_load_n(&ctl->started[i], __ATOMIC_RELAXED);
	/* The writer may have gone far while we did not run. */
	if (*hi - *lo > MAX_GAP)
		return true;
	for (at = CONT_STRIDE; at < file.page; at += CONT_STRIDE) {
		for (gen = *hi; gen > *lo && file_word(i, gen, at) !=
		     words[at / CONT_STRIDE]; gen--)
			;
		if (file_word(i, gen, at) != words[at / CONT_STRIDE])
			return false;
	}
	return true;
}

/* ---- the child -------------------------------------------------------- */

/* Large folios of its own, mapped by PTEs. NULL if there are none to have. */
static char *child_own(__u64 seed)
{
	char *resv, *at;
	unsigned int i;

	/* Not in each child where that is much work. */
	if (file.pmd > MAX_THP || (file.pmd > (4UL << 20) && seed & 0x300))
		return NULL;
	resv = cont_reserve(2 * file.pmd);
	if (resv == MAP_FAILED)
		return NULL;
	at = cont_align_up(resv, file.pmd);
	if (mmap(at, file.pmd, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS |
		 MAP_FIXED | MAP_NORESERVE, -1, 0) != at)
		return NULL;
	madvise(at, file.pmd, MADV_HUGEPAGE);
	at += 2 * file.block;
	for (i = 0; i < file.nr_pages; i++)
		cont_page_fill(at + i * file.page, seed, i, 1);
	madvise(at, file.len, MADV_NOHUGEPAGE);
	return at;
}

struct unmapper {
	char *own;
	__u64 rand;
	int go;
};

/* Give memory back while the process exits; nobody uses it any more. */
static void *unmapper_main(void *arg)
{
	struct unmapper *u = arg;
	char *base[3] = { u->own, anon.addr, file.addr };

	__atomic_store_n(&u->go, 1, __ATOMIC_RELEASE);
	for (;;) {
		__u64 r = cont_rand(&u->rand);
		char *at = base[r % 3];
		unsigned int first = (r >> 8) % file.nr_pages;
		unsigned int nr = 1 + (r >> 32) % (2 * file.bpages);

		if (!at)
			continue;
		if (first + nr > file.nr_pages)
			nr = file.nr_pages - first;
		if (r & CONT_BIT(63))
			munmap(at + first * file.page, nr * file.page);
		else
			madvise(at + first * file.page, nr * file.page, MADV_DONTNEED);
	}
	return NULL;
}

/* The next generation of page i of the file. */
static bool child_store(unsigned int i)
{
	char *page = file.addr + i * file.page;
	__u64 lo = ctl->published[i], hi = ctl->started[i];

	if (!file_page_ok(page, i, lo, hi)) {
		child_bad("page %u of the file is not of generation %llu to %llu in child %d",
			  i, lo, hi, getpid());
		return false;
	}
	__atomic_store_n(&ctl->started[i], hi + 1, __ATOMIC_RELAXED);
	/* Whoever sees the new data sees that it was started. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
	cont_page_fill(page, file.seed, cont_index(&file, i), hi + 1);
	__atomic_store_n(&ctl->published[i], hi + 1, __ATOMIC_RELEASE);
	return true;
}

static bool child_anon_ok(unsigned int i, __u64 gen)
{
	if (cont_page_ok(anon.addr + i * anon.page, anon.seed, cont_index(&anon, i),
			 gen))
		return true;
	child_bad("anonymous page %u is not of generation %llu in child %d", i, gen,
		  getpid());
	return false;
}

/* What the children may have in the memory cgroup. */
static unsigned long memory_max(void)
{
	unsigned long max = 32UL << 20;

	return file.pmd <= MAX_THP && max < 3 * file.pmd ? 3 * file.pmd : max;
}

/* Use more memory than that. */
static void child_eat(void)
{
	size_t size = file.pmd > MAX_THP ? MAX_THP : file.pmd, eaten;
	char *resv, *at;

	for (eaten = 0; eaten < 4 * memory_max(); eaten += size) {
		resv = cont_reserve(2 * size);
		if (resv == MAP_FAILED)
			break;
		at = cont_align_up(resv, size);
		if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE |
			 MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != at)
			break;
		madvise(at, size, MADV_HUGEPAGE);
		memset(at, 1, size);
		madvise(at, size / 2, MADV_NOHUGEPAGE);
	}
	child_bad("child %d has %zu kB in a group for %lu kB", getpid(), eaten >> 10,
		  memory_max() >> 10);
	_exit(KSFT_FAIL);
}

/*
 * Store to the pages of driver id, all others being of other children, say so
 * after some of them by a byte to fd, and go on until killed, or exit.
 */
static void child_main(unsigned int id, __u64 rand, int fd, bool exits)
{
	unsigned int mine, nr, i, n;
	bool skip_anon = !anon.addr, stops;
	struct unmapper u = { 0 };
	__u64 seed = rand;
	pthread_t tid;
	char *own;

	cont_die_with(main_pid);
	if ((cur->what & (SWAP | OOM)) && cg_procs >= 0 &&
	    write(cg_procs, "0", 1) != 1)
		_exit(KSFT_FAIL);

	if ((cur->what & FORGET) &&
	    mmap(file.addr, file.len, file.prot, file.flags | MAP_FIXED, file.fd,
		 file.off) != file.addr) {
		child_bad("mmap of the file: %s", strerror(errno));
		_exit(KSFT_FAIL);
	}
	own = child_own(seed);
	__atomic_store_n(&ctl->own[id], own, __ATOMIC_RELEASE);
	/*
	 * Read first: for shmem, a store is then known to the PTE alone. A store
	 * that faults a page in makes the folio dirty right away.
	 */
	cont_touch(file.addr, file.len);
	if ((cur->what & FORGET) &&
	    !(cont_folio_flags(file.addr) & CONT_KPF_DIRTY))
		ctl->clean++;

	/* Copies of some of the pages that everybody has. */
	for (i = 0; !skip_anon && i < anon.nr_pages; i++)
		if (!child_anon_ok(i, 0))
			_exit(KSFT_FAIL);
	for (n = 0; !skip_anon && n < anon.bpages; n++) {
		i = cont_rand(&rand) % (anon.nr_pages / 2);
		cont_page_fill(anon.addr + i * anon.page, anon.seed,
			       cont_index(&anon, i), 1);
		if (!child_anon_ok(i, 1))
			_exit(KSFT_FAIL);
	}

	/*
	 * A single store that gets lost shows only if it is the only one: one
	 * that is not keeps the whole folio dirty.
	 */
	stops = (cur->what & UNMAP) || ((cur->what & FORGET) && (seed & 0x1000));
	mine = (file.nr_pages - id + nr_drivers - 1) / nr_drivers;
	nr = 1 + cont_rand(&rand) % (1 << cont_rand(&rand) % 8);
	for (n = 0; !exits || n < nr; n++) {
		if (n == nr) {
			if (cur->what & OOM)
				child_eat();
			if (write(fd, "", 1) != 1)
				_exit(KSFT_FAIL);
			if (stops)
				break;
		}
		if (!child_store(id + cont_rand(&rand) % mine * nr_drivers))
			_exit(KSFT_FAIL);
		i = cont_rand(&rand) % file.nr_pages;
		if (own && !cont_page_ok(own + i * file.page, seed, i, 1)) {
			child_bad("page %u of child %d is not what it was", i, getpid());
			_exit(KSFT_FAIL);
		}
	}
	if (cur->what & UNMAP) {
		u.own = own;
		u.rand = rand;
		if (!pthread_create(&tid, NULL, unmapper_main, &u))
			while (!__atomic_load_n(&u.go, __ATOMIC_ACQUIRE))
				sched_yield();
	}
	/* If it is to be killed, the kill decides when. */
	while (!exits)
		sched_yield();
	_exit(KSFT_PASS);
}

/* ---- its parent ------------------------------------------------------- */

static unsigned long forgotten, kept;

/*
 * How much of the file window has left the page cache? What shmem swaps out
 * stays in the swap cache for a while, where mincore() takes it for present.
 */
static void count_forgotten(const char *view, unsigned long swapped)
{
	static unsigned char vec[MAX_PAGES];
	unsigned int i, gone = 0;

	if (!mincore((void *)view, file.len, vec))
		for (i = 0; i < file.nr_pages; i++)
			gone += !(vec[i] & 1);
	if (file.src == CONT_SHMEM)
		gone = swapped < file.nr_pages ? swapped : file.nr_pages;
	forgotten += gone;
	kept += file.nr_pages - gone;
}

/* Nothing clean stays in the page cache. */
static bool forget(void)
{
	long long swapped = cont_vmstat("pswpout");
	char *at;
	int i;

	if (file.src == CONT_XFS) {
		if (fsync(file.fd)) {
			race_fail(&race, "fsync: %s", strerror(errno));
			return false;
		}
		posix_fadvise(file.fd, 0, 0, POSIX_FADV_DONTNEED);
	}
	at = mmap(file.addr, file.len, PROT_READ, MAP_SHARED | MAP_FIXED, file.fd,
		  file.off);
	if (at != file.addr) {
		race_fail(&race, "mmap of the file: %s", strerror(errno));
		return false;
	}
	/* The first round splits the huge page, and that unmaps it. */
	for (i = 0; file.src == CONT_SHMEM && i < 2; i++) {
		cont_touch(at, file.len);
		madvise(at, file.len, MADV_PAGEOUT);
	}
	count_forgotten(at, cont_vmstat("pswpout") - swapped);
	mmap(at, file.len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED |
	     MAP_NORESERVE, -1, 0);
	/* Large folios again, for the next child. */
	if (file.src == CONT_XFS)
		cont_read_ahead(&file, file.off + file.len);
	return true;
}

/* The pages of driver id are at rest, for its child is dead. */
static bool file_verify(unsigned int id)
{
	bool ok = true;
	unsigned int i;
	char *buf;

	if ((cur->what & FORGET) && !forget())
		return false;
	buf = malloc(file.page);
	for (i = id; buf && ok && i < file.nr_pages; i += nr_drivers) {
		__u64 lo = ctl->published[i], hi = ctl->started[i];

		if (pread(file.fd, buf, file.page, file.off + i * file.page) !=
		    (ssize_t)file.page) {
			race_fail(&race, "read of the file: %s", strerror(errno));
			ok = false;
		} else if (!file_page_ok(buf, i, lo, hi)) {
			race_fail(&race,
				  "page %u of the file is not of generation %llu to %llu: %s",
				  i, lo, hi, file_page_ok(buf, i, 0, hi) ?
				  "an older one" : "wrong data");
			ok = false;
		}
	}
	free(buf);
	if (!ok || !holes)
		return ok;
	/* The huge page was split. Start with a hole again. */
	if (fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
		      file.pmd)) {
		race_fail(&race, "punching a hole: %s", strerror(errno));
		return false;
	}
	memset(ctl->started, 0, sizeof(ctl->started));
	memset(ctl->published, 0, sizeof(ctl->published));
	return true;
}

static long rss_pages(int proc)
{
	char buf[64];
	long rss = -1;
	ssize_t n;
	int fd;

	fd = openat(proc, "statm", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	if (n <= 0)
		return -1;
	buf[n] = '\0';
	return sscanf(buf, "%*d %ld", &rss) == 1 ? rss : -1;
}

/*
 * The OOM killer gives its victim two seconds before the reaper comes. Hold the
 * victim at its exit, and let it go when the reaper has started.
 */
static bool oom_wait(pid_t pid, int proc, bool *reaped)
{
	long rss = -1, now;
	struct timespec ts;
	siginfo_t si;
	time_t end;
	int status;

	for (;;) {
		if (waitid(P_PID, pid, &si, WEXITED | WSTOPPED | WNOWAIT | __WALL)) {
			race_fail(&race, "waitid: %s", strerror(errno));
			return false;
		}
		if (si.si_code != CLD_TRAPPED && si.si_code != CLD_STOPPED)
			return true;
		waitpid(pid, &status, __WALL);
		if (status >> 8 == (SIGTRAP | (PTRACE_EVENT_EXIT << 8)))
			break;
		ptrace(PTRACE_CONT, pid, 0, WSTOPSIG(status));
	}
	clock_gettime(CLOCK_MONOTONIC, &ts);
	end = ts.tv_sec + REAPER_SECONDS;
	do {
		now = rss_pages(proc);
		if (rss >= 0 && now < rss) {
			*reaped = true;
			break;
		}
		rss = now;
		sched_yield();
		clock_gettime(CLOCK_MONOTONIC, &ts);
	} while (ts.tv_sec < end);
	ptrace(PTRACE_CONT, pid, 0, 0);
	return true;
}

static bool wait_for_child(int fd, int pidfd, bool *said)
{
	struct pollfd p[2] = {
		{ .fd = fd, .events = POLLIN },
		{ .fd = pidfd, .events = POLLIN },
	};

	if (poll(p, 2, PATIENCE_MS) <= 0) {
		race_fail(&race, "a child hangs");
		return false;
	}
	*said = p[0].revents & POLLIN;
	return true;
}

static unsigned long oom_kills, oom_races;

/* A child from its birth to its death. */
static bool driver_cycle(struct race_thread *t)
{
	struct slot *slot = &slots[t->id];
	__u64 rand = cont_rand(&t->rand);
	bool exits = (rand & 3) == 0 && !(cur->what & OOM);
	bool said = false, ok = true, reaped = false;
	siginfo_t si = { .si_pid = 0 };
	int pipefd[2], pidfd, proc;
	char path[32];
	pid_t pid;

	if (pipe2(pipefd, O_CLOEXEC)) {
		race_fail(&race, "pipe: %s", strerror(errno));
		return false;
	}
	ctl->own[t->id] = NULL;
	pid = fork();
	if (!pid)
		child_main(t->id, rand, pipefd[1], exits);
	close(pipefd[1]);
	if (pid < 0) {
		race_fail(&race, "fork: %s", strerror(errno));
		close(pipefd[0]);
		return false;
	}
	snprintf(path, sizeof(path), "/proc/%d", pid);
	proc = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	pidfd = syscall(__NR_pidfd_open, pid, 0);
	if ((cur->what & OOM) &&
	    ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACEEXIT | PTRACE_O_EXITKILL)) {
		race_fail(&race, "PTRACE_SEIZE: %s", strerror(errno));
		ok = false;
	}
	pthread_rwlock_wrlock(&slot->lock);
	slot->pid = pid;
	slot->pidfd = pidfd;
	slot->proc = proc;
	pthread_rwlock_unlock(&slot->lock);

	if (ok && (cur->what & OOM))
		ok = oom_wait(pid, proc, &reaped);
	else if (ok)
		ok = wait_for_child(pipefd[0], pidfd, &said);
	if (!ok || (said && !exits)) {
		kill(pid, SIGKILL);
		if ((cur->what & MRELEASE) && (rand & 4))
			syscall(__NR_process_mrelease, pidfd, 0);
	}
	/* Until it is waited for, nobody else gets its number. */
	if (waitid(P_PID, pid, &si, WEXITED | WNOWAIT | __WALL))
		race_fail(&race, "waitid: %s", strerror(errno));
	pthread_rwlock_wrlock(&slot->lock);
	slot->pid = 0;
	pthread_rwlock_unlock(&slot->lock);
	waitpid(pid, NULL, __WALL);
	close(pipefd[0]);
	close(pidfd);
	close(proc);
	if (!ok || child_was_bad())
		return false;

	if (cur->what & OOM) {
		if (si.si_code != CLD_KILLED || si.si_status != SIGKILL) {
			race_fail(&race, "child was not OOM killed (code %d, status %d)",
				  si.si_code, si.si_status);
			return false;
		}
		oom_kills++;
		oom_races += reaped;
	} else if (exits ? si.si_code != CLD_EXITED || si.si_status :
		   si.si_code != CLD_KILLED || si.si_status != SIGKILL) {
		race_fail(&race, "child died of something else (code %d, status %d)",
			  si.si_code, si.si_status);
		return false;
	}
	return file_verify(t->id);
}

static void driver(struct race_thread *t)
{
	/* Once even if time was up before this thread came to run. */
	while (driver_cycle(t)) {
		t->steps++;
		if (!race_on(&race))
			break;
	}
}

/* ---- those who disturb ------------------------------------------------ */

static void write_at(int dir, const char *name, const char *str)
{
	int fd = openat(dir, name, O_WRONLY | O_CLOEXEC);

	/* The process may be gone. */
	if (fd >= 0) {
		if (write(fd, str, strlen(str)) < 0)
			errno = 0;
		close(fd);
	}
}

/* Some run of pages that the child has. NULL if it is not that far yet. */
static char *some_pages(unsigned int id, __u64 r, unsigned int *nr)
{
	char *base[3] = {
		__atomic_load_n(&ctl->own[id], __ATOMIC_ACQUIRE), anon.addr, file.addr
	};
	unsigned int first = r % file.nr_pages;

	*nr = 1 + (r >> 16) % (2 * file.bpages);
	if (first + *nr > file.nr_pages)
		*nr = file.nr_pages - first;
	if (!base[(r >> 32) % 3])
		return NULL;
	return base[(r >> 32) % 3] + first * file.page;
}

static void touch_refs(struct slot *slot, unsigned int id, __u64 r)
{
	unsigned int nr, i;
	__u64 ent[256], word;
	int pm, fd;
	char *at;

	if (r & CONT_BIT(40)) {
		write_at(slot->proc, "clear_refs", "1");
		return;
	}
	at = some_pages(id, r, &nr);
	pm = openat(slot->proc, "pagemap", O_RDONLY | O_CLOEXEC);
	fd = open("/sys/kernel/mm/page_idle/bitmap", O_RDWR | O_CLOEXEC);
	if (at && pm >= 0 && fd >= 0 &&
	    pread(pm, ent, nr * 8, (uintptr_t)at / file.page * 8) == (ssize_t)nr * 8) {
		for (i = 0; i < nr; i++) {
			off_t off = CONT_PM_PFN(ent[i]) / 64 * 8;

			if (!(ent[i] & CONT_PM_PRESENT))
				continue;
			word = CONT_BIT(CONT_PM_PFN(ent[i]) % 64);
			/* Setting the bit clears the entries' access bits, and so
			 * does looking at it.
			 */
			if (pwrite(fd, &word, 8, off) != 8 ||
			    pread(fd, &word, 8, off) != 8)
				break;
		}
	}
	if (pm >= 0)
		close(pm);
	if (fd >= 0)
		close(fd);
}

static void migrate(struct slot *slot, unsigned int id, __u64 r)
{
	unsigned long all = 3, node = 1UL << (r >> 48 & 1);
	void *addr[256];
	int node_of[256], status[256];
	unsigned int nr, i;
	char *at;

	switch (r >> 41 & 31) {
	case 0:
		cont_write_str("/proc/sys/vm/compact_memory", "1");
		return;
	case 1 ... 4:
		syscall(__NR_migrate_pages, slot->pid, 8 * sizeof(all), &all, &node);
		return;
	case 5 ... 8:
		/* MPOL_BIND with MPOL_MF_MOVE_ALL, and MPOL_LOCAL again */
		if (!anon.addr || anon.pmd > MAX_THP)
			return;
		syscall(__NR_mbind, anon.addr, anon.len, 2, &node, 8 * sizeof(node), 4);
		syscall(__NR_mbind, anon.addr, anon.len, CONT_MPOL_LOCAL, NULL, 0, 0);
		return;
	}
	at = some_pages(id, r, &nr);
	if (!at || (anon.pmd > MAX_THP && at < anon.addr + anon.len && at >= anon.addr))
		return;
	/* The whole folio goes along with any one of its pages. */
	nr = nr > 8 ? 8 : nr;
	for (i = 0; i < nr; i++) {
		addr[i] = at + i * file.page;
		node_of[i] = r >> 48 & 1;
	}
	syscall(__NR_move_pages, slot->pid, nr, addr, node_of, status, 4);
}

static void swap_out(struct slot *slot, unsigned int id, __u64 r)
{
	struct iovec iov;
	unsigned int nr;
	char path[200];

	if ((r >> 40 & 3) == 0 && cg_dir[0]) {
		snprintf(path, sizeof(path), "%s/memory.reclaim", cg_dir);
		cont_write_str(path, "1M");
		return;
	}
	iov.iov_base = some_pages(id, r, &nr);
	iov.iov_len = nr * file.page;
	if (!iov.iov_base)
		return;
	if (r & CONT_BIT(42))
		syscall(__NR_process_madvise, slot->pidfd, &iov, 1, MADV_PAGEOUT, 0);
	else if (iov.iov_base >= (void *)file.addr &&
		 iov.iov_base < (void *)(file.addr + file.len))
		madvise(iov.iov_base, iov.iov_len, MADV_PAGEOUT);
}

static void disturber(struct race_thread *t)
{
	while (race_on(&race)) {
		__u64 r = cont_rand(&t->rand);
		unsigned int id = (r >> 52) % nr_drivers;
		struct slot *slot = &slots[id];
		unsigned int what = cur->what &
			(MRELEASE | REFS | MIGRATE | SWAP | SYNC);
		unsigned int n = __builtin_popcount(what) ? (r >> 57) %
			__builtin_popcount(what) : 0;

		/* one of those that the case has */
		while (n--)
			what &= what - 1;
		what &= -what;

		pthread_rwlock_rdlock(&slot->lock);
		if (slot->pid) {
			if (what == MRELEASE)
				syscall(__NR_process_mrelease, slot->pidfd, 0);
			else if (what == REFS)
				touch_refs(slot, id, r);
			else if (what == MIGRATE)
				migrate(slot, id, r);
			else if (what == SWAP)
				swap_out(slot, id, r);
			else if (what == SYNC)
				fdatasync(file.fd);
		}
		pthread_rwlock_unlock(&slot->lock);
		rest(r >> 4, 200);
		t->steps++;
	}
}

/*
 * Threads of a real-time class that wake up again and again make the kernel want
 * to reschedule, in the middle of whatever the CPU does.
 */
static void hog(struct race_thread *t)
{
	struct sched_param sp = { .sched_priority = 1 };
	unsigned long cpu = (unsigned long)t->arg;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set) ||
	    sched_setscheduler(0, SCHED_FIFO, &sp))
		return;
	while (race_on(&race)) {
		rest(cont_rand(&t->rand), 500);
		t->steps++;
	}
}

/* ---- those whose memory must not change ------------------------------- */

/* One look at everything. False: *i is wrong, in the anonymous memory or not. */
static bool survivor_look(unsigned int *i, bool *in_anon, __u64 *lo, __u64 *hi)
{
	*in_anon = true;
	*lo = *hi = 0;
	for (*i = 0; anon.addr && *i < anon.nr_pages; ++*i)
		if (!cont_page_ok(anon.addr + *i * anon.page, anon.seed,
				  cont_index(&anon, *i), 0))
			return false;
	*in_anon = false;
	if (cur->what & FORGET)
		return true;
	for (*i = 0; *i < file.nr_pages; ++*i)
		if (!file_look(file.addr + *i * file.page, *i, lo, hi))
			return false;
	return true;
}

static void watcher(struct race_thread *t)
{
	unsigned int i;
	bool in_anon;
	__u64 lo, hi;

	while (race_on(&race) && !child_was_bad()) {
		if (!survivor_look(&i, &in_anon, &lo, &hi))
			race_fail(&race,
				  "%s page %u changed here (generation %llu to %llu)",
				  in_anon ? "anonymous" : "file", i, lo, hi);
		rest(cont_rand(&t->rand), 5000);
		t->steps++;
	}
}

static void survivor(void)
{
	__u64 rand = race.seed;
	unsigned int i;
	bool in_anon;
	__u64 lo, hi;

	cont_die_with(main_pid);
	while (!__atomic_load_n(&ctl->stop, __ATOMIC_ACQUIRE)) {
		if (!survivor_look(&i, &in_anon, &lo, &hi)) {
			child_bad("%s page %u changed under who survives (generation %llu to %llu)",
				  in_anon ? "anonymous" : "file", i, lo, hi);
			_exit(KSFT_FAIL);
		}
		rest(cont_rand(&rand), 5000);
	}
	_exit(KSFT_PASS);
}

/* ---- memory cgroup ---------------------------------------------------- */

static bool cg_write(const char *dir, const char *name, const char *str)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return cont_write_str(path, str);
}

static bool cg_has(const char *name, const char *word)
{
	char path[256], buf[256], *tok, *save;

	snprintf(path, sizeof(path), "%s/%s", cg_root, name);
	if (!cont_read_str(path, buf, sizeof(buf)))
		return false;
	for (tok = strtok_r(buf, " ", &save); tok; tok = strtok_r(NULL, " ", &save))
		if (!strcmp(tok, word))
			return true;
	return false;
}

static void cg_restore(void)
{
	if (getpid() != main_pid)
		return;
	if (cg_procs >= 0)
		close(cg_procs);
	if (cg_dir[0])
		rmdir(cg_dir);
	if (cg_enabled)
		cg_write(cg_root, "cgroup.subtree_control", "-memory");
	if (cg_mounted) {
		umount(cg_root);
		rmdir(cg_root);
	}
	cg_procs = -1;
	cg_dir[0] = '\0';
	cg_enabled = false;
	cg_mounted = false;
}

/* A group for children. Without one, cg_dir is empty. */
static void cg_make(void)
{
	char line[512], dir[96], type[32], path[200];
	FILE *f = fopen("/proc/self/mounts", "re");

	while (f && !cg_root[0] && fgets(line, sizeof(line), f))
		if (sscanf(line, "%*s %95s %31s", dir, type) == 2 &&
		    !strcmp(type, "cgroup2"))
			strcpy(cg_root, dir);
	if (f)
		fclose(f);
	if (!cg_root[0]) {
		strcpy(cg_root, "/tmp/teardown_race.XXXXXX");
		if (!mkdtemp(cg_root)) {
			strcpy(cg_root, "/teardown_race.XXXXXX");
			if (!mkdtemp(cg_root))
				return;
		}
		if (mount("none", cg_root, "cgroup2", 0, NULL)) {
			rmdir(cg_root);
			return;
		}
		cg_mounted = true;
	}
	if (!cg_has("cgroup.controllers", "memory"))
		return;
	if (!cg_has("cgroup.subtree_control", "memory")) {
		if (!cg_write(cg_root, "cgroup.subtree_control", "+memory"))
			return;
		cg_enabled = true;
	}
	snprintf(cg_dir, sizeof(cg_dir), "%s/teardown_race.%d", cg_root, getpid());
	if (mkdir(cg_dir, 0700)) {
		cg_dir[0] = '\0';
		return;
	}
	snprintf(path, sizeof(path), "%s/cgroup.procs", cg_dir);
	cg_procs = open(path, O_WRONLY | O_CLOEXEC);
}

/* ---- cases ------------------------------------------------------------ */

static bool has_swap(void)
{
	char line[256];
	int lines = 0;
	FILE *f;

	f = fopen("/proc/swaps", "re");
	while (f && fgets(line, sizeof(line), f))
		lines++;
	if (f)
		fclose(f);
	return lines > 1;
}

/* Why the case cannot run; NULL if it can. */
static const char *cannot_run(void)
{
	unsigned int what = cur->what;

	if (what & OOM) {
		if (cg_procs < 0)
			return "no memory controller in cgroup v2";
		return NULL;
	}
	if ((what & SWAP) && !has_swap())
		return "no swap is on";
	if ((what & FORGET) && cur->src == CONT_SHMEM && !has_swap())
		return "no swap is on, shmem cannot be thrown out";
	if ((what & MIGRATE) && access("/sys/devices/system/node/node1", F_OK))
		return "there is one node only";
	if (what == MRELEASE &&
	    syscall(__NR_process_mrelease, -1, 0) && errno == ENOSYS)
		return "kernel has no process_mrelease()";
	if (what == REFS && access("/sys/kernel/mm/page_idle/bitmap", W_OK) &&
	    access("/proc/self/clear_refs", W_OK))
		return "neither page_idle nor clear_refs is there";
	return NULL;
}

/* Each child looks at all of it: not too much where blocks are large. */
static unsigned int nr_blocks(void)
{
	return cont_size() > (1UL << 20) ? MAX_BLOCKS / 2 : MAX_BLOCKS;
}

static int file_make(void)
{
	static const enum cont_source srcs[] = { CONT_SHMEM, CONT_XFS };
	int ret = cont_map_make(&file, cur->src, nr_blocks());
	unsigned int i;

	for (i = 0; ret && !(cur->what & FORGET) && i < 2; i++)
		if (srcs[i] != cur->src)
			ret = cont_map_make(&file, srcs[i], nr_blocks());
	return ret;
}

/* Without it the children can be the only ones that have the file mapped. */
static bool file_unmap(void)
{
	if (mmap(file.addr, file.len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS |
		 MAP_FIXED | MAP_NORESERVE, -1, 0) != file.addr)
		return false;
	if (file.src != CONT_SHMEM)
		return true;
	/* What write(2) has put there is dirty for good. */
	holes = true;
	return !fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
			  file.pmd);
}

static void limit_memory(void)
{
	char buf[32];

	snprintf(buf, sizeof(buf), "%lu", memory_max());
	cg_write(cg_dir, "memory.max", buf);
	cg_write(cg_dir, "memory.swap.max", "0");
}

static void run_case(const cpu_set_t *cpus)
{
	static struct race_thread t[RACE_MAX_THREADS + MAX_CPUS + 1];
	unsigned int nr = 0, i, others = 0;
	long long folds = cont_vmstat("contpte_fold");
	unsigned long steps[4] = { 0 };
	const char *why = cannot_run();
	pid_t pid;
	int ret;

	if (why) {
		ksft_test_result_skip("%s: %s\n", cur->name, why);
		return;
	}
	holes = false;
	ret = file_make();
	if (ret || (cur->what & FORGET && !file_unmap())) {
		why = ret ? file.why : strerror(errno);
		if (ret == CONT_MAKE_SKIP) {
			ksft_test_result_skip("%s: %s\n", cur->name, why);
		} else {
			ksft_print_msg("%s\n", why);
			ksft_test_result_fail("%s\n", cur->name);
		}
		cont_map_free(&file);
		return;
	}
	memset(ctl, 0, sizeof(*ctl));
	forgotten = 0;
	kept = 0;
	nr_drivers = race.threads / 2;
	/* What is to be thrown out must not be mapped by others. */
	if (cur->what & (FORGET | OOM))
		nr_drivers = 1;
	if (cur->what & OOM)
		limit_memory();

	pid = cont_fork();
	if (!pid)
		survivor();
	if (pid < 0)
		ksft_exit_fail_msg("fork: %s\n", strerror(errno));

	memset(t, 0, sizeof(t));
	for (; nr < nr_drivers; nr++)
		t[nr].fn = driver;
	if (!(cur->what & OOM))
		for (others = race.threads - nr_drivers, i = 0; i < others; i++)
			t[nr++].fn = disturber;
	t[nr++].fn = watcher;
	for (i = 0; i < MAX_CPUS; i++)
		if (CPU_ISSET(i, cpus)) {
			t[nr].arg = (void *)(unsigned long)i;
			t[nr++].fn = hog;
		}
	race_run(&race, t, nr, NULL);

	__atomic_store_n(&ctl->stop, 1, __ATOMIC_RELEASE);
	if (cont_wait(pid))
		race_fail(&race, "%s", ctl->bad == 2 ? ctl->why :
			  "the survivor did not survive");
	if (cur->what & OOM) {
		cg_write(cg_dir, "memory.max", "max");
		cg_write(cg_dir, "memory.swap.max", "max");
		ksft_print_msg("%lu OOM kills, %lu with the reaper at work\n", oom_kills,
			       oom_races);
	}
	for (i = 0; i < nr; i++)
		steps[t[i].fn == driver ? 0 : t[i].fn == disturber ? 1 :
		      t[i].fn == watcher ? 2 : 3] += t[i].steps;
	ksft_print_msg("%lu children died, %lu disturbances, %lu looks, %lu wake-ups\n",
		       steps[0], steps[1], steps[2], steps[3]);
	if (folds >= 0)
		ksft_print_msg("%lld blocks were folded\n",
			       cont_vmstat("contpte_fold") - folds);
	if (cur->what & FORGET)
		ksft_print_msg("%lu pages thrown out, %lu stayed, %u children found none dirty\n",
			       forgotten, kept, ctl->clean);
	if ((cur->what & FORGET) && (!forgotten || !ctl->clean) && !race.failed)
		ksft_test_result_skip("%s: the page cache keeps everything, or all is dirty\n",
				      cur->name);
	else
		race_result(&race, cur->name);
	cont_map_free(&file);
}

int main(int argc, char **argv)
{
	pthread_rwlockattr_t attr;
	cpu_set_t cpus;
	unsigned int i;

	race_options(&race, argc, argv, 1, 4);
	main_pid = getpid();
	if (geteuid())
		ksft_exit_skip("needs root\n");
	if (!cont_pmd_size())
		ksft_exit_skip("kernel has no THP\n");
	ctl = race_shared(sizeof(*ctl));
	if (sched_getaffinity(0, sizeof(cpus), &cpus))
		ksft_exit_fail_msg("set-up: %s\n", strerror(errno));
	cont_on_fault(on_fault);
	/* Threads that look at a child must not keep it from being buried. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr,
				      PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	for (i = 0; i < MAX_DRIVERS; i++)
		pthread_rwlock_init(&slots[i].lock, &attr);

	ksft_set_plan(ARRAY_SIZE(tests));
	if (cont_map_make(&anon, CONT_ANON, nr_blocks()))
		ksft_print_msg("no anonymous memory to share: %s\n", anon.why);
	cg_make();
	atexit(cg_restore);
	for (i = 0; i < ARRAY_SIZE(tests); i++) {
		cur = &tests[i];
		run_case(&cpus);
	}
	cur = NULL;
	cont_map_free(&anon);
	/* Not every version of this sets the exit status by itself. */
	if (ksft_get_fail_cnt())
		ksft_exit_fail();
	ksft_exit_pass();
}
