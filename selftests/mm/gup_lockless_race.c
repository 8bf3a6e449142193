// SPDX-License-Identifier: GPL-2.0-only
/*
 * Those who read page tables without a lock, against folding and teardown.
 *
 * GUP-fast and perf walk the page table with nothing but interrupts disabled.
 * They may meet a block in the middle of being folded, unfolded, moved or zapped,
 * and must take either what was there or what will be, or look again.
 *
 * Half of the threads, the owners, have pages in every block and hand them to a
 * lockless reader.  The others, the disturbers, do to whole blocks and to parts of
 * them whatever folds, unfolds and zaps, and leaves contents alone or destroys
 * them in a way that the owner is told of.
 *
 * Claim: a page that GUP-fast took is the page that was mapped there when it
 * did, and stays so until it is released; a call fails only where there was
 * nothing that could be accessed; perf reports the physical address that the
 * page has, or none.
 *
 * Oracle: every page carries owner, index and generation.  A spliced page is read
 * back from the pipe and must hold the generation that was there at the splice,
 * or, for as long as it is mapped, what the owner wrote later.  Direct I/O is
 * compared with the other side of it.  gup_test must take every page it was asked
 * for.  Physical addresses are compared with pagemap of before.
 *
 * Not claimed: what 6.1 does not promise.  Direct I/O takes plain references there,
 * which fork() of private memory does not respect, so these do not meet.
 *
 * Breaks on: a lockless read that puts together an address and flags of
 * different entries, or takes a cleared entry for a mapped one; a reference to a
 * page that was freed; pages that come back after a block was zapped; references
 * that stop a folded block from being taken as a whole (gup_test fails).
 *
 * Options: see race_util.h.  Every other thread is an owner.
 */
#include "contpte_util.h"
#include "race_util.h"

#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <linux/hw_breakpoint.h>
#include <linux/perf_event.h>

#define NR_BLOCKS	6
#define MAX_PAGES	(NR_BLOCKS * 128)
/* Pages that an owner hands over at once. */
#define MAX_RUN		8
#define NOWHERE		(~0U)
#define HANG_SECONDS	180

#define RING_PAGES	8

/* What disturbers do. */
enum op {
	/* accesses go on as if nothing happened */
	OP_TOUCH,		/* write a word that no owner looks at */
	OP_EXEC,		/* mprotect to executable and back */
	OP_CLEAR_REFS,
	OP_SYNC,		/* makes file pages clean and read-only */
	OP_ZAP_FILE,		/* MADV_DONTNEED */
	OP_MAP_FILE,		/* the same pages, mapped over */
	OP_FORK,
	OP_PAGEOUT,
	/* until it is done accesses may fail */
	OP_READ_ONLY,
	OP_MOVE,		/* mremap away and back */
	/* contents become zero */
	OP_DISCARD,		/* MADV_DONTNEED of anonymous memory */
	OP_RENEW,		/* the whole THP */
	NR_OPS,
};

#define ANON_OPS	(CONT_BIT(OP_DISCARD) | CONT_BIT(OP_RENEW))
#define FILE_OPS	(CONT_BIT(OP_SYNC) | CONT_BIT(OP_ZAP_FILE) | CONT_BIT(OP_MAP_FILE))

/* How often, of a sum of whatever remains. */
static const unsigned char op_weight[NR_OPS] = {
	[OP_TOUCH]	= 20,
	[OP_EXEC]	= 30,
	[OP_CLEAR_REFS]	= 4,
	[OP_SYNC]	= 4,
	[OP_ZAP_FILE]	= 16,
	[OP_MAP_FILE]	= 8,
	[OP_FORK]	= 4,
	[OP_PAGEOUT]	= 1,
	[OP_READ_ONLY]	= 12,
	[OP_MOVE]	= 12,
	[OP_DISCARD]	= 6,
	[OP_RENEW]	= 3,
};

enum kind {
	SPLICE,
	DIRECT,
	GUP_TEST,
	PERF,
	NR_KINDS,
};

static const char * const kind_name[NR_KINDS] = {
	[SPLICE]	= "vmsplice",
	[DIRECT]	= "direct I/O",
	[GUP_TEST]	= "gup_test",
	[PERF]		= "perf",
};

static const enum cont_source sources[] = { CONT_ANON, CONT_SHMEM, CONT_XFS };
static const char * const source_name[] = { "anon", "shmem", "xfs" };

struct world {
	enum kind kind;
	struct cont_map m;
	bool shared;
	unsigned int ops;		/* bit n: op n may be done */
	unsigned int nr_owners;
	char *spare[RACE_MAX_THREADS];	/* to move to */
	/*
	 * Held for reading by who touches the memory, or does something to it
	 * that does no harm to that; for writing by who makes accesses fail.
	 */
	pthread_rwlock_t lock;
	unsigned long gone;		/* odd: accesses may fail */
	unsigned int ready;		/* owners that are */
	unsigned int discards[MAX_PAGES]; /* of the page so far */
	__u64 gen[MAX_PAGES];		/* known to the owner */
	__u64 pfn[MAX_PAGES];		/* PERF: where the pages are and stay */
	/* for the report */
	unsigned long nr_calls;		/* PERF: samples in the window */
	unsigned long nr_done;		/* that were complete; PERF: had an address */
};

static struct world world;
static struct race race;

/* ---- faults that must not be ------------------------------------------ */

static __thread struct {
	sigjmp_buf env;
	struct race_thread *t;
	bool locked;
} self;

static void on_fault(int sig, siginfo_t *info, void *context)
{
	static const char msg[] = "Bail out! fault in the main thread or a child\n";
	struct world *w = &world;

	(void)context;
	if (self.t) {
		race_fail(&race, "%s (thread %u) got signal %d at %p, window + %#lx",
			  self.t->id % 2 ? "disturber" : "owner", self.t->id, sig,
			  info->si_addr, (long)((char *)info->si_addr - w->m.addr));
		siglongjmp(self.env, 1);
	}
	_exit(write(STDOUT_FILENO, msg, sizeof(msg) - 1) < 0 ? sig : KSFT_FAIL);
}

static void on_alarm(int sig)
{
	static const char msg[] = "Bail out! a thread does not come to an end\n";

	_exit(write(STDOUT_FILENO, msg, sizeof(msg) - 1) < 0 ? sig : KSFT_FAIL);
}

static void lock_shared(struct world *w)
{
	pthread_rwlock_rdlock(&w->lock);
	self.locked = true;
}

static void lock_exclusive(struct world *w)
{
	pthread_rwlock_wrlock(&w->lock);
	self.locked = true;
}

static void unlock(struct world *w)
{
	self.locked = false;
	pthread_rwlock_unlock(&w->lock);
}

/* ---- what a page may hold --------------------------------------------- */

static char *page_addr(struct world *w, unsigned int page)
{
	return w->m.addr + page * w->m.page;
}

static unsigned int discards(struct world *w, unsigned int page)
{
	return __atomic_load_n(&w->discards[page], __ATOMIC_ACQUIRE);
}

struct allowed {
	__u64 gen;		/* this generation, or */
	__u64 later;		/* that one, if it is not 0, or */
	bool zero;
};

/* Word by word: the owner may have been writing when the page became another. */
static bool page_allowed(struct world *w, const char *at, unsigned int page,
			 const struct allowed *a, const char *what)
{
	size_t off;
	__u64 val;

	for (off = CONT_STRIDE; off < w->m.page; off += CONT_STRIDE) {
		val = cont_load(at + off);
		if (val == cont_word(w->m.seed, page, a->gen, off) ||
		    (a->later && val == cont_word(w->m.seed, page, a->later, off)) ||
		    (a->zero && !val))
			continue;
		race_fail(&race, "%s: page %u (%u of block) + %zu: %#llx, not generation %llu%s%s",
			  what, page, page % w->m.bpages, off, val, a->gen,
			  a->later ? " or the next" : "", a->zero ? " or zero" : "");
		return false;
	}
	return true;
}

/* Some pages of one owner. */
struct run {
	unsigned int first;
	unsigned int nr;
	unsigned int discards[MAX_RUN];	/* when it was written */
};

static void choose_run(struct world *w, struct race_thread *t, struct run *r)
{
	unsigned int own = w->m.bpages / w->nr_owners, skip;

	skip = cont_rand(&t->rand) % own;
	r->nr = 1 + cont_rand(&t->rand) % (own - skip);
	if (r->nr > MAX_RUN)
		r->nr = MAX_RUN;
	r->first = cont_rand(&t->rand) % w->m.nr_blocks * w->m.bpages +
		   t->id / 2 * own + skip;
}

/* Write the next generation. */
static void write_run(struct world *w, struct run *r)
{
	unsigned int i, page;

	lock_shared(w);
	for (i = 0; i < r->nr; i++) {
		page = r->first + i;
		r->discards[i] = discards(w, page);
		w->gen[page]++;
		cont_page_fill(page_addr(w, page), w->m.seed, page, w->gen[page]);
	}
	unlock(w);
}

/* It may have become zero since it was written. */
static bool discarded(struct world *w, struct run *r, unsigned int i)
{
	return discards(w, r->first + i) != r->discards[i];
}

static bool check_memory(struct world *w, struct run *r)
{
	struct allowed a = {};
	unsigned int i, page;
	bool ok = true;

	lock_shared(w);
	for (i = 0; ok && i < r->nr; i++) {
		page = r->first + i;
		a.gen = w->gen[page];
		a.zero = discarded(w, r, i);
		ok = page_allowed(w, page_addr(w, page), page, &a, "memory");
	}
	unlock(w);
	return ok;
}

/* ---- calls that may meet memory which cannot be accessed --------------- */

static unsigned long gone(struct world *w)
{
	return __atomic_load_n(&w->gone, __ATOMIC_SEQ_CST);
}

/*
 * Was everything transferred?  Part of it, or EFAULT, will do only when there
 * were moments since "before" at which the memory could not be accessed.
 */
static bool complete(struct world *w, ssize_t n, size_t want, unsigned long before,
		     const char *call)
{
	int err = errno;

	__atomic_add_fetch(&w->nr_calls, 1, __ATOMIC_RELAXED);
	if (n == (ssize_t)want) {
		__atomic_add_fetch(&w->nr_done, 1, __ATOMIC_RELAXED);
		return true;
	}
	if (((before & 1) || gone(w) != before) && (n >= 0 || err == EFAULT))
		return false;
	race_fail(&race, "%s returned %zd of %zu: %s", call, n, want,
		  n < 0 ? strerror(err) : "nothing was in its way");
	return false;
}

/* From now on this owner maps nothing any more: it could fall into a hole. */
static void set_ready(struct world *w)
{
	__atomic_add_fetch(&w->ready, 1, __ATOMIC_RELEASE);
}

/* ---- owners: vmsplice ------------------------------------------------- */

static bool read_back(struct world *w, struct run *r, int fd, size_t len,
		      const struct allowed *a, char *buf)
{
	struct allowed page;
	unsigned int i;
	size_t done;
	ssize_t n;

	for (done = 0; done < len; done += n) {
		n = read(fd, buf + done, len - done);
		if (n <= 0) {
			race_fail(&race, "read from the pipe: %s",
				  n ? strerror(errno) : "end of file");
			return false;
		}
	}
	for (i = 0; i < len / w->m.page; i++) {
		page = a[i];
		page.zero |= discarded(w, r, i);
		if (!page_allowed(w, buf + i * w->m.page, r->first + i, &page, "pipe"))
			return false;
	}
	return true;
}

static bool splice_step(struct world *w, struct race_thread *t, int *pipe, char *buf)
{
	struct allowed allowed[MAX_RUN] = {};
	struct run r, before;
	unsigned long seq;
	struct iovec iov;
	unsigned int i;
	ssize_t n;

	choose_run(w, t, &r);
	write_run(w, &r);
	iov.iov_base = page_addr(w, r.first);
	iov.iov_len = r.nr * w->m.page;
	for (i = 0; i < r.nr; i++)
		allowed[i].gen = w->gen[r.first + i];

	seq = gone(w);
	n = vmsplice(pipe[1], &iov, 1, 0);
	complete(w, n, iov.iov_len, seq, "vmsplice");
	if (race.failed || n <= 0)
		return !race.failed;

	before = r;
	switch (cont_rand(&t->rand) % 3) {
	case 0:
		break;
	case 1:
		/* Seen through the pipe as long as it is the same page. */
		write_run(w, &r);
		for (i = 0; i < r.nr; i++) {
			if (w->shared)
				allowed[i].gen = w->gen[r.first + i];
			else
				allowed[i].later = w->gen[r.first + i];
		}
		break;
	case 2:
		/* The page is the pipe's alone then, if it was private. */
		lock_shared(w);
		if (madvise(iov.iov_base, iov.iov_len, MADV_DONTNEED))
			race_fail(&race, "MADV_DONTNEED: %s", strerror(errno));
		unlock(w);
		if (race.failed)
			return false;
		write_run(w, &r);
		for (i = 0; i < r.nr && w->shared; i++)
			allowed[i].gen = w->gen[r.first + i];
		break;
	}
	return read_back(w, &before, pipe[0], n, allowed, buf) && check_memory(w, &r);
}

static void splice_loop(struct world *w, struct race_thread *t)
{
	char *buf = t->arg;
	int fds[2];

	if (pipe2(fds, O_CLOEXEC)) {
		race_fail(&race, "pipe: %s", strerror(errno));
		return;
	}
	while (race_on(&race) && splice_step(w, t, fds, buf))
		t->steps++;
	close(fds[0]);
	close(fds[1]);
}

/* ---- owners: direct I/O ------------------------------------------------ */

/* A file for direct I/O without a name, or -1. */
static int open_direct(void)
{
	int fd = cont_open_xfs(), direct;
	char path[64];

	if (fd < 0)
		return -1;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	close(fd);
	return direct;
}

/* buf, which nobody disturbs, from or to the file. */
static bool buffer_io(int fd, char *buf, size_t len, bool to_file)
{
	ssize_t n = to_file ? pwrite(fd, buf, len, 0) : pread(fd, buf, len, 0);

	if (n == (ssize_t)len)
		return true;
	race_fail(&race, "direct I/O of a private buffer: %zd of %zu, %s", n, len,
		  strerror(errno));
	return false;
}

/* Memory to file. */
static bool direct_write(struct world *w, struct run *r, int fd, char *buf)
{
	size_t len = r->nr * w->m.page;
	struct allowed a = {};
	unsigned long seq;
	unsigned int i;

	write_run(w, r);
	seq = gone(w);
	if (!complete(w, pwrite(fd, page_addr(w, r->first), len, 0), len, seq,
		      "direct write"))
		return !race.failed;
	memset(buf, 0xff, len);
	if (!buffer_io(fd, buf, len, false))
		return false;
	for (i = 0; i < r->nr; i++) {
		a.gen = w->gen[r->first + i];
		a.zero = discarded(w, r, i);
		if (!page_allowed(w, buf + i * w->m.page, r->first + i, &a, "file"))
			return false;
	}
	return true;
}

/* File to memory. */
static bool direct_read(struct world *w, struct run *r, int fd, char *buf)
{
	size_t len = r->nr * w->m.page;
	unsigned int i, page;
	unsigned long seq;

	for (i = 0; i < r->nr; i++) {
		page = r->first + i;
		cont_page_fill(buf + i * w->m.page, w->m.seed, page, w->gen[page] + 1);
	}
	if (!buffer_io(fd, buf, len, true))
		return false;
	lock_shared(w);
	for (i = 0; i < r->nr; i++)
		r->discards[i] = discards(w, r->first + i);
	unlock(w);
	seq = gone(w);
	if (!complete(w, pread(fd, page_addr(w, r->first), len, 0), len, seq,
		      "direct read")) {
		/* Some of it may be there: no generation would be right. */
		write_run(w, r);
		return !race.failed;
	}
	for (i = 0; i < r->nr; i++)
		w->gen[r->first + i]++;
	return check_memory(w, r);
}

static void direct_loop(struct world *w, struct race_thread *t)
{
	char *buf = t->arg;
	struct run r;
	int fd;
	bool ok = true;

	fd = open_direct();
	if (fd < 0) {
		race_fail(&race, "O_DIRECT: %s", strerror(errno));
		return;
	}
	while (ok && race_on(&race)) {
		choose_run(w, t, &r);
		if (cont_rand(&t->rand) % 2)
			ok = direct_write(w, &r, fd, buf);
		else
			ok = direct_read(w, &r, fd, buf);
		t->steps++;
	}
	close(fd);
}

/* ---- owners: gup_test --------------------------------------------------- */

static bool gup_step(struct world *w, struct race_thread *t, int fd)
{
	unsigned int first = cont_rand(&t->rand) % w->m.nr_pages, nr;
	bool pin = cont_rand(&t->rand) % 2;
	struct gup_test gup = {};
	unsigned long seq;
	struct run r;
	int ret;

	choose_run(w, t, &r);
	write_run(w, &r);

	/* Anybody's pages. */
	nr = 1 + cont_rand(&t->rand) % (w->m.nr_pages - first);
	if (nr > 2 * w->m.bpages)
		nr = 2 * w->m.bpages;
	gup.addr = (uintptr_t)page_addr(w, first);
	gup.size = nr * w->m.page;
	/* It does not tell that the last call got some pages only, but of one page. */
	gup.nr_pages_per_call = 1;
	if (cont_rand(&t->rand) % 2)
		gup.nr_pages_per_call += cont_rand(&t->rand) % nr;
	/* The zero page is not pinned, on newer kernels, and gup_test minds. */
	if (pin || cont_rand(&t->rand) % 2)
		gup.gup_flags = GUP_TEST_WRITE;
	seq = gone(w);
	ret = ioctl(fd, pin ? PIN_FAST_BENCHMARK : GUP_FAST_BENCHMARK, &gup);
	complete(w, ret ? -1 : (ssize_t)gup.size, nr * w->m.page, seq, "gup_test");
	return !race.failed && check_memory(w, &r);
}

static void gup_loop(struct world *w, struct race_thread *t)
{
	int fd = open(GUP_TEST_FILE, O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		race_fail(&race, GUP_TEST_FILE ": %s", strerror(errno));
		return;
	}
	while (race_on(&race) && gup_step(w, t, fd))
		t->steps++;
	close(fd);
}

/* ---- owners: perf -------------------------------------------------------- */

/*
 * Samples of this thread's own accesses, taken in the middle of them: of every
 * page fault before and after it is handled, and of a word that the debug
 * hardware watches.  Each makes the kernel look the address up without a lock.
 */
struct perf {
	int fd;
	struct perf_event_mmap_page *ring;
};

static bool perf_open(struct perf *p, __u32 type, __u64 config, const void *watch)
{
	struct perf_event_attr attr = {
		.type = type,
		.size = PERF_ATTR_SIZE_VER7,
		.config = config,
		.sample_period = 1,
		.sample_type = PERF_SAMPLE_ADDR | PERF_SAMPLE_PHYS_ADDR |
			       PERF_SAMPLE_DATA_PAGE_SIZE,
		.exclude_kernel = 1,
		.exclude_hv = 1,
	};
	size_t size = (RING_PAGES + 1) * cont_page_size();

	if (watch) {
		attr.bp_type = HW_BREAKPOINT_RW;
		attr.bp_addr = (uintptr_t)watch;
		attr.bp_len = HW_BREAKPOINT_LEN_8;
	}
	p->fd = syscall(__NR_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
	if (p->fd < 0)
		return false;
	p->ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
	if (p->ring != MAP_FAILED)
		return true;
	close(p->fd);
	p->fd = -1;
	return false;
}

static void perf_close(struct perf *p)
{
	if (p->fd < 0)
		return;
	munmap(p->ring, (RING_PAGES + 1) * cont_page_size());
	close(p->fd);
}

static __u64 ring_word(struct perf *p, __u64 at)
{
	size_t page = cont_page_size();

	return cont_load((char *)p->ring + page + at % (RING_PAGES * page));
}

/* It seldom happens, but the kernel may migrate a page. */
static bool is_there_now(struct world *w, unsigned int page, __u64 phys)
{
	__u64 pfn;

	lock_shared(w);
	cont_touch(page_addr(w, page), 1);
	pfn = cont_pfn(page_addr(w, page));
	unlock(w);
	return pfn * w->m.page == phys;
}

static bool check_sample(struct world *w, __u64 addr, __u64 phys, __u64 size)
{
	__u64 lo = (uintptr_t)w->m.addr, page = w->m.page;
	unsigned int i = (addr - lo) / page;

	if (addr < lo || addr >= lo + w->m.len)
		return true;
	__atomic_add_fetch(&w->nr_calls, 1, __ATOMIC_RELAXED);
	/* None: there was nothing mapped, or it was being changed. */
	if (phys) {
		__atomic_add_fetch(&w->nr_done, 1, __ATOMIC_RELAXED);
		if (phys != w->pfn[i] * page + addr % page &&
		    !is_there_now(w, i, phys - addr % page)) {
			race_fail(&race, "perf: page %u is at %#llx, not %#llx", i, phys,
				  w->pfn[i] * page + addr % page);
			return false;
		}
	}
	if (size && size != page && size != w->m.block) {
		race_fail(&race, "perf: page %u is part of a mapping of %llu bytes", i,
			  size);
		return false;
	}
	return true;
}

static bool check_samples(struct world *w, struct perf *p)
{
	__u64 head, at, word;
	bool ok = true;

	if (p->fd < 0)
		return true;
	head = __atomic_load_n(&p->ring->data_head, __ATOMIC_ACQUIRE);
	for (at = p->ring->data_tail; ok && at < head; at += word >> 48) {
		/* struct perf_event_header: type is in the low, size in the high bits */
		word = ring_word(p, at);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
		word = word >> 32 | word << 48;
#endif
		if ((__u32)word == PERF_RECORD_SAMPLE)
			ok = check_sample(w, ring_word(p, at + 8),
					  ring_word(p, at + 16), ring_word(p, at + 24));
	}
	__atomic_store_n(&p->ring->data_tail, head, __ATOMIC_RELEASE);
	return ok;
}

static void perf_loop(struct world *w, struct race_thread *t)
{
	struct perf fault, after, watch;
	unsigned int i, page;
	struct run r;
	bool ok;

	/* The first that it owns in the second block. */
	page = t->id / 2 * (w->m.bpages / w->nr_owners) + w->m.bpages;
	perf_open(&watch, PERF_TYPE_BREAKPOINT, 0, page_addr(w, page) + CONT_STRIDE);
	ok = perf_open(&fault, PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS, NULL) &
	     perf_open(&after, PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS_MIN, NULL);
	if (!ok)
		race_fail(&race, "perf_event_open: %s", strerror(errno));
	set_ready(w);
	while (ok && race_on(&race)) {
		choose_run(w, t, &r);
		write_run(w, &r);
		lock_shared(w);
		for (i = 0; i < 16; i++)
			cont_load(page_addr(w, page) + CONT_STRIDE);
		unlock(w);
		ok = check_samples(w, &fault) && check_samples(w, &after) &&
		     check_samples(w, &watch) && check_memory(w, &r);
		t->steps++;
	}
	perf_close(&fault);
	perf_close(&after);
	perf_close(&watch);
}

/* ---- disturbers ----------------------------------------------------------- */

static void op_failed(const char *call)
{
	race_fail(&race, "disturber: %s: %s", call, strerror(errno));
}

/* Whole blocks, one page, or anything. */
static void choose_range(struct world *w, struct race_thread *t, unsigned int *first,
			 unsigned int *nr)
{
	unsigned int block = cont_rand(&t->rand) % w->m.nr_blocks;

	*first = block * w->m.bpages;
	switch (cont_rand(&t->rand) % 4) {
	case 0:
		*nr = (1 + cont_rand(&t->rand) % (w->m.nr_blocks - block)) *
		      w->m.bpages;
		break;
	case 1:
		*nr = w->m.bpages;
		break;
	case 2:
		*first += cont_rand(&t->rand) % w->m.bpages;
		*nr = 1;
		break;
	case 3:
		*first += cont_rand(&t->rand) % w->m.bpages;
		*nr = 1 + cont_rand(&t->rand) % (w->m.nr_pages - *first);
		if (*nr > 2 * w->m.bpages)
			*nr = 2 * w->m.bpages;
		break;
	}
}

/* A new THP in the place of the old one, split as cont_map_make() does it. */
static bool renew(struct world *w)
{
	struct cont_map *m = &w->m;
	char *thp = (char *)((uintptr_t)m->addr & ~((uintptr_t)m->pmd - 1));

	if (mmap(thp, m->pmd, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS |
		 MAP_FIXED | MAP_NORESERVE, -1, 0) != thp)
		return false;
	if (madvise(thp, m->pmd, MADV_HUGEPAGE))
		return false;
	cont_store(thp, 0);
	return !madvise(m->addr, m->len, MADV_NOHUGEPAGE);
}

static void do_fork(struct world *w)
{
	pid_t pid = fork();
	unsigned int i;
	int status;

	if (!pid) {
		self.t = NULL;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* A copy of its own, which nobody else may ever see. */
		for (i = 0; i < w->m.nr_pages && !w->shared; i += 3)
			cont_page_fill(page_addr(w, i), ~w->m.seed, i, 0);
		cont_touch(w->m.addr, w->m.len);
		_exit(0);
	}
	if (pid < 0) {
		op_failed("fork");
		return;
	}
	status = cont_wait(pid);
	if (status)
		race_fail(&race, "child of a disturber: status %#x", status);
}

static void set_discarded(struct world *w, unsigned int first, unsigned int nr)
{
	unsigned int i;

	for (i = first; i < first + nr; i++)
		__atomic_add_fetch(&w->discards[i], 1, __ATOMIC_RELEASE);
}

static void do_harmless(struct world *w, struct race_thread *t, enum op op,
			unsigned int first, unsigned int nr)
{
	char *at = page_addr(w, first);
	size_t len = nr * w->m.page;
	unsigned int i;

	switch (op) {
	case OP_TOUCH:
		for (i = 0; i < nr; i += 1 + cont_rand(&t->rand) % w->m.bpages)
			cont_store(page_addr(w, first + i) +
				   t->id % 8 * sizeof(__u64), t->steps);
		break;
	case OP_EXEC:
		/* Not on a mount with noexec. */
		if (mprotect(at, len, PROT_READ | PROT_WRITE | PROT_EXEC) &&
		    errno != EACCES && errno != EPERM)
			op_failed("mprotect");
		if (mprotect(at, len, PROT_READ | PROT_WRITE))
			op_failed("mprotect back");
		break;
	case OP_CLEAR_REFS:
		cont_write_str("/proc/self/clear_refs", "1");
		break;
	case OP_SYNC:
		if (fdatasync(w->m.fd))
			op_failed("fdatasync");
		break;
	case OP_ZAP_FILE:
		if (madvise(at, len, MADV_DONTNEED))
			op_failed("MADV_DONTNEED");
		break;
	case OP_MAP_FILE:
		if (mmap(at, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			 w->m.fd, w->m.off + first * w->m.page) != at)
			op_failed("mmap");
		break;
	case OP_FORK:
		do_fork(w);
		break;
	case OP_PAGEOUT:
		/* The end of large folios: files do not get new ones. */
		if (w->shared && t->steps < 100)
			break;
		if (madvise(at, len, MADV_PAGEOUT) && errno != EINVAL)
			op_failed("MADV_PAGEOUT");
		break;
	default:
		break;
	}
}

static void set_gone(struct world *w)
{
	__atomic_add_fetch(&w->gone, 1, __ATOMIC_SEQ_CST);
}

static void do_exclusive(struct world *w, struct race_thread *t, enum op op,
			 unsigned int first, unsigned int nr)
{
	char *at = page_addr(w, first), *to = w->spare[t->id] + first * w->m.page;
	size_t len = nr * w->m.page;

	switch (op) {
	case OP_READ_ONLY:
		set_gone(w);
		if (mprotect(at, len, PROT_READ) ||
		    mprotect(at, len, PROT_READ | PROT_WRITE))
			op_failed("mprotect");
		set_gone(w);
		break;
	case OP_MOVE:
		set_gone(w);
		if (!cont_mremap_pages(at, len, to) || !cont_mremap_pages(to, len, at))
			op_failed("mremap");
		set_gone(w);
		break;
	case OP_DISCARD:
		set_discarded(w, first, nr);
		if (madvise(at, len, MADV_DONTNEED))
			op_failed("MADV_DONTNEED");
		break;
	case OP_RENEW:
		set_discarded(w, 0, w->m.nr_pages);
		if (!renew(w))
			op_failed("a new THP");
		break;
	default:
		break;
	}
}

static enum op choose_op(struct world *w, struct race_thread *t)
{
	unsigned int sum = 0, n;
	enum op op;

	for (op = 0; op < NR_OPS; op++)
		sum += w->ops & 1 << op ? op_weight[op] : 0;
	n = cont_rand(&t->rand) % sum;
	for (op = 0; ; op++) {
		if (!(w->ops & 1 << op))
			continue;
		if (n < op_weight[op])
			return op;
		n -= op_weight[op];
	}
}

static void disturb_loop(struct world *w, struct race_thread *t)
{
	unsigned int first, nr;
	enum op op;

	/* See set_ready(): OP_MOVE makes holes. */
	while (__atomic_load_n(&w->ready, __ATOMIC_ACQUIRE) < w->nr_owners &&
	       race_on(&race))
		sched_yield();

	while (race_on(&race)) {
		op = choose_op(w, t);
		choose_range(w, t, &first, &nr);
		if (op < OP_READ_ONLY) {
			lock_shared(w);
			do_harmless(w, t, op, first, nr);
		} else {
			lock_exclusive(w);
			do_exclusive(w, t, op, first, nr);
		}
		unlock(w);
		t->steps++;
	}
}

/* ---- a case ---------------------------------------------------------------- */

static void thread_main(struct race_thread *t)
{
	struct world *w = &world;

	self.t = t;
	if (!sigsetjmp(self.env, 1)) {
		if (t->id % 2) {
			disturb_loop(w, t);
		} else {
			if (w->kind != PERF)
				set_ready(w);
			switch (w->kind) {
			case SPLICE:
				splice_loop(w, t);
				break;
			case DIRECT:
				direct_loop(w, t);
				break;
			case GUP_TEST:
				gup_loop(w, t);
				break;
			default:
				perf_loop(w, t);
				break;
			}
		}
	} else if (self.locked) {
		unlock(w);
	}
	self.t = NULL;
}

/* Why this kind of reader cannot be tried here; NULL if it can. */
static const char *missing(enum kind kind)
{
	struct perf p;
	int fd;

	switch (kind) {
	case DIRECT:
		fd = open_direct();
		if (fd < 0)
			return "no writable XFS that takes O_DIRECT is mounted";
		close(fd);
		return NULL;
	case GUP_TEST:
		return access(GUP_TEST_FILE, R_OK | W_OK) ?
			"no " GUP_TEST_FILE " (CONFIG_GUP_TEST, debugfs)" : NULL;
	case PERF:
		if (!perf_open(&p, PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS_MIN,
			       NULL))
			return "perf gives no physical addresses";
		perf_close(&p);
		return NULL;
	default:
		return NULL;
	}
}

static unsigned int allowed_ops(struct world *w)
{
	unsigned int ops = (1 << NR_OPS) - 1;

	ops &= w->shared ? ~ANON_OPS : ~FILE_OPS;
	/* Too much to clear. */
	if (w->m.pmd > 64UL << 20)
		ops &= ~(1 << OP_RENEW);
	/*
	 * Plain references do not keep the copy on write from taking place, and
	 * what is read then goes to the page that is left behind.
	 */
	if (w->kind == DIRECT && !w->shared)
		ops &= ~(1 << OP_FORK | 1 << OP_TOUCH);
	/* Pages stay where they are. */
	if (w->kind == PERF)
		ops &= ~(ANON_OPS | 1 << OP_PAGEOUT | (w->shared ? 0 : 1 << OP_FORK));
	return ops;
}

static int prepare(struct world *w, enum kind reader, enum cont_source src,
		   unsigned int nr)
{
	unsigned int i;
	int ret;

	memset(w, 0, sizeof(*w));
	w->kind = reader;
	ret = cont_map_make(&w->m, src, NR_BLOCKS);
	if (ret)
		return ret;
	w->shared = w->m.flags == MAP_SHARED;
	w->ops = allowed_ops(w);
	w->nr_owners = (nr + 1) / 2;
	for (i = 0; i < w->m.nr_pages; i++)
		w->pfn[i] = cont_pfn(page_addr(w, i));
	return 0;
}

static void run_case(enum kind kind, unsigned int src)
{
	unsigned int nr = race.threads, i;
	struct race_thread t[RACE_MAX_THREADS] = {};
	char name[64], *resv, *bufs;
	struct world *w = &world;
	size_t each, buf;
	long long folds, unfolds;
	pthread_rwlockattr_t attr;
	const char *why;
	int ret;

	snprintf(name, sizeof(name), "%s, %s", kind_name[kind], source_name[src]);
	why = missing(kind);
	if (why) {
		ksft_test_result_skip("%s: %s\n", name, why);
		return;
	}
	ret = prepare(w, kind, sources[src], nr);
	if (ret == CONT_MAKE_SKIP) {
		ksft_test_result_skip("%s: %s\n", name, w->m.why);
		return;
	}
	if (ret) {
		ksft_test_result_fail("%s: %s\n", name, w->m.why);
		return;
	}

	/* Aligned like the window, so that what is moved there can fold. */
	each = 2 * w->m.pmd + w->m.len;
	buf = MAX_RUN * w->m.page;
	resv = cont_reserve(nr * each);
	bufs = mmap(NULL, nr * buf, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (resv == MAP_FAILED || bufs == MAP_FAILED)
		ksft_exit_fail_msg("mmap: %s\n", strerror(errno));
	for (i = 0; i < nr; i++) {
		w->spare[i] = cont_align_up(resv + i * each, w->m.pmd) +
			      ((uintptr_t)w->m.addr & (w->m.pmd - 1));
		t[i].arg = bufs + i * buf;
	}
	pthread_rwlockattr_init(&attr);
#ifdef __GLIBC__
	/* Owners never leave it for long. */
	pthread_rwlockattr_setkind_np(&attr,
				      PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
	pthread_rwlock_init(&w->lock, &attr);

	folds = cont_vmstat("contpte_fold");
	unfolds = cont_vmstat("contpte_unfold");
	alarm(race.seconds + HANG_SECONDS);
	race_run(&race, t, nr, thread_main);
	alarm(0);
	if (folds >= 0) {
		folds = cont_vmstat("contpte_fold") - folds;
		unfolds = cont_vmstat("contpte_unfold") - unfolds;
	}
	munmap(resv, nr * each);
	munmap(bufs, nr * buf);
	cont_map_free(&w->m);
	pthread_rwlock_destroy(&w->lock);

	ksft_print_msg("%lu of %lu %s, %lu and %lu steps, %lld blocks folded, %lld unfolded\n",
		       w->nr_done, w->nr_calls,
		       kind == PERF ? "samples with an address" : "calls complete",
		       t[0].steps, t[1].steps, folds, unfolds);
	race_result(&race, name);
}

/* ---- a page that is freed and used again at once ----------------------- */

#define GOOD	(0x600dULL << 32)
#define BAD	(0xbadULL << 32)

static struct {
	char *page;	/* what readers splice */
	char *bait;	/* gets the memory that was freed there */
} reuse;

static void reuse_fill(char *to, __u64 val)
{
	size_t at;

	for (at = 0; at < cont_page_size(); at += CONT_STRIDE)
		cont_store(to + at, val);
}

/* The page that a CPU has freed last is the next one that it hands out. */
static void reuse_free(struct race_thread *t)
{
	while (race_on(&race)) {
		reuse_fill(reuse.page, GOOD | (t->steps & 0xffffffff));
		madvise(reuse.page, cont_page_size(), MADV_DONTNEED);
		reuse_fill(reuse.bait, BAD);
		madvise(reuse.bait, cont_page_size(), MADV_DONTNEED);
		t->steps++;
	}
}

static void reuse_splice(struct race_thread *t)
{
	size_t page = cont_page_size(), at;
	struct iovec iov = { .iov_base = reuse.page, .iov_len = page };
	char *buf = malloc(page);
	int fd[2];
	__u64 val;

	if (!buf || pipe(fd)) {
		race_fail(&race, "no pipe: %s", strerror(errno));
		free(buf);
		return;
	}
	while (race_on(&race)) {
		if (vmsplice(fd[1], &iov, 1, 0) != (ssize_t)page ||
		    read(fd[0], buf, page) != (ssize_t)page) {
			race_fail(&race, "vmsplice or read: %s", strerror(errno));
			break;
		}
		for (at = 0; at < page; at += CONT_STRIDE) {
			val = cont_load(buf + at);
			if (val && val >> 32 != GOOD >> 32) {
				race_fail(&race, "thread %u got another page: %#llx at %zu",
					  t->id, val, at);
				break;
			}
		}
		t->steps++;
	}
	close(fd[0]);
	close(fd[1]);
	free(buf);
}

/*
 * Small folios, for the sake of speed: it takes many attempts to have the page freed
 * and used again between the two reads of GUP-fast.
 */
static void run_reuse(void)
{
	struct race_thread t[RACE_MAX_THREADS] = { { .fn = reuse_free } };
	size_t page = cont_page_size();
	char *mem;

	mem = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		ksft_exit_fail_msg("mmap: %s\n", strerror(errno));
	reuse.page = mem;
	reuse.bait = mem + 2 * page;
	alarm(race.seconds + HANG_SECONDS);
	race_run(&race, t, race.threads, reuse_splice);
	alarm(0);
	munmap(mem, 3 * page);
	ksft_print_msg("freed %lu times, spliced %lu times by the first reader\n",
		       t[0].steps, t[1].steps);
	race_result(&race, "vmsplice, a page that is used again");
}

int main(int argc, char **argv)
{
	unsigned int kind, src;

	setvbuf(stdout, NULL, _IOLBF, 0);
	race_options(&race, argc, argv, 1, 4);
	/* Every owner has some pages of each block. */
	if (race.threads > 16)
		race.threads = 16;
	ksft_set_plan(NR_KINDS * ARRAY_SIZE(sources) + 1);

	cont_on_fault(on_fault);
	signal(SIGALRM, on_alarm);
	for (kind = 0; kind < NR_KINDS; kind++)
		for (src = 0; src < ARRAY_SIZE(sources); src++)
			run_case(kind, src);
	run_reuse();

	ksft_exit(!ksft_get_fail_cnt());
}
