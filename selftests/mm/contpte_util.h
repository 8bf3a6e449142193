/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared helpers of the contpte_* tests.
 *
 * The arm64 kernel may set the contiguous hint in a naturally aligned block of
 * PTEs (64K with 4K pages, 2M with 16K and 64K pages).  The kernel reports what
 * it has folded as ContPteMapped in smaps.  What it should have folded is worked
 * out here from other interfaces: pagemap (physical addresses), kpageflags
 * (which pages belong to one folio) and the VMA's permissions.
 *
 * Everything is portable C.  On a kernel or an architecture without contpte
 * cont_supported() is false and the tests skip.
 *
 * A test gets its memory as a struct cont_map from cont_map_make(), for one of
 * the sources of large folios:
 *
 *   CONT_ANON      anonymous THP, its PMD split into PTEs
 *   CONT_SHMEM     tmpfs with huge=always, shared, mapped where no PMD fits
 *   CONT_XFS       XFS page cache made by readahead, shared and writable
 *   CONT_XFS_EXEC  the same, private, read and execute
 *   CONT_THP       anonymous THP, whole and still mapped by its PMD
 *
 * But for the last one, the window [addr, addr + len) starts and ends on a block, is made of whole
 * blocks of large folios, and no VMA outside of it ever merges with it, so that
 * summing smaps over the window is exact.
 */
#ifndef CONTPTE_UTIL_H
#define CONTPTE_UTIL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
/* __u64 is what %llu prints, on every architecture. */
#define __SANE_USERSPACE_TYPES__
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <linux/types.h>

#ifndef MADV_COLD
#define MADV_COLD		20
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT		21
#endif

/* The same on every architecture since they were added in Linux 5.2. */
#ifndef __NR_fsopen
#define __NR_fsopen		430
#define __NR_fsconfig		431
#define __NR_fsmount		432
#endif

#define CONT_FSCONFIG_SET_STRING	1
#define CONT_FSCONFIG_CMD_CREATE	6
#define CONT_MPOL_LOCAL			4

/* mm/gup_test.h is not a header for user space. */
struct gup_test {
	__u64 get_delta_usec;
	__u64 put_delta_usec;
	__u64 addr;
	__u64 size;
	__u32 nr_pages_per_call;
	__u32 gup_flags;
	__u32 test_flags;
	__u32 which_pages[8];
};

#define GUP_FAST_BENCHMARK	_IOWR('g', 1, struct gup_test)
#define PIN_FAST_BENCHMARK	_IOWR('g', 2, struct gup_test)
#define GUP_TEST_WRITE		1	/* FOLL_WRITE */
#define GUP_TEST_FILE		"/sys/kernel/debug/gup_test"

#define CONT_BIT(n)		(1ULL << (n))

#define CONT_PM_PFN(e)		((e) & (CONT_BIT(55) - 1))
#define CONT_PM_SWAP		CONT_BIT(62)
#define CONT_PM_PRESENT		CONT_BIT(63)

/* Bits of /proc/kpageflags, Documentation/admin-guide/mm/pagemap.rst */
#define CONT_KPF_REFERENCED	CONT_BIT(2)
#define CONT_KPF_DIRTY		CONT_BIT(4)
#define CONT_KPF_HEAD		CONT_BIT(15)
#define CONT_KPF_TAIL		CONT_BIT(16)
#define CONT_KPF_HUGETLB	CONT_BIT(17)
#define CONT_KPF_THP		CONT_BIT(22)
#define CONT_KPF_ZERO_PAGE	CONT_BIT(24)

/* Blocks are reported as bits of a 64-bit map; no window may have more. */
#define CONT_MAX_BLOCKS		64

enum cont_source {
	CONT_ANON,
	CONT_SHMEM,
	CONT_XFS,
	CONT_XFS_EXEC,
	CONT_THP,
};

struct cont_map {
	enum cont_source src;
	char *addr;		/* the window; NULL if there is none */
	size_t len;
	size_t page;
	size_t block;
	size_t pmd;
	unsigned int nr_pages;	/* of the window */
	unsigned int nr_blocks;	/* of the window */
	unsigned int bpages;	/* pages a block */
	int prot;
	int flags;		/* MAP_SHARED or MAP_PRIVATE */
	int fd;			/* -1 for anonymous memory */
	off_t off;		/* of the window in fd */
	__u64 seed;		/* of the pattern, see cont_word() */
	char *resv;		/* what the window was cut from */
	size_t resv_len;
	char why[256];		/* why cont_map_make() did not return 0 */
};

/* ---- accesses that the compiler must do ------------------------------- */

static inline __u64 cont_load(const void *p)
{
	return __atomic_load_n((const __u64 *)p, __ATOMIC_RELAXED);
}

static inline void cont_store(void *p, __u64 val)
{
	__atomic_store_n((__u64 *)p, val, __ATOMIC_RELAXED);
}

/* Have fn called when an access faults, of which the process would die. */
static inline void cont_on_fault(void (*fn)(int sig, siginfo_t *info, void *context))
{
	struct sigaction sa = { .sa_sigaction = fn, .sa_flags = SA_SIGINFO };

	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
}

/* ---- sizes and support ------------------------------------------------ */

static inline size_t cont_page_size(void)
{
	return sysconf(_SC_PAGESIZE);
}

/* Bytes a block. */
static inline size_t cont_size(void)
{
	return cont_page_size() == 4096 ? 64UL << 10 : 2UL << 20;
}

static inline char *cont_align_up(const void *p, size_t to)
{
	return (char *)(((uintptr_t)p + to - 1) & ~((uintptr_t)to - 1));
}

/* First line of a small file, without its newline; false if it is not there. */
static inline bool cont_read_str(const char *path, char *buf, size_t size)
{
	ssize_t n;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = read(fd, buf, size - 1);
	close(fd);
	if (n <= 0)
		return false;
	buf[n] = '\0';
	buf[strcspn(buf, "\n")] = '\0';
	return true;
}

static inline bool cont_write_str(const char *path, const char *str)
{
	ssize_t n;
	int fd;

	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = write(fd, str, strlen(str));
	close(fd);
	return n == (ssize_t)strlen(str);
}

/* 0 if there is no THP. */
static inline size_t cont_pmd_size(void)
{
	char buf[32];

	if (!cont_read_str("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size",
			   buf, sizeof(buf)))
		return 0;
	return strtoul(buf, NULL, 10);
}

/* ---- smaps ------------------------------------------------------------ */

struct cont_vma {
	uintptr_t start;
	uintptr_t end;
	char perms[5];
	long bytes;		/* of the field asked for; -1: no such line */
};

/*
 * The VMAs that overlap [addr, addr + len), with one field ("Rss:") of their
 * smaps.  Returns how many there are (never more than max), or -1.
 */
static inline int cont_vmas(const void *addr, size_t len, const char *field,
			    struct cont_vma *vmas, int max)
{
	uintptr_t lo = (uintptr_t)addr, hi = lo + len;
	struct cont_vma cur, *v = NULL;
	size_t flen = strlen(field);
	char line[512];
	int nr = 0;
	FILE *f;

	f = fopen("/proc/self/smaps", "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx %4s", &cur.start, &cur.end, cur.perms) == 3) {
			v = NULL;
			if (cur.end <= lo || cur.start >= hi)
				continue;
			if (nr == max)
				break;
			cur.bytes = -1;
			vmas[nr] = cur;
			v = &vmas[nr++];
		} else if (v && !strncmp(line, field, flen)) {
			v->bytes = strtol(line + flen, NULL, 10) * 1024;
		}
	}
	fclose(f);
	return nr;
}

/*
 * Sum of one smaps field, in bytes, over the VMAs of [addr, addr + len).  smaps
 * counts whole VMAs, so one that sticks out of the range is an error: -1, as
 * when the field does not exist.
 */
static inline long cont_smaps(const void *addr, size_t len, const char *field)
{
	uintptr_t lo = (uintptr_t)addr, hi = lo + len;
	struct cont_vma vmas[4 * CONT_MAX_BLOCKS];
	long sum = 0;
	int i, nr;

	nr = cont_vmas(addr, len, field, vmas, 4 * CONT_MAX_BLOCKS);
	if (nr < 0)
		return -1;
	for (i = 0; i < nr; i++) {
		if (vmas[i].start < lo || vmas[i].end > hi || vmas[i].bytes < 0) {
			printf("# smaps: VMA %lx-%lx, range %lx-%lx, %s %ld\n",
			       vmas[i].start, vmas[i].end, lo, hi, field,
			       vmas[i].bytes);
			fflush(stdout);
			return -1;
		}
		sum += vmas[i].bytes;
	}
	return sum;
}

/* Bytes that the kernel says are folded in [addr, addr + len); -1 as above. */
static inline long cont_mapped(const void *addr, size_t len)
{
	return cont_smaps(addr, len, "ContPteMapped:");
}

/* A field of smaps_rollup in bytes; -1 if it is not there. */
static inline long cont_rollup(const char *field)
{
	size_t flen = strlen(field);
	char line[256];
	long ret = -1;
	FILE *f;

	f = fopen("/proc/self/smaps_rollup", "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, field, flen))
			ret = strtol(line + flen, NULL, 10) * 1024;
	fclose(f);
	return ret;
}

/* A counter of /proc/vmstat; -1 if it is not there. */
static inline long long cont_vmstat(const char *name)
{
	size_t nlen = strlen(name);
	long long ret = -1;
	char line[128];
	FILE *f;

	f = fopen("/proc/vmstat", "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, name, nlen) && line[nlen] == ' ')
			ret = strtoll(line + nlen, NULL, 10);
	fclose(f);
	return ret;
}

/* A bit for each of nr blocks. */
static inline __u64 cont_all_bits(unsigned int nr)
{
	return nr < 64 ? CONT_BIT(nr) - 1 : ~0ULL;
}

static inline bool cont_supported(void)
{
	struct cont_vma vma;
	char here;

	return cont_vmas(&here, 1, "ContPteMapped:", &vma, 1) == 1 &&
	       vma.bytes >= 0;
}

/*
 * The kernel's own check (CONFIG_DEBUG_ARM64_CONTPTE) of all memory of this
 * process.  False if it found a block that breaks a rule, and told the console.
 */
static inline bool cont_rules_hold(void)
{
	char pid[16];

	snprintf(pid, sizeof(pid), "%d", getpid());
	return cont_write_str("/sys/kernel/debug/contpte_check", pid) ||
	       errno != EUCLEAN;
}

#define CONT_NO_SUPPORT	"kernel has no contpte (no ContPteMapped in smaps)"

/* ---- physical pages --------------------------------------------------- */

/* nr pagemap entries from addr on. */
static inline bool cont_pagemap(const void *addr, size_t nr, __u64 *ent)
{
	off_t off = (uintptr_t)addr / cont_page_size() * sizeof(*ent);
	ssize_t n;
	int fd;

	/* Not kept open: the file belongs to the mm that opened it. */
	fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = pread(fd, ent, nr * sizeof(*ent), off);
	close(fd);
	return n == (ssize_t)(nr * sizeof(*ent));
}

/* nr kpageflags words from pfn on. */
static inline bool cont_kpageflags(__u64 pfn, size_t nr, __u64 *flags)
{
	ssize_t n;
	int fd;

	fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = pread(fd, flags, nr * sizeof(*flags), pfn * sizeof(*flags));
	close(fd);
	return n == (ssize_t)(nr * sizeof(*flags));
}

/* 0 if nothing is mapped at addr (or it is swapped, or may not be seen). */
static inline __u64 cont_pfn(const void *addr)
{
	__u64 ent;

	if (!cont_pagemap(addr, 1, &ent) || !(ent & CONT_PM_PRESENT))
		return 0;
	return CONT_PM_PFN(ent);
}

/* kpageflags of the page at addr; 0 if nothing is mapped there. */
static inline __u64 cont_page_flags(const void *addr)
{
	__u64 pfn = cont_pfn(addr), flags;

	if (!pfn || !cont_kpageflags(pfn, 1, &flags))
		return 0;
	return flags;
}

/*
 * kpageflags of the first page of the folio that addr's page is in.  Bits that
 * belong to a folio (dirty, referenced) are only sure to be right there.
 */
static inline __u64 cont_folio_flags(const void *addr)
{
	__u64 pfn = cont_pfn(addr), flags = 0;

	while (pfn && cont_kpageflags(pfn, 1, &flags) && (flags & CONT_KPF_TAIL))
		pfn--;
	return pfn ? flags : 0;
}

/* Pages may be identified (this takes CAP_SYS_ADMIN). */
static inline bool cont_sees_pfns(void)
{
	__u64 flags;
	char here = 1;

	return cont_pfn(&here) && cont_kpageflags(cont_pfn(&here), 1, &flags);
}

/*
 * Do the pages mapped at the block at addr form one aligned block of one folio?
 * This, and equal permissions, is what folding takes.
 */
static inline bool cont_block_is_one_folio(const void *addr)
{
	size_t page = cont_page_size(), nr = cont_size() / page, i;
	__u64 ent[128], flags[128], pfn;

	if (nr > 128 || !cont_pagemap(addr, nr, ent))
		return false;
	pfn = CONT_PM_PFN(ent[0]);
	if (!pfn || pfn % nr || !cont_kpageflags(pfn, nr, flags))
		return false;
	for (i = 0; i < nr; i++) {
		if (!(ent[i] & CONT_PM_PRESENT) || CONT_PM_PFN(ent[i]) != pfn + i)
			return false;
		if (flags[i] & (CONT_KPF_HUGETLB | CONT_KPF_ZERO_PAGE))
			return false;
		/* A folio that starts inside the block is a second one. */
		if (!(flags[i] & CONT_KPF_TAIL) &&
		    (i || !(flags[i] & CONT_KPF_HEAD)))
			return false;
	}
	return true;
}

/*
 * The oracle: a bit for each block of [addr, addr + len) that has to be folded,
 * bit 0 for the block at addr.  addr and len are multiples of the block.  It
 * does not know of entries that differ inside of one VMA, in being writable or
 * in being dirty: a test that makes these says so itself.
 */
static inline __u64 cont_expect_bits(const void *addr, size_t len)
{
	struct cont_vma vmas[4 * CONT_MAX_BLOCKS];
	size_t block = cont_size(), i;
	__u64 bits = 0;
	int nr, v;

	nr = cont_vmas(addr, len, "Size:", vmas, 4 * CONT_MAX_BLOCKS);
	for (i = 0; i < len / block; i++) {
		uintptr_t at = (uintptr_t)addr + i * block;

		for (v = 0; v < nr; v++) {
			/* In one VMA, which may be accessed at all. */
			if (vmas[v].start <= at && vmas[v].end >= at + block &&
			    strncmp(vmas[v].perms, "---", 3) &&
			    cont_block_is_one_folio((void *)at))
				bits |= CONT_BIT(i);
		}
	}
	return bits;
}

/* The oracle in bytes, to compare with cont_mapped(). */
static inline long expect_folded(const void *addr, size_t len)
{
	return __builtin_popcountll(cont_expect_bits(addr, len)) * cont_size();
}

/*
 * A bit for each block of [addr, addr + len) that is folded according to the
 * kernel, in full.  smaps only counts VMAs, so every other block becomes a VMA
 * of its own for the time of the look; MADV_DONTDUMP leaves the PTEs alone.
 * *odd is set if a block is folded in part or anything else is amiss.
 */
static inline __u64 cont_folded_bits(void *addr, size_t len, bool *odd)
{
	size_t block = cont_size(), i, nr = len / block;
	__u64 bits = 0;
	char *at = addr;
	long n;

	*odd = nr > CONT_MAX_BLOCKS;
	/* Holes make madvise() fail with ENOMEM after it did the rest. */
	for (i = 0; i < nr; i += 2)
		madvise(at + i * block, block, MADV_DONTDUMP);
	for (i = 0; i < nr; i++) {
		n = cont_mapped(at + i * block, block);
		if (n == (long)block)
			bits |= CONT_BIT(i);
		else if (n)
			*odd = true;
	}
	for (i = 0; i < nr; i += 2)
		madvise(at + i * block, block, MADV_DODUMP);
	return bits;
}

/* All blocks of [addr, addr + len) are folded. */
static inline bool cont_all_folded(void *addr, size_t len)
{
	__u64 bits;
	bool odd;

	bits = cont_folded_bits(addr, len, &odd);
	return bits == cont_all_bits(len / cont_size()) && !odd;
}

/* ---- seeds and patterns ----------------------------------------------- */

/* From CONTPTE_SEED, else the clock; printed, so that a run can be repeated. */
static inline __u64 cont_seed(void)
{
	const char *env = getenv("CONTPTE_SEED");
	struct timespec ts;
	__u64 seed;

	if (env) {
		seed = strtoull(env, NULL, 0);
	} else {
		clock_gettime(CLOCK_REALTIME, &ts);
		seed = (__u64)ts.tv_sec * 1000000000ULL + ts.tv_nsec;
	}
	printf("# seed %llu\n", seed);
	fflush(stdout);
	return seed;
}

static inline __u64 cont_mix(__u64 x)
{
	x ^= x >> 31;
	x *= 0x9fb21c651e98df25ULL;
	x ^= x >> 28;
	x *= 0xc2b2ae3d27d4eb4fULL;
	return x ^ (x >> 33);
}

/* Next number of a stream; *state may start with any seed. */
static inline __u64 cont_rand(__u64 *state)
{
	*state += 0x9e3779b97f4a7c15ULL;
	return cont_mix(*state);
}

/* Each page carries seed, index and generation in every 64 bytes but the first. */
#define CONT_STRIDE	64

static inline __u64 cont_word(__u64 seed, __u64 index, __u64 gen, size_t at)
{
	return cont_mix(seed ^ cont_mix((index << 20) + (gen << 44) + at + 1));
}

static inline void cont_page_fill(void *page, __u64 seed, __u64 index, __u64 gen)
{
	size_t at, size = cont_page_size();

	for (at = CONT_STRIDE; at < size; at += CONT_STRIDE)
		cont_store((char *)page + at, cont_word(seed, index, gen, at));
}

static inline bool cont_page_ok(const void *page, __u64 seed, __u64 index,
				__u64 gen)
{
	size_t at, size = cont_page_size();

	for (at = CONT_STRIDE; at < size; at += CONT_STRIDE)
		if (cont_load((char *)page + at) != cont_word(seed, index, gen, at))
			return false;
	return true;
}

static inline bool cont_page_zero(const void *page)
{
	size_t at, size = cont_page_size();

	for (at = 0; at < size; at += sizeof(__u64))
		if (cont_load((char *)page + at))
			return false;
	return true;
}

/**
 * cont_page_at() - address of a page of the window
 * @m: the window
 * @i: number of the page
 */
static inline char *cont_page_at(const struct cont_map *m, unsigned int i)
{
	return m->addr + i * m->page;
}

/* Index that the pattern has in page i of the window (its page in the file). */
static inline __u64 cont_index(const struct cont_map *m, unsigned int i)
{
	return m->off / m->page + i;
}

/* Write generation gen into pages [first, first + nr) of the window. */
static inline void cont_fill(struct cont_map *m, unsigned int first,
			     unsigned int nr, __u64 gen)
{
	unsigned int i;

	for (i = first; i < first + nr; i++)
		cont_page_fill(cont_page_at(m, i), m->seed, cont_index(m, i), gen);
}

/*
 * How many of these pages of the window, seen at base + i * page, do not hold
 * generation gen.  The maker leaves generation 0.
 */
static inline unsigned int cont_bad_at(const struct cont_map *m, const void *base,
				       unsigned int first, unsigned int nr,
				       __u64 gen)
{
	unsigned int i, bad = 0;

	for (i = first; i < first + nr; i++) {
		if (cont_page_ok((char *)base + i * m->page, m->seed,
				 cont_index(m, i), gen))
			continue;
		if (!bad++)
			printf("# page %u of the window (%u of its block) is not generation %llu\n",
			       i, i % m->bpages, gen);
	}
	fflush(stdout);
	return bad;
}

static inline unsigned int cont_bad(const struct cont_map *m, unsigned int first,
				    unsigned int nr, __u64 gen)
{
	return cont_bad_at(m, m->addr, first, nr, gen);
}

/**
 * cont_bad_but() - look at all pages but some in a row
 * @m: the window
 * @first: the first page not to look at
 * @nr: how many not to look at
 *
 * Return: how many of the others do not hold generation 0.
 */
static inline unsigned int cont_bad_but(const struct cont_map *m, unsigned int first,
					unsigned int nr)
{
	return cont_bad(m, 0, first, 0) +
	       cont_bad(m, first + nr, m->nr_pages - first - nr, 0);
}

/**
 * cont_other_prot() - permissions that make for a different entry
 * @m: the window
 *
 * Return: those that leave it readable, where that is different: clean pages of a
 * file on disk are write protected in any case.
 */
static inline int cont_other_prot(const struct cont_map *m)
{
	return m->src == CONT_XFS ? PROT_NONE : PROT_READ;
}

/**
 * cont_mremap() - move memory to a place that is given
 * @from: what to move
 * @len: how much of it
 * @to: where to
 *
 * Return: whether it is there.
 */
static inline bool cont_mremap(char *from, size_t len, char *to)
{
	return mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to;
}

/* The same, page by page where VMAs that did not merge are not moved in one go. */
static inline bool cont_mremap_pages(char *from, size_t len, char *to)
{
	size_t page = cont_page_size(), at;

	if (cont_mremap(from, len, to))
		return true;
	if (errno != EFAULT)
		return false;
	for (at = 0; at < len; at += page)
		if (!cont_mremap(from + at, page, to + at))
			return false;
	return true;
}

/* Read from every page. */
static inline void cont_touch(const void *addr, size_t len)
{
	size_t page = cont_page_size(), at;

	for (at = 0; at < len; at += page)
		cont_load((char *)addr + at);
}

/* ---- children --------------------------------------------------------- */

/* fork(); what has been printed so far is printed once. */
static inline pid_t cont_fork(void)
{
	fflush(stdout);
	return fork();
}

/* To be called by a child, which then ends with its parent. */
static inline void cont_die_with(pid_t parent)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
}

/**
 * cont_wait() - wait for the end of a child
 * @pid: what fork() returned to the parent
 *
 * Return: its status as from waitpid(), or -1 with errno if there is no child.
 */
static inline int cont_wait(pid_t pid)
{
	int status;

	if (pid < 0)
		return -1;
	while (waitpid(pid, &status, 0) != pid)
		if (errno != EINTR)
			return -1;
	return status;
}

/* ---- makers ----------------------------------------------------------- */

/* What to do with a test that got something else than 0 from a maker. */
#define CONT_MAKE_SKIP	1
#define CONT_MAKE_FAIL	(-1)

/* In place of a function, for the sake of the compiler's check of the format. */
#define cont_why(m, ret, ...) \
	(snprintf((m)->why, sizeof((m)->why), __VA_ARGS__), (ret))

/* NUMA balancing would take entries away behind the test's back. */
static inline void cont_no_numa_balancing(void)
{
	syscall(__NR_set_mempolicy, CONT_MPOL_LOCAL, NULL, 0);
}

/* Inaccessible address space, to map things over a part of it. */
static inline char *cont_reserve(size_t len)
{
	return mmap(NULL, len, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static inline bool cont_reserve_window(struct cont_map *m, size_t len)
{
	char *p = cont_reserve(len);

	if (p == MAP_FAILED)
		return false;
	m->resv = p;
	m->resv_len = len;
	return true;
}

/* Huge pages are scarce where they are as large as 512M. */
static inline void cont_make_room(void)
{
	sync();
	cont_write_str("/proc/sys/vm/drop_caches", "3");
	cont_write_str("/proc/sys/vm/compact_memory", "1");
}

/* The window becomes a whole THP, mapped by its PMD. */
static inline int cont_make_thp(struct cont_map *m)
{
	char buf[64];
	int tries;

	if (!cont_read_str("/sys/kernel/mm/transparent_hugepage/enabled", buf,
			   sizeof(buf)) || strstr(buf, "[never]"))
		return cont_why(m, CONT_MAKE_SKIP, "transparent huge pages are off");
	if (!cont_reserve_window(m, 2 * m->pmd))
		return cont_why(m, CONT_MAKE_SKIP, "no address space: %s",
				strerror(errno));
	m->addr = cont_align_up(m->resv, m->pmd);
	m->len = m->pmd;
	m->nr_blocks = m->len / m->block;
	m->nr_pages = m->len / m->page;

	for (tries = 0; tries < 4; tries++) {
		if (mmap(m->addr, m->len, m->prot,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
			 -1, 0) != m->addr)
			return cont_why(m, CONT_MAKE_SKIP, "mmap: %s",
					strerror(errno));
		if (madvise(m->addr, m->len, MADV_HUGEPAGE))
			return cont_why(m, CONT_MAKE_FAIL, "MADV_HUGEPAGE: %s",
					strerror(errno));
		cont_store(m->addr, 0);
		if (cont_smaps(m->addr, m->len, "AnonHugePages:") == (long)m->len)
			return 0;
		cont_make_room();
	}
	return cont_why(m, CONT_MAKE_SKIP, "no memory for a THP of %zu kB",
			m->pmd >> 10);
}

static inline int cont_make_anon(struct cont_map *m)
{
	struct cont_map thp = *m;
	int ret;

	if (m->len + 4 * m->block > m->pmd)
		return cont_why(m, CONT_MAKE_FAIL, "window too big for a THP");
	ret = cont_make_thp(&thp);
	m->resv = thp.resv;
	m->resv_len = thp.resv_len;
	if (ret)
		return cont_why(m, ret, "%s", thp.why);

	/* Blocks of the same folio lie on both sides of the window. */
	m->addr = thp.addr + 2 * m->block;
	cont_fill(m, 0, m->nr_pages, 0);
	/*
	 * A VMA that ends inside of the THP cannot have a PMD for it.  Nothing
	 * of the folio gets unmapped, and all entries keep their permissions.
	 */
	if (madvise(m->addr, m->len, MADV_NOHUGEPAGE))
		return cont_why(m, CONT_MAKE_FAIL, "MADV_NOHUGEPAGE: %s",
				strerror(errno));
	return 0;
}

/* Put the pattern into len bytes of the file from off on. */
static inline bool cont_fill_file(struct cont_map *m, off_t off, size_t len)
{
	size_t size = 16 * m->page;
	char *buf = calloc(1, size);
	bool ok = !!buf;
	size_t at, i;

	for (at = 0; ok && at < len; at += size) {
		for (i = 0; i < size; i += m->page) {
			cont_page_fill(buf + i, m->seed, (off + at + i) / m->page, 0);
#ifdef __aarch64__
			/* movz w0, #(page of the file); ret */
			((__u32 *)(buf + i))[0] = 0x52800000 |
				(((off + at + i) / m->page & 0xffff) << 5);
			((__u32 *)(buf + i))[1] = 0xd65f03c0;
#endif
		}
		ok = pwrite(m->fd, buf, size, off + at) == (ssize_t)size;
	}
	free(buf);
	return ok;
}

/*
 * Map the window of m->fd at m->addr, in the middle of a new reservation.  The
 * address agrees with the file offset modulo the block, but not modulo the PMD.
 */
static inline bool cont_map_window(struct cont_map *m)
{
	char *at;

	if (!cont_reserve_window(m, 2 * m->pmd + m->len))
		return false;
	at = cont_align_up(m->resv, m->pmd) + (m->off + m->block) % m->pmd;
	m->addr = mmap(at, m->len, m->prot, m->flags | MAP_FIXED, m->fd, m->off);
	return m->addr == at;
}

/*
 * Another view of the file, where the address is skew bytes off from agreeing
 * with the offset modulo the block.  Not populated.  Room of a block or more on
 * either side is reserved, and never given back.
 */
static inline char *cont_map_view(const struct cont_map *m, off_t off, size_t len,
				  size_t skew, int prot, int flags)
{
	char *resv, *at;

	resv = cont_reserve(2 * m->pmd + len + 2 * m->block);
	if (resv == MAP_FAILED)
		return MAP_FAILED;
	at = cont_align_up(resv + m->block, m->pmd) + (off + m->block) % m->pmd + skew;
	return mmap(at, len, prot, flags | MAP_FIXED, m->fd, off);
}

static inline int cont_make_shmem(struct cont_map *m)
{
	long long failed = cont_vmstat("thp_file_fallback");
	int fs, mnt, tries;

	/* A mount that is in no namespace: nothing to clean up, no path. */
	fs = syscall(__NR_fsopen, "tmpfs", 1);
	if (fs < 0)
		return cont_why(m, CONT_MAKE_SKIP, "fsopen of tmpfs: %s",
				strerror(errno));
	if (syscall(__NR_fsconfig, fs, CONT_FSCONFIG_SET_STRING, "huge", "always", 0) ||
	    syscall(__NR_fsconfig, fs, CONT_FSCONFIG_SET_STRING, "size", "75%", 0) ||
	    syscall(__NR_fsconfig, fs, CONT_FSCONFIG_CMD_CREATE, NULL, NULL, 0)) {
		close(fs);
		return cont_why(m, CONT_MAKE_SKIP, "tmpfs with huge=always: %s",
				strerror(errno));
	}
	mnt = syscall(__NR_fsmount, fs, 1, 0);
	close(fs);
	if (mnt < 0)
		return cont_why(m, CONT_MAKE_SKIP, "fsmount of tmpfs: %s",
				strerror(errno));
	m->fd = openat(mnt, "f", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	close(mnt);
	if (m->fd < 0)
		return cont_why(m, CONT_MAKE_FAIL, "file on tmpfs: %s",
				strerror(errno));

	m->off = m->block;
	for (tries = 0; ; tries++) {
		if (ftruncate(m->fd, 0) || ftruncate(m->fd, m->pmd) ||
		    !cont_fill_file(m, m->off, m->len))
			return cont_why(m, CONT_MAKE_SKIP, "write to tmpfs: %s",
					strerror(errno));
		if (!cont_map_window(m))
			return cont_why(m, CONT_MAKE_FAIL, "mmap of tmpfs: %s",
					strerror(errno));
		cont_touch(m->addr, m->len);
		if (__builtin_popcountll(cont_expect_bits(m->addr, m->len)) ==
		    (int)m->nr_blocks)
			return 0;
		/* Did it try at all?  The page cache has a limit of its own. */
		if (tries || cont_vmstat("thp_file_fallback") == failed)
			return cont_why(m, CONT_MAKE_SKIP,
					"tmpfs has no huge page of %zu kB (too large for it or no memory)",
					m->pmd >> 10);
		munmap(m->resv, m->resv_len);
		cont_make_room();
	}
}

/* A file on a writable XFS; its name is gone. */
static inline int cont_open_xfs(void)
{
	char line[1024], dir[256], path[300], type[32], opts[512];
	int fd = -1;
	FILE *f;

	f = fopen("/proc/self/mounts", "re");
	if (!f)
		return -1;
	while (fd < 0 && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%*s %255s %31s %511s", dir, type, opts) != 3 ||
		    strcmp(type, "xfs") || strncmp(opts, "rw", 2))
			continue;
		snprintf(path, sizeof(path), "%s/contpte.XXXXXX", dir);
		fd = mkostemp(path, O_CLOEXEC);
		if (fd >= 0)
			unlink(path);
	}
	fclose(f);
	return fd;
}

/* Read all of the file so that readahead works its way up to large folios. */
static inline void cont_read_ahead(struct cont_map *m, size_t len)
{
	char path[64], again[64], old[32];
	bool raised = false;
	size_t size = 16 * m->page, at;
	char *buf = malloc(size);
	struct stat st;
	int fd;

	if (!buf || fstat(m->fd, &st))
		goto out;
	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb",
		 major(st.st_dev), minor(st.st_dev));
	if (cont_read_str(path, old, sizeof(old)))
		raised = cont_write_str(path, "65536");
	/* The limit is taken over at open. */
	snprintf(again, sizeof(again), "/proc/self/fd/%d", m->fd);
	fd = open(again, O_RDONLY | O_CLOEXEC);
	if (raised)
		cont_write_str(path, old);
	/* Small steps: each window of readahead has larger folios than the last. */
	for (at = 0; at < len; at += size)
		if (pread(fd, buf, size, at) != (ssize_t)size)
			break;
	close(fd);
out:
	free(buf);
}

static inline int cont_make_xfs(struct cont_map *m)
{
	size_t len = (m->nr_blocks > 4 ? 32 : 16) * m->block;
	unsigned int run = 0;
	char *all, *at;
	size_t i;

	m->fd = cont_open_xfs();
	if (m->fd < 0)
		return cont_why(m, CONT_MAKE_SKIP, "no writable XFS is mounted");
	if (!cont_fill_file(m, 0, len) || fsync(m->fd))
		return cont_why(m, CONT_MAKE_SKIP, "write to XFS: %s", strerror(errno));
	if (posix_fadvise(m->fd, 0, 0, POSIX_FADV_DONTNEED))
		return cont_why(m, CONT_MAKE_FAIL, "POSIX_FADV_DONTNEED failed");
	cont_read_ahead(m, len);

	/* Look where in the file the folios are large enough. */
	all = cont_reserve(len + m->block);
	if (all == MAP_FAILED)
		return cont_why(m, CONT_MAKE_FAIL, "mmap: %s", strerror(errno));
	at = cont_align_up(all, m->block);
	if (mmap(at, len, PROT_READ, MAP_SHARED | MAP_FIXED, m->fd, 0) != at) {
		munmap(all, len + m->block);
		return cont_why(m, CONT_MAKE_FAIL, "mmap of XFS: %s", strerror(errno));
	}
	cont_touch(at, len);
	for (i = 0; i < len / m->block && run < m->nr_blocks; i++)
		run = cont_block_is_one_folio(at + i * m->block) ? run + 1 : 0;
	munmap(all, len + m->block);
	if (run < m->nr_blocks)
		return cont_why(m, CONT_MAKE_SKIP,
				"readahead made no folios of %zu kB in XFS",
				m->block >> 10);

	m->off = (i - run) * m->block;
	if (!cont_map_window(m))
		return cont_why(m, CONT_MAKE_FAIL, "mmap of XFS: %s", strerror(errno));
	cont_touch(m->addr, m->len);
	return 0;
}

/* One that is all zeroes has never been made. */
static inline void cont_map_free(struct cont_map *m)
{
	if (!m->page)
		return;
	if (m->resv)
		munmap(m->resv, m->resv_len);
	if (m->fd >= 0)
		close(m->fd);
	m->resv = NULL;
	m->addr = NULL;
	m->fd = -1;
}

/* Give up the window, if there is one, for a new one with the same seed. */
static inline int cont_map_renew(struct cont_map *m)
{
	int ret;

	cont_map_free(m);
	switch (m->src) {
	case CONT_THP:
		ret = cont_make_thp(m);
		if (!ret)
			cont_fill(m, 0, m->nr_pages, 0);
		break;
	case CONT_ANON:
		ret = cont_make_anon(m);
		break;
	case CONT_SHMEM:
		ret = cont_make_shmem(m);
		break;
	default:
		ret = cont_make_xfs(m);
		break;
	}
	if (ret)
		cont_map_free(m);
	return ret;
}

/*
 * Make a window of nr_blocks blocks (CONT_THP: of as many as a PMD has) that can
 * all fold, with every page mapped and holding generation 0.  Returns 0, or
 * CONT_MAKE_SKIP or CONT_MAKE_FAIL with the reason in m->why.  Whether the kernel
 * folded it is for the test to check.
 *
 * prot and flags apply to the files; 0 stands for what the source usually has.
 */
static inline int cont_map_make_as(struct cont_map *m, enum cont_source src,
				   unsigned int nr_blocks, int prot, int flags)
{
	memset(m, 0, sizeof(*m));
	m->src = src;
	m->fd = -1;
	m->page = cont_page_size();
	m->block = cont_size();
	m->pmd = cont_pmd_size();
	m->bpages = m->block / m->page;
	m->nr_blocks = nr_blocks;
	m->nr_pages = nr_blocks * m->bpages;
	m->len = nr_blocks * m->block;
	m->prot = PROT_READ | (src == CONT_XFS_EXEC ? PROT_EXEC : PROT_WRITE);
	m->flags = src == CONT_SHMEM || src == CONT_XFS ? MAP_SHARED : MAP_PRIVATE;
	if (prot && src != CONT_ANON && src != CONT_THP)
		m->prot = prot;
	if (flags && src != CONT_ANON && src != CONT_THP)
		m->flags = flags;

	if (!cont_sees_pfns())
		return cont_why(m, CONT_MAKE_SKIP,
				"pagemap and kpageflags show nothing (needs root)");
	if (!m->pmd)
		return cont_why(m, CONT_MAKE_SKIP, "kernel has no THP");
	m->seed = cont_seed();
	cont_no_numa_balancing();
	return cont_map_renew(m);
}

static inline int cont_map_make(struct cont_map *m, enum cont_source src,
				unsigned int nr_blocks)
{
	return cont_map_make_as(m, src, nr_blocks, 0, 0);
}

#endif /* CONTPTE_UTIL_H */
