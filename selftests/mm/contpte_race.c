// SPDX-License-Identifier: GPL-2.0-only
/*
 * Unmapping, madvise, mprotect, mremap, mlock and fork of blocks and of odd parts
 * of blocks, by threads and processes that meet in the same blocks.
 *
 * Claim: whatever is done to a block as a whole and to parts of it at the same
 * time, and through however many page tables, every page keeps its data, what
 * was unmapped is gone, what was protected faults, only aligned pieces of one
 * folio are folded, and the counters of the mm agree with its page tables.
 *
 * Oracle: every page carries the seed of the thread that wrote it last, its
 * generation and its index; a table outside of the memory under test says what
 * these are. A thread takes pages before it does anything to them that others
 * would notice, and looks at them when it is done. Threads take ranges, not
 * blocks, so several of them are at work in one block. What can be done without
 * anybody noticing is done to all pages at any time. Protection is checked by
 * system calls that have to fail with EFAULT, unmapping by pagemap, folding by
 * pagemap and kpageflags (see contpte_util.h), counters by comparing what
 * /proc/self/status says before and after. Each case is a process of its own,
 * because the kernel compares the counters with zero when it ends ("Bad
 * rss-counter state" on the console).
 *
 * Breaks on: clearing that resurrects or misses entries of a block, batches that
 * run over the end of the range, the VMA or the page table, TLB entries left
 * behind by protecting or moving a block, a dirty bit lost in unfolding (paged
 * out pages come back old), wrong rmap or rss arithmetic of a batch, entries
 * that differ within a block, a walker (clear_refs, idle pages, compaction,
 * smaps) that trips over a block being changed.
 *
 * Options: see race_util.h. With -n each case makes new folios more often. With
 * -t N the cases of processes have N / 2 threads in each of 3 processes.
 */
#include "race_util.h"
#include <signal.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define DEFAULT_SECONDS	1
#define DEFAULT_THREADS	4

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ	22
#define MADV_POPULATE_WRITE	23
#endif

/* Few enough for the threads to meet in them. */
#define NR_BLOCKS	6
/* All of a THP of 2M. Of larger ones only NR_BLOCKS blocks take part. */
#define MAX_PAGES	(NR_BLOCKS * 128)
#define NR_PROCS	3
/* A step takes at most this many blocks, but now and then the whole THP. */
#define STEP_BLOCKS	(cont_page_size() == 4096 ? 3 : 2)
/* Then the window is made anew: nothing in 6.1 makes large folios again. */
#define ROUND_STEPS	32
/* For the case that a step never returns. */
#define WATCHDOG	300

/* Children write as somebody else than their parents. */
#define CHILD_OWNER	0x8000

enum op {
	/* on pages that the thread has taken */
	OP_LOOK,
	OP_WRITE,
	OP_PROT_READ,
	OP_PROT_NONE,
	OP_DONTNEED,
	OP_FREE,
	OP_PAGEOUT,
	OP_UNMAP,
	OP_MAP_OVER,
	OP_MOVE,
	OP_MOVE_SKEWED,
	OP_LOCK,
	OP_FORK,
	OP_GUP,
	/* on any pages: nothing that whoever has taken them could see */
	OP_ANY_COLD,
	OP_ANY_PAGEOUT,
	OP_ANY_SPLIT,
	OP_ANY_POPULATE,
	OP_ANY_DONTNEED,
	NR_OPS,
};

static const struct {
	const char *name;
	unsigned int weight;
} ops[NR_OPS] = {
	[OP_LOOK]		= { "look", 2 },
	[OP_WRITE]		= { "write", 6 },
	[OP_PROT_READ]		= { "mprotect to read only and back", 4 },
	[OP_PROT_NONE]		= { "mprotect to none and back", 4 },
	[OP_DONTNEED]		= { "MADV_DONTNEED", 2 },
	[OP_FREE]		= { "MADV_FREE", 1 },
	[OP_PAGEOUT]		= { "MADV_PAGEOUT", 1 },
	[OP_UNMAP]		= { "munmap and mmap", 3 },
	[OP_MAP_OVER]		= { "mmap over it", 1 },
	[OP_MOVE]		= { "mremap there and back", 4 },
	[OP_MOVE_SKEWED]	= { "mremap to an odd place and back", 2 },
	[OP_LOCK]		= { "mlock and munlock", 2 },
	[OP_FORK]		= { "fork", 2 },
	[OP_GUP]		= { "vmsplice", 2 },
	[OP_ANY_COLD]		= { "MADV_COLD of anything", 1 },
	[OP_ANY_PAGEOUT]	= { "MADV_PAGEOUT of anything", 1 },
	[OP_ANY_SPLIT]		= { "split and merge of VMAs", 4 },
	[OP_ANY_POPULATE]	= { "populate anything", 3 },
	[OP_ANY_DONTNEED]	= { "MADV_DONTNEED of any file pages", 4 },
};

enum content {
	WRITTEN,		/* generation gen */
	ZERO,
	WRITTEN_OR_ZERO,	/* the same, unless the kernel dropped it */
};

struct page_state {
	__u32 gen;		/* 0: as cont_map_make() filled it */
	__u16 owner;
	__u16 content;
};

/* What all processes of a case share. It survives all of them. */
struct shared {
	bool failed;
	bool told;
	unsigned int active;	/* threads that still step */
	unsigned long steps;
	unsigned long background;
	unsigned long skipped;	/* steps that got no pages */
	unsigned long rounds;
	pid_t pid[NR_PROCS];
	char why[200];
	/* Who has taken the data of a page: 0 or the id of the thread + 1. */
	__u8 taken[MAX_PAGES];
	/* Belongs to who has taken the page. */
	struct page_state page[MAX_PAGES];
};

static struct shared *sh;
static struct cont_map map;
static unsigned int nr_pages;	/* that take part, from the first on */

/* Of this process. */
static char *base;		/* where page 0 is */
static __u8 mapped_by[MAX_PAGES];	/* who has taken the mapping of a page */
static int zero_fd = -1;

/* A thread of the race. */
struct worker {
	unsigned int id;	/* in all processes */
	struct race_thread *t;
	char *spare;		/* address space to move to, aligned like the window */
	char *resv;
	size_t resv_len;
	int pipe[2];
	char *buf;		/* of a page */
	__u32 gen;
	struct page_state *snap;	/* what the pages of a step were at fork */
	bool child;
	/* the step */
	enum op op;
	unsigned int first;
	unsigned int nr;
};

static __thread struct worker *self;

/* ---- reports ---------------------------------------------------------- */

/*
 * Of several reports the first is kept. Others may be in the middle of a step
 * that they cannot finish if this is a child: then they see sh->failed.
 */
static bool __attribute__((format(printf, 2, 3)))
fail(struct worker *w, const char *fmt, ...)
{
	char msg[120];
	va_list ap;

	if (!__atomic_exchange_n(&sh->told, true, __ATOMIC_ACQ_REL)) {
		va_start(ap, fmt);
		vsnprintf(msg, sizeof(msg), fmt, ap);
		va_end(ap);
		if (w)
			snprintf(sh->why, sizeof(sh->why),
				 "thread %u, step %u, %s of pages %u + %u: %s",
				 w->id, w->gen, ops[w->op].name, w->first, w->nr,
				 msg);
		else
			snprintf(sh->why, sizeof(sh->why), "%s", msg);
	}
	__atomic_store_n(&sh->failed, true, __ATOMIC_RELEASE);
	return false;
}

static bool fail_call(struct worker *w, const char *call)
{
	return fail(w, "%s: %s", call, strerror(errno));
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fail(self, "signal %d at %p (window at %p)", sig, info->si_addr, base);
	_exit(1);
}

/* ---- pages and what they have to hold --------------------------------- */

static bool is_file(void)
{
	return map.fd >= 0;
}

static unsigned int below(struct worker *w, unsigned int n)
{
	return cont_rand(&w->t->rand) % n;
}

static char *page_at(unsigned int page)
{
	return base + page * map.page;
}

static __u64 owner_seed(unsigned int owner, __u32 gen)
{
	return gen ? map.seed + 1 + owner : map.seed;
}

static bool page_ok(const struct page_state *st, unsigned int page, const char *at)
{
	if (st->content != ZERO &&
	    cont_page_ok(at, owner_seed(st->owner, st->gen),
			 cont_index(&map, page), st->gen))
		return true;
	/* In this order: the kernel may drop the page while it is looked at. */
	return st->content != WRITTEN && cont_page_zero(at);
}

static void page_write(struct page_state *st, unsigned int page, char *at,
		       unsigned int owner, __u32 gen)
{
	st->owner = owner;
	st->gen = gen;
	st->content = WRITTEN;
	cont_page_fill(at, owner_seed(owner, gen), cont_index(&map, page), gen);
}

/* In a case of processes a thread may have the mapping of a page only. */
static bool is_mine(struct worker *w, unsigned int page)
{
	return sh->taken[page] == w->id + 1;
}

/* The pages of the step, the first of which is seen at "at". */
static bool verify_at(struct worker *w, const char *at, const char *when)
{
	unsigned int i;

	for (i = 0; i < w->nr; i++, at += map.page) {
		const struct page_state *st = &sh->page[w->first + i];

		if (w->child)
			st = &w->snap[i];
		if (!is_mine(w, w->first + i))
			cont_load(at);
		else if (!page_ok(st, w->first + i, at))
			return fail(w, "page %u (%u of its block) is not %s%u of %u, %s",
				    w->first + i, (w->first + i) % map.bpages,
				    st->content == WRITTEN ? "" : "zero or ",
				    st->content == ZERO ? 0 : st->gen, st->owner,
				    when);
	}
	return true;
}

static bool verify(struct worker *w, const char *when)
{
	return verify_at(w, page_at(w->first), when);
}

static void write_pages(struct worker *w)
{
	unsigned int i;

	for (i = w->first; i < w->first + w->nr; i++)
		if (is_mine(w, i))
			page_write(&sh->page[i], i, page_at(i), w->id, w->gen);
}

static void set_content(struct worker *w, enum content c)
{
	unsigned int i;

	/* What is zero already cannot become anything else. */
	for (i = w->first; i < w->first + w->nr; i++)
		if (c != WRITTEN_OR_ZERO || sh->page[i].content != ZERO)
			sh->page[i].content = c;
}

/* Nothing at all is mapped there. */
static bool verify_none(struct worker *w, const char *at, const char *when)
{
	unsigned int i, j, now;
	__u64 ent[64];

	for (i = 0; i < w->nr; i += now) {
		now = w->nr - i < 64 ? w->nr - i : 64;
		if (!cont_pagemap(at + i * map.page, now, ent))
			return fail_call(w, "pagemap");
		for (j = 0; j < now; j++)
			if (ent[j] & (CONT_PM_PRESENT | CONT_PM_SWAP))
				return fail(w, "page %u is still there (%llx) %s",
					    w->first + i + j, ent[j], when);
	}
	return true;
}

/*
 * The kernel's own accesses to user memory obey the same page tables, and give
 * an error where a thread would get a signal.
 */
static bool can_write(char *at)
{
	return read(zero_fd, at, 1) == 1;
}

static bool can_read(const char *at)
{
	return !access(at, F_OK) || errno != EFAULT;
}

/* First, last and any page of the step. */
static char *probe(struct worker *w, unsigned int i)
{
	unsigned int page = w->first;

	if (i == 1)
		page += w->nr - 1;
	else if (i == 2)
		page += below(w, w->nr);
	return page_at(page) + CONT_STRIDE;
}

/* ---- who has which page ----------------------------------------------- */

static bool take(__u8 *lock, unsigned int id)
{
	__u8 none = 0;

	return __atomic_compare_exchange_n(lock, &none, id + 1, false,
					   __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static void give_back(struct worker *w)
{
	unsigned int i;

	for (i = w->first; i < w->first + w->nr; i++) {
		if (is_mine(w, i))
			__atomic_store_n(&sh->taken[i], 0, __ATOMIC_RELEASE);
		__atomic_store_n(&mapped_by[i], 0, __ATOMIC_RELEASE);
	}
	w->nr = 0;
}

/* Takes as much of the range of the step as nobody has, from its start on. */
static unsigned int take_pages(struct worker *w)
{
	unsigned int want = w->nr;

	for (w->nr = 0; w->nr < want; w->nr++) {
		if (!take(&mapped_by[w->first + w->nr], w->id))
			break;
		take(&sh->taken[w->first + w->nr], w->id);
	}
	return w->nr;
}

/* Whole blocks, blocks with odd ends, what straddles blocks, a bit of a block. */
static void choose_range(struct worker *w)
{
	unsigned int bp = map.bpages, blocks, end;

	/* Page by page this would take seconds. */
	if (map.src == CONT_THP && nr_pages == map.nr_pages && !below(w, 20) &&
	    w->op != OP_FORK && w->op != OP_MOVE_SKEWED && w->op != OP_PAGEOUT) {
		w->first = 0;
		w->nr = nr_pages;
		return;
	}
	blocks = 1 + below(w, STEP_BLOCKS);
	w->first = below(w, nr_pages / bp - blocks + 1) * bp;
	end = w->first + blocks * bp;
	switch (below(w, 8)) {
	case 0 ... 3:
		break;
	case 4:
		w->first += below(w, bp);
		break;
	case 5:
		end -= below(w, bp);
		break;
	case 6:
		w->first += below(w, bp);
		end -= below(w, end - w->first);
		break;
	case 7:
		w->first += below(w, blocks * bp);
		end = w->first + 1;
		break;
	}
	w->nr = end - w->first;
}

/* False if everything that was tried is in other hands. */
static bool choose_pages(struct worker *w)
{
	unsigned int tries, want;

	for (tries = 0; tries < 8; tries++) {
		choose_range(w);
		want = w->nr;
		if (take_pages(w) == want)
			return true;
		/* What others have makes one more odd end. */
		if (w->nr && (tries >= 4 || !below(w, 4)))
			return true;
		give_back(w);
	}
	return false;
}

/* ---- operations ------------------------------------------------------- */

/*
 * From here to the end of the race nothing may ask the kernel for an address
 * (malloc, stdio, mmap(NULL)): it would be given a hole that a step has just
 * made, and the end of the step maps over it.
 */

static bool map_again(struct worker *w, char *at, size_t len)
{
	int flags = map.flags | MAP_FIXED | (is_file() ? 0 : MAP_ANONYMOUS | MAP_NORESERVE);
	off_t off = is_file() ? map.off + (off_t)(w->first * map.page) : 0;

	if (mmap(at, len, PROT_READ | PROT_WRITE, flags, map.fd, off) != at)
		return fail_call(w, "mmap");
	if (is_file())
		return true;
	set_content(w, ZERO);
	/* As the rest of the window, to become one VMA with it. */
	if (madvise(at, len, map.src == CONT_THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		return fail_call(w, "MADV_(NO)HUGEPAGE");
	return true;
}

static bool move(char *from, char *to, size_t len)
{
	size_t half = len / map.page / 2 * map.page;

	if (cont_mremap(from, len, to))
		return true;
	/* More than one VMA, because of OP_ANY_SPLIT, does not move in one go. */
	return errno == EFAULT && half && move(from, to, half) &&
	       move(from + half, to + half, len - half);
}

static bool do_move(struct worker *w, char *at, size_t len)
{
	char *to = w->spare + (at - base);

	if (w->op == OP_MOVE_SKEWED)
		to += map.page * (1 + below(w, map.bpages - 1));
	if (!move(at, to, len))
		return fail_call(w, "mremap");
	if (!verify_none(w, at, "after mremap") ||
	    !verify_at(w, to, "after mremap"))
		return false;
	if (!move(to, at, len))
		return fail_call(w, "mremap back");
	if (!verify_none(w, to, "after mremap back"))
		return false;
	if (mmap(to, len, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != to)
		return fail_call(w, "mmap of spare space");
	return true;
}

/* The pages of its parent's step are all that a child knows about. */
static bool child_main(struct worker *w)
{
	size_t len = w->nr * map.page;
	unsigned int i, first, nr;
	char *at = page_at(w->first);

	if (!verify(w, "in the child"))
		return false;
	/* Others use the same folios through the page tables of the parent. */
	first = below(w, nr_pages);
	nr = 1 + below(w, nr_pages - first);
	if (first + nr <= w->first || first >= w->first + w->nr)
		munmap(page_at(first), nr * map.page);
	if (is_file())
		return (!madvise(at, len, MADV_DONTNEED) || fail_call(w, "MADV_DONTNEED")) &&
		       verify(w, "in the child after MADV_DONTNEED");

	/* Some pages: each of them takes a fault and a flush of the TLB. */
	for (i = w->first; i < w->first + w->nr; i += 1 + below(w, 1 + w->nr / 8)) {
		struct page_state st;

		page_write(&st, i, page_at(i), CHILD_OWNER + w->id, w->gen);
		if (!page_ok(&st, i, page_at(i)))
			return fail(w, "child's page %u is not what it wrote", i);
		if (below(w, 2))
			munmap(page_at(i), map.page);
	}
	return true;
}

static bool do_fork(struct worker *w)
{
	pid_t pid, parent = getpid();
	int status;

	memcpy(w->snap, &sh->page[w->first], w->nr * sizeof(*w->snap));
	pid = fork();
	if (!pid) {
		cont_die_with(parent);
		w->child = true;
		_exit(child_main(w) ? 0 : 1);
	}
	if (pid < 0)
		return fail_call(w, "fork");
	/* Writing takes the pages away from the child. */
	if (!is_file() && below(w, 2)) {
		w->gen++;
		write_pages(w);
	}
	status = cont_wait(pid);
	if (status < 0)
		return fail_call(w, "waitpid");
	if (status)
		return fail(w, "child ended with status 0x%x", status);
	return true;
}

/* gup-fast, by the pipe; what it got is read from there. */
static bool do_gup(struct worker *w)
{
	unsigned int i, nr = w->nr < 8 ? w->nr : 8, done = 0;
	unsigned int first = w->first + below(w, w->nr - nr + 1);
	struct iovec iov = { page_at(first), nr * map.page };
	bool ok = true;
	ssize_t n;

	n = vmsplice(w->pipe[1], &iov, 1, SPLICE_F_NONBLOCK);
	if (n < 0)
		return fail_call(w, "vmsplice");
	for (i = first; ok && n >= (ssize_t)map.page; i++, n -= map.page) {
		for (done = 0; ok && done < map.page;) {
			ssize_t got = read(w->pipe[0], w->buf + done, map.page - done);

			ok = got > 0;
			done += got;
		}
		if (!ok)
			fail_call(w, "read of the pipe");
		else if (is_mine(w, i) && !page_ok(&sh->page[i], i, w->buf))
			ok = fail(w, "vmsplice of page %u gave something else", i);
	}
	return ok;
}

static bool do_op(struct worker *w)
{
	char *at = page_at(w->first);
	size_t len = w->nr * map.page;
	unsigned int i;

	switch (w->op) {
	case OP_WRITE:
		write_pages(w);
		break;
	case OP_PROT_READ:
		if (mprotect(at, len, PROT_READ))
			return fail_call(w, "mprotect to read only");
		for (i = 0; i < 3; i++)
			if (can_write(probe(w, i)))
				return fail(w, "can write to what is read only");
		if (!verify(w, "read only"))
			return false;
		if (mprotect(at, len, PROT_READ | PROT_WRITE))
			return fail_call(w, "mprotect back");
		if (below(w, 2))
			write_pages(w);
		break;
	case OP_PROT_NONE:
		if (mprotect(at, len, PROT_NONE))
			return fail_call(w, "mprotect to none");
		for (i = 0; i < 3; i++)
			if (can_read(probe(w, i)))
				return fail(w, "can read what must not be accessed");
		if (mprotect(at, len, PROT_READ | PROT_WRITE))
			return fail_call(w, "mprotect back");
		if (below(w, 2))
			write_pages(w);
		break;
	case OP_DONTNEED:
		if (madvise(at, len, MADV_DONTNEED))
			return fail_call(w, "MADV_DONTNEED");
		if (!is_file())
			set_content(w, ZERO);
		break;
	case OP_FREE:
		if (is_file())
			break;
		if (madvise(at, len, MADV_FREE))
			return fail_call(w, "MADV_FREE");
		set_content(w, WRITTEN_OR_ZERO);
		break;
	case OP_PAGEOUT:
		write_pages(w);
		if (madvise(at, len, MADV_PAGEOUT))
			return fail_call(w, "MADV_PAGEOUT");
		break;
	case OP_UNMAP:
		if (munmap(at, len))
			return fail_call(w, "munmap");
		if (!verify_none(w, at, "after munmap") || !map_again(w, at, len))
			return false;
		break;
	case OP_MAP_OVER:
		if (!map_again(w, at, len))
			return false;
		break;
	case OP_MOVE:
	case OP_MOVE_SKEWED:
		if (!do_move(w, at, len))
			return false;
		break;
	case OP_LOCK:
		if (mlock(at, len))
			return fail_call(w, "mlock");
		if (!verify(w, "locked"))
			return false;
		if (munlock(at, len))
			return fail_call(w, "munlock");
		break;
	case OP_FORK:
		if (!do_fork(w))
			return false;
		break;
	case OP_GUP:
		if (!do_gup(w))
			return false;
		break;
	default:
		break;
	}
	return verify(w, "after the operation");
}

/*
 * There may be holes, locked VMAs and any protection: an error is fine, and says
 * nothing about how much was done.
 */
static bool do_any(struct worker *w)
{
	char *at = page_at(w->first);
	size_t len = w->nr * map.page;
	unsigned int nr = w->nr;

	switch (w->op) {
	case OP_ANY_COLD:
		madvise(at, len, MADV_COLD);
		break;
	case OP_ANY_PAGEOUT:
		madvise(at, len, MADV_PAGEOUT);
		break;
	case OP_ANY_SPLIT:
		madvise(at, len, MADV_DONTDUMP);
		madvise(at, len, MADV_DODUMP);
		break;
	case OP_ANY_POPULATE:
		madvise(at, len, below(w, 2) ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
		break;
	case OP_ANY_DONTNEED:
		if (is_file())
			madvise(at, len, MADV_DONTNEED);
		break;
	default:
		break;
	}
	/* Whatever of it nobody has in hands must be as it was. */
	w->nr = nr;
	if (take_pages(w) && !verify(w, "after the operation"))
		return false;
	give_back(w);
	return true;
}

static void choose_op(struct worker *w)
{
	unsigned int total = 0, n, i;

	for (i = 0; i < NR_OPS; i++)
		total += ops[i].weight;
	n = below(w, total);
	for (i = 0; n >= ops[i].weight; i++)
		n -= ops[i].weight;
	w->op = i;
}

static bool go_on(struct race_thread *t)
{
	return race_on(t->race) && !__atomic_load_n(&sh->failed, __ATOMIC_ACQUIRE);
}

static void worker_main(struct race_thread *t)
{
	struct worker *w = t->arg;

	self = w;
	w->t = t;
	while (t->steps < ROUND_STEPS && go_on(t)) {
		t->steps++;
		w->gen += 2;
		choose_op(w);
		if (w->op >= OP_ANY_COLD) {
			choose_range(w);
			if (!do_any(w))
				break;
		} else if (choose_pages(w)) {
			if (!do_op(w))
				break;
			give_back(w);
		} else {
			__atomic_fetch_add(&sh->skipped, 1, __ATOMIC_RELAXED);
		}
	}
	__atomic_fetch_add(&sh->steps, t->steps, __ATOMIC_RELAXED);
	__atomic_fetch_sub(&sh->active, 1, __ATOMIC_RELEASE);
}

/* ---- background ------------------------------------------------------- */

/* Pages of one block, through their entry in the mm of this process. */
static void mark_idle(struct worker *w)
{
	unsigned int first = below(w, nr_pages / map.bpages) * map.bpages, i;
	__u64 ent[128], all = ~0ULL, last = 0, word;
	int fd;

	fd = open("/sys/kernel/mm/page_idle/bitmap", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (cont_pagemap(page_at(first), map.bpages, ent)) {
		for (i = 0; i < map.bpages; i++) {
			word = CONT_PM_PFN(ent[i]) / 64;
			if (!(ent[i] & CONT_PM_PRESENT) || word == last)
				continue;
			last = word;
			/* What is no page of anybody is left out by the kernel. */
			if (pwrite(fd, &all, 8, word * 8) != 8)
				break;
		}
	}
	close(fd);
}

/* Rss counts every present page once, folded or not. */
static bool check_vma(struct worker *w, long size, long rss, long folded)
{
	if (rss > size || folded > rss)
		return fail(w, "smaps says Size %ld, Rss %ld, ContPteMapped %ld kB",
			    size, rss, folded);
	return true;
}

static bool read_smaps(struct worker *w, pid_t pid)
{
	static char buf[16384 + 1];
	long size = -1, rss = -1, folded = 0;
	char path[64], *line, *end;
	size_t have = 0;
	bool ok = true;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return true;
	while (ok && (n = read(fd, buf + have, sizeof(buf) - 1 - have)) > 0) {
		have += n;
		buf[have] = '\0';
		for (line = buf; (end = strchr(line, '\n')); line = end + 1) {
			if (!strncmp(line, "Size:", 5)) {
				size = atol(line + 5);
				rss = -1;
				folded = 0;
			} else if (!strncmp(line, "Rss:", 4)) {
				rss = atol(line + 4);
			} else if (!strncmp(line, "ContPteMapped:", 14)) {
				folded = atol(line + 14);
			} else if (!strncmp(line, "VmFlags:", 8) && rss >= 0) {
				ok = ok && check_vma(w, size, rss, folded);
			}
		}
		have -= line - buf;
		memmove(buf, line, have);
	}
	close(fd);
	return ok;
}

static void read_pagemap(struct worker *w, pid_t pid)
{
	unsigned int first = below(w, nr_pages);
	char path[64];
	__u64 ent[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (pread(fd, ent, sizeof(ent), (uintptr_t)page_at(first) / map.page * 8) < 0)
		fail_call(w, "pagemap");
	close(fd);
}

static void move_to_node(struct worker *w, pid_t pid)
{
	unsigned int first = below(w, nr_pages), nr, i;
	int node[16], status[16], to = below(w, 2);
	void *page[16];

	nr = nr_pages - first < 16 ? nr_pages - first : 16;
	for (i = 0; i < nr; i++) {
		page[i] = page_at(first + i);
		node[i] = to;
	}
	/* MPOL_MF_MOVE_ALL: others map them, too. */
	syscall(__NR_move_pages, pid, nr, page, node, status, 4);
}

/* Steps that others may notice only by their time. */
static void background_main(struct race_thread *t)
{
	struct worker *w = t->arg;
	unsigned char vec[128];
	char path[64];
	pid_t pid;

	self = w;
	w->t = t;
	w->op = OP_LOOK;
	while (go_on(t) && __atomic_load_n(&sh->active, __ATOMIC_ACQUIRE)) {
		t->steps++;
		pid = sh->pid[below(w, NR_PROCS)];
		if (!pid)
			pid = getpid();
		switch (below(w, 16)) {
		case 0 ... 3:
			snprintf(path, sizeof(path), "/proc/%d/clear_refs", pid);
			cont_write_str(path, "1");
			break;
		case 4 ... 6:
			mark_idle(w);
			break;
		case 7:
			/* Takes long, and is at work on all memory. */
			if (!below(w, 4))
				cont_write_str("/proc/sys/vm/compact_memory", "1");
			break;
		case 8 ... 9:
			if (is_file() && fdatasync(map.fd))
				fail_call(w, "fdatasync");
			break;
		case 10:
			if (!read_smaps(w, pid))
				return;
			break;
		case 11 ... 12:
			read_pagemap(w, pid);
			break;
		case 13:
			mincore(page_at(below(w, nr_pages / map.bpages) * map.bpages),
				map.block, vec);
			break;
		default:
			move_to_node(w, pid);
			break;
		}
	}
	__atomic_fetch_add(&sh->background, t->steps, __ATOMIC_RELAXED);
}

/* ---- rounds ----------------------------------------------------------- */

static bool make_spare(struct worker *w)
{
	w->resv_len = 3 * map.pmd + map.len;
	w->resv = cont_reserve(w->resv_len);
	w->buf = mmap(NULL, map.page, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	w->snap = malloc(MAX_PAGES * sizeof(*w->snap));
	if (w->resv == MAP_FAILED || w->buf == MAP_FAILED || !w->snap ||
	    pipe2(w->pipe, O_CLOEXEC | O_NONBLOCK))
		return fail(NULL, "cannot set up a thread: %s", strerror(errno));
	w->spare = cont_align_up(w->resv, map.pmd) +
		   ((uintptr_t)base & (map.pmd - 1));
	return true;
}

static void free_spare(struct worker *w)
{
	munmap(w->resv, w->resv_len);
	munmap(w->buf, map.page);
	free(w->snap);
	close(w->pipe[0]);
	close(w->pipe[1]);
}

/* Threads of this process, whose ids begin with first_id, have their round. */
static void run_threads(struct race *race, unsigned int first_id, unsigned int nr,
			bool background)
{
	struct race_thread t[RACE_MAX_THREADS + 1] = {};
	static struct worker w[RACE_MAX_THREADS + 1];
	unsigned int i, all = nr + background;

	memset(w, 0, sizeof(w));
	memset(mapped_by, 0, sizeof(mapped_by));
	for (i = 0; i < all; i++) {
		w[i].id = first_id + i;
		if (!make_spare(&w[i]))
			return;
		t[i].arg = &w[i];
		if (i == nr)
			t[i].fn = background_main;
	}
	race_run(race, t, all, worker_main);
	for (i = 0; i < all; i++)
		free_spare(&w[i]);
}

/* All of the window, as this process sees it, after everybody is done. */
static bool check_end(void)
{
	size_t len = nr_pages * map.page;
	__u64 folded, expect;
	unsigned int i;
	bool odd;
	long rss;

	for (i = 0; i < map.nr_pages; i++) {
		struct page_state st = { 0 };

		if (i < nr_pages)
			st = sh->page[i];
		if (!page_ok(&st, i, page_at(i)))
			return fail(NULL,
				    "in the end page %u (%u of its block) is not %u of %u",
				    i, i % map.bpages, st.gen, st.owner);
	}
	madvise(base, map.len, MADV_DODUMP);
	/* smaps can only tell about what ends with a VMA. */
	if (len < map.len)
		madvise(base + len, map.len - len, MADV_DONTDUMP);
	if (cont_supported() && !((uintptr_t)base & (map.block - 1))) {
		folded = cont_folded_bits(base, len, &odd);
		expect = cont_expect_bits(base, len);
		if (odd)
			return fail(NULL, "a block is folded in part");
		if (folded & ~expect)
			return fail(NULL, "folded %llx, but only %llx can be",
				    folded, expect);
	}
	if (madvise(base, map.len, MADV_DONTNEED))
		return fail(NULL, "MADV_DONTNEED: %s", strerror(errno));
	rss = cont_smaps(base, map.len, "Rss:");
	if (rss)
		return fail(NULL, "Rss of the empty window is %ld", rss);
	return true;
}

static bool round_of_threads(struct race *race)
{
	sh->active = race->threads;
	run_threads(race, 0, race->threads, true);
	return !sh->failed && check_end();
}

/* The first process has the window by fork; the others map the file anew. */
static bool map_own_view(unsigned int proc)
{
	size_t skew = proc == 1 ? 0 : map.page;

	munmap(map.resv, map.resv_len);
	base = cont_map_view(&map, map.off, map.len, skew, PROT_READ | PROT_WRITE,
			     map.flags);
	if (base == MAP_FAILED)
		return fail(NULL, "mmap of the file: %s", strerror(errno));
	return true;
}

static void process_main(struct race *race, unsigned int proc, int done[2])
{
	unsigned int threads = race->threads / 2;
	char c;

	race->seed = cont_mix(race->seed + proc);
	if (proc && !map_own_view(proc))
		_exit(1);
	run_threads(race, proc * threads, threads, !proc);
	/* Everybody's end closes it, be it a violent one. */
	close(done[1]);
	while (read(done[0], &c, 1) < 0 && errno == EINTR)
		;
	_exit(sh->failed || !check_end());
}

static bool round_of_processes(struct race *race)
{
	pid_t parent = getpid();
	unsigned int i;
	int done[2], status;
	pid_t pid;

	sh->active = race->threads / 2 * NR_PROCS;
	if (pipe2(done, O_CLOEXEC))
		return fail(NULL, "pipe: %s", strerror(errno));
	for (i = 0; i < NR_PROCS; i++) {
		pid = fork();
		if (!pid) {
			cont_die_with(parent);
			process_main(race, i, done);
		}
		if (pid < 0) {
			fail(NULL, "fork: %s", strerror(errno));
			break;
		}
		__atomic_store_n(&sh->pid[i], pid, __ATOMIC_RELAXED);
	}
	close(done[0]);
	close(done[1]);
	while ((pid = waitpid(-1, &status, 0)) > 0 || errno == EINTR)
		if (pid > 0 && status)
			fail(NULL, "a process ended with status 0x%x", status);
	memset(sh->pid, 0, sizeof(sh->pid));
	return !sh->failed && check_end();
}

/* ---- cases ------------------------------------------------------------ */

/* Pages; RssAnon, RssFile, RssShmem. */
static long status_rss(const char *name)
{
	size_t nlen = strlen(name);
	char buf[4096], *line;
	ssize_t n;
	int fd;

	fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	buf[n < 0 ? 0 : n] = '\0';
	for (line = buf; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, name, nlen))
			return atol(line + nlen) * 1024 / (long)cont_page_size();
	}
	return 0;
}

static const char * const rss_name[] = { "RssAnon:", "RssFile:", "RssShmem:" };

/*
 * What is reported is not exact: each task (up to 6.1) or CPU (later) keeps a
 * part to itself. An error of every round adds up, though.
 */
static bool check_rss(const long *before, const char *why)
{
	long slack = 128 + 2 * 64 * sysconf(_SC_NPROCESSORS_ONLN), now;
	unsigned int i;

	for (i = 0; i < 3; i++) {
		now = status_rss(rss_name[i]);
		if (now < before[i] - slack || now > before[i] + slack)
			return fail(NULL, "%s %ld pages %s, %ld before", rss_name[i],
				    now, why, before[i]);
	}
	return true;
}

static void case_main(struct race *race, enum cont_source src,
		      bool (*round)(struct race *))
{
	__u64 seed = race->seed;
	struct timespec end, now;
	long before[3];
	int ret;
	unsigned int i;

	alarm(WATCHDOG + 4 * race->seconds);
	zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += race->seconds;
	/* The first window, with the threads, has malloc take what it needs. */
	ret = cont_map_make(&map, src, NR_BLOCKS);
	for (i = 0; i < 3; i++)
		before[i] = 0;
	while (!ret) {
		nr_pages = map.nr_pages;
		if (nr_pages > MAX_PAGES)
			nr_pages = NR_BLOCKS * map.bpages;
		base = map.addr;
		memset(sh->page, 0, sizeof(sh->page));
		memset(sh->taken, 0, sizeof(sh->taken));
		race->seed = cont_mix(seed + (sh->rounds << 8));
		if (!round(race))
			_exit(1);
		cont_map_free(&map);
		if (!sh->rounds++)
			for (i = 0; i < 3; i++)
				before[i] = status_rss(rss_name[i]);
		else if (!check_rss(before, "after a round"))
			_exit(1);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec > end.tv_sec ||
		    (now.tv_sec == end.tv_sec && now.tv_nsec >= end.tv_nsec))
			_exit(0);
		ret = cont_map_renew(&map);
	}
	/* One round is a race, if not a long one. */
	if (ret == CONT_MAKE_SKIP && sh->rounds)
		_exit(0);
	fail(NULL, "%s", map.why);
	_exit(ret == CONT_MAKE_SKIP ? KSFT_SKIP : 1);
}

static void run_case(struct race *race, const char *name, enum cont_source src,
		     bool (*round)(struct race *))
{
	pid_t parent = getpid(), pid;
	int status;

	memset(sh, 0, sizeof(*sh));
	pid = cont_fork();
	if (!pid) {
		cont_die_with(parent);
		case_main(race, src, round);
	}
	status = cont_wait(pid);
	if (status < 0)
		ksft_exit_fail_msg("child: %s\n", strerror(errno));
	ksft_print_msg("%s: %lu rounds, %lu steps (%lu got no pages), %lu in background\n",
		       name, sh->rounds, sh->steps, sh->skipped, sh->background);
	race_child_result(race, name, status, sh->why, sh->rounds);
}

static const struct {
	const char *name;
	enum cont_source src;
	bool (*round)(struct race *race);
} cases[] = {
	{ "threads, anonymous THP mapped by PTEs", CONT_ANON, round_of_threads },
	{ "threads, shmem", CONT_SHMEM, round_of_threads },
	{ "processes, shmem", CONT_SHMEM, round_of_processes },
	{ "processes, XFS", CONT_XFS, round_of_processes },
	{ "threads, whole THP", CONT_THP, round_of_threads },
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

	if (!cont_supported())
		ksft_print_msg("%s: data is checked all the same\n", CONT_NO_SUPPORT);
	for (i = 0; i < NR_CASES; i++)
		run_case(&race, cases[i].name, cases[i].src, cases[i].round);

	ksft_print_cnts();
	return ksft_get_fail_cnt() ? KSFT_FAIL : KSFT_PASS;
}
