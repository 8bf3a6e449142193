// SPDX-License-Identifier: GPL-2.0
/*
 * Blocks of folded PTEs that come apart, and come together again.
 *
 * Claim: what happens to one page of a folded block unfolds this block and no
 * other, changes no other page, and the block is folded again as soon as its
 * entries allow it.  What happens to a whole block leaves or makes it folded.
 *
 * Oracle: the window is four blocks; which of them may be folded after a call
 * follows from the call, or, where the kernel is free to choose pages, from
 * pagemap and kpageflags.  ContPteMapped of smaps, read block by block, has to
 * say the same.  A pattern in every page tells lost or stray data.
 */
#include <linux/falloc.h>
#include "contpte_harness.h"

#define NR_BLOCKS	4
/* The block that tests take apart; it has others on both sides. */
#define B		1
#define ALL		cont_all_bits(NR_BLOCKS)
#define ALL_BUT_B	(ALL & ~CONT_BIT(B))

#define MOVE_PAGES_MOVE	2

/* The page of block B that tests pick. */
enum pos {
	FIRST,
	MIDDLE,
	LAST,
};

static __u64 folded(struct __test_metadata *_metadata, struct cont_map *m)
{
	return cont_folded(_metadata, m->addr, m->len);
}

static char *block_b(struct cont_map *m)
{
	return m->addr + B * m->block;
}

/* Number of the picked page in the window. */
static unsigned int picked(struct cont_map *m, enum pos pos)
{
	switch (pos) {
	case FIRST:
		return B * m->bpages;
	case MIDDLE:
		return B * m->bpages + m->bpages / 2;
	default:
		return (B + 1) * m->bpages - 1;
	}
}

/* How many pages of the window do not hold generation 0 in the file. */
static unsigned int bad_in_file(struct cont_map *m)
{
	char *buf = calloc(1, m->page);
	unsigned int i, bad = 0;

	for (i = 0; buf && i < m->nr_pages; i++)
		bad += pread(m->fd, buf, m->page, m->off + i * m->page) !=
				(ssize_t)m->page ||
		       !cont_page_ok(buf, m->seed, cont_index(m, i), 0);
	free(buf);
	return buf ? bad : m->nr_pages;
}

/* Room for a copy of the window, at an address that fits its blocks. */
static char *elsewhere(struct __test_metadata *_metadata, struct cont_map *m)
{
	char *p = cont_reserve(m->len + 3 * m->block);

	ASSERT_NE(MAP_FAILED, (void *)p);
	p = cont_align_up(p + m->page, m->block);
	/* smaps of the room shall not count what is around it. */
	ASSERT_EQ(0, munmap(p - m->page, m->page));
	ASSERT_EQ(0, munmap(p + m->len, m->page));
	return p;
}

static void make(struct __test_metadata *_metadata, struct cont_map *m,
		 enum cont_source src, int prot, int flags)
{
	if (!cont_setup_dirty(_metadata, m, src, NR_BLOCKS, prot, flags))
		return;
	ASSERT_EQ(ALL, cont_expect_bits(m->addr, m->len));
	ASSERT_EQ(ALL, folded(_metadata, m));
}

/* ---- one page --------------------------------------------------------- */

FIXTURE(unfold_page)
{
	struct cont_map map;
	unsigned int page;
	char *addr;
};

FIXTURE_VARIANT(unfold_page)
{
	enum cont_source src;
	enum pos pos;
};

FIXTURE_VARIANT_ADD(unfold_page, anon_first) { .src = CONT_ANON, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_page, anon_middle) { .src = CONT_ANON, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_page, anon_last) { .src = CONT_ANON, .pos = LAST };
FIXTURE_VARIANT_ADD(unfold_page, shmem_first) { .src = CONT_SHMEM, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_page, shmem_middle) { .src = CONT_SHMEM, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_page, shmem_last) { .src = CONT_SHMEM, .pos = LAST };
FIXTURE_VARIANT_ADD(unfold_page, xfs_first) { .src = CONT_XFS, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_page, xfs_middle) { .src = CONT_XFS, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_page, xfs_last) { .src = CONT_XFS, .pos = LAST };
FIXTURE_VARIANT_ADD(unfold_page, xfs_exec_first) { .src = CONT_XFS_EXEC, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_page, xfs_exec_middle) { .src = CONT_XFS_EXEC, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_page, xfs_exec_last) { .src = CONT_XFS_EXEC, .pos = LAST };

FIXTURE_SETUP(unfold_page)
{
	make(_metadata, &self->map, variant->src, 0, 0);
	self->page = picked(&self->map, variant->pos);
	self->addr = cont_page_at(&self->map, self->page);
}

FIXTURE_TEARDOWN(unfold_page)
{
	cont_map_free(&self->map);
}

CONT_TEST_F(unfold_page, munmap)
{
	ASSERT_EQ(0, munmap(self->addr, m->page));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ((long)(m->len - m->page), cont_smaps(m->addr, m->len, "Rss:"));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
}

CONT_TEST_F(unfold_page, mprotect)
{
	ASSERT_EQ(0, mprotect(self->addr, m->page, cont_other_prot(m)));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
	EXPECT_TRUE(cont_other_prot(m) == PROT_NONE || !cont_bad(m, self->page, 1, 0));
}

/* Equal permissions again: the block folds again. */
CONT_TEST_F(unfold_page, mprotect_back)
{
	ASSERT_EQ(0, mprotect(self->addr, m->page, cont_other_prot(m)));
	ASSERT_EQ(0, mprotect(self->addr, m->page, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* Anonymous memory reads as zeroes afterwards, a file as before. */
CONT_TEST_F(unfold_page, dontneed)
{
	ASSERT_EQ(0, madvise(self->addr, m->page, MADV_DONTNEED));
	EXPECT_EQ(0, cont_pfn(self->addr));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
	EXPECT_TRUE(m->src == CONT_ANON ? cont_page_zero(self->addr) :
					  !cont_bad(m, self->page, 1, 0));
}

/* A page that comes back from its file completes the block, a new one does not. */
CONT_TEST_F(unfold_page, dontneed_refault)
{
	ASSERT_EQ(0, madvise(self->addr, m->page, MADV_DONTNEED));
	/* The entry shall be as dirty as the others of the block. */
	if (m->src == CONT_ANON || m->src == CONT_SHMEM)
		cont_fill(m, self->page, 1, 0);
	else
		cont_touch(self->addr, m->page);
	EXPECT_EQ(m->src == CONT_ANON ? ALL_BUT_B : ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(unfold_page, mremap)
{
	char *dst, *to;

	dst = elsewhere(_metadata, m);
	to = dst + self->page * m->page;
	ASSERT_TRUE(cont_mremap(self->addr, m->page, to));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_folded(_metadata, dst, m->len));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
	EXPECT_EQ(0, cont_bad_at(m, dst, self->page, 1, 0));
}

/* The page returns to where it was: the block folds again. */
CONT_TEST_F(unfold_page, mremap_back)
{
	char *dst, *to;

	dst = elsewhere(_metadata, m);
	to = dst + self->page * m->page;
	ASSERT_TRUE(cont_mremap(self->addr, m->page, to));
	ASSERT_TRUE(cont_mremap(to, m->page, self->addr));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* ---- writes to a shared file on disk ---------------------------------- */

/* Its entries are write protected until the file system was told of a write. */
FIXTURE(unfold_mkwrite)
{
	struct cont_map map;
	unsigned int page;
	char *addr;
};

FIXTURE_VARIANT(unfold_mkwrite)
{
	enum pos pos;
};

FIXTURE_VARIANT_ADD(unfold_mkwrite, first) { .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_mkwrite, middle) { .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_mkwrite, last) { .pos = LAST };

FIXTURE_SETUP(unfold_mkwrite)
{
	make(_metadata, &self->map, CONT_XFS, 0, 0);
	self->page = picked(&self->map, variant->pos);
	self->addr = cont_page_at(&self->map, self->page);
}

FIXTURE_TEARDOWN(unfold_mkwrite)
{
	cont_map_free(&self->map);
}

/* One writable entry among read-only ones. */
CONT_TEST_F(unfold_mkwrite, write)
{
	cont_fill(m, self->page, 1, 1);
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, self->page, 1, 1));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
}

/* The last entry becomes writable: the block folds again. */
CONT_TEST_F(unfold_mkwrite, write_last)
{
	unsigned int first = B * m->bpages, i;

	for (i = first; i < first + m->bpages; i++)
		if (i != self->page)
			cont_fill(m, i, 1, 1);
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	cont_fill(m, self->page, 1, 1);
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, first, m->bpages, 1));
	EXPECT_EQ(0, cont_bad_but(m, first, m->bpages));
}

/* Of writable entries, one is made read-only and writable again. */
CONT_TEST_F(unfold_mkwrite, mprotect_back)
{
	cont_fill(m, 0, m->nr_pages, 1);
	ASSERT_EQ(ALL, folded(_metadata, m));
	ASSERT_EQ(0, mprotect(self->addr, m->page, PROT_READ));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	ASSERT_EQ(0, mprotect(self->addr, m->page, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 1));
}

/* ---- writes to a private file ----------------------------------------- */

FIXTURE(unfold_cow)
{
	struct cont_map map;
	unsigned int page;
	char *addr;
};

FIXTURE_VARIANT(unfold_cow)
{
	enum cont_source src;
	enum pos pos;
};

FIXTURE_VARIANT_ADD(unfold_cow, shmem_first) { .src = CONT_SHMEM, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_cow, shmem_middle) { .src = CONT_SHMEM, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_cow, shmem_last) { .src = CONT_SHMEM, .pos = LAST };
FIXTURE_VARIANT_ADD(unfold_cow, xfs_first) { .src = CONT_XFS, .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_cow, xfs_middle) { .src = CONT_XFS, .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_cow, xfs_last) { .src = CONT_XFS, .pos = LAST };

FIXTURE_SETUP(unfold_cow)
{
	make(_metadata, &self->map, variant->src, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	self->page = picked(&self->map, variant->pos);
	self->addr = cont_page_at(&self->map, self->page);
}

FIXTURE_TEARDOWN(unfold_cow)
{
	cont_map_free(&self->map);
}

/* A private copy of one page takes its place; the file keeps its own. */
CONT_TEST_F(unfold_cow, write)
{
	cont_fill(m, self->page, 1, 1);
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, self->page, 1, 1));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
	EXPECT_EQ(0, bad_in_file(m));
}

/* The copy is dropped and the page of the file returns: the block folds again. */
CONT_TEST_F(unfold_cow, write_and_drop)
{
	cont_fill(m, self->page, 1, 1);
	ASSERT_EQ(0, madvise(self->addr, m->page, MADV_DONTNEED));
	cont_touch(self->addr, m->page);
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* ---- writes to anonymous memory after fork ---------------------------- */

FIXTURE(unfold_fork)
{
	struct cont_map map;
	unsigned int page;
	char *addr;
};

FIXTURE_VARIANT(unfold_fork)
{
	enum pos pos;
};

FIXTURE_VARIANT_ADD(unfold_fork, first) { .pos = FIRST };
FIXTURE_VARIANT_ADD(unfold_fork, middle) { .pos = MIDDLE };
FIXTURE_VARIANT_ADD(unfold_fork, last) { .pos = LAST };

FIXTURE_SETUP(unfold_fork)
{
	make(_metadata, &self->map, CONT_ANON, 0, 0);
	self->page = picked(&self->map, variant->pos);
	self->addr = cont_page_at(&self->map, self->page);
}

FIXTURE_TEARDOWN(unfold_fork)
{
	cont_map_free(&self->map);
}

/*
 * Whoever writes has a copy of one page in block B, so that B cannot be folded.
 * The other blocks may be, fork is free to leave them folded or not.
 */
static bool copied(struct cont_map *m, unsigned int page)
{
	__u64 bits;
	bool odd;

	bits = cont_folded_bits(m->addr, m->len, &odd);
	return !odd && !(bits & CONT_BIT(B)) && !cont_bad(m, page, 1, 1) &&
	       !cont_bad_but(m, page, 1);
}

/* The child writes: it gets the copy, the parent keeps its data. */
CONT_TEST_F(unfold_fork, child_writes)
{
	pid_t pid = cont_fork();

	if (!pid) {
		cont_fill(m, self->page, 1, 1);
		_exit(copied(m, self->page) ? 0 : 1);
	}
	EXPECT_EQ(0, cont_wait(pid));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* The parent writes: it gets the copy, the child keeps its data. */
CONT_TEST_F(unfold_fork, parent_writes)
{
	int written[2];
	char c = 0;
	pid_t pid;

	ASSERT_EQ(0, pipe(written));
	pid = cont_fork();
	if (!pid) {
		if (read(written[0], &c, 1) != 1)
			_exit(2);
		_exit(cont_bad(m, 0, m->nr_pages, 0) ? 1 : 0);
	}
	cont_fill(m, self->page, 1, 1);
	EXPECT_TRUE(copied(m, self->page));
	ASSERT_EQ(1, write(written[1], &c, 1));
	EXPECT_EQ(0, cont_wait(pid));
	EXPECT_EQ(0, cont_bad(m, self->page, 1, 1));
	EXPECT_EQ(0, cont_bad_but(m, self->page, 1));
}

/* ---- whole blocks, and more than one ---------------------------------- */

FIXTURE(unfold_block)
{
	struct cont_map map;
};

FIXTURE_VARIANT(unfold_block)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(unfold_block, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(unfold_block, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(unfold_block, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(unfold_block, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(unfold_block)
{
	make(_metadata, &self->map, variant->src, 0, 0);
}

FIXTURE_TEARDOWN(unfold_block)
{
	cont_map_free(&self->map);
}

/* All entries of a block change alike: it is folded afterwards. */
CONT_TEST_F(unfold_block, mprotect_read)
{
	ASSERT_EQ(0, mprotect(block_b(m), m->block, PROT_READ));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(unfold_block, mprotect_read_back)
{
	ASSERT_EQ(0, mprotect(block_b(m), m->block, PROT_READ));
	ASSERT_EQ(0, mprotect(block_b(m), m->block, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

CONT_TEST_F(unfold_block, mprotect_none)
{
	ASSERT_EQ(0, mprotect(block_b(m), m->block, PROT_NONE));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	ASSERT_EQ(0, mprotect(block_b(m), m->block, m->prot));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* A range from the middle of one block to the middle of the next. */
CONT_TEST_F(unfold_block, mprotect_across)
{
	ASSERT_EQ(0, mprotect(block_b(m) + m->block / 2, m->block, cont_other_prot(m)));
	EXPECT_EQ(ALL_BUT_B & ~CONT_BIT(B + 1), folded(_metadata, m));
	ASSERT_EQ(0, mprotect(block_b(m) + m->block / 2, m->block, m->prot));
	EXPECT_EQ(ALL, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* A block moves to an address that fits: it is folded there. */
CONT_TEST_F(unfold_block, mremap)
{
	char *dst, *to;

	dst = elsewhere(_metadata, m);
	to = dst + B * m->block;
	ASSERT_TRUE(cont_mremap(block_b(m), m->block, to));
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(CONT_BIT(B), cont_folded(_metadata, dst, m->len));
	EXPECT_EQ(0, cont_bad_at(m, dst, B * m->bpages, m->bpages, 0));
	EXPECT_EQ(0, cont_bad_but(m, B * m->bpages, m->bpages));
}

/* All of it moves, two halves of blocks at the ends included. */
CONT_TEST_F(unfold_block, mremap_halves)
{
	size_t half = m->block / 2, len = m->len - m->block;
	unsigned int skip;
	char *dst, *to;

	dst = elsewhere(_metadata, m);
	to = dst + half;
	ASSERT_TRUE(cont_mremap(m->addr + half, len, to));
	EXPECT_EQ(0, folded(_metadata, m));
	EXPECT_EQ(ALL & ~(CONT_BIT(0) | CONT_BIT(NR_BLOCKS - 1)),
		  cont_folded(_metadata, dst, m->len));
	skip = m->bpages / 2;
	EXPECT_EQ(0, cont_bad_at(m, dst, skip, m->nr_pages - 2 * skip, 0));
	EXPECT_EQ(0, cont_bad(m, 0, skip, 0));
	EXPECT_EQ(0, cont_bad(m, m->nr_pages - skip, skip, 0));
}

/* Two pages go, of two blocks: two blocks unfold. */
CONT_TEST_F(unfold_block, munmap_across)
{
	unsigned int page = (B + 1) * m->bpages - 1;

	ASSERT_EQ(0, munmap(cont_page_at(m, page), 2 * m->page));
	EXPECT_EQ(ALL_BUT_B & ~CONT_BIT(B + 1), folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, page, 2));
}

/* The pages of a block go one after the other, those left keep their data. */
CONT_TEST_F(unfold_block, munmap_one_by_one)
{
	unsigned int step, i, page, left;

	/* Any odd step visits all pages, their number is a power of two. */
	step = cont_mix(m->seed) | 1;
	for (i = 0; i < m->bpages; i++) {
		page = B * m->bpages + i * step % m->bpages;
		ASSERT_EQ(0, cont_bad(m, page, 1, 0));
		ASSERT_EQ(0, munmap(cont_page_at(m, page), m->page));
		left = m->nr_pages - i - 1;
		ASSERT_EQ((long)(left * m->page), cont_smaps(m->addr, m->len, "Rss:"));
		ASSERT_EQ((long)(m->len - m->block), cont_mapped(m->addr, m->len));
	}
	EXPECT_EQ(ALL_BUT_B, folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, B * m->bpages, m->bpages));
}

/* All is unmapped at once: nothing stays folded, a file comes back whole. */
CONT_TEST_F(unfold_block, dontneed_window)
{
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_DONTNEED));
	EXPECT_EQ(0, cont_mapped(m->addr, m->len));
	EXPECT_EQ(0, cont_smaps(m->addr, m->len, "Rss:"));
	EXPECT_TRUE(m->src == CONT_ANON ? cont_page_zero(block_b(m)) :
					  !cont_bad(m, 0, m->nr_pages, 0));
}

/* The folio is split because of one page: all of it unfolds, for good. */
CONT_TEST_F(unfold_block, split)
{
	ASSERT_EQ(0, madvise(block_b(m), m->page, MADV_COLD));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	EXPECT_EQ(0, cont_expect_bits(block_b(m), m->block));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
}

/* One page is reclaimed, to swap or because its file has it. */
CONT_TEST_F(unfold_block, pageout)
{
	ASSERT_EQ(0, madvise(block_b(m), m->page, MADV_PAGEOUT));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
}

/* A node with memory that is not the one of this page; -1 if there is none. */
static int other_node(void *addr)
{
	char path[64];
	int node, here;

	if (syscall(__NR_move_pages, 0, 1UL, &addr, NULL, &here, 0) || here < 0)
		return -1;
	for (node = 0; node < 16; node++) {
		snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo",
			 node);
		if (node != here && !access(path, R_OK))
			return node;
	}
	return -1;
}

/* The folio moves to another node: the block is taken apart and folded there. */
CONT_TEST_F(unfold_block, migrate)
{
	int node, status, tries;
	__u64 old;
	void *at;

	at = block_b(m) + m->block / 2;
	node = other_node(at);
	if (node < 0)
		SKIP(return, "one NUMA node only, nowhere to migrate to");
	old = cont_pfn(at);
	/* Whoever holds a reference for a moment makes migration fail. */
	for (tries = 0; tries < 10 && cont_pfn(at) == old; tries++)
		ASSERT_LE(0, syscall(__NR_move_pages, 0, 1UL, &at, &node, &status,
				     MOVE_PAGES_MOVE));
	cont_touch(m->addr, m->len);
	EXPECT_NE(old, cont_pfn(at));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

/* ---- pages that the file loses ---------------------------------------- */

FIXTURE(unfold_file)
{
	struct cont_map map;
};

FIXTURE_VARIANT(unfold_file)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(unfold_file, shmem) { .src = CONT_SHMEM };
FIXTURE_VARIANT_ADD(unfold_file, xfs) { .src = CONT_XFS };
FIXTURE_VARIANT_ADD(unfold_file, xfs_exec) { .src = CONT_XFS_EXEC };

FIXTURE_SETUP(unfold_file)
{
	make(_metadata, &self->map, variant->src, 0, 0);
}

FIXTURE_TEARDOWN(unfold_file)
{
	cont_map_free(&self->map);
}

/* One page is punched out of the file: it alone reads as zeroes. */
CONT_TEST_F(unfold_file, punch_hole)
{
	unsigned int page;

	page = picked(m, MIDDLE);
	ASSERT_EQ(0, fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       m->off + page * m->page, m->page));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
	EXPECT_EQ(0, cont_bad_but(m, page, 1));
	EXPECT_TRUE(cont_page_zero(cont_page_at(m, page)));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
}

/* The file ends in the middle of the block: the pages before stay. */
CONT_TEST_F(unfold_file, truncate)
{
	unsigned int page, i;

	page = picked(m, MIDDLE);
	ASSERT_EQ(0, ftruncate(m->fd, m->off + page * m->page));
	for (i = page; i < m->nr_pages; i++)
		ASSERT_EQ(0, cont_pfn(m->addr + i * m->page));
	EXPECT_EQ(0, cont_bad(m, 0, page, 0));
	EXPECT_EQ(0, cont_expect_bits(block_b(m), m->block));
	EXPECT_EQ(cont_expect_bits(m->addr, m->len), folded(_metadata, m));
}

TEST_HARNESS_MAIN
