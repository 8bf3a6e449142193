/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the contpte_* tests that use the kselftest harness have in common: how a
 * fixture gets its window, named "map", and what all of its tests begin with.
 */
#ifndef CONTPTE_HARNESS_H
#define CONTPTE_HARNESS_H

#include "contpte_util.h"
#include "../kselftest_harness.h"

/* Emulators on busy machines are slow. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT	240

/**
 * CONT_TEST_F() - a test of the window of its fixture
 * @fixture: name of the fixture; it has a "struct cont_map map"
 * @test: name of the test
 *
 * As TEST_F(), where besides self and variant there is m, the window. Linux 6.1
 * runs a test whose set-up was skipped: the body is only run if there is a window.
 */
#define CONT_TEST_F(fixture, test)						\
	static void fixture##_##test##_mapped(					\
		struct __test_metadata *_metadata, FIXTURE_DATA(fixture) *self,	\
		const FIXTURE_VARIANT(fixture) *variant, struct cont_map *m);	\
	TEST_F(fixture, test)							\
	{									\
		if (self->map.addr)						\
			fixture##_##test##_mapped(_metadata, self, variant,	\
						  &self->map);			\
	}									\
	static void fixture##_##test##_mapped(					\
		struct __test_metadata *_metadata, FIXTURE_DATA(fixture) *self,	\
		const FIXTURE_VARIANT(fixture) *variant, struct cont_map *m)

/**
 * cont_made() - skip or fail the test for what a maker could not make
 * @_metadata: of the harness
 * @m: what was to be made
 * @ret: what the maker returned
 *
 * Return: whether it was made.
 */
static inline bool cont_made(struct __test_metadata *_metadata,
			     const struct cont_map *m, int ret)
{
	if (ret == CONT_MAKE_SKIP)
		SKIP(return false, "%s", m->why);
	ASSERT_EQ(0, ret)
		TH_LOG("%s", m->why);
	return true;
}

/**
 * cont_setup() - cont_map_make_as() for a test, which is skipped without contpte
 * @_metadata: of the harness
 * @m: the window to make
 * @src: where its folios come from
 * @nr_blocks: how long it is
 * @prot: 0, or the protection of a file mapping
 * @flags: 0, or MAP_SHARED or MAP_PRIVATE of a file mapping
 *
 * Return: false if the test is skipped.
 */
static inline bool cont_setup(struct __test_metadata *_metadata, struct cont_map *m,
			      enum cont_source src, unsigned int nr_blocks,
			      int prot, int flags)
{
	if (!cont_supported())
		SKIP(return false, CONT_NO_SUPPORT);
	return cont_made(_metadata, m,
			 cont_map_make_as(m, src, nr_blocks, prot, flags));
}

/**
 * cont_setup_dirty() - cont_setup(), with all entries dirty
 * @_metadata: of the harness
 * @m: the window to make
 * @src: where its folios come from
 * @nr_blocks: how long it is
 * @prot: 0, or the protection of a file mapping
 * @flags: 0, or MAP_SHARED or MAP_PRIVATE of a file mapping
 *
 * A change of permissions and back leaves only dirty entries writable. Not for
 * what is copied when it is written, and not for a file on disk, which has no
 * writable entries yet.
 *
 * Return: false if the test is skipped.
 */
static inline bool cont_setup_dirty(struct __test_metadata *_metadata,
				    struct cont_map *m, enum cont_source src,
				    unsigned int nr_blocks, int prot, int flags)
{
	if (!cont_setup(_metadata, m, src, nr_blocks, prot, flags))
		return false;
	if (src == CONT_ANON || (src == CONT_SHMEM && m->flags == MAP_SHARED))
		cont_fill(m, 0, m->nr_pages, 0);
	return true;
}

/**
 * cont_folded() - which blocks are folded; the test fails if one is in part
 * @_metadata: of the harness
 * @addr: of the first block
 * @len: of all of them
 *
 * Return: a bit for each block.
 */
static inline __u64 cont_folded(struct __test_metadata *_metadata, void *addr,
				size_t len)
{
	__u64 bits;
	bool odd;

	bits = cont_folded_bits(addr, len, &odd);
	EXPECT_FALSE(odd)
		TH_LOG("a block is folded in part");
	return bits;
}

#endif /* CONTPTE_HARNESS_H */
