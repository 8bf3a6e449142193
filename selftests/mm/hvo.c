// SPDX-License-Identifier: GPL-2.0-only
/*
 * The vmemmap of huge pages that is given back, and comes again.
 *
 * Claim: with vm.hugetlb_optimize_vmemmap on, every huge page whose struct pages
 * fill more than one page keeps one of these pages and gives back the others, no
 * more and no less, whichever way it came into its pool and whichever way it
 * leaves it, also when memory is short.  To users of huge pages, and to whoever
 * looks at their struct pages, nothing changes.  The cost in TLB maintenance is
 * a few flushes for a pool, not some for each page.
 *
 * Oracle: what has to be saved follows from the sizes of pages and of struct page
 * alone.  What is saved is read from the kernel's page tables (the read-only pages
 * of the vmemmap in ptdump have to be those of the huge pages that kpageflags
 * shows, range by range) and, through /proc/kcore, from the struct pages
 * themselves (those of an optimized huge page repeat its first ones).  Either will
 * do, both have to agree.  Free memory tells leaks.  kpageflags and kpagecount of
 * each page are compared with those of a huge page that was not optimized.
 *
 * Breaks on: a tail left writable or mapped to a wrong page, an entry left broken,
 * pages not given back or given back twice, huge pages lost or half optimized when
 * an allocation fails, flushes for each page, tails that look like heads.
 *
 * Each case starts and ends with all pools empty; what was in them before is put
 * back at the end.  Options:
 *   -n  huge pages of the cases that take many, 16 to 65536 (400)
 *   -s  seed of the patterns (CONTPTE_SEED, or the clock)
 */
#include "contpte_util.h"
#include <dirent.h>
#include <getopt.h>
#include <signal.h>
#include <linux/elf.h>
#include <linux/udmabuf.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "../kselftest.h"

#define SYSCTL		"/proc/sys/vm/hugetlb_optimize_vmemmap"
#define POOLS		"/sys/kernel/mm/hugepages"
#define FAIL_DIR	"/sys/kernel/debug/fail_page_alloc"
#define PROBE		"/sys/kernel/debug/hugetlb_vmemmap_test/probe"
#define MEMORY		"/sys/devices/system/memory"

#define STRUCT_PAGE	64
#define MAX_SIZES	8
#define UDMABUF_MAX	(16UL << 20)
#define WHY_LEN		512
/* Huge pages of the cases that do not take many. */
#define SOME		16

#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT	26
#endif

/* kpageflags that say what a page is, and are worked out by the kernel. */
#define KPF_IS		(CONT_BIT(7) | CONT_BIT(10) | CONT_BIT(11) | CONT_BIT(12) |	\
			 CONT_BIT(15) | CONT_BIT(16) | CONT_BIT(17) | CONT_BIT(19) |	\
			 CONT_BIT(20) | CONT_BIT(21) | CONT_BIT(22) | CONT_BIT(23) |	\
			 CONT_BIT(24) | CONT_BIT(26))
/*
 * Flags as they are in struct page: error, dirty, uptodate, active, reserved,
 * private, private_2, owner_private.
 */
#define KPF_RAW		(CONT_BIT(1) | CONT_BIT(3) | CONT_BIT(4) | CONT_BIT(6) |	\
			 CONT_BIT(32) | CONT_BIT(36) | CONT_BIT(37) | CONT_BIT(38))

struct hsize {
	size_t size;
	unsigned long kb;
	__u64 pages;		/* base pages of one huge page */
	__u64 saves;		/* pages that one huge page has to give back */
	char was_nr[24];
	char was_overcommit[24];
	char was_demote[24];	/* empty: cannot be demoted */
};

struct folio {
	__u64 pfn;
	struct hsize *h;
	bool opt;
};

struct range {
	__u64 start;
	__u64 end;
};

/* What look() saw. */
struct view {
	struct folio *f;	/* of all sizes that can be optimized, by pfn */
	size_t nr, max;
	struct range *ro;	/* read-only parts of the vmemmap */
	size_t nr_ro, max_ro;
	__u64 ro_pages;
	__u64 blocks;		/* of vmemmap that a PMD maps */
	__u64 broken;		/* entries left invalid */
};

static struct hsize sizes[MAX_SIZES];
static unsigned int nr_sizes;
static size_t page_size;
static __u64 seed;
static unsigned long many = 400;

static const char *ptdump;	/* NULL: kernel has none */
static bool has_kcore;
static __u64 vmemmap;		/* address of struct page 0; 0: not known */
static struct range vmemmap_range;
static __u64 base_ro;		/* read-only pages that no huge page explains */
static __u64 tainted;
static char was_sysctl[24];

static char *why;		/* of the last FAIL or SKIP, shared with children */
static pid_t main_pid;
static char *mapped;		/* by map_huge() */
static size_t mapped_len;
static char offlined[96];	/* memory block to bring back */

/* In place of a function, for the sake of the compiler's check of the format. */
#define FAIL(...)	(snprintf(why, WHY_LEN, __VA_ARGS__), KSFT_FAIL)
#define SKIP(...)	(snprintf(why, WHY_LEN, __VA_ARGS__), KSFT_SKIP)

/* ---- knobs ------------------------------------------------------------ */

static const char *knob(const struct hsize *h, const char *name)
{
	static char path[128];

	snprintf(path, sizeof(path), POOLS "/hugepages-%lukB/%s", h->kb, name);
	return path;
}

static __u64 pool(const struct hsize *h, const char *name)
{
	char buf[24];

	if (!cont_read_str(knob(h, name), buf, sizeof(buf)))
		return ~0ULL;
	return strtoull(buf, NULL, 10);
}

static bool pool_write(const struct hsize *h, const char *name, __u64 val)
{
	char buf[24];

	snprintf(buf, sizeof(buf), "%llu", val);
	return cont_write_str(knob(h, name), buf);
}

/* Returns how many there are then. */
static __u64 pool_set(const struct hsize *h, __u64 nr)
{
	pool_write(h, "nr_hugepages", nr);
	return pool(h, "nr_hugepages");
}

static __u64 pool_empty(const struct hsize *h)
{
	/* Free surplus pages only go when they are made ordinary ones first. */
	if (pool(h, "surplus_hugepages"))
		pool_set(h, pool(h, "nr_hugepages"));
	return pool_set(h, 0);
}

static bool optimize(bool on)
{
	return cont_write_str(SYSCTL, on ? "1" : "0");
}

/* A line of /proc/meminfo in bytes. */
static __u64 mem_bytes(const char *name)
{
	size_t len = strlen(name);
	char line[128];
	__u64 ret = 0;
	FILE *f;

	f = fopen("/proc/meminfo", "re");
	if (!f)
		return 0;
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, name, len) && line[len] == ':')
			ret = strtoull(line + len + 1, NULL, 10) * 1024;
	fclose(f);
	return ret;
}

/* Free pages, with those that CPUs have set aside. */
static __s64 free_pages(void)
{
	__u64 sum = 0, nr;
	char line[256];
	FILE *f;

	/* Reading it brings the counters up to date. */
	cont_read_str("/proc/sys/vm/stat_refresh", line, sizeof(line));
	f = fopen("/proc/zoneinfo", "re");
	if (!f)
		return 0;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, " pages free %llu", &nr) == 1 ||
		    sscanf(line, " count: %llu", &nr) == 1)
			sum += nr;
	fclose(f);
	return sum;
}

/* How many of up to nr huge pages there should be room for. */
static __u64 room_for(const struct hsize *h, __u64 nr)
{
	__u64 room = mem_bytes("MemFree");
	__u64 fit = room / 2 / h->size;

	if (!fit && room / 8 * 7 >= h->size)
		fit = 1;
	return fit < nr ? fit : nr;
}

/* Returns how many there are then, none if there is no room or no luck. */
static __u64 pool_grow(const struct hsize *h, __u64 nr)
{
	__u64 got;

	nr = room_for(h, nr);
	if (!nr)
		return 0;
	got = pool_set(h, nr);
	if (got < nr) {
		cont_make_room();
		got = pool_set(h, nr);
	}
	return got == ~0ULL ? 0 : got;
}

#define NO_PAGES	"no memory for huge pages of this size"
#define NO_SAVING	"struct pages of this size fit into a page"

/* ---- failing allocations ---------------------------------------------- */

static struct fail_knob {
	const char *name;
	const char *val;
	char was[24];
} fail_knobs[] = {
	/* This one goes last, and is put back first. */
	{ .name = "probability", .val = "100" },
	{ .name = "interval", .val = "1" },
	{ .name = "times", .val = "1000000000" },
	{ .name = "space", .val = "0" },
	{ .name = "verbose", .val = "0" },
	{ .name = "task-filter", .val = "Y" },
	{ .name = "ignore-gfp-wait", .val = "N" },
	/* Spares huge pages themselves, so that what fails is what they take. */
	{ .name = "ignore-gfp-highmem", .val = "Y" },
	{ .name = "min-order", .val = "0" },
};

#define NR_FAIL_KNOBS	ARRAY_SIZE(fail_knobs)

static bool fail_ready;

static bool fail_write(const char *name, const char *val)
{
	char path[128];

	snprintf(path, sizeof(path), FAIL_DIR "/%s", name);
	return cont_write_str(path, val);
}

static bool fail_setup(void)
{
	struct fail_knob *k;
	char path[128];
	int i;

	for (i = 0; i < (int)NR_FAIL_KNOBS; i++) {
		k = &fail_knobs[i];
		snprintf(path, sizeof(path), FAIL_DIR "/%s", k->name);
		if (!cont_read_str(path, k->was, sizeof(k->was)))
			return false;
	}
	if (access("/proc/self/make-it-fail", W_OK))
		return false;
	fail_ready = true;
	for (i = NR_FAIL_KNOBS - 1; i >= 0; i--)
		if (!fail_write(fail_knobs[i].name, fail_knobs[i].val))
			return false;
	return true;
}

static void fail_restore(void)
{
	unsigned int i;

	if (!fail_ready)
		return;
	cont_write_str("/proc/self/make-it-fail", "0");
	for (i = 0; i < NR_FAIL_KNOBS; i++)
		fail_write(fail_knobs[i].name, fail_knobs[i].was);
	fail_ready = false;
}

/*
 * Set the pool's size while each page allocation of this thread fails, but for the
 * first ones: as many as have less than space pages together.  *fails becomes
 * the number of failures.
 */
static bool pool_set_failing(const struct hsize *h, __u64 nr, __u64 space, __u64 *fails)
{
	int fd, arm, tries = 0;
	char buf[24], num[24];
	__u64 times = 1000000000;
	ssize_t n = -1;

	*fails = 0;
	snprintf(num, sizeof(num), "%llu", times);
	if (!fail_write("times", num))
		return false;
	snprintf(num, sizeof(num), "%llu", space);
	if (!fail_write("space", num))
		return false;
	snprintf(buf, sizeof(buf), "%llu", nr);
	fd = open(knob(h, "nr_hugepages"), O_WRONLY | O_CLOEXEC);
	arm = open("/proc/self/make-it-fail", O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && arm >= 0 && pwrite(arm, "1", 1, 0) == 1) {
		/* The failure may hit this call itself, before it does anything. */
		do {
			n = pwrite(fd, buf, strlen(buf), 0);
		} while (n < 0 && errno == ENOMEM && ++tries < 8);
		if (pwrite(arm, "0", 1, 0) != 1)
			n = -1;
	}
	if (fd >= 0)
		close(fd);
	if (arm >= 0)
		close(arm);
	if (cont_read_str(FAIL_DIR "/times", num, sizeof(num)))
		*fails = times - strtoull(num, NULL, 10);
	return n == (ssize_t)strlen(buf);
}

/* ---- what the kernel did ---------------------------------------------- */

static bool add_ro(struct view *v, __u64 start, __u64 end)
{
	if (v->nr_ro && v->ro[v->nr_ro - 1].end == start) {
		v->ro[v->nr_ro - 1].end = end;
	} else {
		if (v->nr_ro == v->max_ro) {
			size_t max = v->max_ro * 2 + 64;
			struct range *ro = realloc(v->ro, max * sizeof(*ro));

			if (!ro)
				return false;
			v->ro = ro;
			v->max_ro = max;
		}
		v->ro[v->nr_ro++] = (struct range){ .start = start, .end = end };
	}
	v->ro_pages += (end - start) / page_size;
	return true;
}

/*
 * ptdump has a line for each range of equal entries.  Some titles may come late on
 * arm64, where several areas end between two entries: the vmemmap's addresses from
 * kcore are better.  Without these, what follows the fixmap is the vmemmap, as
 * nothing read-only is in between.
 */
static bool look_ptdump(struct view *v)
{
	size_t size = 0, pmd = page_size / 8 * page_size;
	char *line = NULL, *tok, *save;
	bool in = false, ok = true;
	__u64 start, end;
	FILE *f;
	int at;

	f = fopen(ptdump, "re");
	if (!f)
		return false;
	while (ok && getline(&line, &size, f) > 0) {
		bool ro = false, pte = false, block = false, broken = false;

		if (!strncmp(line, "---[ ", 5)) {
			if (strstr(line, "vmemmap start") || strstr(line, "Vmemmap") ||
			    strstr(line, "Fixmap end"))
				in = true;
			else if (!strstr(line, "PCI I/O"))
				in = false;
			continue;
		}
		if (sscanf(line, "0x%llx-0x%llx%n", &start, &end, &at) != 2)
			continue;
		if (vmemmap_range.end)
			in = end > vmemmap_range.start && start < vmemmap_range.end;
		if (!in)
			continue;
		for (tok = strtok_r(line + at, "\n ", &save); tok;
		     tok = strtok_r(NULL, "\n ", &save)) {
			ro |= !strcmp(tok, "ro");
			pte |= !strcmp(tok, "PTE") || !strcmp(tok, "pte");
			block |= !strcmp(tok, "BLK") || !strcmp(tok, "PSE");
			broken |= !strcmp(tok, "F");
		}
		if (broken)
			v->broken += (end - start) / page_size;
		else if (block)
			v->blocks += (end - start) / pmd;
		else if (ro && pte)
			ok = add_ro(v, start, end);
	}
	free(line);
	fclose(f);
	return ok;
}

static struct kcore_seg {
	__u64 vaddr;
	__u64 size;
	__u64 off;
} *kcore_seg;
static unsigned int nr_kcore_seg;

/*
 * The segments of kcore, and from them where the vmemmap is: each one of RAM is
 * followed by that of its struct pages.  They move when memory goes offline.
 */
static bool kcore_headers(int fd)
{
	__u64 lo = ~0ULL, hi = 0, base = 0, want;
	struct elf64_phdr *ph;
	struct elf64_hdr eh;
	size_t len;
	int i;

	if (pread(fd, &eh, sizeof(eh), 0) != sizeof(eh) ||
	    eh.e_phentsize != sizeof(*ph))
		return false;
	len = eh.e_phnum * sizeof(*ph);
	ph = malloc(len);
	free(kcore_seg);
	kcore_seg = calloc(eh.e_phnum, sizeof(*kcore_seg));
	nr_kcore_seg = 0;
	if (!ph || !kcore_seg || pread(fd, ph, len, eh.e_phoff) != (ssize_t)len) {
		free(ph);
		return false;
	}
	for (i = 0; i + 1 < eh.e_phnum; i++) {
		if (ph[i].p_type != PT_LOAD || ph[i].p_paddr == ~0ULL ||
		    ph[i + 1].p_paddr != ~0ULL)
			continue;
		want = ph[i].p_memsz / page_size * STRUCT_PAGE;
		if (ph[i + 1].p_memsz + 2 * page_size < want ||
		    ph[i + 1].p_memsz > want + 2 * page_size)
			continue;
		kcore_seg[nr_kcore_seg++] = (struct kcore_seg) {
			.vaddr = ph[i + 1].p_vaddr,
			.size = ph[i + 1].p_memsz,
			.off = ph[i + 1].p_offset,
		};
		/* The first struct page may lie within the first page of them. */
		if (!(ph[i].p_paddr / page_size * STRUCT_PAGE % page_size))
			base = ph[i + 1].p_vaddr -
			       ph[i].p_paddr / page_size * STRUCT_PAGE;
		if (ph[i + 1].p_vaddr < lo)
			lo = ph[i + 1].p_vaddr;
		if (ph[i + 1].p_vaddr + ph[i + 1].p_memsz > hi)
			hi = ph[i + 1].p_vaddr + ph[i + 1].p_memsz;
	}
	free(ph);
	if (!base)
		return false;
	vmemmap = base;
	/* Where memory is offline there is vmemmap as well. */
	if (!vmemmap_range.end || lo < vmemmap_range.start)
		vmemmap_range.start = lo;
	if (hi > vmemmap_range.end)
		vmemmap_range.end = hi;
	return true;
}

static bool kcore_read(int fd, __u64 addr, void *buf, size_t len)
{
	unsigned int i;

	for (i = 0; i < nr_kcore_seg; i++) {
		struct kcore_seg *s = &kcore_seg[i];

		if (addr >= s->vaddr && addr + len <= s->vaddr + s->size)
			return pread(fd, buf, len, s->off + (addr - s->vaddr)) ==
			       (ssize_t)len;
	}
	return false;
}

/*
 * Whether the struct pages of a huge page repeat themselves page by page.  Those
 * of another one must all be there: first the head, then tails that all point to
 * the same place.
 */
static int kcore_folio(int fd, struct folio *f, bool *opt)
{
	size_t len = f->h->pages * STRUCT_PAGE, at;
	unsigned int nr = f->h->saves + 1, same = 0, i, tries;
	static size_t max;
	static char *buf;
	__u64 word;

	if (len > max) {
		free(buf);
		buf = malloc(len);
		max = buf ? len : 0;
		if (!buf)
			return SKIP("no memory for %zu bytes", len);
	}
	/* Others may take and drop references of the head while it is read. */
	for (tries = 0; tries < 3; tries++) {
		if (!kcore_read(fd, vmemmap + f->pfn * STRUCT_PAGE, buf, len))
			return FAIL("kcore: cannot read the struct pages of pfn %#llx",
				    f->pfn);
		for (same = 0, i = 1; i < nr; i++)
			same += !memcmp(buf, buf + i * page_size, page_size);
		if (!same || same == nr - 1)
			break;
	}
	if (same && same != nr - 1)
		return FAIL("pfn %#llx: %u of %u pages of struct pages are the first one",
			    f->pfn, same, nr - 1);
	*opt = same;
	memcpy(&word, buf + STRUCT_PAGE + sizeof(word), sizeof(word));
	for (at = STRUCT_PAGE; !same && at < len; at += STRUCT_PAGE)
		if (!(word & 1) || memcmp(buf + at + sizeof(word), &word, sizeof(word)))
			return FAIL("pfn %#llx: struct page %zu is not a tail as the others",
				    f->pfn, at / STRUCT_PAGE);
	return KSFT_PASS;
}

static bool kpf_one(int fd, __u64 pfn, __u64 *flags)
{
	return pread(fd, flags, sizeof(*flags), pfn * sizeof(*flags)) == sizeof(*flags);
}

/* All huge pages of sizes that can be optimized, from kpageflags. */
static bool look_folios(struct view *v)
{
	__u64 pfn = 0, step = 0, flags;
	unsigned int i;
	int fd;

	for (i = 0; i < nr_sizes && !step; i++)
		if (sizes[i].saves)
			step = sizes[i].pages;
	fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	while (step && kpf_one(fd, pfn, &flags)) {
		struct hsize *h = &sizes[0];

		if ((flags & (CONT_KPF_HUGETLB | CONT_KPF_HEAD)) !=
		    (CONT_KPF_HUGETLB | CONT_KPF_HEAD)) {
			pfn += step;
			continue;
		}
		/* Is there a tail where one of this size would have ended? */
		for (i = 1; i < nr_sizes; i++) {
			if (pfn % sizes[i].pages ||
			    !kpf_one(fd, pfn + h->pages, &flags) ||
			    !(flags & CONT_KPF_HUGETLB) || !(flags & CONT_KPF_TAIL))
				break;
			h = &sizes[i];
		}
		if (!h->saves) {
			pfn += step;
			continue;
		}
		if (v->nr == v->max) {
			size_t max = v->max * 2 + 64;
			struct folio *f = realloc(v->f, max * sizeof(*f));

			if (!f) {
				close(fd);
				return false;
			}
			v->f = f;
			v->max = max;
		}
		v->f[v->nr++] = (struct folio){ .pfn = pfn, .h = h };
		pfn += h->pages;
	}
	close(fd);
	return true;
}

static int ro_state(struct view *v, struct folio *f, bool *opt)
{
	__u64 start = vmemmap + f->pfn * STRUCT_PAGE + page_size;
	__u64 end = vmemmap + (f->pfn + f->h->pages) * STRUCT_PAGE;
	size_t i;

	*opt = false;
	for (i = 0; i < v->nr_ro; i++) {
		if (v->ro[i].end <= start - page_size || v->ro[i].start >= end)
			continue;
		if (v->ro[i].start != start || v->ro[i].end != end)
			return FAIL("pfn %#llx, %lukB: read-only is %#llx-%#llx, not %#llx-%#llx",
				    f->pfn, f->h->kb, v->ro[i].start, v->ro[i].end,
				    start, end);
		*opt = true;
	}
	return KSFT_PASS;
}

/*
 * See what there is.  All that must hold at any time is checked here: huge pages
 * are optimized or they are not, and nothing else is read-only or broken.
 */
static int look(struct view *v)
{
	__u64 ro = base_ro;
	bool by_ro, by_kcore;
	int fd = -1, ret = KSFT_PASS;
	size_t i;

	v->nr = 0;
	v->nr_ro = 0;
	v->ro_pages = 0;
	v->blocks = 0;
	v->broken = 0;
	if (has_kcore) {
		fd = open("/proc/kcore", O_RDONLY | O_CLOEXEC);
		if (fd < 0 || !kcore_headers(fd))
			ret = FAIL("kcore does not show the vmemmap");
	}
	if (!ret && (!look_folios(v) || (ptdump && !look_ptdump(v))))
		ret = FAIL("cannot read kpageflags or ptdump");
	/* Without kcore, the first of as many ranges as huge pages tells the place. */
	if (!vmemmap && v->nr && v->nr_ro == v->nr)
		vmemmap = v->ro[0].start - page_size - v->f[0].pfn * STRUCT_PAGE;

	for (i = 0; i < v->nr && !ret; i++) {
		struct folio *f = &v->f[i];

		by_ro = false;
		by_kcore = false;
		if (has_kcore)
			ret = kcore_folio(fd, f, &by_kcore);
		if (!ret && ptdump && vmemmap)
			ret = ro_state(v, f, &by_ro);
		f->opt = by_ro || by_kcore;
		if (!ret && has_kcore && ptdump && by_ro != by_kcore)
			ret = FAIL("pfn %#llx, %lukB: tails are %s but %s the head page",
				   f->pfn, f->h->kb, by_ro ? "read-only" : "writable",
				   by_kcore ? "repeat" : "do not repeat");
		if (f->opt)
			ro += f->h->saves;
	}
	if (fd >= 0)
		close(fd);
	if (ret)
		return ret;
	if (v->broken)
		return FAIL("%llu pages of the vmemmap have broken entries", v->broken);
	if (ptdump && v->ro_pages != ro)
		return FAIL("%llu pages of the vmemmap are read-only, of huge pages %llu",
			    v->ro_pages, ro);
	return KSFT_PASS;
}

static struct view view;

static __u64 nr_opt(const struct hsize *h, __u64 *all)
{
	__u64 opt = 0;
	size_t i;

	*all = 0;
	for (i = 0; i < view.nr; i++) {
		if (view.f[i].h != h)
			continue;
		*all += 1;
		opt += view.f[i].opt;
	}
	return opt;
}

/* There are nr huge pages, and opt of them are optimized. */
static int expect(const char *when, const struct hsize *h, __u64 nr, __u64 opt)
{
	__u64 have, all, has_opt;
	int ret;

	have = pool(h, "nr_hugepages");
	if (have != nr)
		return FAIL("%s: %llu huge pages of %lukB, not %llu", when, have, h->kb,
			    nr);
	ret = look(&view);
	if (ret || !h->saves)
		return ret;
	has_opt = nr_opt(h, &all);
	if (all != nr)
		return FAIL("%s: %llu huge pages of %lukB in kpageflags, not %llu", when,
			    all, h->kb, nr);
	if (has_opt != opt)
		return FAIL("%s: %llu of %llu huge pages of %lukB optimized, not %llu",
			    when, has_opt, nr, h->kb, opt);
	return KSFT_PASS;
}

/* ---- putting things back ---------------------------------------------- */

static void unmap(void)
{
	if (mapped)
		munmap(mapped, mapped_len);
	mapped = NULL;
}

static void bring_online(void)
{
	if (offlined[0])
		cont_write_str(offlined, "online");
	offlined[0] = '\0';
}

/* All that a case may have left behind. */
static void reset(void)
{
	struct hsize *h;
	unsigned int i;

	fail_restore();
	bring_online();
	unmap();
	for (i = 0; i < nr_sizes; i++) {
		h = &sizes[i];
		/* Gigantic pages have none, and refuse. */
		if (pool(h, "nr_overcommit_hugepages"))
			pool_write(h, "nr_overcommit_hugepages", 0);
		if (h->was_demote[0])
			cont_write_str(knob(h, "demote_size"), h->was_demote);
		pool_empty(h);
	}
	optimize(false);
}

static bool changed;

static void restore(void)
{
	struct hsize *h;
	int i;

	if (getpid() != main_pid || !changed)
		return;
	changed = false;
	reset();
	cont_write_str(SYSCTL, was_sysctl);
	/* The largest ones are the hardest to get. */
	for (i = nr_sizes - 1; i >= 0; i--) {
		h = &sizes[i];
		if (strtoull(h->was_overcommit, NULL, 10))
			cont_write_str(knob(h, "nr_overcommit_hugepages"),
				       h->was_overcommit);
		if (strtoull(h->was_nr, NULL, 10))
			cont_write_str(knob(h, "nr_hugepages"), h->was_nr);
	}
}

static void on_signal(int sig, siginfo_t *info, void *uc)
{
	char buf[96];
	int len;

	(void)uc;
	if (getpid() != main_pid)
		_exit(KSFT_FAIL);
	len = snprintf(buf, sizeof(buf), "Bail out! signal %d, address %p\n", sig,
		       info->si_addr);
	if (write(STDOUT_FILENO, buf, len) != len)
		_exit(KSFT_FAIL);
	restore();
	_exit(KSFT_FAIL);
}

static void on_alarm(int sig)
{
	(void)sig;
}

/* ---- users of huge pages ---------------------------------------------- */

static char *map_huge(const struct hsize *h, __u64 nr, int flags)
{
	unsigned int order = __builtin_ctzll(h->size);
	char *p;

	p = mmap(NULL, nr * h->size, PROT_READ | PROT_WRITE,
		 flags | MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
		 (int)(order << MAP_HUGE_SHIFT), -1, 0);
	if (p == MAP_FAILED)
		return NULL;
	mapped = p;
	mapped_len = nr * h->size;
	return p;
}

/* Much memory is sampled. */
static __u64 stride(const struct hsize *h, __u64 nr)
{
	return nr * h->size > (64UL << 20) ? 61 : 1;
}

static void fill_huge(const struct hsize *h, char *p, __u64 nr, __u64 gen)
{
	__u64 i;

	for (i = 0; i < nr * h->pages; i += stride(h, nr))
		cont_page_fill(p + i * page_size, seed, i, gen);
}

static bool huge_ok(const struct hsize *h, char *p, __u64 nr, __u64 gen)
{
	__u64 i;

	for (i = 0; i < nr * h->pages; i += stride(h, nr))
		if (!cont_page_ok(p + i * page_size, seed, i, gen))
			return false;
	return true;
}

/* The pfn of a mapped huge page; 0 if what is there is not one. */
static __u64 huge_pfn(const struct hsize *h, const char *p)
{
	__u64 *ent = malloc(h->pages * sizeof(*ent));
	__u64 pfn = 0, i;

	if (ent && cont_pagemap(p, h->pages, ent)) {
		pfn = CONT_PM_PFN(ent[0]);
		if (pfn % h->pages)
			pfn = 0;
		for (i = 0; i < h->pages; i++)
			if (!(ent[i] & CONT_PM_PRESENT) || CONT_PM_PFN(ent[i]) != pfn + i)
				pfn = 0;
	}
	free(ent);
	return pfn;
}

static bool read_words(const char *path, __u64 pfn, __u64 nr, __u64 *buf)
{
	size_t len = nr * sizeof(*buf), at = 0;
	ssize_t n = 1;
	int fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	for (; at < len && n > 0; at += n > 0 ? n : 0)
		n = pread(fd, (char *)buf + at, len - at, pfn * sizeof(*buf) + at);
	close(fd);
	return at == len;
}

/* One head, and tails, as anybody sees them. */
static bool is_huge(const struct hsize *h, __u64 pfn)
{
	const __u64 mask = CONT_KPF_HUGETLB | CONT_KPF_HEAD | CONT_KPF_TAIL;
	__u64 *flags = malloc(h->pages * sizeof(*flags));
	bool ok;
	__u64 i;

	ok = flags && read_words("/proc/kpageflags", pfn, h->pages, flags);
	for (i = 0; ok && i < h->pages; i++)
		ok = (flags[i] & mask) ==
		     (CONT_KPF_HUGETLB | (i ? CONT_KPF_TAIL : CONT_KPF_HEAD));
	free(flags);
	return ok;
}

/* Take nr huge pages from the pool, use them, and leave them mapped. */
static int use(const char *when, const struct hsize *h, __u64 nr, int flags)
{
	char *p = map_huge(h, nr, flags);
	__u64 i, pfn;

	if (!p)
		return FAIL("%s: mmap of %llu huge pages: %s", when, nr, strerror(errno));
	fill_huge(h, p, nr, 0);
	for (i = 0; i < nr; i++) {
		pfn = huge_pfn(h, p + i * h->size);
		if (!pfn || !is_huge(h, pfn))
			return FAIL("%s: what is mapped is no huge page (pfn %#llx)", when,
				    pfn);
	}
	if (!huge_ok(h, p, nr, 0))
		return FAIL("%s: what was written is not there", when);
	return KSFT_PASS;
}

/* Ordinary memory, which may be what was a huge page. */
static bool use_small(size_t len)
{
	bool ok = true;
	size_t i;
	char *p;

	if (!len)
		return true;
	if (len > (64UL << 20))
		len = 64UL << 20;
	p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return false;
	for (i = 0; i < len / page_size; i++)
		cont_page_fill(p + i * page_size, seed, i, 3);
	for (i = 0; ok && i < len / page_size; i++)
		ok = cont_page_ok(p + i * page_size, seed, i, 3);
	munmap(p, len);
	return ok;
}

struct job {
	struct hsize *h;
	__u64 nr;
	struct rec *rec;
	char *p;
	__u64 pfn;
};

/* Does fn in a child; its result is that of the child. */
static int in_child(int (*fn)(struct job *job), struct job *job)
{
	pid_t pid = cont_fork();
	int status;

	if (pid < 0)
		return FAIL("fork: %s", strerror(errno));
	if (!pid) {
		cont_die_with(main_pid);
		strcpy(why, "child got a signal");
		_exit(fn(job));
	}
	status = cont_wait(pid);
	if (status < 0)
		return FAIL("waitpid: %s", strerror(errno));
	if (WIFSIGNALED(status))
		return FAIL("child died of signal %d", WTERMSIG(status));
	return WEXITSTATUS(status);
}

/* ---- cases, each with one size ---------------------------------------- */

static int case_off(struct hsize *h)
{
	__u64 nr;
	int ret;

	optimize(false);
	nr = pool_grow(h, SOME);
	if (!nr)
		return SKIP(NO_PAGES);
	ret = expect("optimization off", h, nr, 0);
	return ret ?: use("optimization off", h, nr < 4 ? nr : 4, 0);
}

static int case_savings(struct hsize *h)
{
	__u64 nr, half;
	int ret;

	optimize(true);
	nr = pool_grow(h, SOME);
	if (!nr)
		return SKIP(NO_PAGES);
	/* For sizes that have nothing to save look() says that nothing is. */
	ret = expect("pool grown", h, nr, nr);
	if (ret)
		return ret;
	half = nr / 2;
	pool_set(h, half);
	ret = expect("half of the pool gone", h, half, half);
	if (ret)
		return ret;
	nr = pool_grow(h, nr);
	ret = expect("pool grown again", h, nr, nr);
	if (ret)
		return ret;
	pool_set(h, 0);
	ret = expect("pool gone", h, 0, 0);
	if (ret)
		return ret;
	if (!use_small(nr * h->size))
		return FAIL("memory that was huge pages lost what was written");
	return KSFT_PASS;
}

/* A whole lot of them, and their memory does come back. */
static int case_many(struct hsize *h)
{
	__s64 plain, opt, before = 0, lost, due;
	__u64 nr, got;
	int ret, i;

	if (!h->saves)
		return SKIP(NO_SAVING);
	optimize(false);
	nr = pool_grow(h, many);
	if (nr <= SOME)
		return SKIP("no memory for more than %llu huge pages", nr);
	plain = free_pages();
	pool_set(h, 0);
	due = nr * h->saves;

	optimize(true);
	for (i = 0; i < 3; i++) {
		got = pool_set(h, nr);
		if (got != nr)
			return SKIP("only %llu of %llu huge pages to be had again", got, nr);
		opt = free_pages();
		ret = expect("many", h, nr, nr);
		if (ret)
			return ret;
		if (!i)
			ksft_print_msg("%llu x %lukB: %lld vmemmap pages saved, %lld more free\n",
				       nr, h->kb, due, opt - plain);
		pool_set(h, 0);
		ret = expect("none", h, 0, 0);
		if (ret)
			return ret;
		if (!i)
			before = free_pages();
		/* Others take memory as well: be generous, or do not judge. */
		if (due >= 1024 && opt - plain < due / 2)
			return FAIL("%lld pages saved, but only %lld more are free", due,
				    opt - plain);
	}
	/* Two rounds of which nothing may be left. */
	lost = before - free_pages();
	if (due >= 1024 && lost > due)
		return FAIL("%lld pages lost in two rounds of %lld", lost, due);
	return KSFT_PASS;
}

struct cost {
	long long flush, brk, quiesce, retry;
};

static struct cost cost(void)
{
	return (struct cost) {
		.flush = cont_vmstat("hvo_flush"),
		.brk = cont_vmstat("hvo_break"),
		.quiesce = cont_vmstat("hvo_quiesce"),
	};
}

/*
 * Entries that were replaced since then, and what it took.  A PMD that is split
 * is an entry and takes a flush of its own.
 */
static int expect_cost(const char *when, struct hsize *h, struct cost was, __u64 nr,
		       __u64 splits)
{
	struct cost now = cost();
	__u64 flush = now.flush - was.flush;
	__u64 entries = now.brk - was.brk;
	__u64 quiesced = now.quiesce < 0 ? 0 : now.quiesce - was.quiesce;
	__u64 due = nr * h->saves + splits;
	/* Access-flag quiescing may take several rounds. */
	__u64 limit = nr / 10 + 2 + (quiesced ? nr / 10 + 16 : 0);

	ksft_print_msg("%llu x %lukB %s: %llu flushes, %llu broken, %llu quiesced, %llu splits\n",
		       nr, h->kb, when, flush, entries, quiesced, splits);
	if (entries + quiesced != due)
		return FAIL("%s: %llu entries replaced, not %llu", when, entries + quiesced,
			    due);
	/* With few huge pages the PMDs weigh more than the pages. */
	if (page_size != 4096 || nr < 100)
		limit += splits;
	if (flush > limit)
		return FAIL("%s: %llu flushes for %llu huge pages and %llu PMDs, limit %llu",
			    when, flush, nr, splits, limit);
	return KSFT_PASS;
}

static int case_flushes(struct hsize *h)
{
	struct cost was;
	__u64 nr, blocks;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	if (cost().flush < 0 || cost().brk < 0)
		return SKIP("no hvo_flush and hvo_break in vmstat");
	if (!ptdump)
		return SKIP("no ptdump to count PMDs that are split");
	nr = room_for(h, many);
	ret = look(&view);
	if (ret)
		return ret;
	blocks = view.blocks;
	optimize(true);
	was = cost();
	nr = nr ? pool_set(h, nr) : 0;
	if (!nr)
		return SKIP(NO_PAGES);
	ret = look(&view);
	if (ret)
		return ret;
	ret = expect_cost("grown", h, was, nr, blocks - view.blocks);
	if (ret)
		return ret;
	was = cost();
	pool_set(h, 0);
	return expect_cost("shrunk", h, was, nr, 0);
}

/* kpageflags and kpagecount of all pages of a huge page, in these states. */
enum state {
	IN_POOL,
	MAPPED,
	SHARED,		/* with a child */
	COPIED,		/* the child's own */
	ALONE,		/* when the child is gone */
	NR_STATES,
};

static const char * const state_names[] = {
	"in the pool", "mapped", "shared", "copied", "alone again",
};

struct rec {
	bool done[NR_STATES];
	__u64 words[];
};

static __u64 *rec_words(struct rec *rec, const struct hsize *h, enum state s, bool count)
{
	return rec->words + (2 * s + count) * h->pages;
}

static bool record(struct rec *rec, const struct hsize *h, enum state s, __u64 pfn)
{
	rec->done[s] = read_words("/proc/kpageflags", pfn, h->pages,
				  rec_words(rec, h, s, false)) &&
		       read_words("/proc/kpagecount", pfn, h->pages,
				  rec_words(rec, h, s, true));
	return rec->done[s];
}

static int child_copies(struct job *job)
{
	__u64 pfn;

	if (!huge_ok(job->h, job->p, 1, 1))
		return FAIL("child does not see what its parent wrote");
	if (huge_pfn(job->h, job->p) != job->pfn)
		return FAIL("child does not share the huge page");
	if (!record(job->rec, job->h, SHARED, job->pfn))
		return FAIL("cannot read kpageflags or kpagecount");
	if (job->nr < 2)
		return KSFT_PASS;
	fill_huge(job->h, job->p, 1, 2);
	pfn = huge_pfn(job->h, job->p);
	if (!pfn || pfn == job->pfn)
		return FAIL("child wrote, but has no copy");
	if (!huge_ok(job->h, job->p, 1, 2))
		return FAIL("child's copy lost what was written");
	if (!record(job->rec, job->h, COPIED, pfn))
		return FAIL("cannot read kpageflags or kpagecount");
	return KSFT_PASS;
}

static int use_and_record(struct hsize *h, bool on, struct rec *rec)
{
	struct job job = { .h = h, .rec = rec };
	const char *when = on ? "optimized" : "not optimized";
	size_t i;
	int ret;

	optimize(on);
	/* Any memory that was used before has to be cleared. */
	job.nr = pool_grow(h, 2);
	if (!job.nr)
		return SKIP(NO_PAGES);
	ret = expect(when, h, job.nr, on ? job.nr : 0);
	if (ret)
		return ret;
	for (i = 0; i < view.nr && view.f[i].h != h; i++)
		;
	if (i == view.nr || !record(rec, h, IN_POOL, view.f[i].pfn))
		return FAIL("%s: cannot read kpageflags or kpagecount", when);

	job.p = map_huge(h, 1, 0);
	if (!job.p)
		return FAIL("%s: mmap: %s", when, strerror(errno));
	for (i = 0; i < h->pages; i += h->pages / 16)
		if (!cont_page_zero(job.p + i * page_size))
			return FAIL("%s: new huge page is not zero", when);
	fill_huge(h, job.p, 1, 1);
	job.pfn = huge_pfn(h, job.p);
	if (!job.pfn || !is_huge(h, job.pfn))
		return FAIL("%s: what is mapped is no huge page", when);
	if (!record(rec, h, MAPPED, job.pfn))
		return FAIL("%s: cannot read kpageflags or kpagecount", when);
	ret = in_child(child_copies, &job);
	if (ret)
		return ret;
	if (!huge_ok(h, job.p, 1, 1))
		return FAIL("%s: parent lost what it wrote", when);
	fill_huge(h, job.p, 1, 3);
	if (!huge_ok(h, job.p, 1, 3))
		return FAIL("%s: parent lost what it wrote after the child was gone", when);
	if (!record(rec, h, ALONE, huge_pfn(h, job.p)))
		return FAIL("%s: cannot read kpageflags or kpagecount", when);
	ret = expect(when, h, job.nr, on ? job.nr : 0);
	if (ret)
		return ret;
	unmap();
	if (pool(h, "free_hugepages") != job.nr)
		return FAIL("%s: not all huge pages are free again", when);
	ret = expect(when, h, job.nr, on ? job.nr : 0);
	if (ret)
		return ret;
	pool_set(h, 0);
	return expect(when, h, 0, 0);
}

static int compare(struct hsize *h, struct rec *plain, struct rec *opt)
{
	__u64 per = page_size / STRUCT_PAGE, i;
	__u64 *f[2], *c[2];
	enum state s;

	for (s = 0; s < NR_STATES; s++) {
		if (!plain->done[s] || !opt->done[s])
			continue;
		f[0] = rec_words(plain, h, s, false);
		f[1] = rec_words(opt, h, s, false);
		c[0] = rec_words(plain, h, s, true);
		c[1] = rec_words(opt, h, s, true);
		for (i = 0; i < h->pages; i++) {
			if ((f[0][i] ^ f[1][i]) & KPF_IS)
				return FAIL("%s: kpageflags of page %llu: %#llx, was %#llx",
					    state_names[s], i, f[1][i], f[0][i]);
			if (c[0][i] != c[1][i])
				return FAIL("%s: kpagecount of page %llu: %llu, was %llu",
					    state_names[s], i, c[1][i], c[0][i]);
			/* It is the same memory. */
			if ((f[1][i] ^ f[1][i % per]) & KPF_RAW)
				return FAIL("%s: kpageflags of page %llu: %#llx, of %llu: %#llx",
					    state_names[s], i, f[1][i], i % per,
					    f[1][i % per]);
		}
	}
	return KSFT_PASS;
}

static int case_use(struct hsize *h)
{
	size_t len = sizeof(struct rec) + NR_STATES * 2 * h->pages * sizeof(__u64);
	struct rec *rec[2];
	int ret = KSFT_PASS, i;

	if (!h->saves)
		return SKIP(NO_SAVING);
	for (i = 0; i < 2; i++) {
		rec[i] = mmap(NULL, len, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (rec[i] == MAP_FAILED)
			ret = SKIP("no memory to record the state of pages");
	}
	for (i = 0; i < 2 && !ret; i++)
		ret = use_and_record(h, i, rec[i]);
	if (!ret)
		ret = compare(h, rec[0], rec[1]);
	for (i = 0; i < 2; i++)
		if (rec[i] != MAP_FAILED)
			munmap(rec[i], len);
	return ret;
}

static int child_uses(struct job *job)
{
	/* It exits with huge pages mapped. */
	return use("child", job->h, job->nr, MAP_NORESERVE);
}

/* Pages beyond the pool come with the fault, or with mmap, and go with the user. */
static int case_surplus(struct hsize *h)
{
	struct job job = { .h = h };
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	job.nr = room_for(h, 4);
	if (!job.nr)
		return SKIP(NO_PAGES);
	if (!pool_write(h, "nr_overcommit_hugepages", job.nr))
		return SKIP("no surplus pages of this size: %s", strerror(errno));
	optimize(true);

	/* Nobody promises that there are any. */
	if (!map_huge(h, job.nr, 0))
		return SKIP(NO_PAGES);
	ret = expect("reserved", h, job.nr, job.nr);
	if (ret)
		return ret;
	unmap();
	/* Resizing waits for the work queue that frees optimized pages. */
	pool_set(h, 0);
	ret = expect("reservation gone", h, 0, 0);
	if (ret)
		return ret;

	ret = use("surplus", h, job.nr, MAP_NORESERVE);
	if (ret)
		return ret;
	if (pool(h, "surplus_hugepages") != job.nr)
		return FAIL("%llu surplus pages, not %llu", pool(h, "surplus_hugepages"),
			    job.nr);
	ret = expect("surplus", h, job.nr, job.nr);
	if (ret)
		return ret;
	unmap();
	pool_set(h, 0);
	ret = expect("surplus unmapped", h, 0, 0);
	if (ret)
		return ret;

	ret = in_child(child_uses, &job);
	if (ret)
		return ret;
	pool_set(h, 0);
	ret = expect("child gone", h, 0, 0);
	if (ret)
		return ret;
	if (!use_small(job.nr * h->size))
		return FAIL("memory that was huge pages lost what was written");
	return KSFT_PASS;
}

static int demote_to(struct hsize *h, struct hsize *to, bool on)
{
	__u64 nr, parts = h->pages / to->pages;
	char buf[24], when[64];
	int ret;

	snprintf(when, sizeof(when), "to %lukB, optimization %s", to->kb,
		 on ? "on" : "off");
	snprintf(buf, sizeof(buf), "%lukB", to->kb);
	if (!cont_write_str(knob(h, "demote_size"), buf))
		return SKIP("%lukB: %s", to->kb, strerror(errno));
	optimize(true);
	nr = pool_grow(h, 2);
	if (!nr)
		return SKIP(NO_PAGES);
	ret = expect(when, h, nr, nr);
	if (ret)
		return ret;
	optimize(on);
	/* What it is made into is optimized or not as new pages would be. */
	if (!pool_write(h, "demote", 1))
		return FAIL("%s: %s", when, strerror(errno));
	ret = expect(when, h, nr - 1, nr - 1);
	if (ret)
		return ret;
	ret = expect(when, to, parts, on ? parts : 0);
	if (ret)
		return ret;
	ret = use(when, to, parts < 8 ? parts : 8, 0);
	if (ret)
		return ret;
	unmap();
	pool_set(to, parts / 2);
	ret = expect(when, to, parts / 2, on ? parts / 2 : 0);
	if (ret)
		return ret;
	pool_set(to, 0);
	ret = expect(when, to, 0, 0);
	if (ret)
		return ret;
	pool_set(h, 0);
	return expect(when, h, 0, 0);
}

static int case_demote(struct hsize *h)
{
	unsigned int i, done = 0;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	if (!h->was_demote[0])
		return SKIP("huge pages of this size cannot be demoted");
	for (i = 0; &sizes[i] < h; i++) {
		ret = demote_to(h, &sizes[i], true);
		if (!ret)
			ret = demote_to(h, &sizes[i], false);
		if (ret == KSFT_FAIL)
			return ret;
		done += !ret;
	}
	return done ? KSFT_PASS : KSFT_SKIP;
}

/* Gigantic pages come from alloc_contig_range() and are made compound there. */
static int case_gigantic(struct hsize *h)
{
	__u64 nr;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	/* The buddy allocator's pages can be overcommitted. */
	if (pool_write(h, "nr_overcommit_hugepages", 0))
		return SKIP("not gigantic");
	optimize(true);
	nr = pool_grow(h, 4);
	if (!nr)
		return SKIP("no memory, or no allocation at run time");
	ret = expect("gigantic", h, nr, nr);
	if (!ret)
		ret = use("gigantic", h, nr, 0);
	if (!ret)
		ret = expect("gigantic in use", h, nr, nr);
	unmap();
	pool_set(h, 0);
	return ret ?: expect("gigantic gone", h, 0, 0);
}

/* The switch decides about new pages only. */
static int case_switch(struct hsize *h)
{
	__u64 nr, half;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	optimize(true);
	half = pool_grow(h, room_for(h, SOME) > 1 ? room_for(h, SOME) / 2 : 1);
	if (!half)
		return SKIP(NO_PAGES);
	optimize(false);
	ret = expect("switched off", h, half, half);
	if (ret)
		return ret;
	nr = pool_set(h, 2 * half);
	ret = expect("pool of both kinds", h, nr, half);
	if (ret)
		return ret;
	ret = use("pool of both kinds", h, nr, 0);
	if (ret)
		return ret;
	unmap();
	pool_set(h, 0);
	return expect("pool gone", h, 0, 0);
}

#define NO_FAIL		"no fail_page_alloc in debugfs (CONFIG_FAULT_INJECTION)"

/* KASAN keeps what was freed for a while: then free memory tells nothing of leaks. */
static bool has_symbol(const char *name)
{
	char line[256], *end;
	bool found = false;
	FILE *f;

	f = fopen("/proc/kallsyms", "re");
	while (f && !found && fgets(line, sizeof(line), f)) {
		end = strrchr(line, ' ');
		if (end) {
			end[strcspn(end, "\n")] = '\0';
			found = !strcmp(end + 1, name);
		}
	}
	if (f)
		fclose(f);
	return found;
}

/* Pages that cannot be restored stay, optimized, until there is memory. */
static int case_shrink_enomem(struct hsize *h)
{
	__u64 nr, left, fails, space;
	__s64 before, lost, due;
	int ret, i;

	if (!h->saves)
		return SKIP(NO_SAVING);
	optimize(true);
	nr = pool_grow(h, SOME);
	if (!nr)
		return SKIP(NO_PAGES);
	if (!fail_setup())
		return SKIP(NO_FAIL);

	if (!pool_set_failing(h, 0, 0, &fails))
		return SKIP("failing the allocations failed: %s", strerror(errno));
	if (!fails)
		return FAIL("pool shrunk without any allocation");
	ret = expect("no page to be had", h, nr, nr);
	if (ret)
		return ret;
	if (pool(h, "surplus_hugepages") != nr)
		return FAIL("%llu surplus pages, not %llu", pool(h, "surplus_hugepages"), nr);
	ret = use("not restored", h, nr, 0);
	if (ret)
		return ret;
	ret = expect("not restored, in use", h, nr, nr);
	if (ret)
		return ret;
	/* They are surplus: memory can be had now, so they go with their user. */
	unmap();
	pool_set(h, 0);
	ret = expect("restored", h, 0, 0);
	if (ret)
		return ret;

	/* Some can be had.  How many huge pages these do for is left open. */
	for (space = 1; space <= nr * h->saves; space = space * 3 + 1) {
		nr = pool_set(h, nr);
		if (!nr)
			return SKIP(NO_PAGES);
		if (!pool_set_failing(h, 0, space, &fails))
			return SKIP("failing the allocations failed: %s", strerror(errno));
		left = pool(h, "nr_hugepages");
		/* Pages may be allocated in bulk, so that none fails. */
		if (left > nr || pool(h, "surplus_hugepages") != left || (!fails && left))
			return FAIL("%llu allocations: %llu of %llu huge pages left, %llu surplus",
				    space - 1, left, nr, pool(h, "surplus_hugepages"));
		ret = expect("few pages to be had", h, left, left);
		if (ret)
			return ret;
		/* The rest becomes ordinary again, and can be used. */
		ret = left ? use("few pages to be had", h, left < 2 ? left : 2, 0) : KSFT_PASS;
		if (ret)
			return ret;
		unmap();
	}
	pool_empty(h);
	ret = expect("restored", h, 0, 0);
	if (ret)
		return ret;

	/* What was allocated in vain, for the last huge page, is not lost. */
	nr = nr < 4 ? nr : 4;
	space = nr / 2 * h->saves + h->saves;
	due = 0;
	before = free_pages();
	for (i = 0; i < 40 && due < 512; i++) {
		pool_set(h, nr);
		if (!pool_set_failing(h, 0, space, &fails))
			return SKIP("failing the allocations failed: %s", strerror(errno));
		due += h->saves - 1;
		pool_empty(h);
	}
	lost = before - free_pages();
	if (due >= 200 && lost > due / 2 && !has_symbol("kasan_quarantine_put"))
		return FAIL("%lld pages lost in %d failures", lost, i);
	return expect("after many failures", h, 0, 0);
}

/* No page for a page table: the huge page is there, but not optimized. */
static int case_grow_enomem(struct hsize *h)
{
	__u64 unopt = 0, nr, fails, all, extra;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	if (!fail_setup())
		return SKIP(NO_FAIL);
	if (!ptdump)
		return SKIP("no ptdump to find page tables that are missing");
	ret = look(&view);
	if (ret)
		return ret;
	if (!view.blocks)
		return SKIP("the vmemmap has all of its page tables");
	optimize(true);
	/* Each time there is one page more to be had. */
	for (extra = 0; extra < 4; extra++) {
		nr = room_for(h, 8);
		if (!pool_set_failing(h, nr, 1 + extra, &fails))
			return SKIP("failing the allocations failed: %s", strerror(errno));
		nr = pool(h, "nr_hugepages");
		if (!nr)
			return SKIP(NO_PAGES);
		ret = look(&view);
		if (ret)
			return ret;
		unopt += nr - nr_opt(h, &all);
		if (all != nr)
			return FAIL("%llu huge pages in kpageflags, not %llu", all, nr);
		ret = use("not all optimized", h, nr, 0);
		if (ret)
			return ret;
		unmap();
		pool_empty(h);
		ret = expect("pool gone", h, 0, 0);
		if (ret)
			return ret;
		if (!fails)
			break;
	}
	if (!unopt)
		return SKIP("no page table was missing where huge pages are");
	ksft_print_msg("%llu huge pages of %lukB were left as they are\n", unopt, h->kb);
	/* Now that there is memory, all can be optimized. */
	fail_restore();
	nr = pool_grow(h, SOME);
	return expect("memory again", h, nr, nr);
}

/* Free huge pages go when their memory does. */
static int case_offline(struct hsize *h)
{
	struct sigaction sa = { .sa_handler = on_alarm }, old;
	__u64 nr, block, gone, rest;
	unsigned int tries = 0;
	char path[96], buf[32];
	bool wrote, timeout;
	size_t i;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	if (!cont_read_str(MEMORY "/block_size_bytes", buf, sizeof(buf)))
		return SKIP("no memory hotplug");
	block = strtoull(buf, NULL, 16) / page_size;
	if (h->pages > block)
		return SKIP("larger than a memory block");
	optimize(true);
	nr = pool_grow(h, many);
	if (!nr)
		return SKIP(NO_PAGES);
	ret = expect("pool", h, nr, nr);
	if (ret)
		return ret;

	/* From the end: the kernel is at the start. */
	for (i = view.nr; i-- > 0 && tries < 8;) {
		__u64 id = view.f[i].pfn / block;

		if (i + 1 < view.nr && view.f[i + 1].pfn / block == id)
			continue;
		tries++;
		snprintf(path, sizeof(path), MEMORY "/memory%llu/state", id);
		/* Pages that nobody lets go would keep it trying for ever. */
		sigaction(SIGALRM, &sa, &old);
		alarm(10);
		wrote = cont_write_str(path, "offline");
		timeout = !alarm(0);
		sigaction(SIGALRM, &old, NULL);
		if (!wrote) {
			if (timeout)
				return SKIP("memory%llu does not get offline", id);
			/* Those that it held may be gone nevertheless. */
			rest = pool(h, "nr_hugepages");
			ret = expect("could not go offline", h, rest, rest);
			if (ret)
				return ret;
			nr = rest;
			if (i > view.nr)
				i = view.nr;
			continue;
		}
		strcpy(offlined, path);
		for (gone = 1; gone <= i && view.f[i - gone].pfn / block == id; gone++)
			;
		rest = pool(h, "nr_hugepages");
		ret = expect("memory offline", h, rest, rest);
		if (ret)
			return ret;
		for (i = 0; i < view.nr; i++)
			if (view.f[i].pfn / block == id)
				return FAIL("huge page at pfn %#llx is offline",
					    view.f[i].pfn);
		if (rest + gone != nr)
			return FAIL("memory%llu held %llu of %llu huge pages, %llu are left",
				    id, gone, nr, rest);
		bring_online();
		if (!cont_read_str(path, buf, sizeof(buf)) || strcmp(buf, "online"))
			return FAIL("memory%llu does not get online", id);
		ret = expect("memory online", h, rest, rest);
		if (ret)
			return ret;
		nr = pool_grow(h, nr);
		ret = expect("pool grown again", h, nr, nr);
		if (ret)
			return ret;
		ret = use("pool grown again", h, nr < SOME ? nr : SOME, 0);
		if (ret)
			return ret;
		unmap();
		pool_set(h, 0);
		return expect("pool gone", h, 0, 0);
	}
	return SKIP("no memory block with huge pages can go offline");
}

/* Take one huge page for a file, and map what a dma-buf has of it: its end. */
static int use_udmabuf(const struct hsize *h, int dev, int fd)
{
	struct udmabuf_create create = {
		.memfd = fd,
		.flags = UDMABUF_FLAGS_CLOEXEC,
		.size = h->size < UDMABUF_MAX ? h->size : UDMABUF_MAX,
	};
	size_t first = (h->size - create.size) / page_size;
	size_t nr = create.size / page_size, i;
	char *file, *p;
	int buf;

	create.offset = first * page_size;
	if (ftruncate(fd, h->size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK))
		return FAIL("file of a huge page: %s", strerror(errno));
	file = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (file == MAP_FAILED)
		return FAIL("mmap of a huge page: %s", strerror(errno));
	mapped = file;
	mapped_len = h->size;
	file += create.offset;
	for (i = 0; i < nr; i++)
		cont_page_fill(file + i * page_size, seed, first + i, 0);

	buf = ioctl(dev, UDMABUF_CREATE, &create);
	/* Some kernels take none. */
	if (buf < 0 && errno == EBADFD)
		return SKIP("no dma-buf of huge pages: %s", strerror(errno));
	if (buf < 0)
		return FAIL("UDMABUF_CREATE: %s", strerror(errno));
	p = mmap(NULL, create.size, PROT_READ | PROT_WRITE, MAP_SHARED, buf, 0);
	close(buf);
	if (p == MAP_FAILED)
		return FAIL("mmap of a dma-buf: %s", strerror(errno));
	/* Half of the first faults read. */
	for (i = 0; i < nr; i++) {
		if (i % 2 && !cont_page_ok(p + i * page_size, seed, first + i, 0))
			break;
		cont_page_fill(p + i * page_size, seed, first + i, 1);
	}
	munmap(p, create.size);
	if (i < nr)
		return FAIL("page %zu of the dma-buf is not that of the file", i);
	for (i = 0; i < nr; i++)
		if (!cont_page_ok(file + i * page_size, seed, first + i, 1))
			return FAIL("page %zu: what was written to the dma-buf is not there",
				    i);
	return expect("dma-buf", h, 1, 1);
}

/* Who maps parts of a huge page one by one has no struct page to count that in. */
static int case_udmabuf(struct hsize *h)
{
	unsigned int order = __builtin_ctzll(h->size);
	int dev, fd, ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	optimize(true);
	if (!pool_grow(h, 1))
		return SKIP(NO_PAGES);
	dev = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	if (dev < 0)
		return SKIP("/dev/udmabuf: %s", strerror(errno));
	fd = memfd_create("hvo", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB |
				 order << MAP_HUGE_SHIFT);
	ret = fd < 0 ? SKIP("memfd_create: %s", strerror(errno)) : use_udmabuf(h, dev, fd);
	unmap();
	close(dev);
	if (fd >= 0)
		close(fd);
	return ret ?: expect("dma-buf gone", h, 1, 1);
}

static bool probe(const char *what, __u64 pfn, char *buf, size_t size)
{
	char cmd[48];

	snprintf(cmd, sizeof(cmd), "%s %llu", what, pfn);
	return cont_write_str(PROBE, pfn ? cmd : what) && cont_read_str(PROBE, buf, size);
}

/* Faults that are nobody's to repair are reported as ever. */
static int case_probe(struct hsize *h)
{
	char buf[32] = "no answer";
	__u64 pfn, at;
	int ret;

	if (!h->saves)
		return SKIP(NO_SAVING);
	if (access(PROBE, R_OK | W_OK))
		return SKIP("no " PROBE);
	optimize(true);
	if (!pool_grow(h, 1))
		return SKIP(NO_PAGES);
	ret = use("probe", h, 1, 0);
	if (ret)
		return ret;
	pfn = huge_pfn(h, mapped);
	/* Within the head page tails are as writable as the head. */
	if (!probe("write", pfn + 10, buf, sizeof(buf)) || strcmp(buf, "0"))
		return FAIL("write to tail 10: %s", buf);
	/* First and last of those that are not in the head page. */
	for (at = page_size / STRUCT_PAGE; at < h->pages;
	     at += h->pages - 1 - page_size / STRUCT_PAGE) {
		if (!probe("read", pfn + at, buf, sizeof(buf)) || strcmp(buf, "0"))
			return FAIL("read of tail %llu: %s", at, buf);
		if (!probe("write", pfn + at, buf, sizeof(buf)) || strcmp(buf, "-14"))
			return FAIL("write to tail %llu: %s", at, buf);
	}
	if (!probe("wild", 0, buf, sizeof(buf)) || strcmp(buf, "-14"))
		return FAIL("wild read: %s", buf);
	if (!is_huge(h, pfn))
		return FAIL("the huge page is none any more");
	return expect("probed", h, 1, 1);
}

/* ---- cases for all sizes at once -------------------------------------- */

/* What the boot made, as the tests find it. */
static int case_boot(void)
{
	bool asked = false, any = false;
	char line[4096];
	unsigned int i;
	int ret;

	if (cont_read_str("/proc/cmdline", line, sizeof(line)))
		asked = strstr(line, "hugetlb_free_vmemmap=on") ||
			strstr(line, "hugetlb_free_vmemmap=1");
	if (!asked)
		return SKIP("no hugetlb_free_vmemmap=on on the command line");
	if (strtoull(was_sysctl, NULL, 10) != 1)
		return FAIL("hugetlb_free_vmemmap=on, but the sysctl is off");
	if (!strstr(line, "hugepages="))
		return SKIP("no hugepages= on the command line");
	for (i = 0; i < nr_sizes; i++) {
		__u64 nr = strtoull(sizes[i].was_nr, NULL, 10);

		if (!nr || !sizes[i].saves)
			continue;
		any = true;
		ret = expect("boot", &sizes[i], nr, nr);
		if (ret)
			return ret;
	}
	return any ? KSFT_PASS : SKIP("no huge pages were made");
}

static const struct {
	const char *name;
	int (*fn)(struct hsize *h);
} cases[] = {
	{ "off", case_off },
	{ "savings", case_savings },
	{ "many", case_many },
	{ "flushes", case_flushes },
	{ "use", case_use },
	{ "surplus", case_surplus },
	{ "demote", case_demote },
	{ "gigantic", case_gigantic },
	{ "switch", case_switch },
	{ "shrink_enomem", case_shrink_enomem },
	{ "offline", case_offline },
	{ "udmabuf", case_udmabuf },
	{ "probe", case_probe },
};

static void result(int ret, const char *name)
{
	switch (ret) {
	case KSFT_PASS:
		ksft_test_result_pass("%s\n", name);
		break;
	case KSFT_SKIP:
		ksft_test_result_skip("%s: %s\n", name, why);
		break;
	default:
		ksft_print_msg("%s (seed %llu)\n", why, seed);
		ksft_test_result_fail("%s\n", name);
	}
	fflush(stdout);
}

/* Kernel's complaints: bad page, oops, warning. */
static __u64 taint(void)
{
	char buf[24];

	if (!cont_read_str("/proc/sys/kernel/tainted", buf, sizeof(buf)))
		return 0;
	return strtoull(buf, NULL, 10) & (CONT_BIT(5) | CONT_BIT(7) | CONT_BIT(9));
}

static void run(const char *name, int (*fn)(struct hsize *h), struct hsize *h)
{
	char full[64];
	unsigned int i;
	int ret, left;

	snprintf(full, sizeof(full), "%s %lukB", name, h->kb);
	why[0] = '\0';
	ret = fn(h);
	if (ret != KSFT_FAIL) {
		char *said = strdup(why);

		reset();
		left = look(&view);
		if (!left && view.nr)
			left = FAIL("at the end: huge page at pfn %#llx", view.f[0].pfn);
		for (i = 0; i < nr_sizes && !left; i++)
			if (pool(&sizes[i], "nr_hugepages"))
				left = FAIL("at the end: huge pages of %lukB",
					    sizes[i].kb);
		if (!left && taint() != tainted)
			left = FAIL("the kernel complained: see its log");
		if (left)
			ret = left;
		else if (said)
			strcpy(why, said);
		free(said);
	} else {
		reset();
	}
	tainted = taint();
	result(ret, full);
}

static int by_size(const void *a, const void *b)
{
	const struct hsize *x = a, *y = b;

	return x->size < y->size ? -1 : x->size > y->size;
}

static void find_sizes(void)
{
	struct dirent *d;
	struct hsize *h;
	DIR *dir;

	dir = opendir(POOLS);
	if (!dir)
		ksft_exit_skip("kernel has no huge pages\n");
	while ((d = readdir(dir)) && nr_sizes < MAX_SIZES) {
		h = &sizes[nr_sizes];
		if (sscanf(d->d_name, "hugepages-%lukB", &h->kb) != 1)
			continue;
		h->size = h->kb << 10;
		h->pages = h->size / page_size;
		h->saves = h->pages * STRUCT_PAGE / page_size;
		h->saves -= !!h->saves;
		if (!cont_read_str(knob(h, "demote_size"), h->was_demote,
				   sizeof(h->was_demote)))
			h->was_demote[0] = '\0';
		if (cont_read_str(knob(h, "nr_hugepages"), h->was_nr,
				  sizeof(h->was_nr)) &&
		    cont_read_str(knob(h, "nr_overcommit_hugepages"), h->was_overcommit,
				  sizeof(h->was_overcommit)))
			nr_sizes++;
	}
	closedir(dir);
	qsort(sizes, nr_sizes, sizeof(*sizes), by_size);
}

static void find_oracles(void)
{
	static const char * const paths[] = {
		"/sys/kernel/debug/kernel_page_tables",
		"/sys/kernel/debug/page_tables/kernel",
	};
	unsigned int i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(paths); i++)
		if (!access(paths[i], R_OK))
			ptdump = paths[i];
	fd = open("/proc/kcore", O_RDONLY | O_CLOEXEC);
	has_kcore = fd >= 0 && kcore_headers(fd);
	if (fd >= 0)
		close(fd);
	ksft_print_msg("oracles: %s, %s\n", ptdump ?: "no ptdump (CONFIG_PTDUMP_DEBUGFS)",
		       has_kcore ? "kcore" : "no kcore");
}

static void usage(const char *name, FILE *f)
{
	fprintf(f, "Usage: %s [-n pages] [-s seed]\n"
		"  -n  huge pages of the cases that take many, 16 to 65536 (%lu)\n"
		"  -s  seed of the patterns (CONTPTE_SEED, or the clock)\n", name, many);
}

static void options(int argc, char **argv)
{
	char *end = "";
	int opt;

	while ((opt = getopt(argc, argv, "hn:s:")) != -1) {
		switch (opt) {
		case 'n':
			many = strtoul(optarg, &end, 0);
			break;
		case 's':
			strtoull(optarg, &end, 0);
			setenv("CONTPTE_SEED", optarg, 1);
			break;
		case 'h':
			usage(argv[0], stdout);
			exit(KSFT_PASS);
		default:
			end = "?";
		}
		if (*end)
			break;
	}
	if (*end || optind < argc || many < 16 || many > 65536) {
		usage(argv[0], stderr);
		exit(KSFT_FAIL);
	}
}

int main(int argc, char **argv)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP, SIGSEGV, SIGBUS };
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	struct hsize *first = NULL;
	unsigned int i, j;
	char buf[24];

	options(argc, argv);
	ksft_print_header();
	page_size = cont_page_size();
	main_pid = getpid();
	why = mmap(NULL, WHY_LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (why == MAP_FAILED)
		ksft_exit_fail_msg("mmap: %s\n", strerror(errno));
	if (geteuid() || !cont_sees_pfns())
		ksft_exit_skip("needs root\n");
	find_sizes();
	if (!cont_read_str(SYSCTL, was_sysctl, sizeof(was_sysctl)))
		ksft_exit_skip("kernel has no HVO (no " SYSCTL ")\n");
	find_oracles();
	if (!ptdump && !has_kcore)
		ksft_exit_skip("neither ptdump nor kcore show the vmemmap\n");
	seed = cont_seed();
	cont_no_numa_balancing();
	tainted = taint();
	ksft_set_plan(1 + nr_sizes * (1 + ARRAY_SIZE(cases)));

	result(case_boot(), "boot");

	for (i = 0; i < ARRAY_SIZE(signals); i++)
		sigaction(signals[i], &sa, NULL);
	changed = true;
	atexit(restore);
	reset();
	for (i = 0; i < nr_sizes; i++)
		if (pool(&sizes[i], "nr_hugepages"))
			ksft_exit_fail_msg("huge pages of %lukB are in use\n", sizes[i].kb);
	if (look(&view)) {
		ksft_print_msg("%s\n", why);
		base_ro = view.ro_pages;
	}

	/*
	 * First what needs page tables that are still to be made, since they stay;
	 * many of the smallest pages take a few of them.  Then the largest pages
	 * first, before memory is fragmented.
	 */
	for (i = 0; i < nr_sizes; i++) {
		run("grow_enomem", case_grow_enomem, &sizes[i]);
		if (!first && sizes[i].saves) {
			first = &sizes[i];
			run("flushes", case_flushes, first);
		}
	}
	for (i = nr_sizes; i-- > 0;)
		for (j = 0; j < ARRAY_SIZE(cases); j++)
			if (cases[j].fn != case_flushes || &sizes[i] != first)
				run(cases[j].name, cases[j].fn, &sizes[i]);

	restore();
	for (i = 0; i < nr_sizes; i++)
		if (!cont_read_str(knob(&sizes[i], "nr_hugepages"), buf, sizeof(buf)) ||
		    strcmp(buf, sizes[i].was_nr))
			ksft_print_msg("%lukB: %s huge pages, %s before\n", sizes[i].kb, buf,
				       sizes[i].was_nr);
	if (ksft_get_fail_cnt())
		ksft_exit_fail();
	ksft_exit_pass();
}
