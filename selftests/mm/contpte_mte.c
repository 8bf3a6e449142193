// SPDX-License-Identifier: GPL-2.0
/*
 * Contiguous mappings of memory with allocation tags (MTE).
 *
 * Claim: each page of a folded block has the tags that it was given, and keeps them
 * when its block is folded or taken apart, copied by fork, moved, protected, or
 * swapped out and in. Memory that gets PROT_MTE has no tags to begin with.
 *
 * Oracle: the tags themselves, read with LDG. Each page has its own, in its first
 * and its last granule.
 *
 * Breaks on: set_ptes() and its like if they look after the tags of the first page
 * of a run only.
 */
#include "contpte_harness.h"

#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#define MTE_PROT	0x20	/* PROT_MTE */
#define MTE_HWCAP2	0x40000	/* HWCAP2_MTE */
#define MTE_GRANULE	16
#define MTE_SHIFT	56

#define NR_BLOCKS	4

#ifdef __aarch64__
static bool mte_supported(void)
{
	return getauxval(AT_HWCAP2) & MTE_HWCAP2;
}

static void mte_set(char *p, unsigned int tag)
{
	uintptr_t at = (uintptr_t)p | (uintptr_t)tag << MTE_SHIFT;

	asm volatile(".arch armv8.5-a+memtag\n\tstg %0, [%0]" : : "r"(at) : "memory");
}

static unsigned int mte_get(const char *p)
{
	uintptr_t at = (uintptr_t)p;

	asm volatile(".arch armv8.5-a+memtag\n\tldg %0, [%0]" : "+r"(at) : : "memory");
	return at >> MTE_SHIFT & 0xf;
}
#else
static bool mte_supported(void)
{
	return false;
}

static void mte_set(char *p, unsigned int tag)
{
}

static unsigned int mte_get(const char *p)
{
	return 0;
}
#endif

/* Never 0, and different for neighbours and for generations. */
static unsigned int tag_of(unsigned int page, unsigned int gen)
{
	return 1 + (page + gen) % 15;
}

static void tag_page(char *p, size_t page, unsigned int tag)
{
	mte_set(p, tag);
	mte_set(p + page - MTE_GRANULE, tag);
}

static bool has_tag(const char *p, size_t page, unsigned int tag)
{
	return mte_get(p) == tag && mte_get(p + page - MTE_GRANULE) == tag;
}

static void tag_all(struct cont_map *m, unsigned int gen)
{
	unsigned int i;

	for (i = 0; i < m->nr_pages; i++)
		tag_page(cont_page_at(m, i), m->page, tag_of(i, gen));
}

/* How many pages, seen at @base, have other tags than those of @gen. */
static unsigned int wrong_tags(struct cont_map *m, const char *base, unsigned int gen)
{
	unsigned int i, wrong = 0;

	for (i = 0; i < m->nr_pages; i++) {
		if (has_tag(base + i * m->page, m->page, tag_of(i, gen)))
			continue;
		if (!wrong++)
			printf("# page %u (%u of its block) has tags %u and %u, not %u\n",
			       i, i % m->bpages, mte_get(base + i * m->page),
			       mte_get(base + (i + 1) * m->page - MTE_GRANULE),
			       tag_of(i, gen));
	}
	fflush(stdout);
	return wrong;
}

FIXTURE(mte)
{
	struct cont_map map;
};

FIXTURE_VARIANT(mte)
{
	enum cont_source src;
};

FIXTURE_VARIANT_ADD(mte, anon) { .src = CONT_ANON };
FIXTURE_VARIANT_ADD(mte, shmem) { .src = CONT_SHMEM };

/* Folded memory that gets its tags while it is folded */
FIXTURE_SETUP(mte)
{
	struct cont_map *m = &self->map;
	unsigned int i;

	if (!mte_supported())
		SKIP(return, "no MTE");
	if (!cont_setup_dirty(_metadata, m, variant->src, NR_BLOCKS, 0, 0))
		return;
	ASSERT_TRUE(cont_all_folded(m->addr, m->len));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot | MTE_PROT));
	cont_touch(m->addr, m->len);
	ASSERT_TRUE(cont_all_folded(m->addr, m->len));
	for (i = 0; i < m->nr_pages; i++)
		ASSERT_TRUE(has_tag(cont_page_at(m, i), m->page, 0));
	tag_all(m, 0);
	ASSERT_EQ(0, wrong_tags(m, m->addr, 0));
}

FIXTURE_TEARDOWN(mte)
{
	cont_map_free(&self->map);
}

/* Unfolds each block at one of its pages, and folds it again. */
CONT_TEST_F(mte, unfold)
{
	unsigned int i;
	bool odd;

	for (i = 0; i < m->nr_blocks; i++)
		ASSERT_EQ(0, mprotect(m->addr + i * m->block + (i * 3 + 1) * m->page,
				      m->page, PROT_READ | MTE_PROT));
	EXPECT_EQ(0, wrong_tags(m, m->addr, 0));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	ASSERT_EQ(0, mprotect(m->addr, m->len, m->prot | MTE_PROT));
	cont_fill(m, 0, m->nr_pages, 1);
	cont_folded_bits(m->addr, m->len, &odd);
	EXPECT_EQ(0, wrong_tags(m, m->addr, 0));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 1));
}

/* What the child or the parent writes to is copied with its tags. */
CONT_TEST_F(mte, fork)
{
	unsigned int i, ok = 1;
	pid_t pid = cont_fork();

	if (!pid) {
		if (wrong_tags(m, m->addr, 0))
			_exit(1);
		for (i = 0; i < m->nr_pages; i += 3)
			cont_page_fill(cont_page_at(m, i), m->seed, cont_index(m, i), 1);
		ok = !wrong_tags(m, m->addr, 0);
		if (m->src == CONT_ANON)
			tag_all(m, 1);
		_exit(!ok);
	}
	EXPECT_EQ(0, cont_wait(pid));
	EXPECT_EQ(0, wrong_tags(m, m->addr, 0));
	if (m->src == CONT_ANON)
		EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
	/* Now it is the only one, and writes on without copying. */
	cont_fill(m, 0, m->nr_pages, 2);
	EXPECT_EQ(0, wrong_tags(m, m->addr, 0));
}

/* Two blocks on, where they still fit as they are, and then where they do not. */
CONT_TEST_F(mte, mremap)
{
	size_t skew[] = { 0, m->page };
	char *from = m->addr, *resv, *to;
	unsigned int i;

	for (i = 0; i < 2; i++) {
		resv = cont_reserve(m->len + 2 * m->block);
		ASSERT_NE(MAP_FAILED, resv);
		to = cont_align_up(resv, m->block) + skew[i];
		ASSERT_TRUE(cont_mremap(from, m->len, to));
		EXPECT_EQ(0, wrong_tags(m, to, 0));
		EXPECT_EQ(0, cont_bad_at(m, to, 0, m->nr_pages, 0));
		from = to;
	}
}

/*
 * Give the first page of the folio tags as well, outside of the window: when a folio
 * is split, Linux 6.1 goes by that page to tell whether the others have any.
 */
static bool tag_head(struct cont_map *m)
{
	char *head = m->addr - 2 * m->block;

	if (m->src == CONT_SHMEM)
		head = cont_map_view(m, 0, m->page, 0, m->prot, m->flags);
	if (head == MAP_FAILED || mprotect(head, m->page, m->prot | MTE_PROT))
		return false;
	tag_page(head, m->page, 1);
	return true;
}

/* Tags go out with the pages, and come in with them. */
CONT_TEST_F(mte, swap)
{
	unsigned int i, out = 0;
	__u64 ent;

	ASSERT_TRUE(tag_head(m));
	ASSERT_EQ(0, madvise(m->addr, m->len, MADV_PAGEOUT));
	for (i = 0; i < m->nr_pages; i++)
		if (cont_pagemap(cont_page_at(m, i), 1, &ent) && !(ent & CONT_PM_PRESENT))
			out++;
	if (!out)
		SKIP(return, "nothing was swapped out");
	EXPECT_EQ(0, wrong_tags(m, m->addr, 0));
	EXPECT_EQ(0, cont_bad(m, 0, m->nr_pages, 0));
}

TEST_HARNESS_MAIN
