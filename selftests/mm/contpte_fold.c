// SPDX-License-Identifier: GPL-2.0
/*
 * Which blocks of PTEs are folded, and which must not be.
 *
 * Claim: a naturally aligned block of valid PTEs that map consecutive pages of
 * one folio with equal permissions is folded, whatever the order in which its
 * entries came to be, and nothing else is.
 *
 * Oracle: pagemap and kpageflags tell which blocks qualify, ContPteMapped of
 * smaps which the kernel folded.  A pattern in every page tells whether they
 * still map what they have to.
 */
#include <linux/io_uring.h>
#include <linux/mman.h>
#include "contpte_harness.h"

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup	425
#endif
#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT		26
#endif

#define NR_BLOCKS	4
/* The block that tests work on; it has others on both sides. */
#define B		1
#define ALL		cont_all_bits(NR_BLOCKS)
#define ALL_BUT_B	(ALL & ~CONT_BIT(B))

/* Folded blocks of the window. */
static __u64 folded(struct __test_metadata *_metadata, struct cont_map *m)
{
	return cont_folded(_metadata, m->addr, m->len);
}

/* The numbers below nr in random order. */
static void shuffle(unsigned int *order, unsigned int nr, __u64 seed)
{
	unsigned int i, j, tmp;

	for (i = 0; i < nr; i++)
		order[i] = i;
	for (i = nr - 1; i > 0; i--) {
		j = cont_rand(&seed) % (i + 1);
		tmp = order[i];
		order[i] = order[j];
		order[j] = tmp;
	}
}

FIXTURE(fold)
{
	struct cont_map map;
};

FIXTURE_VARIANT(fold)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(fold, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(fold, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(fold, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(fold, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(fold)
{
	cont_setup_dirty(_metadata, &self->map, variant->src, NR_BLOCKS, 0, 0);
}

FIXTURE_TEARDOWN(fold)
{
	cont_map_free(&self->map);
}

/* A populated range of large folios is folded from end to end. */
CONT_TEST_F(fold, populated)
{
	ASSERT_EQ(ALL, cont_expect_bits(m->addr, m->len));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ((long)m->len, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* smaps_rollup says what the VMAs in smaps say together. */
CONT_TEST_F(fold, rollup)
{
	long rollup;

	rollup = cont_rollup("ContPteMapped:");
	EXPECT_LE((long)m->len, rollup);
	EXPECT_EQ(cont_smaps(NULL, SIZE_MAX, "ContPteMapped:"), rollup);
}

/* The counters in vmstat move by the blocks that fold and unfold, or more. */
CONT_TEST_F(fold, vmstat)
{
	long long fold, unfold;
	int i;

	fold = cont_vmstat("contpte_fold");
	unfold = cont_vmstat("contpte_unfold");
	ASSERT_LE(0, fold);
	ASSERT_LE(0, unfold);
	for (i = 0; i < NR_BLOCKS; i++)
		ASSERT_EQ(0, mprotect(m->addr + i * m->block, m->page, PROT_NONE));
	EXPECT_LE(unfold + NR_BLOCKS, cont_vmstat("contpte_unfold"));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot));
	EXPECT_LE(fold + NR_BLOCKS, cont_vmstat("contpte_fold"));
}

/* A block folds with its last entry, not before, in any order of them. */
CONT_TEST_F(fold, random_order)
{
	unsigned int order[128], i;
	char *block = m->addr + B * m->block;

	shuffle(order, m->bpages, m->seed);
	for (i = 0; i < m->bpages; i++)
		ASSERT_EQ(0, mprotect(block + order[i] * m->page, m->page, PROT_NONE));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));

	shuffle(order, m->bpages, m->seed + 1);
	for (i = 0; i < m->bpages - 1; i++)
		ASSERT_EQ(0, mprotect(block + order[i] * m->page, m->page, m->prot));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));

	ASSERT_EQ(0, mprotect(block + order[i] * m->page, m->page, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* Memory without access has no valid entries, so nothing is folded. */
CONT_TEST_F(fold, prot_none)
{
	ASSERT_EQ(0, mprotect(m->addr, m->len, PROT_NONE));
	EXPECT_EQ(0, cont_mapped(m->addr, m->len));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* Virtual and physical address disagree modulo the block: nothing folds. */
CONT_TEST_F(fold, incongruent)
{
	char *dst;

	dst = cont_reserve(m->len + 3 * m->block);
	ASSERT_NE(MAP_FAILED, (void *)dst);
	dst = cont_align_up(dst, m->block) + m->page;

	ASSERT_TRUE(cont_mremap(m->addr, m->len, dst));
	EXPECT_EQ(0, cont_mapped(dst, m->len));
	EXPECT_EQ(0, cont_bad_at(m, dst, 0, m->nr_pages, 0));
	EXPECT_EQ(0, cont_mapped(dst, m->len));
}

/* Write all entries of the block again, but for the one of page. */
static void rewrite_around(struct __test_metadata *_metadata, struct cont_map *m,
			   unsigned int page)
{
	char *block = m->addr + B * m->block;
	size_t before = page * m->page, after = m->block - before - m->page;

	if (before) {
		ASSERT_EQ(0, mprotect(block, before, PROT_NONE));
		ASSERT_EQ(0, mprotect(block, before, m->prot));
	}
	if (after) {
		ASSERT_EQ(0, mprotect(block + before + m->page, after, PROT_NONE));
		ASSERT_EQ(0, mprotect(block + before + m->page, after, m->prot));
	}
}

/* A block with a page that is not mapped by any VMA never folds. */
CONT_TEST_F(fold, hole_in_vma)
{
	unsigned int page;

	page = cont_mix(m->seed) % m->bpages;
	ASSERT_EQ(0, munmap(m->addr + B * m->block + page * m->page, m->page));
	rewrite_around(_metadata, m, page);
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, B * m->bpages + page, 1));
}

/* A block with an empty entry never folds. */
CONT_TEST_F(fold, hole_in_table)
{
	unsigned int page;
	char *hole;

	page = cont_mix(m->seed) % m->bpages;
	hole = m->addr + B * m->block + page * m->page;
	ASSERT_EQ(0, madvise(hole, m->page, MADV_DONTNEED));
	rewrite_around(_metadata, m, page);
	EXPECT_EQ(0, cont_pfn(hole));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, B * m->bpages + page, 1));
}

/* Two VMAs with different permissions in a block: it is not folded. */
CONT_TEST_F(fold, two_vmas_differ)
{
	char *block;

	block = m->addr + B * m->block;
	ASSERT_EQ(0, mprotect(block, m->block / 2, cont_other_prot(m)));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	ASSERT_EQ(0, mprotect(block, m->block / 2, m->prot));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/*
 * Two VMAs with equal entries in a block: it may stay folded, as a whole, and
 * comes apart when one of them goes.
 */
CONT_TEST_F(fold, two_vmas_alike)
{
	size_t half;
	char *block;
	long n;

	block = m->addr + B * m->block;
	half = m->block / 2;
	ASSERT_EQ(0, madvise(block, half, MADV_DONTFORK));
	n = cont_mapped(block, half);
	EXPECT_TRUE(n == 0 || n == (long)half);
	EXPECT_TRUE(cont_mapped(m->addr, m->len) == (long)(m->len - m->block + 2 * n));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));

	ASSERT_EQ(0, munmap(block, half));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, B * m->bpages, m->bpages / 2));
}

/* Files: what the page fault handler folds. */
FIXTURE(fold_file)
{
	struct cont_map map;
};

FIXTURE_VARIANT(fold_file)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(fold_file, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(fold_file, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(fold_file, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(fold_file)
{
	cont_setup_dirty(_metadata, &self->map, variant->src, NR_BLOCKS, 0, 0);
}

FIXTURE_TEARDOWN(fold_file)
{
	cont_map_free(&self->map);
}

/* Read faults in random order end in folded blocks. */
CONT_TEST_F(fold_file, fault_order)
{
	unsigned int order[NR_BLOCKS * 128], i;

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTNEED));
	ASSERT_EQ(0, cont_smaps(m->addr, m->len, "Rss:"));
	EXPECT_EQ(0, cont_mapped(m->addr, m->len));
	shuffle(order, m->nr_pages, m->seed);
	for (i = 0; i < m->nr_pages; i++)
		cont_touch(m->addr + order[i] * m->page, m->page);
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* An address that disagrees with the file offset: faults fold nothing. */
CONT_TEST_F(fold_file, incongruent_offset)
{
	char *view;

	view = cont_map_view(m, m->off, m->len, m->page, m->prot, m->flags);
	ASSERT_NE(MAP_FAILED, (void *)view);
	EXPECT_EQ(0, cont_bad_at(m, view, 0, m->nr_pages, 0));
	EXPECT_EQ((long)m->len, cont_smaps(view, m->len, "Rss:"));
	EXPECT_EQ(0, cont_mapped(view, m->len));
}

/* Blocks that stick out of the VMA do not fold, those inside of it do. */
CONT_TEST_F(fold_file, vma_edges)
{
	char *view, *end;
	__u64 inner;
	size_t len;

	len = m->len - 2 * m->page;
	view = cont_map_view(m, m->off + m->page, len, 0, m->prot, m->flags);
	ASSERT_NE(MAP_FAILED, (void *)view);
	end = view + len;
	/* Nothing else in the range that smaps is asked for. */
	ASSERT_EQ(0, munmap(view - m->page, m->page));
	ASSERT_EQ(0, munmap(end, m->page));

	EXPECT_EQ(0, cont_bad_at(m, view - m->page, 1, m->nr_pages - 2, 0));
	EXPECT_EQ((long)len, cont_smaps(view, len, "Rss:"));
	inner = ALL & ~(CONT_BIT(0) | CONT_BIT(NR_BLOCKS - 1));
	EXPECT_EQ(inner, cont_folded(_metadata, view - m->page, m->len));
}

/* Shared and writable files: first touch is a write. */
FIXTURE(fold_shared)
{
	struct cont_map map;
};

FIXTURE_VARIANT(fold_shared)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(fold_shared, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(fold_shared, xfs) { .src = CONT_XFS };

FIXTURE_SETUP(fold_shared)
{
	cont_setup_dirty(_metadata, &self->map, variant->src, NR_BLOCKS, 0, 0);
}

FIXTURE_TEARDOWN(fold_shared)
{
	cont_map_free(&self->map);
}

/* Write faults in random order end in folded blocks. */
CONT_TEST_F(fold_shared, write_order)
{
	unsigned int order[NR_BLOCKS * 128], i;

	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTNEED));
	shuffle(order, m->nr_pages, m->seed);
	for (i = 0; i < m->nr_pages; i++)
		cont_fill(m, order[i], 1, 1);
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 1));
}

/* Anonymous memory: a PMD that has to become PTEs because of one page. */
FIXTURE(fold_pmd)
{
	struct cont_map map;
	char *page;
};

FIXTURE_SETUP(fold_pmd)
{
	struct cont_map *m = &self->map;

	if (cont_setup_dirty(_metadata, m, CONT_THP, 0, 0, 0))
		self->page = cont_page_at(m, cont_mix(m->seed) % m->nr_pages);
}

FIXTURE_TEARDOWN(fold_pmd)
{
	cont_map_free(&self->map);
}

/* All blocks are folded but the one of this page, which data is not checked. */
static void all_but_page(struct __test_metadata *_metadata, struct cont_map *m,
			 char *page)
{
	EXPECT_EQ((long)(m->len - m->block), cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_bad_but(m, (page - m->addr) / m->page, 1));
}

/* A PMD is no block, however large. */
CONT_TEST_F(fold_pmd, whole)
{
	EXPECT_EQ(0, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(fold_pmd, split_by_munmap)
{
	ASSERT_EQ(0, munmap(self->page, m->page));
	all_but_page(_metadata, m, self->page);
}

CONT_TEST_F(fold_pmd, split_by_dontneed)
{
	ASSERT_EQ(0, madvise(self->page, m->page, MADV_DONTNEED));
	all_but_page(_metadata, m, self->page);
}

CONT_TEST_F(fold_pmd, split_by_mprotect)
{
	ASSERT_EQ(0, mprotect(self->page, m->page, PROT_READ));
	all_but_page(_metadata, m, self->page);
}

CONT_TEST_F(fold_pmd, split_by_mremap)
{
	char *dst;

	dst = cont_reserve(m->page);
	ASSERT_NE(MAP_FAILED, (void *)dst);
	ASSERT_TRUE(cont_mremap(self->page, m->page, dst));
	all_but_page(_metadata, m, self->page);
}

/* The entries of the page are like all others. */
CONT_TEST_F(fold_pmd, split_by_vma)
{
	long n;

	ASSERT_EQ(0, madvise(self->page, m->page, MADV_DONTFORK));
	n = cont_mapped(m->addr, m->len);
	EXPECT_TRUE(n == (long)m->len || n == (long)(m->len - m->block));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/*
 * A file with folios of all sizes, as readahead left them: blocks fold where a
 * folio is large enough, and only there.
 */
TEST(folios_of_all_sizes)
{
	size_t len, off;
	struct cont_map m;
	__u64 expect;
	char *view;

	if (!cont_setup_dirty(_metadata, &m, CONT_XFS, NR_BLOCKS, 0, 0))
		return;
	len = 16 * m.block;
	view = cont_map_view(&m, 0, len, 0, PROT_READ, MAP_SHARED);
	ASSERT_NE(MAP_FAILED, (void *)view);
	for (off = 0; off < len; off += m.page)
		ASSERT_TRUE(cont_page_ok(view + off, m.seed, off / m.page, 0));

	expect = cont_expect_bits(view, len);
	/* Readahead starts with small folios, and the window is larger ones. */
	ASSERT_EQ(0, expect & 1);
	ASSERT_NE(0, expect);
	EXPECT_EQ(expect, cont_folded(_metadata, view, len));
	cont_map_free(&m);
}

/* Code runs from a folded block, and running it leaves it folded. */
TEST(execute)
{
#ifdef __aarch64__
	struct cont_map m;
	unsigned int i;

	if (!cont_setup_dirty(_metadata, &m, CONT_XFS_EXEC, NR_BLOCKS, 0, 0))
		return;
	for (i = 0; i < m.nr_pages; i++) {
		int (*func)() = (int (*)())(m.addr + i * m.page);

		ASSERT_EQ((int)(cont_index(&m, i) & 0xffff), func());
	}
	EXPECT_EQ(ALL, folded(_metadata, &m));
	cont_map_free(&m);
#else
	SKIP(return, CONT_NO_SUPPORT);
#endif
}

/*
 * Program text that a fault has brought in is folded by that fault, wherever in the
 * block it was, and although readahead has nothing to go by.
 */
TEST(text_from_disk)
{
	unsigned int nr = 4, b;
	struct cont_map m;
	__u64 rand;
	char *view;

	if (cont_size() != 64 << 10)
		SKIP(return, "text comes in folios of 64K, which are no block here");
	if (!cont_setup_dirty(_metadata, &m, CONT_XFS_EXEC, nr, 0, 0))
		return;
	rand = m.seed;
	/* Nothing of it stays in the page cache. */
	ASSERT_EQ(0, munmap(m.addr, m.len));
	ASSERT_EQ(0, posix_fadvise(m.fd, 0, 0, POSIX_FADV_DONTNEED));
	view = cont_map_view(&m, m.off, m.len, 0, m.prot, m.flags);
	ASSERT_NE(MAP_FAILED, (void *)view);
	/* From the end, or one readahead would serve all. */
	for (b = nr; b--; ) {
		char *at = view + b * m.block;

		ASSERT_EQ(0, cont_pfn(at));
		cont_load(at + cont_rand(&rand) % m.bpages * m.page);
		EXPECT_TRUE(cont_block_is_one_folio(at));
		EXPECT_EQ(cont_all_bits(1), cont_folded(_metadata, at, m.block));
	}
	EXPECT_EQ(0, cont_bad_at(&m, view, 0, m.nr_pages, 0));
	cont_map_free(&m);
}

/* Anonymous memory without large folios, and none of its pages yet. */
static char *small_pages(struct __test_metadata *_metadata, size_t len)
{
	char *mem = cont_reserve(len + cont_size());

	ASSERT_NE(MAP_FAILED, (void *)mem);
	mem = cont_align_up(mem, cont_size());
	ASSERT_EQ(0, madvise(mem, len, MADV_NOHUGEPAGE));
	ASSERT_EQ(0, mprotect(mem, len, PROT_READ | PROT_WRITE));
	return mem;
}

/* Pages that are not part of a large folio, next to each other or not. */
TEST(small_folios)
{
	size_t len = 32 * cont_size(), at;
	char *mem;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	mem = small_pages(_metadata, len);
	for (at = 0; at < len; at += cont_page_size())
		cont_store(mem + at, at);
	EXPECT_EQ((long)len, cont_smaps(mem, len, "Rss:"));
	EXPECT_EQ(0, cont_mapped(mem, len));
}

/* The same in shared memory. */
TEST(small_folios_shmem)
{
	size_t block = cont_size(), len = 8 * block, at;
	char *mem;
	int fd;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	if (!cont_sees_pfns())
		SKIP(return, "pagemap and kpageflags show nothing (needs root)");
	fd = memfd_create("contpte", MFD_CLOEXEC);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ftruncate(fd, len));
	mem = cont_reserve(len + block);
	ASSERT_NE(MAP_FAILED, (void *)mem);
	mem = cont_align_up(mem, block);
	mem = mmap(mem, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	ASSERT_NE(MAP_FAILED, (void *)mem);
	for (at = 0; at < len; at += cont_page_size())
		cont_store(mem + at, at);
	/* Nothing, unless shmem_enabled makes huge pages of this one too. */
	EXPECT_EQ(cont_expect_bits(mem, len), cont_folded(_metadata, mem, len));
	close(fd);
}

/*
 * Pages that lie like those of a large folio but are none any more: splitting a
 * folio leaves its pages where they are.
 */
TEST(split_folio)
{
	__u64 ent[NR_BLOCKS * 128];
	struct cont_map m;
	unsigned int i;

	if (!cont_setup_dirty(_metadata, &m, CONT_ANON, NR_BLOCKS, 0, 0))
		return;
	/* Of a part of a folio, this splits it. */
	ASSERT_EQ(0, madvise(m.addr, m.page, MADV_COLD));
	cont_touch(m.addr, m.len);
	ASSERT_TRUE(cont_pagemap(m.addr, m.nr_pages, ent));
	for (i = 1; i < m.nr_pages; i++)
		ASSERT_EQ(CONT_PM_PFN(ent[0]) + i, CONT_PM_PFN(ent[i]));
	ASSERT_EQ(0, CONT_PM_PFN(ent[0]) % m.bpages);
	ASSERT_EQ(0, cont_page_flags(m.addr) & (CONT_KPF_HEAD | CONT_KPF_TAIL));

	ASSERT_EQ(0, mprotect(m.addr, m.len, PROT_READ));
	EXPECT_EQ(0, cont_mapped(m.addr, m.len));
	ASSERT_EQ(0, mprotect(m.addr, m.len, m.prot));
	cont_fill(&m, 0, m.nr_pages, 1);
	EXPECT_EQ(0, cont_mapped(m.addr, m.len));
	EXPECT_EQ(0, cont_bad(&m, 0, m.nr_pages, 1));
	cont_map_free(&m);
}

/* The zero page, over and over. */
TEST(zero_page)
{
	size_t len = 4 * cont_size();
	char *mem;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	mem = small_pages(_metadata, len);
	cont_touch(mem, len);
	EXPECT_EQ(0, cont_mapped(mem, len));
	ASSERT_EQ(0, mprotect(mem, len, PROT_READ));
	EXPECT_EQ(0, cont_mapped(mem, len));
	EXPECT_TRUE(cont_page_zero(mem));
}

/* The huge zero page, when its PMD is split. */
TEST(huge_zero_page)
{
	size_t pmd = cont_pmd_size(), block = cont_size(), len = 4 * block;
	char *mem;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	if (!pmd)
		SKIP(return, "kernel has no THP");
	mem = cont_reserve(2 * pmd);
	ASSERT_NE(MAP_FAILED, (void *)mem);
	mem = cont_align_up(mem, pmd);
	ASSERT_EQ(0, madvise(mem, pmd, MADV_HUGEPAGE));
	ASSERT_EQ(0, mprotect(mem, pmd, PROT_READ | PROT_WRITE));
	cont_touch(mem, cont_page_size());
	ASSERT_EQ(0, madvise(mem + block, len, MADV_NOHUGEPAGE));
	cont_touch(mem + block, len);
	EXPECT_EQ(0, cont_mapped(mem + block, len));
	EXPECT_TRUE(cont_page_zero(mem + block));
}

/* Does the VMA at addr have this flag in smaps? */
static bool vma_has_flag(const void *addr, const char *flag)
{
	unsigned long start, end;
	bool here = false, ret = false;
	char line[512];
	FILE *f;

	f = fopen("/proc/self/smaps", "re");
	if (!f)
		return false;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = start <= (uintptr_t)addr && (uintptr_t)addr < end;
		else if (here && !strncmp(line, "VmFlags:", 8))
			ret = strstr(line, flag);
	}
	fclose(f);
	return ret;
}

/*
 * A compound page of a driver, aligned and mapped in one piece.  Where the
 * driver inserts it page by page it counts like any other folio; where it maps
 * page frame numbers the entries are special, and must not fold.
 */
TEST(driver_memory)
{
	const unsigned int entries = 32768;
	size_t len = entries * sizeof(struct io_uring_sqe), block = cont_size();
	struct io_uring_params params = { .flags = 0 };
	unsigned int tries;
	char *mem;
	long expect;
	int fd;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	if (!cont_sees_pfns())
		SKIP(return, "pagemap and kpageflags show nothing (needs root)");
	fd = syscall(__NR_io_uring_setup, entries, &params);
	if (fd < 0)
		SKIP(return, "io_uring_setup: %s", strerror(errno));
	/*
	 * io_uring insists on choosing the address.  The kernel goes downwards,
	 * so that filling what is above a block moves the next try onto it.
	 */
	for (tries = 0; tries < 16; tries++) {
		mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			   IORING_OFF_SQES);
		ASSERT_NE(MAP_FAILED, (void *)mem);
		if (!((uintptr_t)mem % block))
			break;
		ASSERT_EQ(0, munmap(mem, len));
		cont_reserve((uintptr_t)mem % block);
	}
	ASSERT_EQ(0, (uintptr_t)mem % block);
	ASSERT_TRUE(cont_block_is_one_folio(mem));
	expect = vma_has_flag(mem, " pf") ? 0 : expect_folded(mem, len);
	EXPECT_EQ(expect, cont_mapped(mem, len));
	ASSERT_EQ(0, mprotect(mem, len, PROT_READ));
	EXPECT_EQ(expect, cont_mapped(mem, len));
	close(fd);
}

/*
 * hugetlb uses the same bit on its own account: pages of the size of a block are
 * not counted, and work as ever.
 */
TEST(hugetlb)
{
	char path[128], old[32] = "0";
	size_t block = cont_size(), len = 2 * block, at;
	unsigned int shift = __builtin_ctzl(block);
	char *mem;

	if (!cont_supported())
		SKIP(return, CONT_NO_SUPPORT);
	snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-%zukB/nr_hugepages",
		 block >> 10);
	if (!cont_read_str(path, old, sizeof(old)) || !cont_write_str(path, "2"))
		SKIP(return, "no hugetlb pages of %zu kB (needs root)", block >> 10);
	mem = mmap(NULL, len, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (shift << MAP_HUGE_SHIFT),
		   -1, 0);
	if (mem == MAP_FAILED) {
		cont_write_str(path, old);
		SKIP(return, "no memory for hugetlb pages of %zu kB", block >> 10);
	}
	for (at = 0; at < len; at += cont_page_size())
		cont_page_fill(mem + at, 1, at, 0);
	EXPECT_EQ(0, cont_mapped(mem, len));
	EXPECT_EQ(0, mprotect(mem, len, PROT_READ));
	EXPECT_EQ(0, cont_mapped(mem, len));
	EXPECT_EQ(0, mprotect(mem, len, PROT_READ | PROT_WRITE));
	for (at = 0; at < len; at += cont_page_size())
		EXPECT_TRUE(cont_page_ok(mem + at, 1, at, 0));
	EXPECT_EQ(0, munmap(mem, len));
	EXPECT_TRUE(cont_write_str(path, old));
}

TEST_HARNESS_MAIN
