// SPDX-License-Identifier: GPL-2.0-only
/*
 * Fork of blocks of large folios that other threads are writing to.
 *
 * Claim: a child gets each page as it was at some moment during fork(), and keeps
 * it, whatever parent, siblings and grandchildren write, unmap or protect. None
 * of them sees what the others write. Pages pinned for DMA stay the parent's. In
 * shared memory all see all writes. Blocks of the parent are folded after fork()
 * if they were before, and the child's are, too.
 *
 * Oracle: a writer announces a generation for a page, writes it to the page from
 * the first word to the last, and announces that it is done, in memory that is
 * shared with the children. The child may find what was done before fork(), or
 * anything begun since until fork() returned. It may find a generation in its
 * first words and the one before in the rest, if the first was not done before
 * fork(): a page is taken from its writer at one moment. (A pinned page is copied
 * while its writer goes on, and may be any mix of these.) The child takes a sum
 * of each page, waits until parents have published more writes, and compares. A
 * writer knows what it wrote, and looks before it writes again. PFNs come from
 * pagemap. Folding is compared with cont_expect_bits().
 *
 * Breaks on: fork that write-protects less than the block or makes it writable
 * again behind the writer (child sees later generations), a TLB entry of the
 * block that survives write protection, copying of entries from the wrong page of
 * the block or from the other side of the end of a VMA (MADV_DONTFORK and
 * MADV_WIPEONFORK in the middle of blocks), reuse of a page that a child still
 * maps because mapcounts or AnonExclusive of a batch are wrong, pinned pages that
 * are shared instead of copied, unfolding of the parent at fork.
 *
 * Options: see race_util.h. Of -t N threads one forks, the others write.
 *
 * The cases "stay folded" hold only where fork write-protects and copies whole
 * blocks in one go.
 */
#include "race_util.h"
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define DEFAULT_SECONDS	1
#define DEFAULT_THREADS	4

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK		18
#define MADV_KEEPONFORK		19
#endif

/* The same on every architecture since they were added in Linux 5.1. */
#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup	425
#define __NR_io_uring_register	427
#endif
#define URING_REGISTER_BUFFERS	0
#define URING_UNREGISTER_BUFFERS	1

/* Enough for blocks on both sides of a VMA's end, and few enough to fill often. */
#define NR_BLOCKS	4
#define MAX_PAGES	(NR_BLOCKS * 128)
/* Children at a time. */
#define SLOTS		4
/* After so many the parent has mostly copies in small pages: make new folios. */
#define ROUND_FORKS	6
#define GRANDCHILD	0x100
/* For the case that something never returns. */
#define WATCHDOG	300

/* What a child has in place of a page, by madvise() of the parent. */
enum inherit {
	COPIED,
	ABSENT,			/* MADV_DONTFORK */
	WIPED,			/* MADV_WIPEONFORK */
};

struct shared {
	bool failed;
	bool told;
	bool forks_done;	/* of the round */
	bool forking;		/* writers must not rest */
	unsigned int kick;	/* futex: writers begin anew when it changes */
	unsigned long rounds;
	unsigned long forks;
	unsigned long writes;
	unsigned int go[SLOTS];	/* futex: the child in this slot may end */
	__u32 begun[MAX_PAGES];
	__u32 done[MAX_PAGES];
	__u64 folded;		/* a child's report */
	__u64 expect;
	bool odd;
	char why[200];
};

static struct shared *sh;
static struct cont_map map;
static unsigned int nr_pages;	/* that take part, from the first on */
static unsigned int nr_writers;
static unsigned int nr_owners;	/* the writers, and who else has pages */
static int zero_fd = -1;

/* Of the thread that forks; children inherit them. */
static bool pinned;
static __u64 pinned_pfn[MAX_PAGES];
static enum inherit inherit[MAX_PAGES];
static __u32 lo[MAX_PAGES];
/* Of a child. */
static __u32 hi[MAX_PAGES];
static __u64 sum[MAX_PAGES];

static __thread const char *role = "main";
static __thread unsigned int role_id;

/* ---- reports ---------------------------------------------------------- */

/* The first one is kept. It may come from any process. */
static bool __attribute__((format(printf, 1, 2)))
fail(const char *fmt, ...)
{
	char msg[140];
	va_list ap;

	if (!__atomic_exchange_n(&sh->told, true, __ATOMIC_ACQ_REL)) {
		va_start(ap, fmt);
		vsnprintf(msg, sizeof(msg), fmt, ap);
		va_end(ap);
		snprintf(sh->why, sizeof(sh->why), "%s %u: %s", role, role_id, msg);
	}
	__atomic_store_n(&sh->failed, true, __ATOMIC_RELEASE);
	return false;
}

static bool fail_call(const char *call)
{
	return fail("%s: %s", call, strerror(errno));
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fail("signal %d at %p (window at %p)", sig, info->si_addr, map.addr);
	_exit(1);
}

/* ---- pages ------------------------------------------------------------ */

static bool is_shared(void)
{
	return map.flags == MAP_SHARED;
}

static char *page_at(unsigned int page)
{
	return map.addr + page * map.page;
}

static unsigned int owner_of(unsigned int page)
{
	return page % nr_owners;
}

/* Published for those who look at the page later, or while it is written. */
static void write_page(unsigned int page)
{
	__u32 gen = __atomic_load_n(&sh->begun[page], __ATOMIC_RELAXED) + 1;

	__atomic_store_n(&sh->begun[page], gen, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	cont_page_fill(page_at(page), map.seed, cont_index(&map, page), gen);
	__atomic_store_n(&sh->done[page], gen, __ATOMIC_RELEASE);
}

/* For the one who writes it, or when nobody does. */
static bool check_done(unsigned int page)
{
	__u32 gen = __atomic_load_n(&sh->done[page], __ATOMIC_ACQUIRE);

	if (cont_page_ok(page_at(page), map.seed, cont_index(&map, page), gen))
		return true;
	return fail("page %u (%u of its block) is not generation %u that was written",
		    page, page % map.bpages, gen);
}

/*
 * The page is of generations from..to. If it was taken at one moment, there is
 * at most one step down, by one generation.
 */
static bool check_range(unsigned int page, const char *p, __u32 from, __u32 to,
			bool one_moment, const char *when)
{
	__u64 index = cont_index(&map, page);
	bool stepped = false;
	__u32 gen = to, g;
	size_t at;

	for (at = CONT_STRIDE; at < map.page; at += CONT_STRIDE) {
		__u64 word = cont_load(p + at);

		if (word == cont_word(map.seed, index, gen, at))
			continue;
		if (one_moment && at != CONT_STRIDE) {
			if (stepped || gen == from)
				break;
			stepped = true;
			gen--;
			if (word != cont_word(map.seed, index, gen, at))
				break;
			continue;
		}
		for (g = to; g > from; g--)
			if (word == cont_word(map.seed, index, g, at))
				break;
		gen = g;
		if (word != cont_word(map.seed, index, gen, at))
			break;
	}
	if (at >= map.page)
		return true;
	return fail("page %u (%u of its block) is not of %u to %u at %zu (%u before), %s",
		    page, page % map.bpages, from, to, at, gen, when);
}

static __u64 page_sum(unsigned int page)
{
	const char *p = page_at(page);
	__u64 s = 0;
	size_t at;

	for (at = 0; at < map.page; at += 8)
		s = (s << 1 | s >> 63) + cont_load(p + at);
	return s;
}

static bool can_read(const char *at)
{
	return !access(at, F_OK) || errno != EFAULT;
}

static bool can_write(char *at)
{
	return read(zero_fd, at, 1) == 1;
}

/* ---- futex ------------------------------------------------------------ */

static void wait_go(unsigned int slot)
{
	while (!__atomic_load_n(&sh->go[slot], __ATOMIC_ACQUIRE))
		syscall(__NR_futex, &sh->go[slot], FUTEX_WAIT, 0, NULL, NULL, 0);
}

static void set_go(unsigned int slot)
{
	__atomic_store_n(&sh->go[slot], 1, __ATOMIC_RELEASE);
	syscall(__NR_futex, &sh->go[slot], FUTEX_WAKE, 1, NULL, NULL, 0);
}

/*
 * Writers rest when nobody needs them: busy CPUs slow down the forks. This makes
 * each of them write its pages at least once more.
 */
static void kick_writers(void)
{
	__atomic_fetch_add(&sh->kick, 1, __ATOMIC_ACQ_REL);
	syscall(__NR_futex, &sh->kick, FUTEX_WAKE, RACE_MAX_THREADS, NULL, NULL, 0);
}

/* ---- children --------------------------------------------------------- */

/*
 * A child of a process with threads must not use malloc or stdio.
 */

static bool go_on(struct race *race)
{
	return race_on(race) && !__atomic_load_n(&sh->failed, __ATOMIC_ACQUIRE);
}

static bool reap(pid_t pid)
{
	int status = cont_wait(pid);

	if (status < 0)
		return fail_call("waitpid");
	return !status || fail("process %d ended with status 0x%x", pid, status);
}

/* The first look, page by page. */
static bool look(void)
{
	unsigned int i;

	for (i = 0; i < nr_pages; i++) {
		switch (inherit[i]) {
		case ABSENT:
			if (can_read(page_at(i) + CONT_STRIDE))
				return fail("page %u is there after MADV_DONTFORK", i);
			continue;
		case WIPED:
			if (!cont_page_zero(page_at(i)))
				return fail("page %u is not zero after MADV_WIPEONFORK",
					    i);
			break;
		case COPIED:
			if (pinned_pfn[i] && cont_pfn(page_at(i)) == pinned_pfn[i])
				return fail("page %u is pinned, but shared", i);
			if (!check_range(i, page_at(i), lo[i], hi[i], !pinned,
					 "after fork"))
				return false;
			break;
		}
		sum[i] = page_sum(i);
	}
	return true;
}

static bool look_again(const char *when)
{
	unsigned int i;

	for (i = 0; i < nr_pages; i++)
		if (inherit[i] != ABSENT && page_sum(i) != sum[i])
			return fail("page %u (%u of its block) has changed %s", i,
				    i % map.bpages, when);
	return true;
}

/* Until the parent has overwritten some of the pages; false if it has ended. */
static bool wait_for_writes(struct race *race, __u64 *rand)
{
	unsigned int tries, page;

	for (tries = 0; tries < 8; tries++) {
		page = cont_rand(rand) % nr_pages;
		if (owner_of(page) >= nr_writers)
			continue;
		while (__atomic_load_n(&sh->done[page], __ATOMIC_ACQUIRE) <= hi[page]) {
			if (!go_on(race))
				return false;
			kick_writers();
			sched_yield();
		}
	}
	return true;
}

/* Any part of the window, blocks or not. */
static void choose_range(__u64 *rand, unsigned int *first, unsigned int *nr)
{
	unsigned int max = 2 * map.bpages;

	*first = cont_rand(rand) % nr_pages;
	*nr = 1 + cont_rand(rand) % max;
	if (!(cont_rand(rand) % 4)) {
		*first -= *first % map.bpages;
		*nr = map.bpages;
	}
	if (*nr > nr_pages - *first)
		*nr = nr_pages - *first;
}

/* Unmap a part of it all, or protect it for a while. */
static bool unsettle(__u64 *rand)
{
	unsigned int first, nr, i;
	char *at;

	choose_range(rand, &first, &nr);
	for (i = first; i < first + nr; i++)
		if (inherit[i] == ABSENT)
			return true;
	at = page_at(first);
	if (cont_rand(rand) % 2) {
		if (munmap(at, nr * map.page))
			return fail_call("munmap");
		for (i = first; i < first + nr; i++)
			inherit[i] = ABSENT;
		return true;
	}
	if (mprotect(at, nr * map.page, PROT_READ))
		return fail_call("mprotect");
	if (can_write(at + CONT_STRIDE) ||
	    can_write(at + (nr - 1) * map.page + CONT_STRIDE))
		return fail("can write to what is read only, pages %u + %u", first, nr);
	if (!look_again("by mprotect"))
		return false;
	if (mprotect(at, nr * map.page, PROT_READ | PROT_WRITE))
		return fail_call("mprotect back");
	return true;
}

/* A pattern of its own in single pages and in a run of them. */
static bool write_own(__u64 *rand, unsigned int who)
{
	unsigned int first, nr, i;
	__u64 seed = ~map.seed + who;

	choose_range(rand, &first, &nr);
	for (i = 0; i < nr_pages; i++) {
		if (inherit[i] == ABSENT)
			continue;
		if ((i < first || i >= first + nr) && cont_rand(rand) % 8)
			continue;
		cont_page_fill(page_at(i), seed, i, who);
		if (!cont_page_ok(page_at(i), seed, i, who))
			return fail("page %u is not what the child wrote", i);
		sum[i] = page_sum(i);
	}
	return look_again("by writing to others");
}

static bool grandchild(__u64 *rand, unsigned int who)
{
	pid_t pid, parent = getpid();
	unsigned int i;

	pid = fork();
	if (!pid) {
		cont_die_with(parent);
		role = "grandchild";
		/* The child's VMAs are still to be wiped on fork. */
		for (i = 0; i < nr_pages; i++) {
			if (inherit[i] != WIPED)
				continue;
			if (!cont_page_zero(page_at(i))) {
				fail("page %u is not zero after MADV_WIPEONFORK", i);
				_exit(1);
			}
			sum[i] = page_sum(i);
		}
		_exit(!(look_again("in the child of the child") && unsettle(rand) &&
			write_own(rand, who + GRANDCHILD)));
	}
	if (pid < 0)
		return fail_call("fork");
	return write_own(rand, who) && reap(pid) &&
	       look_again("by the child of the child");
}

static bool child_private(struct race *race, unsigned int slot, __u64 *rand)
{
	unsigned int how = cont_rand(rand) % 8;
	unsigned int who = slot + 1;

	if (!look())
		return false;
	wait_for_writes(race, rand);
	if (!look_again("by writes of the parent"))
		return false;
	/* Both sides take their copies of the pages at the same time. */
	kick_writers();
	if ((how & 1) && !unsettle(rand))
		return false;
	if ((how & 2) && !write_own(rand, who))
		return false;
	if ((how & 4) && !grandchild(rand, who))
		return false;
	wait_go(slot);
	return look_again("until the end");
}

/* Everybody's writes are to be seen while they are made. */
static bool look_live(const char *when)
{
	static __u64 copy[65536 / 8];
	unsigned int i, at;
	__u32 from, to;

	for (i = 0; i < nr_pages; i++) {
		if (inherit[i] == ABSENT)
			continue;
		from = __atomic_load_n(&sh->done[i], __ATOMIC_ACQUIRE);
		for (at = 0; at < map.page / 8; at++)
			copy[at] = cont_load(page_at(i) + 8 * at);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		to = __atomic_load_n(&sh->begun[i], __ATOMIC_RELAXED);
		if (!check_range(i, (char *)copy, from, to, false, when))
			return false;
	}
	return true;
}

static bool child_shared(struct race *race, unsigned int slot, __u64 *rand)
{
	unsigned int i;

	for (i = 0; i < nr_pages; i++)
		if (inherit[i] == ABSENT && can_read(page_at(i) + CONT_STRIDE))
			return fail("page %u is there after MADV_DONTFORK", i);
	if (!look_live("after fork"))
		return false;
	wait_for_writes(race, rand);
	if (!look_live("after writes of the parent"))
		return false;
	if (cont_rand(rand) % 2) {
		unsigned int first, nr;

		choose_range(rand, &first, &nr);
		if (munmap(page_at(first), nr * map.page))
			return fail_call("munmap");
		for (i = first; i < first + nr; i++)
			inherit[i] = ABSENT;
	}
	for (i = 0; i < nr_pages; i++)
		if (inherit[i] != ABSENT && owner_of(i) == nr_writers + slot)
			write_page(i);
	wait_go(slot);
	return look_live("in the end");
}

static void child_main(struct race *race, unsigned int slot, __u64 rand)
{
	unsigned int i;
	bool ok;

	role = "child";
	role_id = slot;
	/* fork() has returned: what has not begun by now cannot be in a page. */
	for (i = 0; i < nr_pages; i++)
		hi[i] = __atomic_load_n(&sh->begun[i], __ATOMIC_ACQUIRE);
	ok = is_shared() ? child_shared(race, slot, &rand) :
			   child_private(race, slot, &rand);
	_exit(!ok);
}

/* ---- the parent ------------------------------------------------------- */

/* Pages of all writers alternate, so that they have every block in common. */
static void writer_main(struct race_thread *t)
{
	unsigned int page, nr = 0, kick;

	role = "writer";
	role_id = t->id;
	while (!__atomic_load_n(&sh->forks_done, __ATOMIC_ACQUIRE)) {
		kick = __atomic_load_n(&sh->kick, __ATOMIC_ACQUIRE);
		for (page = t->id; page < nr_pages; page += nr_owners) {
			/* Out of step with the others, now and then. */
			if (!(cont_rand(&t->rand) % 16))
				continue;
			if (!check_done(page))
				return;
			write_page(page);
			nr++;
		}
		if (__atomic_load_n(&sh->forking, __ATOMIC_ACQUIRE) ||
		    __atomic_load_n(&sh->forks_done, __ATOMIC_ACQUIRE))
			continue;
		syscall(__NR_futex, &sh->kick, FUTEX_WAIT, kick, NULL, NULL, 0);
	}
	/* The last writes have been looked at as well. */
	for (page = t->id; page < nr_pages; page += nr_owners)
		if (!check_done(page))
			return;
	__atomic_fetch_add(&sh->writes, nr, __ATOMIC_RELAXED);
}

/* Pages that no thread writes: of nobody, or of a child that has ended. */
static bool check_others(unsigned int first_owner, unsigned int last_owner)
{
	unsigned int i;

	for (i = 0; i < nr_pages; i++)
		if (owner_of(i) >= first_owner && owner_of(i) <= last_owner &&
		    !check_done(i))
			return false;
	return true;
}

static bool check_pinned(const char *when)
{
	__u64 ent[MAX_PAGES];
	unsigned int i;

	if (!pinned)
		return true;
	if (!cont_pagemap(map.addr, nr_pages, ent))
		return fail_call("pagemap");
	for (i = 0; i < nr_pages; i++)
		if (pinned_pfn[i] && (!(ent[i] & CONT_PM_PRESENT) ||
				      CONT_PM_PFN(ent[i]) != pinned_pfn[i]))
			return fail("pinned page %u was %llx and is %llx, %s", i,
				    pinned_pfn[i], CONT_PM_PFN(ent[i]), when);
	return true;
}

static bool end_child(pid_t *pid, unsigned int slot)
{
	bool ok;

	set_go(slot);
	ok = reap(pid[slot]);
	pid[slot] = 0;
	if (ok && is_shared())
		ok = check_others(nr_writers + slot, nr_writers + slot);
	return ok && check_pinned("after a child has ended");
}

static bool start_child(struct race_thread *t, pid_t *pid, unsigned int slot)
{
	static const int advice[] = { 0, 0, MADV_DONTFORK, MADV_WIPEONFORK };
	static const int back[] = { 0, 0, MADV_DOFORK, MADV_KEEPONFORK };
	unsigned int how = cont_rand(&t->rand) % 4, first, nr, i;
	__u64 rand = cont_rand(&t->rand);
	pid_t parent = getpid();

	choose_range(&t->rand, &first, &nr);
	/* Only anonymous memory can be wiped. */
	if (how == 3 && map.fd >= 0)
		how = 2;
	if (how >= 2 && madvise(page_at(first), nr * map.page, advice[how]))
		return fail_call("MADV_DONTFORK or MADV_WIPEONFORK");
	for (i = 0; i < nr_pages; i++) {
		inherit[i] = COPIED;
		if (how >= 2 && i >= first && i < first + nr)
			inherit[i] = how == 2 ? ABSENT : WIPED;
	}
	sh->go[slot] = 0;
	for (i = 0; i < nr_pages; i++)
		lo[i] = __atomic_load_n(&sh->done[i], __ATOMIC_ACQUIRE);
	__atomic_store_n(&sh->forking, true, __ATOMIC_RELEASE);
	kick_writers();
	pid[slot] = fork();
	if (!pid[slot]) {
		cont_die_with(parent);
		child_main(t->race, slot, rand);
	}
	__atomic_store_n(&sh->forking, false, __ATOMIC_RELEASE);
	if (pid[slot] < 0)
		return fail_call("fork");
	sh->forks++;
	if (how >= 2 && madvise(page_at(first), nr * map.page, back[how]))
		return fail_call("MADV_DOFORK or MADV_KEEPONFORK");
	return check_pinned("after fork");
}

/* Children come and go in any order. */
static void forker_main(struct race_thread *t)
{
	unsigned int forks = 0, slot;
	pid_t pid[SLOTS] = { 0 };
	bool ok = true;

	role = "forker";
	while (ok && forks < ROUND_FORKS && go_on(t->race)) {
		slot = cont_rand(&t->rand) % SLOTS;
		if (pid[slot]) {
			ok = end_child(pid, slot);
		} else {
			forks++;
			ok = start_child(t, pid, slot);
		}
		t->steps++;
	}
	for (slot = cont_rand(&t->rand) % SLOTS; ; slot = (slot + 1) % SLOTS) {
		if (pid[slot] > 0)
			end_child(pid, slot);
		else if (!pid[0] && !pid[1] && !pid[2] && !pid[3])
			break;
		else if (pid[slot] < 0)
			pid[slot] = 0;
	}
	if (nr_owners > nr_writers)
		check_others(nr_writers, nr_owners - 1);
	__atomic_store_n(&sh->forks_done, true, __ATOMIC_RELEASE);
	kick_writers();
}

/* ---- rounds ----------------------------------------------------------- */

/* From the middle of a block to the middle of another one; -1: cannot pin. */
static int pin(void)
{
	__u64 params[15] = { 0 }, ent[MAX_PAGES];
	unsigned int first = map.bpages / 2 - 1, nr = map.bpages + 3, i;
	struct iovec iov = { page_at(first), nr * map.page };
	int fd;

	fd = syscall(__NR_io_uring_setup, 1, params);
	if (fd < 0)
		return -1;
	if (syscall(__NR_io_uring_register, fd, URING_REGISTER_BUFFERS, &iov, 1) ||
	    !cont_pagemap(map.addr, nr_pages, ent)) {
		close(fd);
		return -1;
	}
	memset(pinned_pfn, 0, sizeof(pinned_pfn));
	for (i = first; i < first + nr; i++)
		pinned_pfn[i] = CONT_PM_PFN(ent[i]);
	return fd;
}

static void unpin(int fd)
{
	syscall(__NR_io_uring_register, fd, URING_UNREGISTER_BUFFERS, NULL, 0);
	close(fd);
}

static bool run_round(struct race *race)
{
	struct race_thread t[RACE_MAX_THREADS] = {};

	sh->forks_done = false;
	sh->forking = false;
	memset(sh->begun, 0, sizeof(sh->begun));
	memset(sh->done, 0, sizeof(sh->done));
	t[nr_writers].fn = forker_main;
	race_run(race, t, nr_writers + 1, writer_main);
	return !sh->failed && check_others(0, nr_owners - 1);
}

struct fork_case {
	const char *name;
	enum cont_source src;
	int flags;		/* of the mapping; 0: as usual */
	bool pinned;
	bool folded;		/* no race: does it stay folded? */
	bool cow;		/* ... with some pages that were written to */
};

static bool after(const struct timespec *end)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > end->tv_sec ||
	       (now.tv_sec == end->tv_sec && now.tv_nsec >= end->tv_nsec);
}

static void __attribute__((noreturn)) end_case(int ret, const char *why)
{
	if (!sh->failed)
		snprintf(sh->why, sizeof(sh->why), "%s", why);
	_exit(ret == CONT_MAKE_SKIP ? KSFT_SKIP : KSFT_FAIL);
}

static void race_case(struct race *race, const struct fork_case *c)
{
	__u64 seed = race->seed;
	struct timespec end;
	int ret, fd = -1;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += race->seconds;
	ret = cont_map_make_as(&map, c->src, NR_BLOCKS, PROT_READ | PROT_WRITE,
			       c->flags);
	nr_writers = race->threads - 1;
	nr_owners = nr_writers + (is_shared() ? SLOTS : map.fd >= 0 ? 1 : 0);
	while (!ret) {
		nr_pages = NR_BLOCKS * map.bpages;
		if (c->pinned) {
			fd = pin();
			if (fd < 0)
				end_case(CONT_MAKE_SKIP, "io_uring cannot pin pages");
			pinned = true;
		}
		race->seed = cont_mix(seed + sh->rounds);
		if (!run_round(race))
			_exit(1);
		if (fd >= 0)
			unpin(fd);
		sh->rounds++;
		if (after(&end))
			_exit(0);
		ret = cont_map_renew(&map);
	}
	/* One round is a race, if not a long one. */
	if (ret == CONT_MAKE_SKIP && sh->rounds)
		_exit(0);
	end_case(ret, map.why);
}

/* ---- do they stay folded? --------------------------------------------- */

/* fork() may make nothing that was folded and can be folded into small pages. */
static bool compare(const char *who, __u64 folded, __u64 expect, bool odd)
{
	if (folded == expect && !odd)
		return true;
	return fail("of the %s %llx is folded%s, %llx can be", who, folded,
		    odd ? " (some in part)" : "", expect);
}

static bool compare_now(const char *who)
{
	bool odd;
	__u64 folded = cont_folded_bits(map.addr, map.len, &odd);

	return compare(who, folded, cont_expect_bits(map.addr, map.len), odd);
}

static void folded_case(const struct fork_case *c)
{
	pid_t pid, parent = getpid();
	int ret, hold[2];
	char byte;

	if (!cont_supported())
		end_case(CONT_MAKE_SKIP, CONT_NO_SUPPORT);
	ret = cont_map_make_as(&map, c->src, NR_BLOCKS, PROT_READ | PROT_WRITE,
			       c->flags);
	if (ret)
		end_case(ret, map.why);
	/* An anon_vma has fork() copy the page tables of a file mapping, too. */
	if (c->cow)
		cont_fill(&map, map.bpages + 1, 1, 1);
	if (!compare_now("parent before fork"))
		_exit(1);
	if (pipe2(hold, O_CLOEXEC))
		end_case(CONT_MAKE_FAIL, "pipe failed");
	pid = fork();
	if (!pid) {
		cont_die_with(parent);
		role = "child";
		close(hold[1]);
		sh->folded = cont_folded_bits(map.addr, map.len, &sh->odd);
		sh->expect = cont_expect_bits(map.addr, map.len);
		while (read(hold[0], &byte, 1) < 0 && errno == EINTR)
			;
		_exit(0);
	}
	if (pid < 0)
		end_case(CONT_MAKE_FAIL, "fork failed");
	close(hold[0]);
	if (!compare_now("parent after fork"))
		_exit(1);
	close(hold[1]);
	if (!reap(pid) || !compare_now("parent after the child's end") ||
	    !compare("child", sh->folded, sh->expect, sh->odd))
		_exit(1);
	/* The data is as it was, in what is left of the block as well. */
	if (cont_bad(&map, 0, map.bpages, 0) ||
	    cont_bad(&map, map.bpages + 1, 1, c->cow))
		end_case(CONT_MAKE_FAIL, "data has changed");
	_exit(0);
}

/* ---- main ------------------------------------------------------------- */

static void run_case(struct race *race, const struct fork_case *c)
{
	pid_t parent = getpid(), pid;
	int status;

	memset(sh, 0, sizeof(*sh));
	pid = cont_fork();
	if (!pid) {
		cont_die_with(parent);
		alarm(WATCHDOG + 4 * race->seconds);
		zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
		if (c->folded)
			folded_case(c);
		race_case(race, c);
	}
	status = cont_wait(pid);
	if (status < 0)
		ksft_exit_fail_msg("child: %s\n", strerror(errno));
	if (!c->folded)
		ksft_print_msg("%s: %lu rounds, %lu forks, %lu pages written\n",
			       c->name, sh->rounds, sh->forks, sh->writes);
	race_child_result(race, c->name, status, sh->why, sh->rounds);
}

static const struct fork_case cases[] = {
	{ .name = "anonymous THP mapped by PTEs", .src = CONT_ANON },
	{ .name = "whole THP", .src = CONT_THP },
	{ .name = "private file mapping, some pages written", .src = CONT_XFS,
	  .flags = MAP_PRIVATE },
	{ .name = "shared shmem", .src = CONT_SHMEM },
	{ .name = "pinned anonymous pages", .src = CONT_ANON, .pinned = true },
	{ .name = "anonymous blocks stay folded", .src = CONT_ANON, .folded = true },
	{ .name = "blocks of a private file mapping stay folded", .src = CONT_XFS,
	  .flags = MAP_PRIVATE, .folded = true, .cow = true },
};

#define NR_CASES	ARRAY_SIZE(cases)

int main(int argc, char **argv)
{
	struct race race;
	unsigned int i;

	race_options(&race, argc, argv, DEFAULT_SECONDS, DEFAULT_THREADS);
	ksft_set_plan(NR_CASES);
	sh = race_shared(sizeof(*sh));
	cont_on_fault(on_fault);

	for (i = 0; i < NR_CASES; i++)
		run_case(&race, &cases[i]);

	ksft_print_cnts();
	return ksft_get_fail_cnt() ? KSFT_FAIL : KSFT_PASS;
}
