// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stress of folding, unfolding, accessed/dirty and protection by four threads.
 *
 * Claim: whatever the threads do to their own pages, nobody's data suffers,
 * although the pages of all of them share blocks: no page is lost, is swapped
 * for another or comes back old, no access faults that must not, and only blocks
 * that are one aligned piece of one folio are folded in the end.
 *
 * Oracle: every page carries its owner, its generation and its index.  The owner
 * alone knows what has to be there, and looks after every operation.  At the end
 * pagemap and kpageflags tell which blocks may be folded.
 *
 * CONTPTE_SEED=n repeats the operations of each thread (the seed of a run is in
 * its output), CONTPTE_STRESS_OPS=n makes each thread do n of them.
 */
#include "contpte_harness.h"
#include <pthread.h>

#define NR_THREADS	4
#define NR_BLOCKS	12
#define MAX_RUNS	(NR_BLOCKS * 128)
/* New folios are made after that many operations: the old ones get split. */
#define ROUND_OPS	40
#define DEFAULT_OPS	80

enum op {
	/* on pages of the thread itself */
	OP_READ,
	OP_WRITE,
	OP_MPROTECT_READ,
	OP_MPROTECT_NONE,
	OP_DONTNEED,
	OP_FREE,
	OP_REMAP,
	OP_MREMAP,
	OP_MLOCK,
	OP_FORK,
	/* on anybody's pages: nothing that their owners could see */
	OP_MPROTECT_EXEC,
	OP_CLEAR_REFS,
	OP_WRITEBACK,
	OP_PAGEOUT,
	NR_OPS,
};

static const char * const op_name[NR_OPS] = {
	[OP_READ]		= "read",
	[OP_WRITE]		= "write",
	[OP_MPROTECT_READ]	= "mprotect to read only and back",
	[OP_MPROTECT_NONE]	= "mprotect to none and back",
	[OP_DONTNEED]		= "MADV_DONTNEED",
	[OP_FREE]		= "MADV_FREE",
	[OP_REMAP]		= "munmap and mmap",
	[OP_MREMAP]		= "mremap there and back",
	[OP_MLOCK]		= "mlock and munlock",
	[OP_FORK]		= "fork",
	[OP_MPROTECT_EXEC]	= "mprotect of execution",
	[OP_CLEAR_REFS]		= "clear_refs",
	[OP_WRITEBACK]		= "fdatasync",
	[OP_PAGEOUT]		= "MADV_PAGEOUT",
};

/* What a page has to hold. */
enum content {
	WRITTEN,		/* generation gen */
	ZERO,
	WRITTEN_OR_ZERO,	/* the same, unless the kernel dropped it */
};

struct page_state {
	enum content content;
	unsigned int gen;	/* 0: as cont_map_make() filled it */
};

/* Pages in a row that belong to one thread; a run ends with its block. */
struct run {
	unsigned int first;
	unsigned int nr;
	unsigned int owner;
};

struct stress {
	struct cont_map m;
	const unsigned char *weight;	/* of each op */
	unsigned int total_weight;
	struct page_state *page;
	struct run run[MAX_RUNS];
	unsigned int nr_runs;
	char *spare[NR_THREADS];	/* address space to move to */
	bool failed;
};

struct thread {
	struct stress *s;
	pthread_t tid;
	unsigned int id;
	unsigned int nr_ops;
	__u64 rand;
	/* for the report */
	unsigned int nr;
	enum op op;
	struct run at;
	char why[160];
};

static __thread struct thread *self_thread;

static void on_segv(int sig, siginfo_t *info, void *context)
{
	struct thread *t = self_thread;
	char buf[256];
	int n;

	(void)context;
	n = snprintf(buf, sizeof(buf),
		     "# signal %d at %p, thread %d, op %u: %s of pages %u + %u\n", sig,
		     info->si_addr, t ? (int)t->id : -1, t ? t->nr : 0,
		     t ? op_name[t->op] : "none", t ? t->at.first : 0,
		     t ? t->at.nr : 0);
	if (write(STDOUT_FILENO, buf, n) != n)
		_exit(KSFT_FAIL);
	_exit(KSFT_FAIL);
}

static bool is_file(const struct cont_map *m)
{
	return m->fd >= 0;
}

static unsigned int below(struct thread *t, unsigned int n)
{
	return cont_rand(&t->rand) % n;
}

static __u64 owner_seed(const struct stress *s, unsigned int owner, unsigned int gen)
{
	return gen ? s->m.seed + 1 + owner : s->m.seed;
}

static bool page_is_right(struct stress *s, unsigned int owner, unsigned int page,
			  const char *at)
{
	struct page_state *st = &s->page[page];

	if (st->content != WRITTEN && cont_page_zero(at))
		return true;
	return st->content != ZERO &&
	       cont_page_ok(at, owner_seed(s, owner, st->gen),
			    cont_index(&s->m, page), st->gen);
}

/* Look at the pages of a run, the first of which is seen at "at". */
static bool verify_at(struct thread *t, const struct run *r, const char *at,
		      const char *when)
{
	struct stress *s = t->s;
	unsigned int i;

	for (i = 0; i < r->nr; i++) {
		if (page_is_right(s, t->id, r->first + i, at + i * s->m.page))
			continue;
		snprintf(t->why, sizeof(t->why),
			 "page %u (%u of its block) is not generation %u%s, %s",
			 r->first + i, (r->first + i) % s->m.bpages,
			 s->page[r->first + i].gen,
			 s->page[r->first + i].content == WRITTEN ? "" : " or zero",
			 when);
		return false;
	}
	return true;
}

static bool verify(struct thread *t, const struct run *r, const char *when)
{
	return verify_at(t, r, cont_page_at(&t->s->m, r->first), when);
}

/* All that the thread owns. */
static bool verify_own(struct thread *t, const char *when)
{
	unsigned int i;

	for (i = 0; i < t->s->nr_runs; i++)
		if (t->s->run[i].owner == t->id && !verify(t, &t->s->run[i], when))
			return false;
	return true;
}

static void write_run(struct thread *t, const struct run *r)
{
	struct stress *s = t->s;
	unsigned int i;

	for (i = r->first; i < r->first + r->nr; i++) {
		s->page[i].gen = t->nr + 1;
		s->page[i].content = WRITTEN;
		cont_page_fill(cont_page_at(&s->m, i), owner_seed(s, t->id, s->page[i].gen),
			       cont_index(&s->m, i), s->page[i].gen);
	}
}

static void set_content(struct thread *t, const struct run *r, enum content c)
{
	unsigned int i;

	for (i = r->first; i < r->first + r->nr; i++) {
		/* What is zero already cannot become anything else. */
		if (c != WRITTEN_OR_ZERO || t->s->page[i].content != ZERO)
			t->s->page[i].content = c;
	}
}

/* stdio is not for a child that other threads were forked away from. */
static void report(const struct thread *t, const char *who)
{
	char buf[400];
	int n;

	n = snprintf(buf, sizeof(buf), "# %s %u, op %u, %s of pages %u + %u: %s\n", who,
		     t->id, t->nr, op_name[t->op], t->at.first, t->at.nr, t->why);
	if (write(STDOUT_FILENO, buf, n) != n)
		_exit(KSFT_FAIL);
}

static bool failed(struct thread *t, const char *call)
{
	snprintf(t->why, sizeof(t->why), "%s: %s", call, strerror(errno));
	return false;
}

static bool do_remap(struct thread *t, const struct run *r, char *at, size_t len)
{
	struct cont_map *m = &t->s->m;
	int flags = m->flags | MAP_FIXED | (is_file(m) ? 0 : MAP_ANONYMOUS);
	off_t off = is_file(m) ? m->off + r->first * m->page : 0;

	if (munmap(at, len))
		return failed(t, "munmap");
	if (mmap(at, len, PROT_READ | PROT_WRITE, flags, m->fd, off) != at)
		return failed(t, "mmap");
	if (!is_file(m))
		set_content(t, r, ZERO);
	return true;
}

static bool do_mremap(struct thread *t, const struct run *r, char *at, size_t len)
{
	char *to = t->s->spare[t->id] + r->first * t->s->m.page;

	if (!cont_mremap_pages(at, len, to))
		return failed(t, "mremap");
	if (!verify_at(t, r, to, "after mremap"))
		return false;
	if (!cont_mremap_pages(to, len, at))
		return failed(t, "mremap back");
	return true;
}

static bool do_fork(struct thread *t, const struct run *r)
{
	bool shared = t->s->m.flags == MAP_SHARED;
	pid_t pid = fork();
	bool ok;

	if (!pid) {
		ok = verify_own(t, "after fork");
		if (ok && !shared) {
			/* The parent must not see this. */
			write_run(t, r);
			ok = verify_own(t, "after a write");
		}
		if (!ok)
			report(t, "child of thread");
		_exit(ok ? 0 : 1);
	}
	if (pid < 0)
		return failed(t, "fork");
	if (cont_wait(pid)) {
		snprintf(t->why, sizeof(t->why), "child saw wrong data");
		return false;
	}
	return verify_own(t, "after fork");
}

static bool do_op(struct thread *t)
{
	const struct run *r = &t->at;
	struct cont_map *m = &t->s->m;
	char *at = cont_page_at(&t->s->m, r->first);
	size_t len = r->nr * m->page;

	switch (t->op) {
	case OP_READ:
		break;
	case OP_WRITE:
		write_run(t, r);
		break;
	case OP_MPROTECT_READ:
		if (mprotect(at, len, PROT_READ))
			return failed(t, "mprotect");
		if (!verify(t, r, "read only"))
			return false;
		if (mprotect(at, len, PROT_READ | PROT_WRITE))
			return failed(t, "mprotect back");
		break;
	case OP_MPROTECT_NONE:
		if (mprotect(at, len, PROT_NONE) ||
		    mprotect(at, len, PROT_READ | PROT_WRITE))
			return failed(t, "mprotect");
		break;
	case OP_DONTNEED:
		if (madvise(at, len, MADV_DONTNEED))
			return failed(t, "MADV_DONTNEED");
		if (!is_file(m))
			set_content(t, r, ZERO);
		break;
	case OP_FREE:
		if (is_file(m))
			break;
		if (madvise(at, len, MADV_FREE))
			return failed(t, "MADV_FREE");
		set_content(t, r, WRITTEN_OR_ZERO);
		break;
	case OP_REMAP:
		if (!do_remap(t, r, at, len))
			return false;
		break;
	case OP_MREMAP:
		if (!do_mremap(t, r, at, len))
			return false;
		break;
	case OP_MLOCK:
		if (mlock(at, len))
			return failed(t, "mlock");
		if (!verify(t, r, "locked"))
			return false;
		if (munlock(at, len))
			return failed(t, "munlock");
		break;
	case OP_FORK:
		if (!do_fork(t, r))
			return false;
		break;
	/* Any owner may have a hole in this range right now: ENOMEM. */
	case OP_MPROTECT_EXEC:
		if ((mprotect(at, len, PROT_READ | PROT_WRITE | PROT_EXEC) ||
		     mprotect(at, len, PROT_READ | PROT_WRITE)) && errno != ENOMEM)
			return failed(t, "mprotect");
		return true;
	case OP_PAGEOUT:
		if (madvise(at, len, MADV_PAGEOUT) && errno != ENOMEM &&
		    errno != EINVAL)
			return failed(t, "MADV_PAGEOUT");
		return true;
	case OP_CLEAR_REFS:
		if (!cont_write_str("/proc/self/clear_refs", "1"))
			return failed(t, "clear_refs");
		return true;
	case OP_WRITEBACK:
		if (is_file(m) && fdatasync(m->fd))
			return failed(t, "fdatasync");
		return true;
	default:
		break;
	}
	return verify(t, r, "after the operation");
}

/* The next operation and what to do it to: the seed decides, and nothing else. */
static void choose(struct thread *t)
{
	struct stress *s = t->s;
	unsigned int n = below(t, s->total_weight), pages = s->m.nr_pages;
	struct run *r = &t->at;
	unsigned int skip;

	for (t->op = 0; n >= s->weight[t->op]; t->op++)
		n -= s->weight[t->op];

	if (t->op >= OP_MPROTECT_EXEC) {
		/* Ends anywhere, or made of whole blocks. */
		r->first = below(t, pages);
		r->nr = 1 + below(t, pages - r->first);
		if (below(t, 2)) {
			r->first -= r->first % s->m.bpages;
			r->nr = s->m.bpages;
		}
		return;
	}

	*r = s->run[below(t, s->nr_runs)];
	while (r->owner != t->id)
		*r = s->run[below(t, s->nr_runs)];
	/* All of it, one page, or a part. */
	switch (below(t, 3)) {
	case 0:
		break;
	case 1:
		r->first += below(t, r->nr);
		r->nr = 1;
		break;
	case 2:
		skip = below(t, r->nr);
		r->first += skip;
		r->nr = 1 + below(t, r->nr - skip);
		break;
	}
}

static void *thread_main(void *arg)
{
	struct thread *t = arg;
	unsigned int i;

	self_thread = t;
	for (i = 0; i < t->nr_ops; i++, t->nr++) {
		if (__atomic_load_n(&t->s->failed, __ATOMIC_RELAXED))
			return NULL;
		choose(t);
		if (!do_op(t))
			goto fail;
	}
	if (verify_own(t, "after the round"))
		return NULL;
fail:
	__atomic_store_n(&t->s->failed, true, __ATOMIC_RELAXED);
	report(t, "thread");
	return NULL;
}

/* Who owns what.  Most blocks have several owners, some have one. */
static void share_out(struct stress *s, __u64 *rand)
{
	unsigned int owner = cont_rand(rand) % NR_THREADS, page = 0, left, max;
	struct run *r;

	max = s->m.bpages / 4;
	for (s->nr_runs = 0; page < s->m.nr_pages; s->nr_runs++) {
		r = &s->run[s->nr_runs];
		left = s->m.bpages - page % s->m.bpages;
		r->first = page;
		r->nr = 1 + cont_rand(rand) % max;
		if (left == s->m.bpages && !(cont_rand(rand) % 4))
			r->nr = s->m.bpages;
		if (r->nr > left)
			r->nr = left;
		r->owner = owner;
		owner = (owner + 1) % NR_THREADS;
		page += r->nr;
	}
}

/* As the spare space is aligned like the window, what is moved can fold there. */
static bool make_spare(struct stress *s, char **resv)
{
	size_t pmd = s->m.pmd, each = 2 * pmd + s->m.len;
	unsigned int i;

	*resv = cont_reserve(NR_THREADS * each);
	if (*resv == MAP_FAILED)
		return false;
	for (i = 0; i < NR_THREADS; i++)
		s->spare[i] = cont_align_up(*resv + i * each, pmd) +
			      ((uintptr_t)s->m.addr & (pmd - 1));
	return true;
}

FIXTURE(stress)
{
	struct stress *s;
};

FIXTURE_VARIANT(stress)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(stress, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(stress, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(stress, xfs) { .src = CONT_XFS };

FIXTURE_SETUP(stress)
{
	struct stress *s;

	s = calloc(1, sizeof(*s));
	ASSERT_NE(NULL, s);
	if (!cont_setup(_metadata, &s->m, variant->src, NR_BLOCKS, 0, 0)) {
		free(s);
		return;
	}
	s->page = calloc(s->m.nr_pages, sizeof(*s->page));
	ASSERT_NE(NULL, s->page);
	cont_on_fault(on_segv);
	self->s = s;
}

FIXTURE_TEARDOWN(stress)
{
	if (self->s) {
		cont_map_free(&self->s->m);
		free(self->s->page);
		free(self->s);
	}
}

static unsigned int stress_ops(void)
{
	const char *env = getenv("CONTPTE_STRESS_OPS");
	unsigned int ops = env ? strtoul(env, NULL, 0) : 0;

	return ops ? ops : DEFAULT_OPS;
}

static void run_round(struct __test_metadata *_metadata, struct stress *s,
		      unsigned int done, unsigned int nr_ops)
{
	struct thread *t, threads[NR_THREADS] = {};
	unsigned int i;

	for (i = 0; i < NR_THREADS; i++) {
		t = &threads[i];
		t->s = s;
		t->id = i;
		t->nr = done;
		t->nr_ops = nr_ops;
		t->rand = cont_mix(s->m.seed ^ cont_mix(done * NR_THREADS + i));
		ASSERT_EQ(0, pthread_create(&t->tid, NULL, thread_main, t));
	}
	for (i = 0; i < NR_THREADS; i++)
		ASSERT_EQ(0, pthread_join(threads[i].tid, NULL));
	ASSERT_FALSE(s->failed);
	ASSERT_TRUE(cont_rules_hold());
}

static void run_stress(struct __test_metadata *_metadata, struct stress *s,
		       const unsigned char *weight)
{
	unsigned int ops = stress_ops(), done, now, i;
	long long folds, unfolds;
	__u64 rand, folded;
	char *resv;
	bool odd;

	s->weight = weight;
	s->total_weight = 0;
	for (i = 0; i < NR_OPS; i++)
		s->total_weight += weight[i];
	rand = s->m.seed;
	folds = cont_vmstat("contpte_fold");
	unfolds = cont_vmstat("contpte_unfold");

	for (done = 0; done < ops; done += now) {
		now = ops - done < ROUND_OPS ? ops - done : ROUND_OPS;
		if (done) {
			if (!cont_made(_metadata, &s->m, cont_map_renew(&s->m)))
				return;
			memset(s->page, 0, s->m.nr_pages * sizeof(*s->page));
		}
		ASSERT_EQ((long)s->m.len, cont_mapped(s->m.addr, s->m.len));
		ASSERT_TRUE(make_spare(s, &resv));
		share_out(s, &rand);
		run_round(_metadata, s, done, now);

		/*
		 * A block with the hint that is no block of a folio is the worst.
		 * SKIP() in the next round would forget what an EXPECT has found.
		 */
		folded = cont_folded_bits(s->m.addr, s->m.len, &odd);
		ASSERT_FALSE(odd);
		for (i = 0; i < s->m.nr_blocks; i++) {
			char *block = s->m.addr + i * s->m.block;

			ASSERT_TRUE(!(folded & (1ULL << i)) ||
				    cont_block_is_one_folio(block));
		}
		ASSERT_EQ(0, madvise(s->m.addr, s->m.len, MADV_DONTNEED));
		ASSERT_EQ(0, cont_mapped(s->m.addr, s->m.len));
		ASSERT_EQ(0, cont_smaps(s->m.addr, s->m.len, "Rss:"));
		ASSERT_EQ(0, munmap(resv, NR_THREADS * (2 * s->m.pmd + s->m.len)));
	}

	EXPECT_LT(folds, cont_vmstat("contpte_fold"));
	/* The mix has something that unfolds, whatever the source. */
	if (weight[OP_MPROTECT_READ])
		EXPECT_LT(unfolds, cont_vmstat("contpte_unfold"));
}

/* Blocks come and go as a whole, or are completed again. */
static const unsigned char fold_mix[NR_OPS] = {
	[OP_READ]		= 4,
	[OP_WRITE]		= 4,
	[OP_MPROTECT_READ]	= 2,
	[OP_DONTNEED]		= 2,
	[OP_REMAP]		= 2,
	[OP_MREMAP]		= 4,
};

TEST_F(stress, fold)
{
	if (self->s)
		run_stress(_metadata, self->s, fold_mix);
}

/* Pages leave blocks that others use. */
static const unsigned char unfold_mix[NR_OPS] = {
	[OP_READ]		= 2,
	[OP_WRITE]		= 2,
	[OP_MPROTECT_READ]	= 2,
	[OP_MPROTECT_NONE]	= 2,
	[OP_DONTNEED]		= 1,
	[OP_REMAP]		= 1,
	[OP_MREMAP]		= 2,
	[OP_FORK]		= 1,
	[OP_MPROTECT_EXEC]	= 1,
};

TEST_F(stress, unfold)
{
	if (self->s)
		run_stress(_metadata, self->s, unfold_mix);
}

/* Whatever sets, clears, moves or relies on accessed and dirty bits. */
static const unsigned char access_dirty_mix[NR_OPS] = {
	[OP_READ]		= 5,
	[OP_WRITE]		= 10,
	[OP_FREE]		= 1,
	[OP_FORK]		= 1,
	[OP_CLEAR_REFS]		= 4,
	[OP_WRITEBACK]		= 3,
	[OP_PAGEOUT]		= 1,
};

TEST_F(stress, access_dirty)
{
	if (self->s)
		run_stress(_metadata, self->s, access_dirty_mix);
}

static const unsigned char protection_mix[NR_OPS] = {
	[OP_READ]		= 2,
	[OP_WRITE]		= 4,
	[OP_MPROTECT_READ]	= 4,
	[OP_MPROTECT_NONE]	= 3,
	[OP_MLOCK]		= 1,
	[OP_MPROTECT_EXEC]	= 6,
};

TEST_F(stress, protection)
{
	if (self->s)
		run_stress(_metadata, self->s, protection_mix);
}

static const unsigned char every_mix[NR_OPS] = {
	[OP_READ]		= 4,
	[OP_WRITE]		= 8,
	[OP_MPROTECT_READ]	= 4,
	[OP_MPROTECT_NONE]	= 3,
	[OP_DONTNEED]		= 2,
	[OP_FREE]		= 1,
	[OP_REMAP]		= 3,
	[OP_MREMAP]		= 4,
	[OP_MLOCK]		= 1,
	[OP_FORK]		= 1,
	[OP_MPROTECT_EXEC]	= 4,
	[OP_CLEAR_REFS]		= 2,
	[OP_WRITEBACK]		= 2,
	[OP_PAGEOUT]		= 1,
};

TEST_F(stress, everything)
{
	if (self->s)
		run_stress(_metadata, self->s, every_mix);
}

TEST_HARNESS_MAIN
