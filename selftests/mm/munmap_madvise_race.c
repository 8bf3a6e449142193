// SPDX-License-Identifier: GPL-2.0-only
/*
 * munmap() that frees page tables, against MADV_DONTNEED of other memory.
 *
 * Two threads that take away memory of the same mm, each with its own
 * mmu_gather, must not rob each other of a TLB flush.  In 2019 they did: the
 * one that finished first forgot about the page tables that the other had freed,
 * and the next mapping at the address was seen through stale entries.  Folded
 * blocks add to it, since one stale entry then covers a whole block.
 *
 * Claim: when munmap() has returned and something else is mapped at the address,
 * no CPU reads or writes what was there before, whatever other threads zap.
 *
 * Oracle: each word says which page of which generation it belongs to.  One
 * thread maps, writes the pattern and publishes it; the readers, on other CPUs,
 * look only while it is published and know exactly what they have to find.  They
 * also write, and the mapper looks for that from its own CPU.  The zapping
 * threads put a pattern of their own into the pages that became free, and find
 * it again or not.
 *
 * Breaks on: a TLB flush that is missing, too short, for the wrong size or level,
 * or done after the pages were freed; page tables freed too early; entries of a
 * block that come back or go away when its other end is zapped.
 *
 * Options: see race_util.h.  -t counts the mapper, the readers (one of four
 * threads) and those that zap; there is at least one of each.
 */
#include "contpte_util.h"
#include "race_util.h"

#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <linux/futex.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE	0x100000
#endif

/*
 * Far below what mmap() hands out by itself, and above programs and heaps that
 * are not at a random address: nothing else shares page tables with it.
 */
#define REGION_ADDR	(64ULL << 30)
#define MAX_PAGES	256
#define MAX_READERS	8
/* Of each thread that zaps. */
#define OWN_PAGES	8
/* That a thread has been caught in an endless fault is found by nothing else. */
#define HANG_SECONDS	180

enum backing {
	SMALL,
	THP,		/* mapped by a PMD */
	THP_PTES,	/* mapped by PTEs */
	SHMEM,		/* by a PMD and by PTEs in turn */
	XFS,
};

struct test_case {
	const char *name;
	enum backing backing;
	bool part;	/* take away pages in the middle first */
	bool exiting;	/* those that zap are exiting threads */
};

static const struct test_case cases[] = {
	{ "small pages", SMALL },
	{ "small pages, exiting threads", SMALL, .exiting = true },
	{ "THP", THP },
	{ "THP mapped by PTEs", THP_PTES },
	{ "THP mapped by PTEs, exiting threads", THP_PTES, .exiting = true },
	{ "THP mapped by PTEs, parts of blocks", THP_PTES, .part = true },
	{ "shmem", SHMEM },
	{ "shmem, parts of blocks", SHMEM, .part = true },
	{ "XFS, parts of blocks", XFS, .part = true },
};

/* What the readers may look at. */
enum state {
	NOTHING,
	EDGES,		/* pages before lo and from hi on */
	ALL,
};

/* What a reader wrote last. */
struct wrote {
	unsigned int pub;
	unsigned int page;
	__u64 val;
};

struct reader {
	unsigned long turn;	/* odd: looking */
	unsigned int seen;	/* the last publication seen */
	/* Of this publication and of the last, which the mapper looks at. */
	struct wrote wrote[2];
} __attribute__((aligned(128)));

struct region {
	const struct test_case *c;
	char *addr;
	size_t page;
	size_t block;
	size_t pmd;
	unsigned int nr_pages;		/* in use, from addr on */
	__u64 seed;
	/* of the file: pages are at either place, in turn */
	int fd;
	off_t place[2];
	/* what is published */
	unsigned int lo, hi;
	__u64 gen[MAX_PAGES];
	unsigned int pub;		/* number of the publication * 4 + state */
	unsigned int last_pub;		/* for the mapper */

	unsigned int nr_readers;
	struct reader reader[MAX_READERS];
	cpu_set_t cpus;
	int nr_cpus;
};

static struct region region;
static struct race race;

/* ---- the pattern ------------------------------------------------------ */

/* A few words a page are enough, and leave more time for races. */
#define WORDS	8

static size_t word_at(unsigned int i)
{
	return i * (region.page / WORDS);
}

/* Word 0 and what follows it are the readers'. */
static void fill(char *page, __u64 seed, __u64 index, __u64 gen)
{
	unsigned int i;

	for (i = 1; i < WORDS; i++)
		cont_store(page + word_at(i), cont_word(seed, index, gen, word_at(i)));
}

/* ---- faults that must not be ------------------------------------------ */

static __thread struct {
	sigjmp_buf env;
	struct race_thread *t;	/* NULL: nothing to go back to */
	const char *role;
} self;

static void on_fault(int sig, siginfo_t *info, void *context)
{
	char buf[160];
	int n;

	(void)context;
	if (self.t) {
		race_fail(&race, "%s (thread %u) got signal %d at %p", self.role,
			  self.t->id, sig, info->si_addr);
		siglongjmp(self.env, 1);
	}
	n = snprintf(buf, sizeof(buf), "Bail out! signal %d at %p in %s\n", sig,
		     info->si_addr, self.role ? self.role : "the main thread");
	n = write(STDOUT_FILENO, buf, n);
	_exit(KSFT_FAIL);
}

static void on_alarm(int sig)
{
	static const char msg[] = "Bail out! a thread does not come to an end\n";
	ssize_t n = write(STDOUT_FILENO, msg, sizeof(msg) - 1);

	_exit(n < 0 ? sig : KSFT_FAIL);
}

/* ---- publishing ------------------------------------------------------- */

/*
 * Wait for another publication than this one.  The mapper ends with one, and
 * after race_on() has become false.
 */
static void wait_other(struct region *r, unsigned int pub)
{
	unsigned int i;

	for (i = 0; i < 1000; i++)
		if (__atomic_load_n(&r->pub, __ATOMIC_SEQ_CST) != pub)
			return;
	if (race_on(&race))
		syscall(__NR_futex, &r->pub, FUTEX_WAIT_PRIVATE, pub, NULL);
}

/*
 * From here on readers do what the new state says.  Returns when none of them
 * is still at what the old one said.
 */
static void publish(struct region *r, enum state state)
{
	unsigned long turn;
	unsigned int i;

	r->last_pub = r->pub;
	/* One word: nobody may take one's state for that of another. */
	__atomic_store_n(&r->pub, (r->pub / 4 + 1) * 4 + state, __ATOMIC_SEQ_CST);
	syscall(__NR_futex, &r->pub, FUTEX_WAKE_PRIVATE, MAX_READERS);
	for (i = 0; i < r->nr_readers; i++) {
		turn = __atomic_load_n(&r->reader[i].turn, __ATOMIC_SEQ_CST);
		while ((turn & 1) && turn == __atomic_load_n(&r->reader[i].turn,
							     __ATOMIC_SEQ_CST))
			sched_yield();
	}
}

/* Until every reader has looked: only then its TLB has something in it. */
static void wait_seen(struct region *r)
{
	unsigned int i;

	for (i = 0; i < r->nr_readers; i++)
		while (__atomic_load_n(&r->reader[i].seen, __ATOMIC_SEQ_CST) !=
		       r->pub && race_on(&race))
			sched_yield();
}

/* ---- the readers ------------------------------------------------------ */

static struct wrote *wrote(struct reader *rd, unsigned int pub)
{
	return &rd->wrote[pub / 4 % 2];
}

/* In every page there are two words for each reader, where the pattern has none. */
static char *reader_word(struct region *r, struct reader *rd, struct wrote *w)
{
	unsigned int n = 2 * (rd - r->reader) + (w - rd->wrote);

	return r->addr + w->page * r->page + n * sizeof(__u64);
}

static void tell_wrong(struct region *r, const char *who, unsigned int page,
		       size_t at, __u64 val)
{
	__u64 gen = r->gen[page], old;

	for (old = gen; old && old + 16 > gen; old--) {
		if (val != cont_word(r->seed, page, old, at))
			continue;
		race_fail(&race, "%s: page %u (%zu of block) + %zu is of generation %llu, not %llu",
			  who, page, page % (r->block / r->page), at, old, gen);
		return;
	}
	race_fail(&race, "%s: page %u (%zu of block) + %zu holds %#llx%s, not generation %llu",
		  who, page, page % (r->block / r->page), at, val,
		  val ? "" : " (zero)", gen);
}

static bool look(struct region *r, const char *who, unsigned int page, size_t at)
{
	__u64 val = cont_load(r->addr + page * r->page + at);

	if (val == cont_word(r->seed, page, r->gen[page], at))
		return true;
	tell_wrong(r, who, page, at, val);
	return false;
}

static unsigned int readable_page(struct region *r, enum state now, __u64 rand)
{
	unsigned int n = r->nr_pages - (now == EDGES ? r->hi - r->lo : 0);
	unsigned int page = rand % n;

	return now == EDGES && page >= r->lo ? page + r->hi - r->lo : page;
}

static bool look_around(struct race_thread *t, struct reader *rd,
			struct region *r, enum state now, unsigned int pub)
{
	struct wrote *w = wrote(rd, pub);
	unsigned int i, page;
	__u64 val;

	for (i = 0; i < 32; i++) {
		page = readable_page(r, now, cont_rand(&t->rand));
		if (!look(r, "reader", page,
			  word_at(1 + cont_rand(&t->rand) % (WORDS - 1))))
			return false;
	}

	/* What it wrote before, unless pages have been taken away since. */
	if (w->pub == pub) {
		val = cont_load(reader_word(r, rd, w));
		if (val != w->val) {
			race_fail(&race, "reader: wrote %#llx into page %u, finds %#llx",
				  w->val, w->page, val);
			return false;
		}
	}
	w->pub = pub;
	w->page = readable_page(r, now, cont_rand(&t->rand));
	w->val = cont_rand(&t->rand);
	cont_store(reader_word(r, rd, w), w->val);
	return true;
}

static void read_loop(struct race_thread *t)
{
	struct region *r = &region;
	struct reader *rd = t->arg;
	unsigned int pub;
	enum state state;
	bool ok = true;

	while (ok && race_on(&race)) {
		__atomic_add_fetch(&rd->turn, 1, __ATOMIC_SEQ_CST);
		pub = __atomic_load_n(&r->pub, __ATOMIC_SEQ_CST);
		state = pub % 4;
		if (state != NOTHING) {
			ok = look_around(t, rd, r, state, pub);
			__atomic_store_n(&rd->seen, pub, __ATOMIC_SEQ_CST);
			t->steps++;
		}
		__atomic_add_fetch(&rd->turn, 1, __ATOMIC_SEQ_CST);
		if (state == NOTHING)
			wait_other(r, pub);
	}
}

/* ---- the mapper ------------------------------------------------------- */

/* Has what the readers wrote last arrived where this CPU sees it? */
static bool check_readers(struct region *r)
{
	struct reader *rd;
	struct wrote *w;
	__u64 val;

	for (rd = r->reader; rd < r->reader + r->nr_readers; rd++) {
		w = wrote(rd, r->last_pub);
		if (w->pub != r->last_pub)
			continue;
		val = cont_load(reader_word(r, rd, w));
		if (val == w->val)
			continue;
		race_fail(&race, "mapper: a reader wrote %#llx into page %u, but it holds %#llx",
			  w->val, w->page, val);
		return false;
	}
	return true;
}

static bool failed(const char *call)
{
	race_fail(&race, "mapper: %s: %s", call, strerror(errno));
	return false;
}

static bool map(struct region *r, unsigned int first, size_t len, unsigned int place,
		int fixed)
{
	char *at = r->addr + first * r->page;
	int flags = fixed | (r->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
	off_t off = r->fd < 0 ? 0 : r->place[place] + first * r->page;

	if (mmap(at, len, PROT_READ | PROT_WRITE, flags, r->fd, off) != at)
		return failed("mmap");
	return true;
}

static void write_pages(struct region *r, unsigned int first, unsigned int end,
			__u64 gen)
{
	unsigned int i;

	for (i = first; i < end; i++) {
		r->gen[i] = gen;
		fill(r->addr + i * r->page, r->seed, i, gen);
	}
}

static bool map_all(struct region *r, __u64 gen)
{
	size_t len = r->pmd;

	if (r->c->backing == XFS || (r->c->backing == SHMEM && gen % 2))
		len = r->nr_pages * r->page;
	if (!map(r, 0, len, gen % 2, MAP_FIXED_NOREPLACE))
		return false;
	switch (r->c->backing) {
	case SMALL:
		if (madvise(r->addr, len, MADV_NOHUGEPAGE) && errno != EINVAL)
			return failed("MADV_NOHUGEPAGE");
		break;
	case THP:
	case THP_PTES:
		if (madvise(r->addr, len, MADV_HUGEPAGE))
			return failed("MADV_HUGEPAGE");
		cont_store(r->addr, 0);
		/* A VMA that ends in the middle of it leaves the THP no PMD. */
		if (r->c->backing == THP_PTES &&
		    madvise(r->addr + len / 2, len / 2, MADV_NOHUGEPAGE))
			return failed("MADV_NOHUGEPAGE");
		break;
	default:
		break;
	}
	write_pages(r, 0, r->nr_pages, gen);
	return true;
}

/*
 * Replace some pages in the middle, while the readers use those on both sides.
 * Ends are wherever they come to be, which is seldom between two blocks.
 */
static bool replace_part(struct race_thread *t, struct region *r, __u64 gen)
{
	size_t len;
	char *at;

	r->lo = 1 + cont_rand(&t->rand) % (r->nr_pages / 2 - 1);
	r->hi = r->nr_pages / 2 + cont_rand(&t->rand) % (r->nr_pages / 2 - 1) + 1;
	at = r->addr + r->lo * r->page;
	len = (r->hi - r->lo) * r->page;

	publish(r, EDGES);
	if (!check_readers(r))
		return false;
	switch (cont_rand(&t->rand) % 3) {
	case 0:
		if (munmap(at, len))
			return failed("munmap");
		if (!map(r, r->lo, len, gen % 2, MAP_FIXED_NOREPLACE))
			return false;
		break;
	case 1:
		if (!map(r, r->lo, len, gen % 2, MAP_FIXED))
			return false;
		break;
	case 2:
		if (madvise(at, len, MADV_DONTNEED))
			return failed("MADV_DONTNEED");
		if (r->fd < 0 && !cont_page_zero(at)) {
			race_fail(&race, "mapper: page %u is not zero after MADV_DONTNEED",
				  r->lo);
			return false;
		}
		break;
	}
	write_pages(r, r->lo, r->hi, gen);
	publish(r, ALL);
	wait_seen(r);
	return true;
}

static bool check_all(struct region *r)
{
	unsigned int i;

	for (i = 0; i < r->nr_pages; i++)
		if (!look(r, "mapper", i, word_at(1)) ||
		    !look(r, "mapper", i, word_at(WORDS - 1)))
			return false;
	return true;
}

static bool one_generation(struct race_thread *t, struct region *r, __u64 *gen)
{
	unsigned int i;

	if (!map_all(r, ++*gen))
		return false;
	publish(r, ALL);
	wait_seen(r);
	for (i = 0; r->c->part && i < 2; i++)
		if (!replace_part(t, r, ++*gen))
			return false;

	publish(r, NOTHING);
	if (!check_readers(r) || !check_all(r))
		return false;
	/* Page tables are freed along with the pages. */
	if (munmap(r->addr, r->pmd))
		return failed("munmap");
	return true;
}

static void map_loop(struct race_thread *t)
{
	struct region *r = &region;
	__u64 gen = 0;

	while (race_on(&race) && one_generation(t, r, &gen))
		t->steps++;
}

/* ---- those that zap --------------------------------------------------- */

static bool own_ok(const char *who, struct race_thread *t, char *addr,
		   unsigned int nr, __u64 gen)
{
	unsigned int i, w;
	char *at;

	for (i = 0; i < nr; i++) {
		for (w = 1; w < WORDS; w++) {
			at = addr + i * region.page + word_at(w);
			if (cont_load(at) == cont_word(~region.seed - t->id, i, gen,
						       word_at(w)))
				continue;
			race_fail(&race, "%s: its page %u holds %#llx at %p", who, i,
				  cont_load(at), at);
			return false;
		}
	}
	return true;
}

static void own_fill(struct race_thread *t, char *addr, unsigned int nr, __u64 gen)
{
	unsigned int i;

	for (i = 0; i < nr; i++)
		fill(addr + i * region.page, ~region.seed - t->id, i, gen);
}

static void zap_loop(struct race_thread *t)
{
	unsigned int nr, i;
	size_t page = region.page;
	char *addr = t->arg;

	while (race_on(&race)) {
		nr = 1 + cont_rand(&t->rand) % OWN_PAGES;
		own_fill(t, addr, nr, t->steps);
		if (!own_ok("zapper", t, addr, nr, t->steps))
			return;
		if (madvise(addr, OWN_PAGES * page, MADV_DONTNEED)) {
			race_fail(&race, "MADV_DONTNEED: %s", strerror(errno));
			return;
		}
		i = cont_rand(&t->rand) % OWN_PAGES;
		if (!cont_page_zero(addr + i * page)) {
			race_fail(&race, "zapper: page %u is not zero after MADV_DONTNEED",
				  i);
			return;
		}
		t->steps++;
	}
}

/* A thread that has used some of its stack, which the C library gives back. */
static void *short_life(void *arg)
{
	struct race_thread *t = arg;
	char stack[(OWN_PAGES + 1) * region.page], *addr;

	self.role = "an exiting thread";
	addr = cont_align_up(stack, region.page);
	own_fill(t, addr, OWN_PAGES, t->steps);
	own_ok("exiting thread", t, addr, OWN_PAGES, t->steps);
	return NULL;
}

static void exit_loop(struct race_thread *t)
{
	pthread_attr_t attr;
	pthread_t tid;
	int err;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 4UL << 20);
	while (race_on(&race)) {
		err = pthread_create(&tid, &attr, short_life, t);
		if (err) {
			race_fail(&race, "pthread_create: %s", strerror(err));
			return;
		}
		pthread_join(tid, NULL);
		t->steps++;
	}
}

/* ---- a case ----------------------------------------------------------- */

/* Mapper and readers on CPUs of their own, as far as there are any. */
static void pin(struct region *r, unsigned int id)
{
	int cpu, nr = 0, first = id, last = id;
	cpu_set_t set;

	if (id > r->nr_readers) {
		first = r->nr_readers + 1;
		last = r->nr_cpus - 1;
	}
	if (first > last || last >= r->nr_cpus)
		return;
	CPU_ZERO(&set);
	for (cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &r->cpus))
			continue;
		if (nr >= first && nr <= last)
			CPU_SET(cpu, &set);
		nr++;
	}
	sched_setaffinity(0, sizeof(set), &set);
}

static void thread_main(struct race_thread *t)
{
	struct region *r = &region;
	bool reader = t->id && t->id <= r->nr_readers;

	pin(r, t->id);
	self.role = !t->id ? "mapper" : reader ? "reader" : "zapper";
	self.t = t;
	if (!sigsetjmp(self.env, 1)) {
		if (!t->id)
			map_loop(t);
		else if (reader)
			read_loop(t);
		else if (r->c->exiting)
			exit_loop(t);
		else
			zap_loop(t);
	} else if (reader && (((struct reader *)t->arg)->turn & 1)) {
		/* The mapper waits for it. */
		__atomic_add_fetch(&((struct reader *)t->arg)->turn, 1,
				   __ATOMIC_SEQ_CST);
	}
	/* Nobody looks when the mapper has gone. */
	if (!t->id)
		publish(r, NOTHING);
	self.t = NULL;
}

/* The file, with nothing of it mapped, and where the pages are in it. */
static int open_file(struct region *r, struct cont_map *m)
{
	unsigned int blocks = r->nr_pages / (r->block / r->page);
	bool xfs = r->c->backing == XFS;
	int ret;

	/* The one huge page of the shmem file is twice as large, or more. */
	ret = cont_map_make(m, xfs ? CONT_XFS : CONT_SHMEM, xfs ? 2 * blocks : 1);
	if (ret)
		return ret;
	r->fd = dup(m->fd);
	r->place[0] = xfs ? m->off : 0;
	r->place[1] = r->place[0] + r->nr_pages * r->page;
	cont_map_free(m);
	return r->fd < 0 ? cont_why(m, CONT_MAKE_FAIL, "dup: %s", strerror(errno)) : 0;
}

static int prepare(struct region *r, const struct test_case *c, struct cont_map *m)
{
	unsigned int bpages;

	memset(r, 0, sizeof(*r));
	r->c = c;
	r->fd = -1;
	r->page = cont_page_size();
	r->block = cont_size();
	r->pmd = cont_pmd_size();
	if (!r->pmd && c->backing != SMALL)
		return cont_why(m, CONT_MAKE_SKIP, "kernel has no THP");
	if (!r->pmd)
		r->pmd = 2UL << 20;
	r->seed = cont_mix(race.seed + (c - cases));
	r->addr = cont_align_up((void *)(uintptr_t)REGION_ADDR, r->pmd);
	bpages = r->block / r->page;
	/*
	 * Few, so that much of the time goes to mapping and unmapping. Two pieces
	 * of this size fit into a huge page.
	 */
	if (c->backing == SMALL)
		r->nr_pages = 32;
	else
		r->nr_pages = bpages < 32 ? 64 : 2 * bpages;
	CPU_ZERO(&r->cpus);
	if (!sched_getaffinity(0, sizeof(r->cpus), &r->cpus))
		r->nr_cpus = CPU_COUNT(&r->cpus);
	return c->backing == SHMEM || c->backing == XFS ? open_file(r, m) : 0;
}

static void run_case(const struct test_case *c)
{
	struct race_thread t[RACE_MAX_THREADS] = {};
	unsigned int nr = race.threads < 3 ? 3 : race.threads, i;
	struct region *r = &region;
	long long folds;
	char *own = NULL;
	struct cont_map m;
	size_t len;
	int ret;

	ret = prepare(r, c, &m);
	if (ret == CONT_MAKE_SKIP) {
		ksft_test_result_skip("%s: %s\n", c->name, m.why);
		return;
	}
	if (ret) {
		ksft_test_result_fail("%s: %s\n", c->name, m.why);
		return;
	}

	r->nr_readers = nr / 4 ? nr / 4 : 1;
	if (r->nr_readers > MAX_READERS)
		r->nr_readers = MAX_READERS;
	len = OWN_PAGES * r->page;
	own = mmap(NULL, nr * len, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (own == MAP_FAILED)
		ksft_exit_fail_msg("mmap: %s\n", strerror(errno));
	madvise(own, nr * len, MADV_NOHUGEPAGE);
	for (i = 1; i < nr; i++) {
		t[i].arg = own + i * len;
		if (i <= r->nr_readers)
			t[i].arg = &r->reader[i - 1];
	}

	folds = cont_vmstat("contpte_fold");
	alarm(race.seconds + HANG_SECONDS);
	race_run(&race, t, nr, thread_main);
	alarm(0);
	/* After a failure something may be left there. */
	munmap(r->addr, r->pmd);
	munmap(own, nr * len);
	if (r->fd >= 0)
		close(r->fd);
	ksft_print_msg("%lu generations, %lu looks, %lu zaps, %lld blocks folded\n",
		       t[0].steps, t[1].steps, t[r->nr_readers + 1].steps,
		       folds < 0 ? 0 : cont_vmstat("contpte_fold") - folds);
	race_result(&race, c->name);
}

int main(int argc, char **argv)
{
	unsigned int i;

	setvbuf(stdout, NULL, _IOLBF, 0);
	race_options(&race, argc, argv, 1, 4);
	ksft_set_plan(ARRAY_SIZE(cases));
	cont_no_numa_balancing();

	cont_on_fault(on_fault);
	signal(SIGALRM, on_alarm);
	for (i = 0; i < ARRAY_SIZE(cases); i++)
		run_case(&cases[i]);

	ksft_exit(!ksft_get_fail_cnt());
}
