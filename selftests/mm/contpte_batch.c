// SPDX-License-Identifier: GPL-2.0
/*
 * What is done to whole blocks leaves them folded, or takes them away, and costs
 * no TLB maintenance of its own.
 *
 * Claim: fork, munmap, exit, MADV_DONTNEED, mprotect, mremap to a congruent address,
 * truncation and writeback of folded memory unfold no block that they cover whole,
 * at most the two that an odd range cuts, and lose no data.
 *
 * Oracle: contpte_unfold of vmstat counts what unfolds (each time with a TLB
 * invalidation); pagemap and kpageflags tell which blocks may be folded; a pattern
 * in every page and the file tell whether the data is there.
 *
 * Breaks on: a batch that forgets to stay whole, that goes beyond its range, or that
 * drops access or dirty.
 */
#include "contpte_harness.h"

#define NR_BLOCKS	4

static long long unfolds(void)
{
	return cont_vmstat("contpte_unfold");
}

FIXTURE(batch)
{
	struct cont_map map;
	char *view;		/* more address space, aligned as the window is */
	char *resv;
	size_t resv_len;
};

FIXTURE_VARIANT(batch)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(batch, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(batch, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(batch, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(batch, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(batch)
{
	struct cont_map *m = &self->map;

	if (!cont_setup(_metadata, m, variant->src, NR_BLOCKS, 0, 0))
		return;
	/* All entries become dirty and writable, so that none has to fault again. */
	if (m->prot & PROT_WRITE)
		cont_fill(m, 0, m->nr_pages, 0);
	self->resv_len = m->len + 2 * m->block;
	self->resv = cont_reserve(self->resv_len);
	ASSERT_NE(MAP_FAILED, self->resv);
	self->view = cont_align_up(self->resv, m->block);
	ASSERT_TRUE(cont_all_folded(m->addr, m->len));
}

FIXTURE_TEARDOWN(batch)
{
	if (self->resv)
		munmap(self->resv, self->resv_len);
	cont_map_free(&self->map);
}

/* The parent stays folded, the child is, and exits without ado. */
CONT_TEST_F(batch, fork)
{
	long long before = unfolds();
	pid_t pid = cont_fork();

	if (!pid) {
		/* What is not copied (shared, or never written) is mapped by faults. */
		cont_touch(m->addr, m->len);
		_exit(!cont_all_folded(m->addr, m->len) ||
		      cont_bad(m, 0, m->nr_pages, 0) != 0);
	}
	EXPECT_EQ(0, cont_wait(pid));
	EXPECT_EQ(before, unfolds());
	EXPECT_TRUE(cont_all_folded(m->addr, m->len));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* A range that begins and ends inside of blocks cuts these two only. */
CONT_TEST_F(batch, munmap_odd)
{
	long long before = unfolds();
	bool odd;

	ASSERT_EQ(0, munmap(m->addr + m->page, m->len - 2 * m->page));
	EXPECT_EQ(before + 2, unfolds());
	EXPECT_EQ(0, cont_folded_bits(m->addr, m->len, &odd));
	EXPECT_FALSE(odd);
	EXPECT_EQ(0, cont_bad(m, 0, 1, 0));
	EXPECT_EQ(0, cont_bad(m, m->nr_pages - 1, 1, 0));
}

CONT_TEST_F(batch, munmap)
{
	long long before = unfolds();

	ASSERT_EQ(0, munmap(m->addr + m->block, 2 * m->block));
	EXPECT_EQ(before, unfolds());
	EXPECT_TRUE(cont_all_folded(m->addr, m->block));
	EXPECT_TRUE(cont_all_folded(m->addr + 3 * m->block, m->block));
	EXPECT_EQ(0, cont_bad(m, 0, m->bpages, 0));
	EXPECT_EQ(0, cont_bad(m, 3 * m->bpages, m->bpages, 0));
}

/*
 * struct mmu_gather starts with eight slots, of which a page takes one and a run of
 * pages two: the first run needs what the last slot is not enough for.
 */
CONT_TEST_F(batch, munmap_pages_and_runs)
{
	unsigned int i;

	for (i = 1; i < 14; i += 2)
		ASSERT_EQ(0, munmap(cont_page_at(m, i), m->page));
	ASSERT_EQ(0, munmap(cont_page_at(m, 14), 2 * m->page));
	ASSERT_EQ(0, munmap(m->addr, 2 * m->block));
	for (i = 0; i < 2 * m->bpages; i++)
		ASSERT_EQ(0, cont_pfn(cont_page_at(m, i)));
	EXPECT_TRUE(cont_all_folded(m->addr + 2 * m->block, 2 * m->block));
	EXPECT_EQ(0, cont_bad(m, 2 * m->bpages, 2 * m->bpages, 0));
}

/* The pages of a file come back as they were, others as zeroes. */
CONT_TEST_F(batch, dontneed)
{
	long long before = unfolds();
	unsigned int i;

	ASSERT_EQ(0, madvise(m->addr + m->block, 2 * m->block, MADV_DONTNEED));
	EXPECT_EQ(before, unfolds());
	for (i = m->bpages; i < 3 * m->bpages; i++)
		ASSERT_EQ(0, cont_pfn(cont_page_at(m, i)));
	EXPECT_TRUE(cont_all_folded(m->addr, m->block));
	if (m->fd < 0) {
		for (i = m->bpages; i < 3 * m->bpages; i++)
			ASSERT_TRUE(cont_page_zero(cont_page_at(m, i)));
		EXPECT_EQ(0, cont_bad(m, 0, m->bpages, 0));
		EXPECT_EQ(0, cont_bad(m, 3 * m->bpages, m->bpages, 0));
	} else {
		EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	}
}

CONT_TEST_F(batch, dontneed_odd)
{
	long long before = unfolds();
	unsigned int half = m->bpages / 2;

	ASSERT_EQ(0, madvise(m->addr + half * m->page, m->len - m->block,
			     MADV_DONTNEED));
	EXPECT_EQ(before + 2, unfolds());
	EXPECT_EQ(0, cont_bad(m, 0, half, 0));
	EXPECT_EQ(0, cont_bad(m, m->nr_pages - half, half, 0));
	EXPECT_NE(0, cont_pfn(m->addr + (half - 1) * m->page));
	EXPECT_EQ(0, cont_pfn(m->addr + half * m->page));
	EXPECT_EQ(0, cont_pfn(m->addr + (m->nr_pages - half - 1) * m->page));
	EXPECT_NE(0, cont_pfn(m->addr + (m->nr_pages - half) * m->page));
}

/* A process goes away with blocks that are its own. */
CONT_TEST_F(batch, exit)
{
	long long before;
	pid_t pid;

	pid = cont_fork();
	if (!pid) {
		if (m->prot & PROT_WRITE)
			cont_fill(m, 0, m->nr_pages, 1);
		_exit(0);
	}
	ASSERT_EQ(0, cont_wait(pid));
	/* Writing may have unfolded. Once more, with nothing to copy. */
	before = unfolds();
	pid = cont_fork();
	if (!pid) {
		cont_touch(m->addr, m->len);
		_exit(0);
	}
	ASSERT_EQ(0, cont_wait(pid));
	EXPECT_EQ(before, unfolds());
}

CONT_TEST_F(batch, mprotect)
{
	int prot = m->prot & PROT_EXEC ? PROT_READ : m->prot & ~PROT_WRITE;
	long long before = unfolds();

	ASSERT_EQ(0, mprotect(m->addr, m->len, prot));
	EXPECT_TRUE(cont_all_folded(m->addr, m->len));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot));
	EXPECT_TRUE(cont_all_folded(m->addr, m->len));
	EXPECT_EQ(before, unfolds());
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	/* What can be written can be written, in each page by itself. */
	if (m->prot & PROT_WRITE) {
		cont_fill(m, 0, m->nr_pages, 1);
		EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 1));
	}
}

CONT_TEST_F(batch, mprotect_odd)
{
	long long before = unfolds();

	ASSERT_EQ(0, mprotect(m->addr + m->page, m->len - 2 * m->page, PROT_NONE));
	EXPECT_EQ(before + 2, unfolds());
	EXPECT_EQ(0, cont_bad(m, 0, 1, 0));
	EXPECT_EQ(0, cont_bad(m, m->nr_pages - 1, 1, 0));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	EXPECT_TRUE(cont_all_folded(m->addr, m->len));
}

CONT_TEST_F(batch, mremap)
{
	long long before = unfolds();

	ASSERT_TRUE(cont_mremap(m->addr, m->len, self->view));
	EXPECT_EQ(before, unfolds());
	EXPECT_TRUE(cont_all_folded(self->view, m->len));
	EXPECT_EQ(0, cont_bad_at(m, self->view, 0, m->nr_pages, 0));
}

/* To where nothing can fold, and back. */
CONT_TEST_F(batch, mremap_skewed)
{
	long long before = unfolds();
	char *to = self->view + m->page;
	bool odd;

	ASSERT_TRUE(cont_mremap(m->addr, m->len, to));
	/* The end of a page table may come in the middle of a block. */
	EXPECT_GE(before + 1, unfolds());
	EXPECT_EQ(0, cont_folded_bits(self->view, m->len + m->block, &odd));
	EXPECT_FALSE(odd);
	EXPECT_EQ(0, cont_bad_at(m, to, 0, m->nr_pages, 0));
	ASSERT_TRUE(cont_mremap(to, m->len, m->addr));
	EXPECT_TRUE(cont_all_folded(m->addr, m->len));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* Writeback cleans blocks as they are, and forgets nothing that was written. */
CONT_TEST_F(batch, writeback)
{
	long long before;
	unsigned int i, gen;
	char *buf;

	if (m->src != CONT_XFS)
		SKIP(return, "only a shared file on disk is written back");
	before = unfolds();
	buf = malloc(m->page);
	ASSERT_NE(NULL, buf);
	for (gen = 1; gen < 4; gen++) {
		cont_fill(m, 0, m->nr_pages, gen);
		ASSERT_TRUE(cont_all_folded(m->addr, m->len));
		before = unfolds();
		ASSERT_EQ(0, fdatasync(m->fd));
		EXPECT_EQ(before, unfolds());
		EXPECT_TRUE(cont_all_folded(m->addr, m->len));
		EXPECT_EQ(0, cont_page_flags(m->addr) & CONT_KPF_DIRTY);
		/* Seen by the next writeback: entries are read-only again. */
		cont_fill(m, m->bpages + 1, 1, gen + 10);
		EXPECT_NE(0, cont_folio_flags(m->addr + m->block) & CONT_KPF_DIRTY);
		ASSERT_EQ(0, fdatasync(m->fd));
		for (i = 0; i < m->nr_pages; i++) {
			ASSERT_EQ((ssize_t)m->page, pread(m->fd, buf, m->page,
							  m->off + i * m->page));
			ASSERT_EQ(0, memcmp(buf, cont_page_at(m, i), m->page));
		}
	}
	free(buf);
}

CONT_TEST_F(batch, truncate)
{
	long long before = unfolds();

	if (m->fd < 0)
		SKIP(return, "no file");
	ASSERT_EQ(0, ftruncate(m->fd, m->off));
	EXPECT_EQ(before, unfolds());
	EXPECT_EQ(0, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_smaps(m->addr, m->len, "Rss:"));
}

/* ---- advice about a whole folio, which its PTEs map ------------------- */

FIXTURE(batch_folio)
{
	struct cont_map map;
};

FIXTURE_SETUP(batch_folio)
{
	struct cont_map *m = &self->map;

	if (!cont_setup(_metadata, m, CONT_THP, 1, 0, 0))
		return;
	/* A VMA that ends inside of it splits the PMD. The VMA is whole again. */
	ASSERT_EQ(0, madvise(m->addr, m->page, MADV_NOHUGEPAGE));
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_NOHUGEPAGE));
	ASSERT_EQ((long)m->len, cont_mapped(m->addr, m->len));
}

FIXTURE_TEARDOWN(batch_folio)
{
	cont_map_free(&self->map);
}

static bool is_whole(const struct cont_map *m)
{
	return (cont_page_flags(m->addr) & CONT_KPF_HEAD) &&
	       (cont_page_flags(m->addr + m->len - m->page) & CONT_KPF_TAIL);
}

CONT_TEST_F(batch_folio, cold)
{
	long long before = unfolds();

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_COLD));
	EXPECT_EQ(before, unfolds());
	EXPECT_TRUE(is_whole(m));
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_smaps(m->addr, m->len, "Referenced:"));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(batch_folio, free)
{
	long long before = unfolds();

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_FREE));
	EXPECT_EQ(before, unfolds());
	EXPECT_TRUE(is_whole(m));
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_smaps(m->addr, m->len, "Private_Dirty:"));
	/* What is written now stays, whatever becomes of the rest. */
	cont_fill(m, 0, m->nr_pages, 1);
	madvise(m->addr, m->len, MADV_PAGEOUT);
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 1));
}

/* What is unmapped is free: no reference is forgotten. */
CONT_TEST_F(batch_folio, munmap_frees)
{
	__u64 pfn, flags;

	pfn = cont_pfn(m->addr);
	ASSERT_NE(0, pfn);
	ASSERT_EQ(0, munmap(m->addr, m->len));
	/* The LRU's per-CPU lists may hold one for a while: this drains them. */
	cont_make_room();
	ASSERT_TRUE(cont_kpageflags(pfn, 1, &flags));
	EXPECT_EQ(0, flags & (CONT_KPF_HEAD | CONT_KPF_THP));
}

/* Advice for a part must not change the rest. */
CONT_TEST_F(batch_folio, free_part)
{
	unsigned int half = m->nr_pages / 2 + 1;
	unsigned int i;

	ASSERT_EQ(0, madvise(m->addr, half * m->page, MADV_FREE));
	EXPECT_EQ(0, cont_bad(m, half, m->nr_pages - half, 0));
	madvise(m->addr, m->len, MADV_PAGEOUT);
	EXPECT_EQ(0, cont_bad(m, half, m->nr_pages - half, 0));
	for (i = 0; i < half; i++)
		ASSERT_TRUE(cont_page_ok(cont_page_at(m, i), m->seed, i, 0) ||
			    cont_page_zero(cont_page_at(m, i)));
}

TEST_HARNESS_MAIN
