// SPDX-License-Identifier: GPL-2.0-only
/*
 * Access and dirty of folded blocks.
 *
 * Claim: accessed and dirty of a block are the OR of its entries.  Whichever
 * entry the access went through, nothing is lost, nothing is invented beyond the
 * block, and neither the access nor clear_refs unfolds.
 *
 * Oracle: Referenced, Private_Dirty, Shared_Dirty and Swap of smaps and the
 * idle page bitmap for the bits; for what hangs on the bits, the data.  A page
 * whose dirty bit got lost comes back from reclaim or from disk with old data.
 * Where only the dirty bit of the PTE stands between a page and its loss, each
 * folio is written through one entry only, since reclaim spreads the dirty bit
 * of one page over the folio.
 */
#include "contpte_harness.h"
#include <limits.h>
#include <sched.h>
#include <sys/utsname.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ	22
#endif

/* More entries than this are sampled, the first and the last among them. */
#define MAX_ENTRIES	16
/* The same where a sample costs a huge page of more than a few megabytes. */
#define FEW_ENTRIES	4

/* Some pages of block 1, or all: their numbers in the window, and how many. */
static unsigned int sample(struct cont_map *m, unsigned int max, unsigned int *page)
{
	__u64 state = m->seed;
	unsigned int i;

	if (m->bpages <= max) {
		for (i = 0; i < m->bpages; i++)
			page[i] = m->bpages + i;
		return m->bpages;
	}
	page[0] = m->bpages;
	page[1] = 2 * m->bpages - 1;
	for (i = 2; i < max; i++)
		page[i] = m->bpages + 1 + cont_rand(&state) % (m->bpages - 2);
	return max;
}

static bool forget_accesses(void)
{
	return cont_write_str("/proc/self/clear_refs", "1");
}

/*
 * clear_refs leaves it to the TLB to forget that an entry was accessed.  fork()
 * flushes all of the parent's translations; the window itself has to be
 * MADV_DONTFORK, or it would be write protected.
 */
static bool flush_tlb(void)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	return !cont_wait(pid);
}

static long smaps_dirty(const void *addr, size_t len)
{
	long priv = cont_smaps(addr, len, "Private_Dirty:");
	long shared = cont_smaps(addr, len, "Shared_Dirty:");

	return priv < 0 || shared < 0 ? -1 : priv + shared;
}

static bool have_swap(void)
{
	char line[256];
	int lines = 0;
	FILE *f;

	f = fopen("/proc/swaps", "re");
	if (!f)
		return false;
	while (fgets(line, sizeof(line), f))
		lines++;
	fclose(f);
	return lines > 1;
}

/* Read a byte of page i; in an executable mapping, run the code that is there. */
static bool use_page(const struct cont_map *m, unsigned int i)
{
#ifdef __aarch64__
	if (m->src == CONT_XFS_EXEC) {
		unsigned int (*code)(long unused);

		code = (void *)cont_page_at(m, i);
		return code(0) == (cont_index(m, i) & 0xffff);
	}
#endif
	cont_touch(cont_page_at(m, i), m->page);
	return true;
}

/* A window that is folded from end to end. */
static bool make_folded(struct __test_metadata *_metadata, struct cont_map *m,
			enum cont_source src, unsigned int nr_blocks)
{
	if (!cont_setup(_metadata, m, src, nr_blocks, 0, 0))
		return false;
	ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	return true;
}

/* ---- accessed --------------------------------------------------------- */

/* Three blocks: the one that is touched and one on either side. */
#define ACCESS_BLOCKS	3

FIXTURE(access)
{
	struct cont_map map;
	char *mid;		/* the block in the middle, a VMA of its own */
	unsigned int nr;
	unsigned int page[MAX_ENTRIES];
};

FIXTURE_VARIANT(access)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(access, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(access, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(access, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(access, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(access)
{
	struct cont_map *m = &self->map;

	if (!make_folded(_metadata, m, variant->src, ACCESS_BLOCKS))
		return;
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTFORK));
	self->mid = m->addr + m->block;
	ASSERT_EQ(0, madvise(self->mid, m->block, MADV_DONTDUMP));
	self->nr = sample(m, MAX_ENTRIES, self->page);
}

FIXTURE_TEARDOWN(access)
{
	cont_map_free(&self->map);
}

/*
 * Real hardware may set the accessed flag ahead of an access that never comes.
 * A kernel that invents one does so every time.
 */
#define TRIES	8U

/* What every test of this fixture starts from. */
static bool unreferenced(struct cont_map *m)
{
	unsigned int tries;

	for (tries = 0; tries < TRIES; tries++) {
		if (!forget_accesses() || !flush_tlb())
			return false;
		if (!cont_smaps(m->addr, m->len, "Referenced:"))
			return true;
	}
	return false;
}

/* Use one page, and no other since. */
static void use_alone(struct __test_metadata *_metadata, struct cont_map *m,
		      unsigned int page)
{
	ASSERT_TRUE(unreferenced(m));
	ASSERT_TRUE(use_page(m, page));
}

/* The block in the middle is referenced, and no other is. */
static bool only_mid_referenced(struct __test_metadata *_metadata, struct cont_map *m)
{
	char *mid = m->addr + m->block;

	ASSERT_LT(0, cont_smaps(mid, m->block, "Referenced:"));
	return !cont_smaps(m->addr, m->block, "Referenced:") &&
	       !cont_smaps(mid + m->block, m->block, "Referenced:");
}

CONT_TEST_F(access, clear_refs_reaches_every_entry)
{
	cont_touch(m->addr, m->len);
	ASSERT_EQ((long)m->len, cont_smaps(m->addr, m->len, "Referenced:"));
	EXPECT_TRUE(unreferenced(m));
}

CONT_TEST_F(access, clear_refs_does_not_unfold)
{
	ASSERT_TRUE(forget_accesses());
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0U, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(access, any_entry_references_its_block)
{
	unsigned int n;

	for (n = 0; n < self->nr; n++) {
		use_alone(_metadata, m, self->page[n]);
		EXPECT_EQ((long)m->block,
			  cont_smaps(self->mid, m->block, "Referenced:"))
			TH_LOG("used page %u", self->page[n]);
	}
}

CONT_TEST_F(access, no_entry_references_other_blocks)
{
	unsigned int n, tries;

	for (n = 0; n < self->nr; n++) {
		for (tries = 0; tries < TRIES; tries++) {
			use_alone(_metadata, m, self->page[n]);
			if (only_mid_referenced(_metadata, m))
				break;
		}
		EXPECT_GT(TRIES, tries)
			TH_LOG("used page %u", self->page[n]);
	}
}

CONT_TEST_F(access, use_does_not_unfold)
{
	unsigned int n;

	for (n = 0; n < self->nr; n++) {
		use_alone(_metadata, m, self->page[n]);
		EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len))
			TH_LOG("used page %u", self->page[n]);
	}
}

/* The first operation on another page of the block takes it apart. */
CONT_TEST_F(access, unfolding_keeps_references)
{
	unsigned int n, next;

	for (n = 0; n < self->nr; n++) {
		next = m->bpages + (self->page[n] + 1) % m->bpages;
		use_alone(_metadata, m, self->page[n]);
		ASSERT_EQ(0, mprotect(cont_page_at(m, next), m->page, PROT_NONE));
		EXPECT_LT(0, cont_smaps(self->mid, m->block, "Referenced:"))
			TH_LOG("used page %u", self->page[n]);
		ASSERT_EQ(0, mprotect(cont_page_at(m, next), m->page, m->prot));
	}
}

CONT_TEST_F(access, unfolding_and_folding_invent_no_reference)
{
	char *at = cont_page_at(m, m->bpages + m->bpages / 2);
	unsigned int tries;

	for (tries = 0; tries < TRIES; tries++) {
		ASSERT_TRUE(unreferenced(m));
		ASSERT_EQ(0, mprotect(at, m->page, PROT_NONE));
		ASSERT_EQ(0, mprotect(at, m->page, m->prot));
		if (!cont_smaps(m->addr, m->len, "Referenced:"))
			break;
	}
	EXPECT_GT(TRIES, tries);
}

/* Set the idle flag of the folio that pfn is the head of, or get it: -1, 0, 1. */
static int idle_flag(__u64 pfn, bool set)
{
	__u64 bit = 1ULL << (pfn % 64), word = set ? bit : 0;
	off_t off = pfn / 64 * sizeof(word);
	ssize_t n;
	int fd;

	fd = open("/sys/kernel/mm/page_idle/bitmap", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -1;
	if (set)
		n = pwrite(fd, &word, sizeof(word), off);
	else
		n = pread(fd, &word, sizeof(word), off);
	close(fd);
	return n == sizeof(word) ? !!(word & bit) : -1;
}

/* The way reclaim looks at a folio: through its reverse mapping. */
CONT_TEST_F(access, any_entry_ends_idleness_of_the_folio)
{
	unsigned int n, tries;
	__u64 pfn, flags;

	if (access("/sys/kernel/mm/page_idle/bitmap", W_OK))
		SKIP(return, "kernel has no idle page tracking");

	pfn = cont_pfn(self->mid);
	while (cont_kpageflags(pfn, 1, &flags) && (flags & CONT_KPF_TAIL))
		pfn--;
	for (n = 0; n < self->nr; n++) {
		for (tries = 0; tries < TRIES; tries++) {
			ASSERT_EQ(1, idle_flag(pfn, true));
			ASSERT_TRUE(flush_tlb());
			if (idle_flag(pfn, false) == 1)
				break;
		}
		ASSERT_GT(TRIES, tries);
		ASSERT_TRUE(use_page(m, self->page[n]));
		EXPECT_EQ(0, idle_flag(pfn, false))
			TH_LOG("used page %u", self->page[n]);
	}
}

/* ---- accessed by a fault ---------------------------------------------- */

FIXTURE(fault)
{
	struct cont_map map;
};

FIXTURE_VARIANT(fault)
{
	enum cont_source src;
	bool hole;		/* nothing in the page cache yet */
};

FIXTURE_VARIANT_ADD(fault, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(fault, shmem_hole) { .src = CONT_SHMEM, .hole = true };
FIXTURE_VARIANT_ADD(fault, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(fault, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(fault)
{
	struct cont_map *m = &self->map;

	if (!cont_setup(_metadata, m, variant->src, ACCESS_BLOCKS, 0, 0))
		return;
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTFORK));
	ASSERT_EQ(0, madvise(m->addr + m->block, m->block, MADV_DONTDUMP));
}

FIXTURE_TEARDOWN(fault)
{
	cont_map_free(&self->map);
}

/* However many pages the kernel maps around the one that was asked for. */
CONT_TEST_F(fault, references_only_its_block)
{
	unsigned int tries;

	for (tries = 0; tries < TRIES; tries++) {
		/* Else the flag would go from the entries to the folio. */
		ASSERT_TRUE(unreferenced(m));
		if (variant->hole) {
			ASSERT_EQ(0, ftruncate(m->fd, 0));
			ASSERT_EQ(0, ftruncate(m->fd, m->pmd));
		} else {
			ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTNEED));
		}
		ASSERT_EQ(0, cont_smaps(m->addr, m->len, "Rss:"));
		cont_touch(cont_page_at(m, m->bpages + 1), m->page);
		if (only_mid_referenced(_metadata, m))
			break;
	}
	EXPECT_GT(TRIES, tries);
}

/* ---- clean, writable blocks: dirty is in the PTEs alone --------------- */

FIXTURE(dirty)
{
	struct cont_map map;
	unsigned int nr;
	unsigned int page[MAX_ENTRIES];	/* of each block one */
};

FIXTURE_VARIANT(dirty)
{
	enum cont_source src;
};

/* MADV_FREE'd as a THP, then split into PTEs. */
FIXTURE_VARIANT_ADD(dirty, anon) { .src = CONT_ANON };

/* A hole that has only been read so far. */
FIXTURE_VARIANT_ADD(dirty, shmem) { .src = CONT_SHMEM };

/*
 * Give the window new folios that are clean in every respect, mapped by writable
 * and folded PTEs.  Anonymous memory holds generation 0, which the kernel may
 * drop at any time; shmem holds zeroes.
 */
static int renew_clean(struct cont_map *m)
{
	char *thp;
	int tries;

	if (m->src == CONT_SHMEM) {
		if (ftruncate(m->fd, 0) || ftruncate(m->fd, m->pmd) ||
		    mmap(m->addr, m->len, m->prot, m->flags | MAP_FIXED, m->fd,
			 m->off) != m->addr)
			return cont_why(m, CONT_MAKE_FAIL, "hole: %s", strerror(errno));
		cont_touch(m->addr, m->len);
		return 0;
	}

	thp = (char *)((uintptr_t)m->addr & ~(m->pmd - 1));
	for (tries = 0; ; tries++) {
		if (mmap(thp, m->pmd, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
			 -1, 0) != thp || madvise(thp, m->pmd, MADV_HUGEPAGE))
			return cont_why(m, CONT_MAKE_FAIL, "mmap: %s", strerror(errno));
		cont_fill(m, 0, m->nr_pages, 0);
		if (cont_smaps(thp, m->pmd, "AnonHugePages:") == (long)m->pmd)
			break;
		if (tries)
			return cont_why(m, CONT_MAKE_SKIP,
					"no memory for a THP of %zu kB", m->pmd >> 10);
		cont_write_str("/proc/sys/vm/compact_memory", "1");
	}
	if (madvise(thp, m->pmd, MADV_FREE) ||
	    madvise(m->addr, m->len, MADV_NOHUGEPAGE))
		return cont_why(m, CONT_MAKE_FAIL, "madvise: %s", strerror(errno));
	return 0;
}

static bool make_clean(struct __test_metadata *_metadata, struct cont_map *m,
		       enum cont_source src, unsigned int nr_blocks)
{
	return cont_setup(_metadata, m, src, nr_blocks, 0, 0) &&
	       cont_made(_metadata, m, renew_clean(m));
}

/* Blocks for one write each, so that all entries get their turn. */
static unsigned int dirty_blocks(void)
{
	size_t pmd = cont_pmd_size(), block = cont_size();
	size_t bpages = block / cont_page_size();
	size_t nr = pmd / block > 4 ? pmd / block - 4 : 1;

	if (nr > bpages)
		nr = bpages;
	return nr < MAX_ENTRIES ? nr : MAX_ENTRIES;
}

FIXTURE_SETUP(dirty)
{
	struct cont_map *m = &self->map;
	unsigned int b;

	if (!make_clean(_metadata, m, variant->src, dirty_blocks()))
		return;
	ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	/* Every block gets figures of its own in smaps. */
	for (b = 0; b < m->nr_blocks; b += 2)
		ASSERT_EQ(0, madvise(m->addr + b * m->block, m->block, MADV_DONTDUMP));
	self->nr = sample(m, m->nr_blocks, self->page);
	for (b = 0; b < self->nr; b++)
		self->page[b] = b * m->bpages + self->page[b] % m->bpages;
}

FIXTURE_TEARDOWN(dirty)
{
	cont_map_free(&self->map);
}

CONT_TEST_F(dirty, reading_leaves_all_clean)
{
	cont_touch(m->addr, m->len);
	EXPECT_EQ(0, smaps_dirty(m->addr, m->len));
	EXPECT_EQ(0ULL, cont_folio_flags(m->addr) & CONT_KPF_DIRTY);
}

CONT_TEST_F(dirty, unfolding_and_folding_leave_all_clean)
{
	unsigned int b;
	char *at;

	for (b = 0; b < self->nr; b++) {
		at = cont_page_at(m, self->page[b]);
		ASSERT_EQ(0, mprotect(at, m->page, PROT_NONE));
		ASSERT_EQ(0, mprotect(at, m->page, m->prot));
	}
	EXPECT_EQ(0, smaps_dirty(m->addr, m->len));
}

CONT_TEST_F(dirty, any_entry_dirties_its_block)
{
	unsigned int b;
	char *block;

	ASSERT_EQ(0, smaps_dirty(m->addr, m->len));
	for (b = 0; b < self->nr; b++) {
		block = m->addr + b * m->block;
		cont_fill(m, self->page[b], 1, 1);
		EXPECT_EQ((long)m->block, smaps_dirty(block, m->block))
			TH_LOG("wrote page %u", self->page[b]);
	}
}

CONT_TEST_F(dirty, no_entry_dirties_other_blocks)
{
	unsigned int b, other;

	for (b = 0; b < self->nr; b++) {
		cont_fill(m, self->page[b], 1, 1);
		for (other = b + 1; other < m->nr_blocks; other++)
			EXPECT_EQ(0, smaps_dirty(m->addr + other * m->block, m->block))
				TH_LOG("wrote page %u of block %u, block %u is dirty",
				       self->page[b], b, other);
	}
}

CONT_TEST_F(dirty, writing_does_not_unfold)
{
	unsigned int b;

	for (b = 0; b < self->nr; b++) {
		cont_fill(m, self->page[b], 1, 1);
		EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len))
			TH_LOG("wrote page %u", self->page[b]);
	}
}

/* Pages in [addr, addr + len) that are mapped. */
static unsigned int present(const void *addr, size_t len)
{
	size_t page = cont_page_size(), at;
	unsigned int sum = 0;
	__u64 ent;

	for (at = 0; at < len; at += page)
		if (cont_pagemap((char *)addr + at, 1, &ent) &&
		    (ent & CONT_PM_PRESENT))
			sum++;
	return sum;
}

/* Pages wait to be put on the LRU on the CPU that touched them. */
static void stay_on_cpu(void)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(sched_getcpu(), &set);
	sched_setaffinity(0, sizeof(set), &set);
}

/*
 * Get what is mapped in [addr, addr + len) reclaimed.  To split a folio of shmem
 * is to unmap it: its pages have to be mapped again before they can go.  A page
 * that somebody else is just looking at is passed over.  Anonymous pages that
 * must not be discarded stay mapped.
 */
static void page_out(const struct cont_map *m, char *addr, size_t len)
{
	bool shmem = m->src == CONT_SHMEM;
	int i, tries = shmem ? 64 : 3;
	size_t at;

	stay_on_cpu();
	for (i = 0; i < tries; i++) {
		for (at = 0; shmem && i < 2 && at < len; at += m->page)
			madvise(addr + at, m->page, MADV_POPULATE_READ);
		/* Holes make it fail with ENOMEM after it did the rest. */
		madvise(addr, len, MADV_PAGEOUT);
		if (i && !present(addr, len))
			break;
	}
}

/*
 * A dirty bit that the kernel invented would make reclaim keep a page or write
 * it to swap.  This is also what the tests of lost dirty bits rest on: reclaim
 * does drop clean pages.
 */
CONT_TEST_F(dirty, reading_leaves_all_discardable)
{
	cont_touch(m->addr, m->len);
	page_out(m, m->addr, m->len);
	EXPECT_EQ(0U, present(m->addr, m->len));
	EXPECT_EQ(0, cont_smaps(m->addr, m->len, "Swap:"));
}

/* A dirty bit that clear_refs, or the accessed bit, took along. */
CONT_TEST_F(dirty, clear_refs_keeps_dirty)
{
	unsigned int b;

	for (b = 0; b < self->nr; b++)
		cont_fill(m, self->page[b], 1, 1);
	ASSERT_TRUE(forget_accesses());
	for (b = 0; b < self->nr; b++)
		EXPECT_EQ((long)m->block,
			  smaps_dirty(m->addr + b * m->block, m->block))
			TH_LOG("wrote page %u", self->page[b]);
}

/* A fault on an entry that lacks what another one of its block has comes to an end. */
CONT_TEST_F(dirty, write_after_fork_ends)
{
	pid_t pid;

	cont_fill(m, 0, 1, 1);
	pid = cont_fork();
	if (!pid) {
		cont_fill(m, 1, 1, 1);
		_exit(!!cont_bad(m, 1, 1, 1));
	}
	cont_fill(m, 2, 1, 1);
	EXPECT_EQ(0, cont_wait(pid));
	EXPECT_EQ(0U, cont_bad(m, 2, 1, 1));
}

/* Linux 6.1's number of FOLL_FAST_ONLY, which mm/gup_test.c hands on. */
#define GUP_TEST_FAST_ONLY	0x80000

/* Without locks, too, where one entry of the block is dirty and the others are not. */
CONT_TEST_F(dirty, gup_fast_takes_any_entry)
{
	struct gup_test gup = {
		.addr = (uintptr_t)m->addr,
		.size = m->block,
		.nr_pages_per_call = 1,
		.gup_flags = GUP_TEST_WRITE | GUP_TEST_FAST_ONLY,
	};
	struct utsname name;
	int fd;

	if (uname(&name) || strncmp(name.release, "6.1.", 4))
		SKIP(return, "FOLL_FAST_ONLY may have another number than in Linux 6.1");
	fd = open(GUP_TEST_FILE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "no " GUP_TEST_FILE);
	cont_fill(m, 0, 1, 1);
	ASSERT_EQ(0, ioctl(fd, GUP_FAST_BENCHMARK, &gup));
	/* It ends where it gets no page. */
	EXPECT_EQ(m->block, gup.size);
	close(fd);
}

/* ---- dirty bits under reclaim ----------------------------------------- */

/*
 * Between the write through one entry of a block and the reclaim of its folio,
 * something is done to a neighbour in the same block, or to all of it.
 */
enum meanwhile {
	NOTHING,
	MUNMAP_NEIGHBOUR,
	DONTNEED_NEIGHBOUR,
	MPROTECT_NEIGHBOUR,
	MPROTECT_ALL,
	MREMAP_NEIGHBOUR,
	MREMAP_ALL,
	CLEAR_REFS,
	FORK,			/* child goes away */
	FORK_CHILD_KEEPS,	/* parent unmaps, child keeps the page */
};

FIXTURE(reclaim)
{
	struct cont_map map;
	char *spare;		/* address space to move to, aligned like the window */
	unsigned int nr;
	unsigned int page[MAX_ENTRIES];
};

FIXTURE_VARIANT(reclaim)
{
	enum cont_source src;
	enum meanwhile op;
};

FIXTURE_VARIANT_ADD(reclaim, anon) { .src = CONT_ANON, .op = NOTHING };
FIXTURE_VARIANT_ADD(reclaim, anon_munmap_neighbour) { CONT_ANON, MUNMAP_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, anon_dontneed_neighbour) { CONT_ANON, DONTNEED_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, anon_mprotect_neighbour) { CONT_ANON, MPROTECT_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, anon_mprotect_all) { .src = CONT_ANON, .op = MPROTECT_ALL };
FIXTURE_VARIANT_ADD(reclaim, anon_mremap_neighbour) { CONT_ANON, MREMAP_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, anon_mremap_all) { .src = CONT_ANON, .op = MREMAP_ALL };
FIXTURE_VARIANT_ADD(reclaim, anon_clear_refs) { .src = CONT_ANON, .op = CLEAR_REFS };
FIXTURE_VARIANT_ADD(reclaim, anon_fork) { .src = CONT_ANON, .op = FORK };
FIXTURE_VARIANT_ADD(reclaim, anon_fork_child_keeps) { CONT_ANON, FORK_CHILD_KEEPS };
FIXTURE_VARIANT_ADD(reclaim, shmem) { .src = CONT_SHMEM, .op = NOTHING };
FIXTURE_VARIANT_ADD(reclaim, shmem_munmap_neighbour) { CONT_SHMEM, MUNMAP_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, shmem_dontneed_neighbour) { CONT_SHMEM, DONTNEED_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, shmem_mprotect_neighbour) { CONT_SHMEM, MPROTECT_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, shmem_mprotect_all) { CONT_SHMEM, MPROTECT_ALL };
FIXTURE_VARIANT_ADD(reclaim, shmem_mremap_neighbour) { CONT_SHMEM, MREMAP_NEIGHBOUR };
FIXTURE_VARIANT_ADD(reclaim, shmem_mremap_all) { .src = CONT_SHMEM, .op = MREMAP_ALL };
FIXTURE_VARIANT_ADD(reclaim, shmem_clear_refs) { .src = CONT_SHMEM, .op = CLEAR_REFS };
FIXTURE_VARIANT_ADD(reclaim, shmem_fork) { .src = CONT_SHMEM, .op = FORK };

FIXTURE_SETUP(reclaim)
{
	struct cont_map *m = &self->map;

	if (variant->src == CONT_SHMEM && !have_swap())
		SKIP(return, "swap is off");
	if (!make_clean(_metadata, m, variant->src, 3))
		return;
	self->spare = cont_reserve(2 * m->pmd);
	ASSERT_NE(MAP_FAILED, self->spare);
	self->spare = cont_align_up(self->spare, m->pmd) +
		      ((uintptr_t)m->addr & (m->pmd - 1));
	self->nr = sample(m, m->pmd > (4 << 20) ? FEW_ENTRIES : MAX_ENTRIES, self->page);
}

FIXTURE_TEARDOWN(reclaim)
{
	cont_map_free(&self->map);
}

/* Reclaim the block that page i, now seen at "at", is in.  Is the page the same? */
static bool survives(const struct cont_map *m, char *at, unsigned int i)
{
	page_out(m, (char *)((uintptr_t)at & ~(m->block - 1)), m->block);
	/* Anonymous memory that is not to be discarded stays where it is. */
	if (m->src == CONT_SHMEM && present(at, m->page)) {
		printf("# page %u was not reclaimed\n", i);
		return false;
	}
	return cont_page_ok(at, m->seed, cont_index(m, i), 1);
}

/* Write page i, do op, reclaim: is the page as it was written? */
static bool write_op_reclaim(struct cont_map *m, enum meanwhile op, char *spare,
			     unsigned int i, bool *op_ok)
{
	/* The next entry of the block, or the first after the last. */
	char *next = cont_page_at(m, i / m->bpages * m->bpages + (i + 1) % m->bpages);
	int pipefd[2];
	bool ok, told;
	pid_t pid;
	char c;

	/* Shared memory is not copied at fork: here it is the child that writes. */
	if (op == FORK && m->flags == MAP_SHARED) {
		pid = fork();
		if (!pid) {
			cont_touch(m->addr, m->len);
			cont_fill(m, i, 1, 1);
			_exit(0);
		}
		*op_ok = !cont_wait(pid);
		return survives(m, cont_page_at(m, i), i);
	}

	cont_fill(m, i, 1, 1);
	switch (op) {
	case NOTHING:
		break;
	case MUNMAP_NEIGHBOUR:
		*op_ok = !munmap(next, m->page);
		break;
	case DONTNEED_NEIGHBOUR:
		*op_ok = !madvise(next, m->page, MADV_DONTNEED);
		break;
	case MPROTECT_NEIGHBOUR:
		*op_ok = !mprotect(next, m->page, PROT_READ);
		break;
	case MPROTECT_ALL:
		*op_ok = !mprotect(m->addr, m->len, PROT_READ);
		break;
	case MREMAP_NEIGHBOUR:
		*op_ok = cont_mremap(next, m->page, spare);
		break;
	case MREMAP_ALL:
		*op_ok = cont_mremap(m->addr, m->len, spare);
		return survives(m, spare + m->page * i, i);
	case CLEAR_REFS:
		*op_ok = forget_accesses();
		break;
	case FORK:
		pid = fork();
		if (!pid)
			_exit(0);
		*op_ok = !cont_wait(pid);
		break;
	case FORK_CHILD_KEEPS:
		if (pipe(pipefd)) {
			*op_ok = false;
			break;
		}
		pid = fork();
		if (!pid) {
			told = read(pipefd[0], &c, 1) == 1;
			ok = told && survives(m, cont_page_at(m, i), i);
			_exit(ok ? 0 : told ? 1 : 2);
		}
		/* All of the THP: the child is to be the only one that maps it. */
		ok = pid > 0 && !munmap((void *)((uintptr_t)m->addr & ~(m->pmd - 1)),
					m->pmd);
		*op_ok = write(pipefd[1], "", 1) == 1 && ok;
		close(pipefd[0]);
		close(pipefd[1]);
		return !cont_wait(pid);
	}
	return survives(m, cont_page_at(m, i), i);
}

CONT_TEST_F(reclaim, page_written_through_any_entry_survives)
{
	bool op_ok = true;
	unsigned int n;

	for (n = 0; n < self->nr; n++) {
		if (!cont_made(_metadata, m, renew_clean(m)))
			return;
		ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
		ASSERT_EQ(0, smaps_dirty(m->addr, m->len));
		/* SKIP() in the next turn would forget what an EXPECT has found. */
		ASSERT_TRUE(write_op_reclaim(m, variant->op, self->spare,
					     self->page[n], &op_ok))
			TH_LOG("wrote page %u", self->page[n]);
		ASSERT_TRUE(op_ok);
	}
}

/* ---- reclaim of a memory cgroup: folios are unmapped in one go -------- */

FIXTURE(memcg)
{
	char dir[64];
};

FIXTURE_SETUP(memcg)
{
	const char *root = "/sys/fs/cgroup";
	char file[96];

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	snprintf(file, sizeof(file), "%s/cgroup.subtree_control", root);
	if (!cont_write_str(file, "+memory"))
		SKIP(return, "no cgroup2 with a memory controller at %s", root);
	snprintf(self->dir, sizeof(self->dir), "%s/contpte.%d", root, getpid());
	ASSERT_EQ(0, mkdir(self->dir, 0700));
	snprintf(file, sizeof(file), "%s/memory.reclaim", self->dir);
	if (access(file, W_OK)) {
		rmdir(self->dir);
		self->dir[0] = '\0';
		SKIP(return, "memory cgroups have no memory.reclaim");
	}
}

FIXTURE_TEARDOWN(memcg)
{
	if (self->dir[0])
		rmdir(self->dir);
}

enum in_memcg {
	SURVIVED,
	GOT_LOST,
	NOT_RECLAIMED,
	NO_MEMORY,
	NO_MEMCG,
};

/*
 * Two THPs, MADV_FREE'd and then split into PTEs; one has been written through
 * one entry since.  The one that was not tells that reclaim came by.
 */
static enum in_memcg lazyfree_in_memcg(const char *dir, unsigned int entry)
{
	struct cont_map written, clean;
	char file[96];
	unsigned int i;
	int tries;

	snprintf(file, sizeof(file), "%s/cgroup.procs", dir);
	if (!cont_write_str(file, "0"))
		return NO_MEMCG;
	if (cont_map_make(&written, CONT_ANON, 2) || renew_clean(&written) ||
	    cont_map_make(&clean, CONT_ANON, 2) || renew_clean(&clean))
		return NO_MEMORY;
	i = written.bpages + entry % written.bpages;
	cont_fill(&written, i, 1, 1);
	snprintf(file, sizeof(file), "%s/memory.reclaim", dir);
	for (tries = 0; tries < 20 && present(clean.addr, clean.len); tries++) {
		/* Accessed folios get another round. */
		if (!forget_accesses())
			return NO_MEMCG;
		/* Says EAGAIN if it found less than it was asked for. */
		cont_write_str(file, "1G");
	}
	if (present(clean.addr, clean.len))
		return NOT_RECLAIMED;
	return cont_page_ok(cont_page_at(&written, i), written.seed,
			    cont_index(&written, i), 1) ? SURVIVED : GOT_LOST;
}

TEST_F(memcg, page_written_after_madv_free_survives)
{
	size_t bpages = cont_size() / cont_page_size();
	unsigned int entries[] = { 0, 1, bpages / 2, bpages - 1 }, n;
	int status;
	pid_t pid;

	if (!self->dir[0])
		return;
	for (n = 0; n < ARRAY_SIZE(entries); n++) {
		pid = cont_fork();
		if (!pid)
			_exit(lazyfree_in_memcg(self->dir, entries[n]));
		status = cont_wait(pid);
		ASSERT_TRUE(WIFEXITED(status));
		if (WEXITSTATUS(status) == NO_MEMORY)
			SKIP(return, "no memory for two THPs");
		ASSERT_EQ(SURVIVED, WEXITSTATUS(status))
			TH_LOG("wrote entry %u", entries[n]);
	}
}

/* ---- what MGLRU counts ------------------------------------------------- */

#define LRU_GEN		"/sys/kernel/debug/lru_gen"
#define LRU_GEN_ON	"/sys/kernel/mm/lru_gen/enabled"

/* What fits in a PMD of 4K pages. */
#define AGED_PAGES	384
/* A process with 64 pages is walked. Each 64 faults it is found out how many it has. */
#define SEEN_PAGES	160

FIXTURE(aging)
{
	struct cont_map map;
	char was[16];		/* LRU_GEN_ON before */
};

FIXTURE_VARIANT(aging)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(aging, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(aging, shmem) { .src = CONT_SHMEM };

/* How many entries all walks so far found accessed; -1 if that cannot be told. */
static long found_young(void)
{
	long sum = -1, n;
	char word[32], *end;
	FILE *f;

	f = fopen(LRU_GEN "_full", "re");
	if (!f)
		return -1;
	while (fscanf(f, "%31s", word) == 1) {
		n = strtol(word, &end, 10);
		if (end != word && !strcmp(end, "Y"))
			sum = sum < 0 ? n : sum + n;
	}
	fclose(f);
	return sum;
}

/* Walk the page tables of the memory cgroup of each "memcg" line, on each node. */
static bool age(void)
{
	unsigned long memcg = 0, node = 0, seq = 0;
	char line[PATH_MAX + 64], cmd[96];
	bool ok = true, last = false, found = false;
	FILE *f;

	f = fopen(LRU_GEN, "re");
	if (!f)
		return false;
	while (ok && !last) {
		last = !fgets(line, sizeof(line), f);
		if (!last && sscanf(line, " %lu", &seq) == 1) {
			found = true;
			continue;
		}
		/* That was the youngest: entries of anonymous memory too, all tables. */
		snprintf(cmd, sizeof(cmd), "+ %lu %lu %lu 1 1", memcg, node, seq);
		ok = !found || cont_write_str(LRU_GEN, cmd);
		found = false;
		if (!last && sscanf(line, "memcg %lu", &memcg) != 1)
			ok = ok && sscanf(line, " node %lu", &node) == 1;
	}
	fclose(f);
	return ok;
}

FIXTURE_SETUP(aging)
{
	char now[16] = "", *room;
	const char *why = NULL;
	unsigned int i;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	if (!cont_read_str(LRU_GEN_ON, self->was, sizeof(self->was)) ||
	    !cont_write_str(LRU_GEN_ON, "7"))
		SKIP(return, "kernel has no MGLRU");
	cont_read_str(LRU_GEN_ON, now, sizeof(now));
	if (!(strtol(now, NULL, 16) & 2))
		why = "no access flag in hardware: page tables are not walked";
	else if (found_young() < 0)
		why = "no debugfs, or a kernel that keeps LRU_GEN_STATS";
	if (why) {
		cont_write_str(LRU_GEN_ON, self->was);
		SKIP(return, "%s", why);
	}
	room = mmap(NULL, SEEN_PAGES * cont_page_size(), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, room);
	madvise(room, SEEN_PAGES * cont_page_size(), MADV_NOHUGEPAGE);
	for (i = 0; i < SEEN_PAGES; i++)
		cont_store(room + i * cont_page_size(), 1);
	if (!make_folded(_metadata, &self->map, variant->src,
			 AGED_PAGES * cont_page_size() / cont_size())) {
		/* Newer kernels tear nothing down after a skip. */
		cont_write_str(LRU_GEN_ON, self->was);
		return;
	}
	ASSERT_EQ(0, madvise(self->map.addr, self->map.len, MADV_DONTFORK));
}

FIXTURE_TEARDOWN(aging)
{
	cont_map_free(&self->map);
	if (self->was[0])
		cont_write_str(LRU_GEN_ON, self->was);
}

/* An eighth of a table's entries has to be young for it to be looked at again. */
CONT_TEST_F(aging, block_counts_as_all_of_its_entries)
{
	__u64 state = m->seed;
	unsigned int use, i;
	long young[2];

	ASSERT_TRUE(age());
	for (use = 0; use < 2; use++) {
		ASSERT_TRUE(flush_tlb());
		for (i = 0; use && i < m->nr_pages; i += m->bpages)
			cont_touch(cont_page_at(m, i + cont_rand(&state) % m->bpages),
				   m->page);
		young[use] = -found_young();
		ASSERT_TRUE(age());
		young[use] += found_young();
	}

	/* What else runs uses about as much both times. */
	EXPECT_LT(young[0] + m->nr_pages / 2, young[1]);
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
}

/* ---- swap and MADV_FREE of whole folded ranges ------------------------ */

FIXTURE(swap)
{
	struct cont_map map;
};

FIXTURE_VARIANT(swap)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(swap, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(swap, shmem) { .src = CONT_SHMEM };

FIXTURE_SETUP(swap)
{
	if (!have_swap())
		SKIP(return, "swap is off");
	make_folded(_metadata, &self->map, variant->src, 4);
}

FIXTURE_TEARDOWN(swap)
{
	cont_map_free(&self->map);
}

/* Generation that page i gets: a choice that the seed makes. */
static __u64 gen_of(const struct cont_map *m, unsigned int i)
{
	return cont_mix(m->seed + i) % 2;
}

/* Pages [first, first + nr) that do not hold the generation of gen_of() + add. */
static unsigned int bad_mix(const struct cont_map *m, unsigned int first,
			    unsigned int nr, __u64 add)
{
	unsigned int i, bad = 0;

	for (i = first; i < first + nr; i++)
		bad += cont_bad(m, i, 1, gen_of(m, i) + add);
	return bad;
}

static void write_mix(struct cont_map *m)
{
	unsigned int i;

	for (i = 0; i < m->nr_pages; i++)
		if (gen_of(m, i))
			cont_fill(m, i, 1, 1);
}

CONT_TEST_F(swap, written_pages_come_back)
{
	write_mix(m);
	page_out(m, m->addr, m->len);
	/* Pages were reclaimed, or there is nothing to be seen here. */
	ASSERT_EQ((long)m->len, cont_smaps(m->addr, m->len, "Swap:"));
	EXPECT_EQ(0U, bad_mix(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(swap, both_sides_of_a_fork_come_back)
{
	unsigned int i, bad;
	pid_t pid;

	write_mix(m);
	pid = cont_fork();
	if (!pid) {
		bad = bad_mix(m, 0, m->nr_pages, 0);
		/* Shared memory: the parent sees it.  Private: it must not. */
		for (i = 0; i < m->nr_pages; i++)
			cont_fill(m, i, 1, gen_of(m, i) + 2);
		page_out(m, m->addr, m->len);
		_exit(!!(bad + bad_mix(m, 0, m->nr_pages, 2)));
	}
	EXPECT_EQ(0, cont_wait(pid));
	page_out(m, m->addr, m->len);
	EXPECT_EQ(0U, bad_mix(m, 0, m->nr_pages, m->flags == MAP_SHARED ? 2 : 0));
}

FIXTURE(madv_free)
{
	struct cont_map map;
};

FIXTURE_SETUP(madv_free)
{
	make_folded(_metadata, &self->map, CONT_ANON, 4);
}

FIXTURE_TEARDOWN(madv_free)
{
	cont_map_free(&self->map);
}

CONT_TEST_F(madv_free, pages_written_later_survive)
{
	unsigned int i;

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_FREE));
	write_mix(m);
	page_out(m, m->addr, m->len);
	for (i = 0; i < m->nr_pages; i++)
		if (gen_of(m, i))
			EXPECT_EQ(0U, cont_bad(m, i, 1, 1));
}

CONT_TEST_F(madv_free, other_pages_are_old_or_zero)
{
	unsigned int i;

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_FREE));
	write_mix(m);
	page_out(m, m->addr, m->len);
	for (i = 0; i < m->nr_pages; i++) {
		if (gen_of(m, i) || cont_page_zero(cont_page_at(m, i)))
			continue;
		EXPECT_EQ(0U, cont_bad(m, i, 1, 0));
	}
}

CONT_TEST_F(madv_free, clean_pages_are_discarded)
{
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_FREE));
	cont_touch(m->addr, m->len);
	page_out(m, m->addr, m->len);
	EXPECT_EQ(0U, present(m->addr, m->len));
}

/* One page in the middle of each block; all others are still needed. */
CONT_TEST_F(madv_free, neighbours_survive)
{
	unsigned int i;

	if (!have_swap())
		SKIP(return, "swap is off");
	for (i = m->bpages / 2; i < m->nr_pages; i += m->bpages)
		ASSERT_EQ(0, madvise(cont_page_at(m, i), m->page, MADV_FREE));
	page_out(m, m->addr, m->len);
	for (i = 0; i < m->nr_pages; i++)
		if (i % m->bpages != m->bpages / 2)
			EXPECT_EQ(0U, cont_bad(m, i, 1, 0));
}

/* ---- writeback of a file mapping -------------------------------------- */

struct disk {
	const struct cont_map *m;
	char *buf;		/* fit for O_DIRECT */
	int fd;			/* O_DIRECT */
};

FIXTURE(writeback)
{
	struct cont_map map;
	struct disk disk;
	unsigned int nr;
	unsigned int page[MAX_ENTRIES];
};

FIXTURE_SETUP(writeback)
{
	struct cont_map *m = &self->map;
	char path[64];

	self->disk.m = m;
	self->disk.fd = -1;
	if (!make_folded(_metadata, m, CONT_XFS, 3))
		return;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", m->fd);
	self->disk.fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	ASSERT_LE(0, self->disk.fd);
	ASSERT_EQ(0, posix_memalign((void **)&self->disk.buf, m->page, m->page));
	self->nr = sample(m, MAX_ENTRIES, self->page);
}

FIXTURE_TEARDOWN(writeback)
{
	free(self->disk.buf);
	if (self->disk.fd >= 0)
		close(self->disk.fd);
	cont_map_free(&self->map);
}

/*
 * Does page i of the window have this generation on disk?  The read goes around
 * the page cache; it writes back what the cache knows to be dirty first, so that
 * old data can only come from a dirty bit that did not get to the cache.
 */
static bool on_disk(const struct disk *d, unsigned int i, __u64 gen)
{
	const struct cont_map *m = d->m;
	off_t off = m->off + m->page * i;

	return pread(d->fd, d->buf, m->page, off) == (ssize_t)m->page &&
	       cont_page_ok(d->buf, m->seed, cont_index(m, i), gen);
}

/* After fsync(), page i has to have this generation on disk. */
static void gets_to_disk(struct __test_metadata *_metadata, const struct disk *d,
			 unsigned int i, __u64 gen)
{
	ASSERT_EQ(0, fsync(d->m->fd));
	EXPECT_TRUE(on_disk(d, i, gen))
		TH_LOG("wrote page %u", i);
}

static unsigned int not_on_disk(const struct disk *d, unsigned int first,
				unsigned int nr, __u64 gen)
{
	unsigned int i, bad = 0;

	for (i = first; i < first + nr; i++)
		bad += !on_disk(d, i, gen);
	return bad;
}

/* Make all entries writable and dirty, so that the blocks fold as such. */
static void write_all(struct cont_map *m, __u64 gen)
{
	cont_fill(m, 0, m->nr_pages, gen);
}

CONT_TEST_F(writeback, write_through_any_entry_gets_to_disk)
{
	unsigned int n, i;

	for (n = 0; n < self->nr; n++) {
		i = self->page[n];
		cont_fill(m, i, 1, n + 1);
		gets_to_disk(_metadata, &self->disk, i, n + 1);
	}
	/* Blocks that nobody wrote. */
	EXPECT_EQ(0U, not_on_disk(&self->disk, 0, m->bpages, 0));
	EXPECT_EQ(0U, not_on_disk(&self->disk, 2 * m->bpages, m->bpages, 0));
}

/* Writeback has to take write access away, or the second write goes unseen. */
CONT_TEST_F(writeback, write_after_writeback_gets_to_disk)
{
	__u64 gen = 0;
	unsigned int n, i;

	for (n = 0; n < self->nr; n++) {
		i = self->page[n];
		write_all(m, ++gen);
		ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
		ASSERT_EQ(0, fsync(m->fd));
		cont_fill(m, i, 1, ++gen);
		gets_to_disk(_metadata, &self->disk, i, gen);
	}
}

CONT_TEST_F(writeback, msync_is_as_good_as_fsync)
{
	__u64 gen = 0;
	unsigned int n, i;

	for (n = 0; n < self->nr; n++) {
		i = self->page[n];
		write_all(m, ++gen);
		ASSERT_EQ(0, msync(m->addr, m->len, MS_SYNC));
		cont_fill(m, i, 1, ++gen);
		ASSERT_EQ(0, msync(cont_page_at(m, i), m->page, MS_SYNC));
		EXPECT_TRUE(on_disk(&self->disk, i, gen))
			TH_LOG("wrote page %u", i);
	}
}

CONT_TEST_F(writeback, write_before_munmap_gets_to_disk)
{
	__u64 gen = 0;
	unsigned int n, i;

	for (n = 0; n < self->nr; n++) {
		i = self->page[n];
		write_all(m, ++gen);
		ASSERT_EQ(0, fsync(m->fd));
		cont_fill(m, i, 1, ++gen);
		ASSERT_EQ(0, munmap(m->addr, m->len));
		gets_to_disk(_metadata, &self->disk, i, gen);
		ASSERT_EQ(m->addr, mmap(m->addr, m->len, m->prot, m->flags | MAP_FIXED,
					m->fd, m->off));
		cont_touch(m->addr, m->len);
	}
}

CONT_TEST_F(writeback, reread_after_drop_is_what_was_written)
{
	unsigned int i;

	write_all(m, 1);
	ASSERT_EQ(0, fsync(m->fd));
	for (i = 0; i < self->nr; i++)
		cont_fill(m, self->page[i], 1, 2);
	ASSERT_EQ(0, fsync(m->fd));
	ASSERT_EQ(0, munmap(m->addr, m->len));
	ASSERT_EQ(0, posix_fadvise(m->fd, 0, 0, POSIX_FADV_DONTNEED));
	ASSERT_EQ(m->addr, mmap(m->addr, m->len, m->prot, m->flags | MAP_FIXED, m->fd,
				m->off));
	for (i = 0; i < self->nr; i++)
		EXPECT_EQ(0U, cont_bad(m, self->page[i], 1, 2));
	EXPECT_EQ(0U, cont_bad(m, 0, m->bpages, 1));
	EXPECT_EQ(0U, cont_bad(m, 2 * m->bpages, m->bpages, 1));
}

CONT_TEST_F(writeback, two_mappings_are_both_cleaned)
{
	struct cont_map other;
	__u64 gen = 0;
	unsigned int n, i;

	other = *m;
	ASSERT_TRUE(cont_map_window(&other));
	cont_touch(other.addr, other.len);
	ASSERT_EQ((long)m->len, cont_mapped(other.addr, other.len));
	for (n = 0; n < self->nr; n++) {
		i = self->page[n];
		write_all(m, ++gen);
		write_all(&other, ++gen);
		ASSERT_EQ(0, fsync(m->fd));
		cont_fill(m, i, 1, ++gen);
		gets_to_disk(_metadata, &self->disk, i, gen);
		cont_fill(&other, i, 1, ++gen);
		gets_to_disk(_metadata, &self->disk, i, gen);
	}
	munmap(other.resv, other.resv_len);
}

CONT_TEST_F(writeback, writing_shows_as_dirty)
{
	ASSERT_EQ(0, smaps_dirty(m->addr, m->len));
	cont_fill(m, self->page[self->nr - 1], 1, 1);
	EXPECT_LT(0, smaps_dirty(m->addr, m->len));
}

CONT_TEST_F(writeback, all_is_clean_afterwards)
{
	unsigned int n;

	for (n = 0; n < self->nr; n++) {
		cont_fill(m, self->page[n], 1, n + 1);
		ASSERT_EQ(0, fsync(m->fd));
		EXPECT_EQ(0, smaps_dirty(m->addr, m->len))
			TH_LOG("wrote page %u", self->page[n]);
	}
	write_all(m, 1);
	ASSERT_EQ(0, fsync(m->fd));
	EXPECT_EQ(0, smaps_dirty(m->addr, m->len));
	EXPECT_EQ(0ULL, cont_folio_flags(cont_page_at(m, m->bpages)) & CONT_KPF_DIRTY);
}

/*
 * Nothing but dirty tells the entries of these blocks apart while they are being
 * cleaned, one after the other.
 */
CONT_TEST_F(writeback, read_only_blocks_are_cleaned)
{
	write_all(m, 1);
	ASSERT_EQ(0, mprotect(m->addr, m->len, PROT_READ));
	ASSERT_EQ(0, fsync(m->fd));
	EXPECT_EQ(0, smaps_dirty(m->addr, m->len));
	EXPECT_EQ(0U, not_on_disk(&self->disk, 0, m->nr_pages, 1));
}

CONT_TEST_F(writeback, reading_leaves_all_clean)
{
	write_all(m, 1);
	ASSERT_EQ(0, fsync(m->fd));
	cont_touch(m->addr, m->len);
	EXPECT_EQ(0, smaps_dirty(m->addr, m->len));
	EXPECT_EQ(0ULL, cont_folio_flags(cont_page_at(m, m->bpages)) & CONT_KPF_DIRTY);
}

/* Cleaning goes through all entries of a block: they end up alike. */
CONT_TEST_F(writeback, cleaned_blocks_are_folded)
{
	write_all(m, 1);
	ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	ASSERT_EQ(0, fsync(m->fd));
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
}

TEST_HARNESS_MAIN
