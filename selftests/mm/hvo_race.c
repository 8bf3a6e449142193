// SPDX-License-Identifier: GPL-2.0-only
/*
 * Huge pages whose struct pages are given back, against all who look at them.
 *
 * With vm.hugetlb_optimize_vmemmap on, the vmemmap of a huge page is remapped when
 * the page comes into its pool and when it leaves it.  Any struct page may be
 * accessed meanwhile, by any CPU in any context, and by those who take references
 * of pages that may be somebody else's by now.
 *
 * Claim: none of them notices.  They see the old mapping or the new one, which say
 * the same; no access fails, no CPU goes on using a page that was given back, and
 * in the end everything is there again.
 *
 * Oracle: huge pages in use hold a pattern, and what pagemap, kpageflags, kpagecount
 * and /proc/kcore tell of them while they are in use follows from their address
 * alone.  Of all other struct pages, in /proc/kcore, only that is checked which
 * holds whoever uses the page (a head is aligned to more than the distance of its
 * tail; none is all zero, which is what kcore makes of a failed read).  Memory
 * that was given back is filled with ones by a thread that wants it unchanged, so
 * that who still takes it for struct pages finds nonsense, and who writes to it is
 * found.  CONFIG_TEST_HUGETLB_VMEMMAP does the like in the kernel, from contexts
 * that user space cannot get into.  When all has ended, the pages saved are counted
 * by kpageflags and kcore and again by the read-only pages in ptdump, and are as
 * many as before; the kernel has not warned.
 *
 * Breaks on: a missing or late TLB flush, pages freed before it, entries left
 * broken, faults that are not mended or reported as errors (above all in NMIs and
 * with locks held), writes to read-only tails, fake heads taken for heads, vmemmap
 * pages lost or never given back.
 *
 * Options: see race_util.h.  -t counts those who look, not those who resize pools.
 */
#include "contpte_util.h"
#include "race_util.h"

#include <elf.h>
#include <sched.h>
#include <signal.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE	23
#endif
#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT		26
#endif

#define DEFAULT_SECONDS	1
#define DEFAULT_THREADS	5
/* A thread that is caught in an endless fault is found by nothing else. */
#define HANG_SECONDS	120

#define SYSCTL		"/proc/sys/vm/hugetlb_optimize_vmemmap"
#define POOLS		"/sys/kernel/mm/hugepages"
#define WINDOW		"/sys/kernel/debug/hugetlb_vmemmap/window_us"
#define MODULE		"/sys/kernel/debug/hugetlb_vmemmap_test"
#define PAGE_IDLE	"/sys/kernel/mm/page_idle/bitmap"
#define COMPACT		"/proc/sys/vm/compact_memory"
#define PERF_RATE	"/proc/sys/kernel/perf_event_max_sample_rate"

#define WINDOW_US	"100"
/* Faults mended by then: there are thousands. */
#define MIN_HELP	10
#define MAX_GOES	20

/* kpageflags, and struct pages, read at a time. */
#define CHUNK		1024
#define MAX_SIZES	16
#define NR_HOT		512
#define MAX_SEGS	64
/* Small pages that the memory given back is caught with, and a thread holds. */
#define CHURN_PAGES	128
/* Of a huge page, this many pages are filled. */
#define FILL_PAGES	512

/* A size of huge pages that can be optimized. */
struct size {
	__u64 bytes;
	unsigned int order;
	__u64 max;		/* so many at a time */
	__u64 was_nr, was_over;	/* before the test */
};

/* A stretch of RAM, and where kcore has its struct pages. */
struct seg {
	__u64 pfn, nr;
	off_t off;
};

enum role {
	POOL,
	DEMOTE,
	HOLD,
	FLAGS,
	KCORE,
	CHURN,
	REFS,
};

struct race_case {
	const char *name;
	const char *contexts;	/* of the module */
	bool module;		/* is what the case is about */
	bool two;		/* sizes, one demoted to the other */
	bool window;
	bool quiesce;
	bool on;		/* nobody turns the optimization off */
	enum role roles[6];	/* one after the other, then all over again */
};

/* Of the case that runs; shared with the child that runs it. */
struct shared {
	char why[512];
	bool skip;
	unsigned long steps[REFS + 1];
	unsigned long surplus;
};

static struct size sizes[MAX_SIZES];
static unsigned int nr_sizes;
static size_t page;

static struct seg segs[MAX_SEGS];
static unsigned int nr_segs;	/* 0: no kcore */
static __u64 vmemmap;		/* address of struct page 0 */
static __u64 vmemmap_lo, vmemmap_hi;
static size_t sp_size, sp_head, sp_ref;	/* of struct page */
static const char *ptdump;

static struct shared *sh;
static char was_sysctl[16], was_window[16], was_rate[16];
static long saved_before;
static bool set_up;
static volatile sig_atomic_t interrupted;
static volatile pid_t child;

static struct race race;
static const struct race_case *current;
/* Heads of pages that are or were huge. */
static __u64 hot[NR_HOT];
static unsigned int nr_hot;

/* ---- files ------------------------------------------------------------ */

static bool __attribute__((format(printf, 1, 2))) fail(const char *fmt, ...)
{
	va_list ap;

	if (sh->why[0])
		return false;
	va_start(ap, fmt);
	vsnprintf(sh->why, sizeof(sh->why), fmt, ap);
	va_end(ap);
	return false;
}

static const char *knob(char *path, size_t len, const struct size *s,
			const char *name)
{
	snprintf(path, len, POOLS "/hugepages-%llukB/%s", s->bytes >> 10, name);
	return path;
}

static __u64 pool_read(const struct size *s, const char *name)
{
	char path[128], buf[32];

	if (!cont_read_str(knob(path, sizeof(path), s, name), buf, sizeof(buf)))
		return 0;
	return strtoull(buf, NULL, 10);
}

static bool pool_write(const struct size *s, const char *name, __u64 val)
{
	char path[128], buf[32];

	snprintf(buf, sizeof(buf), "%llu", val);
	return cont_write_str(knob(path, sizeof(path), s, name), buf);
}

/* What the kernel complained about, if CONFIG_PANIC_ON_OOPS did not end it. */
static __u64 taint(void)
{
	char buf[32];

	if (!cont_read_str("/proc/sys/kernel/tainted", buf, sizeof(buf)))
		return 0;
	/* Bad page, oops, warning, lockup */
	return strtoull(buf, NULL, 10) & (1 << 5 | 1 << 7 | 1 << 9 | 1 << 14);
}

static __u64 mem_free(void)
{
	char line[128];
	__u64 kb = 0;
	FILE *f;

	f = fopen("/proc/meminfo", "re");
	if (!f)
		return 0;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "MemFree: %llu kB", &kb) == 1)
			break;
	fclose(f);
	return kb << 10;
}

/* The value of a line of the module's statistics. */
static __u64 stat_of(const char *stats, const char *name)
{
	size_t len = strlen(name);

	while (stats && *stats) {
		if (!strncmp(stats, name, len) && stats[len] == ' ')
			return strtoull(stats + len, NULL, 0);
		stats = strchr(stats, '\n');
		stats += !!stats;
	}
	return 0;
}

static bool read_stats(char *buf, size_t size)
{
	ssize_t n;
	int fd;

	fd = open(MODULE "/stats", O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, buf, size - 1);
	close(fd);
	buf[n < 0 ? 0 : n] = '\0';
	return n > 0;
}

/* ---- struct pages in kcore -------------------------------------------- */

static bool note_number(const char *notes, size_t len, const char *name, size_t *val)
{
	const char *at = memmem(notes, len, name, strlen(name));

	if (at)
		*val = strtoul(at + strlen(name), NULL, 10);
	return at;
}

/*
 * Each segment of RAM is followed by that of its struct pages, which begins at a
 * page.  Offsets in struct page are among the notes, as in a crash dump.
 */
static bool parse_kcore(int fd)
{
	Elf64_Phdr ph[2 * MAX_SEGS];
	Elf64_Ehdr eh;
	static char notes[65536];
	__u64 at, end;
	ssize_t n;
	int i;

	if (pread(fd, &eh, sizeof(eh), 0) != sizeof(eh) ||
	    eh.e_phentsize != sizeof(ph[0]) || eh.e_phnum > 2 * MAX_SEGS)
		return false;
	n = eh.e_phnum * sizeof(ph[0]);
	if (pread(fd, ph, n, eh.e_phoff) != n || ph[0].p_type != PT_NOTE)
		return false;
	n = pread(fd, notes, sizeof(notes) - 1, ph[0].p_offset);
	if (n <= 0)
		return false;
	if (!note_number(notes, n, "SIZE(page)=", &sp_size) || sp_size % 8 ||
	    !note_number(notes, n, "OFFSET(page.compound_head)=", &sp_head) ||
	    !note_number(notes, n, "OFFSET(page._refcount)=", &sp_ref))
		return false;

	vmemmap_lo = ~0ULL;
	for (i = 1; i + 1 < eh.e_phnum && nr_segs < MAX_SEGS; i++) {
		struct seg *s = &segs[nr_segs];

		/* Only RAM has a physical address here, or the kernel's image. */
		if (ph[i].p_paddr == ~0ULL || ph[i + 1].p_paddr != ~0ULL)
			continue;
		s->pfn = ph[i].p_paddr / page;
		s->nr = ph[i].p_memsz / page;
		if (s->pfn * sp_size % page)
			continue;
		at = ph[i + 1].p_vaddr;
		end = at + ph[i + 1].p_memsz;
		if (at + s->nr * sp_size > end || at + s->nr * sp_size + page < end)
			continue;
		if (vmemmap && vmemmap != at - s->pfn * sp_size)
			continue;
		vmemmap = at - s->pfn * sp_size;
		s->off = ph[i + 1].p_offset;
		if (at < vmemmap_lo)
			vmemmap_lo = at;
		if (end > vmemmap_hi)
			vmemmap_hi = end;
		nr_segs++;
	}
	return nr_segs;
}

/* To be opened by each thread: there is one buffer for each open file. */
static int open_kcore(void)
{
	return open("/proc/kcore", O_RDONLY | O_CLOEXEC);
}

static const struct seg *seg_of(__u64 pfn)
{
	unsigned int i;

	for (i = 0; i < nr_segs; i++)
		if (pfn >= segs[i].pfn && pfn < segs[i].pfn + segs[i].nr)
			return &segs[i];
	return NULL;
}

/* Returns how many of the struct pages from pfn on were read, or -1. */
static int read_struct_pages(int fd, __u64 pfn, unsigned int nr, char *buf)
{
	const struct seg *s = seg_of(pfn);
	ssize_t len, n;

	if (!s)
		return 0;
	if (nr > s->pfn + s->nr - pfn)
		nr = s->pfn + s->nr - pfn;
	len = nr * sp_size;
	n = pread(fd, buf, len, s->off + (pfn - s->pfn) * sp_size);
	return n == len ? (int)nr : -1;
}

static __u64 head_word(const char *buf, unsigned int i)
{
	__u64 word;

	memcpy(&word, buf + i * sp_size + sp_head, sizeof(word));
	return word;
}

static __u32 ref_word(const char *buf, unsigned int i)
{
	__u32 word;

	memcpy(&word, buf + i * sp_size + sp_ref, sizeof(word));
	return word;
}

/* Is this (not the first) page of struct pages a repetition of the head's? */
static bool is_repeated(__u64 pfn)
{
	return !(pfn * sp_size % page);
}

/* ---- pages saved ------------------------------------------------------ */

/* Read-only pages in the vmemmap; -1 if that cannot be told. */
static long saved_by_ptdump(void)
{
	__u64 from, to;
	char line[256];
	long nr = 0;
	FILE *f;

	if (!ptdump || !nr_segs)
		return -1;
	f = fopen(ptdump, "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "0x%llx-0x%llx", &from, &to) != 2 ||
		    from < vmemmap_lo || to > vmemmap_hi)
			continue;
		if (strstr(line, " ro ") && (strstr(line, " PTE ") ||
					     strstr(line, " pte")))
			nr += (to - from) / page;
	}
	fclose(f);
	return nr;
}

/*
 * Looks at all pages.  Returns how many pages of struct pages repeat others; -1
 * without kcore.  Remembers where the huge pages are.
 */
static long saved_by_kcore(void)
{
	__u64 flags[CHUNK], pfn, both = CONT_KPF_HUGETLB | CONT_KPF_TAIL;
	unsigned int i, step;
	static char buf[4096];
	long nr = 0;
	int fd, kcore;
	ssize_t n;

	fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	kcore = open_kcore();
	nr_hot = 0;
	step = nr_segs ? page / sp_size : CHUNK;
	for (pfn = 0; ; pfn += n / 8) {
		n = pread(fd, flags, sizeof(flags), pfn * 8);
		if (n <= 0)
			break;
		for (i = 0; i < n / 8; i++)
			if ((flags[i] & CONT_KPF_HUGETLB) &&
			    (flags[i] & CONT_KPF_HEAD) && nr_hot < NR_HOT)
				hot[nr_hot++] = pfn + i;
		if (!nr_segs)
			continue;
		for (i = 0; i < n / 8; i += step)
			if ((flags[i] & both) == both &&
			    read_struct_pages(kcore, pfn + i, 1, buf) == 1)
				nr += !(head_word(buf, 0) & 1);
	}
	close(kcore);
	close(fd);
	return nr_segs ? nr : -1;
}

/* -1: cannot tell; -2: two opinions. */
static long saved(void)
{
	long kcore = saved_by_kcore(), pt = saved_by_ptdump();

	if (kcore >= 0 && pt >= 0 && kcore != pt) {
		fail("%ld pages of struct pages repeat others, but %ld are mapped read-only",
		     kcore, pt);
		return -2;
	}
	return kcore;
}

/* So many pages are saved for one huge page. */
static long saves(const struct size *s)
{
	return (long)(s->bytes / page * sp_size / page) - 1;
}

/* ---- pools ------------------------------------------------------------ */

static bool pools_empty(void)
{
	unsigned int i;

	for (i = 0; i < nr_sizes; i++)
		if (pool_read(&sizes[i], "nr_hugepages") ||
		    pool_read(&sizes[i], "surplus_hugepages"))
			return false;
	return true;
}

/*
 * Pages that were freed in atomic context go later: give it time, and no more than
 * that.  A surplus page that is free (its struct pages could not be had again, or
 * nodes were mistaken for each other) goes only when it has been made a page of
 * the pool again.
 */
static bool empty_pools(void)
{
	unsigned int i, try;

	for (try = 0; try < 200; try++) {
		for (i = 0; i < nr_sizes; i++) {
			pool_write(&sizes[i], "nr_overcommit_hugepages", 0);
			pool_write(&sizes[i], "nr_hugepages", 0);
		}
		if (pools_empty())
			return true;
		usleep(10000);
		for (i = 0; i < nr_sizes; i++)
			pool_write(&sizes[i], "nr_hugepages",
				   pool_read(&sizes[i], "surplus_hugepages"));
	}
	for (i = 0; i < nr_sizes; i++)
		if (pool_read(&sizes[i], "nr_hugepages") ||
		    pool_read(&sizes[i], "surplus_hugepages"))
			break;
	if (i < nr_sizes)
		fail("%llu pages of %llu kB are still there, %llu free, %llu surplus",
		     pool_read(&sizes[i], "nr_hugepages"), sizes[i].bytes >> 10,
		     pool_read(&sizes[i], "free_hugepages"),
		     pool_read(&sizes[i], "surplus_hugepages"));
	return false;
}

static __u64 grow_pool(const struct size *s, __u64 nr)
{
	pool_write(s, "nr_hugepages", nr);
	return pool_read(s, "nr_hugepages");
}

/* The page size times so many fits easily. */
static __u64 how_many(__u64 bytes)
{
	__u64 room = mem_free() / 4, nr;

	if (room > 256ULL << 20)
		room = 256ULL << 20;
	nr = room / bytes;
	if (!nr && mem_free() / 4 > bytes)
		nr = 2;
	return nr > 64 ? 64 : nr;
}

/* The smallest that can be optimized, and one that can be demoted to it. */
static void find_sizes(void)
{
	unsigned int order;
	struct size s = { 0 };
	char path[128];

	for (order = 16; order < 40 && nr_sizes < 2; order++) {
		s.bytes = 1ULL << order;
		s.order = order;
		if (access(knob(path, sizeof(path), &s, "nr_hugepages"), W_OK) ||
		    saves(&s) <= 0)
			continue;
		s.max = how_many(s.bytes);
		if (!s.max)
			continue;
		if (nr_sizes) {
			if (s.max > 4)
				s.max = 4;
			if (access(knob(path, sizeof(path), &s, "demote"), W_OK))
				continue;
		}
		s.was_nr = pool_read(&s, "nr_hugepages");
		s.was_over = pool_read(&s, "nr_overcommit_hugepages");
		sizes[nr_sizes++] = s;
	}
}

static void set_window(const char *us)
{
	if (was_window[0])
		cont_write_str(WINDOW, us);
}

/* At exit as well, and after a child was killed in the middle of a case. */
static void restore(void)
{
	unsigned int i;

	if (!set_up)
		return;
	set_up = false;
	cont_write_str(MODULE "/stop", "1");
	/* Gets lower while the handlers of the module take long. */
	if (was_rate[0])
		cont_write_str(PERF_RATE, was_rate);
	set_window(was_window);
	empty_pools();
	cont_write_str(SYSCTL, was_sysctl);
	for (i = 0; i < nr_sizes; i++) {
		pool_write(&sizes[i], "nr_hugepages", sizes[i].was_nr);
		pool_write(&sizes[i], "nr_overcommit_hugepages", sizes[i].was_over);
	}
}

/* ---- threads that resize pools ---------------------------------------- */

static void pool_loop(struct race_thread *t)
{
	const struct size *s = t->arg;
	__u64 nr;

	while (race_on(&race)) {
		nr = cont_rand(&t->rand) % (s->max + 1);
		/* Ends of the range are where all of them change at once. */
		if (!(cont_rand(&t->rand) % 4))
			nr = t->steps % 2 ? s->max : 0;
		if (!current->on)
			cont_write_str(SYSCTL, cont_rand(&t->rand) % 4 ? "1" : "0");
		if (!pool_write(s, "nr_hugepages", nr)) {
			race_fail(&race, "nr_hugepages of %llu kB: %s", s->bytes >> 10,
				  strerror(errno));
			return;
		}
		t->steps++;
	}
}

/*
 * Whether there is one to be demoted is up to the others.  The pool is never made
 * smaller but by this: demotion does not know of surplus pages, and leaves the
 * count of them wrong.
 */
static void demote_loop(struct race_thread *t)
{
	const struct size *s = &sizes[1];

	while (race_on(&race)) {
		pool_write(s, "nr_hugepages", s->max);
		if (pool_write(s, "demote", 1 + cont_rand(&t->rand) % s->max))
			t->steps++;
	}
}

/* ---- threads that use huge pages -------------------------------------- */

/*
 * While this thread has the huge page mapped, all that is known of its pages has
 * to be so.
 */
static bool check_flags(const struct size *s, __u64 head)
{
	__u64 nr = s->bytes / page, buf[CHUNK], at, want;
	unsigned int i, n;
	bool ok = true;
	int fd, cnt;

	fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	cnt = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC);
	for (at = 0; ok && at < nr; at += CHUNK) {
		n = nr - at < CHUNK ? nr - at : CHUNK;
		ok = pread(fd, buf, n * 8, (head + at) * 8) == n * 8;
		for (i = 0; ok && i < n; i++) {
			want = CONT_KPF_HUGETLB;
			want |= at + i ? CONT_KPF_TAIL : CONT_KPF_HEAD;
			buf[i] &= CONT_KPF_HUGETLB | CONT_KPF_TAIL | CONT_KPF_HEAD;
			if (buf[i] == want)
				continue;
			race_fail(&race, "page %llu of %#llx: kpageflags %#llx, not %#llx",
				  at + i, head, buf[i], want);
			ok = false;
		}
		ok = ok && pread(cnt, buf, n * 8, (head + at) * 8) == n * 8;
		for (i = 0; ok && i < n; i++) {
			if (buf[i] == 1)
				continue;
			race_fail(&race, "page %llu of the huge page at %#llx has kpagecount %llu",
				  at + i, head, buf[i]);
			ok = false;
		}
	}
	if (!ok)
		race_fail(&race, "kpageflags or kpagecount: %s", strerror(errno));
	close(fd);
	close(cnt);
	return ok;
}

static bool check_struct_pages(const struct size *s, __u64 head, int kcore, char *buf)
{
	__u64 nr = s->bytes / page, at, word, want = vmemmap + head * sp_size + 1;
	bool repeated;
	int i, n;

	for (at = 0; at < nr; at += n) {
		n = read_struct_pages(kcore, head + at, CHUNK, buf);
		if (n <= 0) {
			race_fail(&race, "kcore: %s", strerror(errno));
			return false;
		}
		for (i = at ? 0 : 1; i < n && at + i < nr; i++) {
			word = head_word(buf, i);
			repeated = is_repeated(head + at + i) && !(word & 1);
			if (repeated || (word == want && !ref_word(buf, i)))
				continue;
			race_fail(&race, "tail %llu of %#llx: head %#llx, not %#llx, %u references",
				  at + i, head, word, want, ref_word(buf, i));
			return false;
		}
	}
	return true;
}

static void fill(const struct size *s, char *addr, __u64 seed, __u64 gen)
{
	__u64 nr = s->bytes / page, step = nr > FILL_PAGES ? nr / FILL_PAGES : 1, i;

	for (i = 0; i < nr; i += step)
		cont_page_fill(addr + i * page, seed, i, gen);
}

static bool filled(const struct size *s, char *addr, __u64 seed, __u64 gen)
{
	__u64 nr = s->bytes / page, step = nr > FILL_PAGES ? nr / FILL_PAGES : 1, i;

	for (i = 0; i < nr; i += step) {
		if (cont_page_ok(addr + i * page, seed, i, gen))
			continue;
		race_fail(&race, "page %llu of a huge page has changed", i);
		return false;
	}
	return true;
}

static bool hold_one(struct race_thread *t, const struct size *s, char *addr,
		     int kcore, char *buf)
{
	__u64 ents[2], head, gen = t->steps;

	fill(s, addr, t->rand, gen);
	if (!cont_pagemap(addr, 1, &ents[0]) ||
	    !cont_pagemap(addr + s->bytes - page, 1, &ents[1])) {
		race_fail(&race, "pagemap: %s", strerror(errno));
		return false;
	}
	head = CONT_PM_PFN(ents[0]);
	if (!head || head % (s->bytes / page) ||
	    CONT_PM_PFN(ents[1]) != head + s->bytes / page - 1) {
		race_fail(&race, "a huge page is mapped at %#llx to %#llx", head,
			  CONT_PM_PFN(ents[1]));
		return false;
	}
	/* Shared with others without a lock: any of the values will do. */
	__atomic_store_n(&hot[cont_rand(&t->rand) % nr_hot], head, __ATOMIC_RELAXED);
	return check_flags(s, head) &&
	       (kcore < 0 || check_struct_pages(s, head, kcore, buf));
}

/* Takes pages of the pool, or surplus pages when it has none. */
static void hold_loop(struct race_thread *t)
{
	int prot = PROT_READ | PROT_WRITE, flags, kcore = nr_segs ? open_kcore() : -1;
	const struct size *s;
	__u64 seed;
	char *addr, *buf;
	bool ok = true;

	buf = malloc(CHUNK * (nr_segs ? sp_size : 1));
	while (ok && race_on(&race)) {
		s = &sizes[current->two ? cont_rand(&t->rand) % nr_sizes : 0];
		flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
			s->order << MAP_HUGE_SHIFT;
		/* Reserved by mmap, or allocated by the fault. */
		if (cont_rand(&t->rand) % 2)
			flags |= MAP_NORESERVE;
		addr = mmap(NULL, s->bytes, prot, flags, -1, 0);
		if (addr == MAP_FAILED) {
			sched_yield();
			continue;
		}
		/* Does not send a signal when there is none left. */
		if (!madvise(addr, s->bytes, MADV_POPULATE_WRITE)) {
			seed = t->rand;
			if (pool_read(s, "surplus_hugepages"))
				__atomic_fetch_add(&sh->surplus, 1, __ATOMIC_RELAXED);
			ok = hold_one(t, s, addr, kcore, buf) &&
			     filled(s, addr, seed, t->steps);
			t->steps++;
		} else if (errno == EINVAL) {
			/* Before 5.14: fill what is reserved, and only that. */
			if (!(flags & MAP_NORESERVE)) {
				seed = t->rand;
				ok = hold_one(t, s, addr, kcore, buf) &&
				     filled(s, addr, seed, t->steps);
				t->steps++;
			}
		}
		munmap(addr, s->bytes);
	}
	free(buf);
	close(kcore);
}

/* ---- threads that look at all pages ----------------------------------- */

/* Mostly where huge pages are. */
static __u64 choose_pfn(struct race_thread *t)
{
	__u64 len = sizes[current->two ? nr_sizes - 1 : 0].bytes / page;
	const struct seg *s;

	if (!nr_segs || cont_rand(&t->rand) % 8)
		return __atomic_load_n(&hot[cont_rand(&t->rand) % nr_hot],
				       __ATOMIC_RELAXED) +
		       cont_rand(&t->rand) % len / 64 * 64;
	s = &segs[cont_rand(&t->rand) % nr_segs];
	return s->pfn + cont_rand(&t->rand) % s->nr / 64 * 64;
}

/*
 * They take no reference.  With CONFIG_DEBUG_VM_PGFLAGS it is a BUG if a page becomes
 * part of a compound page just then (stable_page_flags() asks a folio for its flags
 * that is none any more), whether struct pages are optimized or not.  Then it is
 * only pages that this test holds that kpageflags and kpagecount are read of.
 */
static bool flags_may_race(void)
{
	static int may = -1;
	char line[256];
	FILE *f;

	if (may >= 0)
		return may;
	may = 1;
	f = fopen("/proc/kallsyms", "re");
	/* What only CONFIG_DEBUG_VM has */
	while (f && may && fgets(line, sizeof(line), f))
		may = !strstr(line, " page_init_poison\n");
	if (f)
		fclose(f);
	return may;
}

static void flags_loop(struct race_thread *t)
{
	__u64 buf[CHUNK], pfn;
	int fd, cnt;

	fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	cnt = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC);
	while (race_on(&race)) {
		pfn = choose_pfn(t);
		/* 0 is the end of memory. */
		if (pread(fd, buf, sizeof(buf), pfn * 8) < 0 ||
		    pread(cnt, buf, sizeof(buf), pfn * 8) < 0) {
			race_fail(&race, "kpageflags or kpagecount of %#llx: %s", pfn,
				  strerror(errno));
			break;
		}
		t->steps++;
	}
	close(fd);
	close(cnt);
}

static bool all_zero(const char *buf)
{
	size_t i;

	for (i = 0; i < sp_size; i++)
		if (buf[i])
			return false;
	return true;
}

static bool struct_page_ok(__u64 pfn, const char *buf)
{
	__u64 word = head_word(buf, 0), head = word - 1 - vmemmap, away;

	if (all_zero(buf)) {
		race_fail(&race, "struct page %#llx is all zero", pfn);
		return false;
	}
	if (!(word & 1))
		return true;
	away = pfn - head / sp_size;
	if (!(head % sp_size) && head / sp_size < pfn && head &&
	    away < (head / sp_size & -(head / sp_size)))
		return true;
	race_fail(&race, "struct page %#llx is tail of %#llx", pfn, word);
	return false;
}

static void kcore_loop(struct race_thread *t)
{
	int kcore = open_kcore(), i, n;
	bool ok = true;
	char *buf;
	__u64 pfn;

	buf = malloc(CHUNK * sp_size);
	while (ok && race_on(&race)) {
		pfn = choose_pfn(t);
		n = read_struct_pages(kcore, pfn, CHUNK, buf);
		if (n < 0)
			race_fail(&race, "kcore: struct pages from %#llx on: %s", pfn,
				  strerror(errno));
		for (i = 0; ok && i < n; i++)
			ok = struct_page_ok(pfn + i, buf + i * sp_size);
		t->steps++;
	}
	free(buf);
	close(kcore);
}

/* Where memory of ones holds something else; len if it does nowhere. */
static size_t first_change(const void *mem, size_t len)
{
	const char *p = mem;
	size_t i;

	/* Others may have written to it, as far as the compiler knows. */
	asm volatile("" ::: "memory");
	if (cont_load(p) == ~0ULL && !memcmp(p, p + 8, len - 8))
		return len;
	for (i = 0; i < len; i += 8)
		if (cont_load(p + i) != ~0ULL)
			break;
	return i;
}

/*
 * Has the memory that was given back, and lets other pages that are neighbours of
 * huge ones have references taken.
 */
static void churn_loop(struct race_thread *t)
{
	size_t len = CHURN_PAGES * page, i;
	struct iovec from, to;
	__u64 *mem, *copy;
	ssize_t n;

	copy = malloc(len);
	while (race_on(&race)) {
		mem = mmap(NULL, len, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (mem == MAP_FAILED)
			continue;
		madvise(mem, len, MADV_NOHUGEPAGE);
		/* A tail of a bad head, on another node, if taken for struct pages */
		memset(mem, 0xff, len);
		from = (struct iovec) { mem, len };
		to = (struct iovec) { copy, len };
		n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
		if (n != (ssize_t)len && errno != ENOSYS)
			race_fail(&race, "process_vm_readv: %zd, %s", n, strerror(errno));
		i = first_change(mem, len);
		if (i < len)
			race_fail(&race, "somebody wrote to memory of ones, at %zu: %#llx",
				  i % page, cont_load((char *)mem + i));
		i = n == (ssize_t)len ? first_change(copy, len) : len;
		if (i < len)
			race_fail(&race, "process_vm_readv found %#llx in memory of ones, at %zu",
				  copy[i / 8], i % page);
		munmap(mem, len);
		t->steps++;
	}
	free(copy);
}

/* Those who take references of pages that they find by their number. */
static void refs_loop(struct race_thread *t)
{
	__u64 bits[CHUNK / 64];
	int idle, what;
	off_t at;

	idle = open(PAGE_IDLE, O_RDWR | O_CLOEXEC);
	while (race_on(&race)) {
		what = cont_rand(&t->rand) % 64;
		at = choose_pfn(t) / 64 * 8;
		if (!what) {
			cont_write_str(COMPACT, "1");
		} else if (idle < 0) {
			sched_yield();
			continue;
		} else if (what % 2) {
			/* Fails beyond the end of memory. */
			if (pread(idle, bits, sizeof(bits), at) < 0)
				race_fail(&race, "page_idle: %s", strerror(errno));
		} else {
			memset(bits, 0xff, sizeof(bits));
			if (pwrite(idle, bits, sizeof(bits), at) < 0 && errno != ENXIO)
				race_fail(&race, "page_idle: %s", strerror(errno));
		}
		t->steps++;
	}
	close(idle);
}

static void (* const loops[])(struct race_thread *t) = {
	[POOL] = pool_loop,
	[DEMOTE] = demote_loop,
	[HOLD] = hold_loop,
	[FLAGS] = flags_loop,
	[KCORE] = kcore_loop,
	[CHURN] = churn_loop,
	[REFS] = refs_loop,
};

static const char * const role_names[] = {
	[POOL] = "pools resized",
	[DEMOTE] = "demoted",
	[HOLD] = "huge pages used",
	[FLAGS] = "kpageflags",
	[KCORE] = "kcore",
	[CHURN] = "memory reused",
	[REFS] = "references",
};

/* ---- the module ------------------------------------------------------- */

static int by_pfn(const void *a, const void *b)
{
	__u64 x = *(const __u64 *)a, y = *(const __u64 *)b;

	return x < y ? -1 : x > y;
}

/* The ranges where huge pages are just now, with what is between near ones. */
static void print_ranges(char *buf, size_t size)
{
	__u64 len = sizes[current->two ? nr_sizes - 1 : 0].bytes / page, start, end;
	unsigned int i, n = 0;
	size_t at = 0;

	qsort(hot, nr_hot, sizeof(hot[0]), by_pfn);
	for (i = 0; i < nr_hot && n < 12; n++) {
		start = hot[i];
		do {
			end = hot[i++] + len;
		} while (i < nr_hot && hot[i] < end + 8 * len);
		at += snprintf(buf + at, size - at, "%llu %llu ", start, end);
	}
}

static bool start_module(const struct race_case *c)
{
	char line[1024];
	size_t at;

	if (!c->contexts || access(MODULE, F_OK))
		return true;
	print_ranges(line, sizeof(line));
	at = strlen(line);
	snprintf(line + at, sizeof(line) - at, "%s nmi", c->contexts);
	/* The counters that are wanted for NMIs may not be there. */
	if (!strcmp(c->contexts, "ref") || !cont_write_str(MODULE "/start", line)) {
		snprintf(line + at, sizeof(line) - at, "%s", c->contexts);
		if (!cont_write_str(MODULE "/start", line))
			return fail(MODULE "/start: %s: %s", line, strerror(errno));
	}
	return true;
}

/* Has ended when this returns; *buf tells what it has done. */
static bool stop_module(const struct race_case *c, char *buf, size_t size)
{
	const char *first;
	char word[32];
	int n, len;

	buf[0] = '\0';
	if (!c->contexts || access(MODULE, F_OK))
		return true;
	cont_write_str(MODULE "/stop", "1");
	if (!read_stats(buf, size))
		return fail(MODULE "/stats: %s", strerror(errno));
	if (stat_of(buf, "errors")) {
		first = strstr(buf, "first_error");
		return fail("in the kernel: %llu errors, %.*s",
			    stat_of(buf, "errors"), (int)strcspn(first, "\n"), first);
	}
	/* It has been there, in each of the contexts. */
	for (n = 0; sscanf(c->contexts + n, "%20s%n", word, &len) == 1; n += len) {
		strcat(word, "_reads");
		if (!stat_of(buf, word))
			return fail("in the kernel: no %s", word);
	}
	return true;
}

/* ---- a case, in a child ----------------------------------------------- */

static void on_fault(int sig, siginfo_t *info, void *context)
{
	(void)context;
	fail("signal %d at %p", sig, info->si_addr);
	_exit(KSFT_FAIL);
}

static void on_alarm(int sig)
{
	(void)sig;
	fail("does not come to an end");
	_exit(KSFT_FAIL);
}

static void __attribute__((noreturn)) skip(const char *reason)
{
	snprintf(sh->why, sizeof(sh->why), "%s", reason);
	sh->skip = true;
	_exit(KSFT_SKIP);
}

/* Asked for; a CPU that does not set access flags breaks and makes even so. */
static bool quiescing(void)
{
	static const char param[] = "hugetlb_vmemmap_quiesce=";
	const char *val;
	char line[4096];

	if (cont_vmstat("hvo_quiesce") < 0 ||
	    !cont_read_str("/proc/cmdline", line, sizeof(line)))
		return false;
	val = strstr(line, param);
	if (!val)
		return false;
	val += strlen(param);
	return strchr("1yY", *val) || !strncmp(val, "on", 2);
}

/* From full pools, all of it optimized, which tells where the huge pages are. */
static bool fill_pools(const struct race_case *c)
{
	unsigned int i, n = c->two ? nr_sizes : 1;
	long want = saved_before, now;
	__u64 nr;

	for (i = n; i-- > 0; ) {
		nr = grow_pool(&sizes[i], sizes[i].max);
		if (!nr)
			skip("no memory for huge pages");
		want += nr * saves(&sizes[i]);
	}
	now = saved();
	if (now == -2)
		return false;
	if (!nr_hot)
		return fail("no huge page to be seen in kpageflags");
	if (now >= 0 && now != want)
		return fail("with full pools %ld pages are saved, not %ld", now, want);
	return true;
}

static bool counters_ok(const struct race_case *c, long long broken, long long helped)
{
	if (c->window && broken >= 0 && !quiescing()) {
		if (helped < MIN_HELP)
			return fail("%lld windows of " WINDOW_US " us, but only %lld faults mended",
				    broken, helped);
	}
	/* What cannot be quiesced is broken. */
	if (c->quiesce && !broken && helped)
		return fail("nothing was broken, but %lld faults were mended", helped);
	return true;
}

static void __attribute__((noreturn)) child_main(const struct race_case *c)
{
	struct race_thread t[RACE_MAX_THREADS + 2] = {};
	unsigned int i, nr = 0, r = 0, goes = 0;
	long long broken, helped;
	enum role role;

	current = c;
	if (c->two && nr_sizes < 2)
		skip("there are no two sizes of huge pages that can be optimized");
	if (c->module && access(MODULE, F_OK))
		skip("no CONFIG_TEST_HUGETLB_VMEMMAP in this kernel");
	if (c->quiesce && !quiescing())
		skip("not booted with hugetlb_vmemmap_quiesce=on");
	if (c->window && cont_vmstat("hvo_break") < 0)
		skip("this kernel does not break and make (no hvo_break in vmstat)");
	if (c->window && !was_window[0])
		skip("no CONFIG_DEBUG_HUGETLB_VMEMMAP in this kernel");

	if (!fill_pools(c) || !start_module(c))
		_exit(KSFT_FAIL);
	/* Surplus pages of the size that is not demoted */
	pool_write(&sizes[0], "nr_overcommit_hugepages", sizes[0].max);
	if (c->window)
		set_window(WINDOW_US);
	broken = cont_vmstat("hvo_break");
	helped = cont_vmstat("hvo_help");

	t[nr].fn = loops[POOL];
	t[nr++].arg = &sizes[0];
	if (c->two)
		t[nr++].fn = loops[DEMOTE];
	for (i = 0; i < race.threads && nr < RACE_MAX_THREADS; i++) {
		if (!c->roles[r])
			r = 0;
		role = c->roles[r];
		if (role == KCORE && !nr_segs)
			role = FLAGS;
		if (role == FLAGS && !flags_may_race())
			role = nr_segs ? KCORE : HOLD;
		t[nr++].fn = loops[role];
		r = (r + 1) % ARRAY_SIZE(c->roles);
	}
	/* A guest that is short of CPUs may need several goes to meet a window. */
	do {
		race_run(&race, t, nr, NULL);
		for (i = 0; i < nr; i++)
			for (r = 0; r < ARRAY_SIZE(loops); r++)
				if (t[i].fn == loops[r])
					sh->steps[r] += t[i].steps;
	} while (c->window && !quiescing() && !race.failed && goes++ < MAX_GOES &&
		 cont_vmstat("hvo_help") - helped < MIN_HELP);
	if (race.failed)
		fail("%s (seed %llu)", race.why, race.seed);
	if (broken >= 0)
		counters_ok(c, cont_vmstat("hvo_break") - broken,
			    cont_vmstat("hvo_help") - helped);
	_exit(sh->why[0] ? KSFT_FAIL : KSFT_PASS);
}

/* ---- all cases -------------------------------------------------------- */

static const char * const counters[] = {
	"hvo_flush", "hvo_break", "hvo_help", "hvo_quiesce", "hvo_retry",
};

static void tell(const struct race_case *c, const long long *was, const char *stats)
{
	static const char * const stat[] = {
		"irqoff_reads", "ptl_reads", "ref_reads", "nofault_reads",
		"hrtimer_reads", "nmi_reads", "perf_irq_reads", "refs_taken",
	};
	char line[512];
	unsigned int i;
	int n = 0;

	for (i = 0; i < ARRAY_SIZE(role_names); i++)
		if (sh->steps[i])
			n += snprintf(line + n, sizeof(line) - n, ", %s %lu",
				      role_names[i], sh->steps[i]);
	if (sh->surplus)
		n += snprintf(line + n, sizeof(line) - n, ", with surplus %lu",
			      sh->surplus);
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		if (was[i] >= 0)
			n += snprintf(line + n, sizeof(line) - n, ", %s %lld",
				      counters[i], cont_vmstat(counters[i]) - was[i]);
	if (n)
		ksft_print_msg("%s: %s\n", c->name, line + 2);
	for (i = n = 0; i < ARRAY_SIZE(stat); i++)
		if (stat_of(stats, stat[i]))
			n += snprintf(line + n, sizeof(line) - n, ", %s %llu", stat[i],
				      stat_of(stats, stat[i]));
	if (n)
		ksft_print_msg("%s: %s\n", c->name, line + 2);
}

/* Everything that a case has used is back where it was. */
static bool all_back(void)
{
	unsigned int try;
	long now;

	if (!empty_pools())
		return false;
	now = saved();
	/* What is freed later may be on its way still. */
	for (try = 0; try < 20 && now != saved_before && now != -2; try++) {
		usleep(50000);
		now = saved();
	}
	if (now == -2)
		return false;
	if (now != saved_before)
		return fail("with empty pools %ld pages are saved, %ld before", now,
			    saved_before);
	return true;
}

static void run_case(const struct race_case *c)
{
	long long was[ARRAY_SIZE(counters)];
	pid_t parent = getpid(), pid;
	__u64 tainted = taint();
	char stats[1024];
	unsigned int i;
	int status;

	memset(sh, 0, sizeof(*sh));
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		was[i] = cont_vmstat(counters[i]);
	cont_write_str(SYSCTL, "1");
	pid = cont_fork();
	if (!pid) {
		cont_die_with(parent);
		signal(SIGTERM, SIG_DFL);
		signal(SIGINT, SIG_DFL);
		signal(SIGHUP, SIG_DFL);
		cont_on_fault(on_fault);
		signal(SIGALRM, on_alarm);
		alarm(HANG_SECONDS + 4 * race.seconds);
		child_main(c);
	}
	if (pid < 0)
		ksft_exit_fail_msg("fork: %s\n", strerror(errno));
	child = pid;
	if (interrupted)
		kill(pid, SIGKILL);
	status = cont_wait(pid);
	if (status < 0)
		ksft_exit_fail_msg("waitpid: %s\n", strerror(errno));
	child = 0;

	set_window("0");
	if (sh->skip) {
		empty_pools();
		ksft_test_result_skip("%s: %s\n", c->name, sh->why);
		return;
	}
	stop_module(c, stats, sizeof(stats));
	tell(c, was, stats);
	all_back();
	if (taint() & ~tainted)
		fail("the kernel complains, see its log");
	if (status)
		fail("status %#x", status);
	if (interrupted)
		exit(KSFT_FAIL);
	if (sh->why[0])
		ksft_print_msg("%s\n", sh->why);
	ksft_test_result(!sh->why[0], "%s\n", c->name);
}

/* The last one.  What was in the pools before may have been optimized or not. */
static void check_restored(long saved_first)
{
	bool was_empty = true;
	unsigned int i;
	char buf[16];
	long now;

	memset(sh, 0, sizeof(*sh));
	restore();
	if (!cont_read_str(SYSCTL, buf, sizeof(buf)) || strcmp(buf, was_sysctl))
		fail(SYSCTL " is %s, not %s", buf, was_sysctl);
	if (was_window[0] && (!cont_read_str(WINDOW, buf, sizeof(buf)) ||
			      strcmp(buf, was_window)))
		fail(WINDOW " is %s, not %s", buf, was_window);
	for (i = 0; i < nr_sizes; i++) {
		was_empty &= !sizes[i].was_nr;
		if (pool_read(&sizes[i], "nr_hugepages") != sizes[i].was_nr ||
		    pool_read(&sizes[i], "nr_overcommit_hugepages") != sizes[i].was_over)
			fail("the pool of %llu kB has %llu pages, not %llu",
			     sizes[i].bytes >> 10,
			     pool_read(&sizes[i], "nr_hugepages"), sizes[i].was_nr);
	}
	now = saved();
	if (was_empty && now != saved_first)
		fail("%ld pages are saved, %ld before", now, saved_first);
	if (sh->why[0])
		ksft_print_msg("%s\n", sh->why);
	ksft_test_result(!sh->why[0], "everything is as it was before\n");
}

static const struct race_case cases[] = {
	{ .name = "all who can look at struct pages",
	  .roles = { HOLD, KCORE, FLAGS, CHURN, HOLD } },
	{ .name = "two sizes in parallel, and demotion", .two = true,
	  .roles = { HOLD, KCORE, FLAGS, CHURN, HOLD } },
	{ .name = "interrupts off, page_table_lock, timers, NMIs", .module = true,
	  .contexts = "irqoff ptl nofault hrtimer",
	  .roles = { HOLD, CHURN } },
	{ .name = "speculative references", .contexts = "ref",
	  .roles = { REFS, HOLD, CHURN, REFS } },
	{ .name = "window held open", .window = true, .on = true,
	  .contexts = "irqoff ptl nofault hrtimer",
	  .roles = { KCORE, FLAGS, HOLD, CHURN } },
	{ .name = "nothing to mend after quiescing", .quiesce = true, .on = true,
	  .roles = { HOLD, KCORE, FLAGS, CHURN } },
};

#define NR_CASES	ARRAY_SIZE(cases)

/* Until it has ended, there is no putting back of what it uses. */
static void on_signal(int sig)
{
	interrupted = sig;
	if (child > 0)
		kill(child, SIGKILL);
}

static bool pools_in_use(void)
{
	unsigned int i;

	for (i = 0; i < nr_sizes; i++)
		if (sizes[i].was_nr != pool_read(&sizes[i], "free_hugepages") ||
		    pool_read(&sizes[i], "resv_hugepages"))
			return true;
	return false;
}

int main(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = on_signal };
	long saved_first;
	unsigned int i;
	int fd;

	race_options(&race, argc, argv, DEFAULT_SECONDS, DEFAULT_THREADS);
	page = cont_page_size();
	if (geteuid())
		ksft_exit_skip("needs root\n");
	if (!cont_read_str(SYSCTL, was_sysctl, sizeof(was_sysctl)))
		ksft_exit_skip("no vm.hugetlb_optimize_vmemmap in this kernel\n");
	sh = race_shared(sizeof(*sh));
	fd = open_kcore();
	if (fd < 0 || !parse_kcore(fd)) {
		ksft_print_msg("no struct pages in /proc/kcore: pages saved are not counted\n");
		nr_segs = 0;
		sp_size = 64;
	}
	close(fd);
	if (!access("/sys/kernel/debug/kernel_page_tables", R_OK))
		ptdump = "/sys/kernel/debug/kernel_page_tables";
	else if (!access("/sys/kernel/debug/page_tables/kernel", R_OK))
		ptdump = "/sys/kernel/debug/page_tables/kernel";
	if (!flags_may_race())
		ksft_print_msg("CONFIG_DEBUG_VM: kpageflags are read of pages in use only\n");
	find_sizes();
	if (!nr_sizes)
		ksft_exit_skip("no huge pages that can be optimized, or no memory for them\n");
	if (pools_in_use())
		ksft_exit_skip("huge pages are in use\n");
	cont_read_str(WINDOW, was_window, sizeof(was_window));
	cont_read_str(PERF_RATE, was_rate, sizeof(was_rate));

	/* From here on there is something to be put back. */
	saved_first = saved();
	set_up = true;
	atexit(restore);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	set_window("0");
	/* Of a run that was killed */
	cont_write_str(MODULE "/stop", "1");
	if (!empty_pools())
		ksft_exit_fail_msg("%s\n", sh->why);
	saved_before = saved();
	if (saved_before == -2)
		ksft_exit_fail_msg("%s\n", sh->why);
	for (i = 0; i < nr_sizes; i++)
		ksft_print_msg("up to %llu pages of %llu kB, %ld pages saved for each\n",
			       sizes[i].max, sizes[i].bytes >> 10, saves(&sizes[i]));

	ksft_set_plan(NR_CASES + 1);
	for (i = 0; i < NR_CASES; i++)
		run_case(&cases[i]);
	check_restored(saved_first);

	ksft_print_cnts();
	return ksft_get_fail_cnt() ? KSFT_FAIL : KSFT_PASS;
}
